"""What compiles anew, and what does not: counted by JAX's own events, never timed."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heedful
from compilations import counted

rng = np.random.default_rng(0)
Q, KV = (rng.standard_normal(shape, np.float32) for shape in ((2, 2, 3, 8), (2, 1, 11, 8)))
JAX_BACKENDS = ["jax:flash", "jax:plain", "jax:nn-xla"]


def out(convert, **options):
    return heedful.attention(convert(Q), convert(KV), convert(KV), **options)


def gradient(convert, **options):
    q, kv = convert(Q), convert(KV)
    return jax.grad(lambda q: heedful.attention(q, kv, kv, **options).sum())(q)


# Each first value, and then new ones: the last offset is the default one, which the shapes would give.
NEW_VALUES = {
    "q_offset, a number": [{"causal": True, "q_offset": n} for n in (3, 5, -2, np.int64(0), 8)],
    "q_offset, an array": [{"window": (2, 2), "q_offset": np.array([n, 1])} for n in (3, 5, 8)],
    "sinks": [{"sinks": np.float32([n, 1 / n])} for n in (1, 2, 5)],
    "alibi slopes": [{"alibi_slopes": np.float32([n, 1 / n])} for n in (1, 2, 5)],
    "segment ids": [
        {"q_segment_ids": np.full((2, 3), n), "kv_segment_ids": np.arange(22).reshape(2, 11) // n}
        for n in (1, 2, 5)
    ],
    "dropout seed, a number": [{"dropout_rate": 0.5, "dropout_seed": n} for n in (1, 2, 5)],
    "dropout seed, an array": [{"dropout_rate": 0.5, "dropout_seed": np.array(n)} for n in (1, 2)],
    "lengths": [{"causal": True, "kv_lengths": np.array([n, 11])} for n in (3, 0, 11)],
}


@pytest.mark.parametrize(
    ("backend", "values"),
    [
        (backend, values)
        for backend, values in product(JAX_BACKENDS, NEW_VALUES)
        if backend != "jax:nn-xla" or not values.startswith(("sinks", "alibi", "dropout"))
    ],
)
@pytest.mark.parametrize("call", [out, gradient])
def test_new_values_neither_trace_nor_compile(backend, call, values):
    first, *others = NEW_VALUES[values]
    for _ in range(2):  # the second call of a gradient still finds something to compile in jax.grad
        call(jnp.asarray, backend=backend, **first)
    for options in others:
        with counted() as counts:
            call(jnp.asarray, backend=backend, **options)
        assert not counts["traced"] and not counts["compiled"]


@pytest.mark.parametrize("backend", ["jax:flash", "numpy:oracle"])
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_nor_do_they_across_a_bridge(convert, backend):
    first, *others = NEW_VALUES["q_offset, a number"]
    out(convert, backend=backend, **first)
    with counted() as counts:
        for options in others:
            out(convert, backend=backend, **options)
    assert not counts["traced"] and not counts["compiled"]


@pytest.mark.parametrize("backend", JAX_BACKENDS)
def test_calls_that_are_the_same_attention_compile_once(backend):
    """In whatever layout and rank they come: NumPy's, whose views compile nothing of their own."""
    q, kv = Q[:1], KV[:1]
    heedful.attention(q, kv, kv, causal=True, backend=backend)
    with counted() as counts:
        turned = (x.swapaxes(1, 2) for x in (q, kv, kv))
        heedful.attention(*turned, causal=True, backend=backend, layout="bshd")
        heedful.attention(q[0], kv[0], kv[0], causal=True, backend=backend)
        heedful.attention(*(x[None] for x in (q, kv, kv)), causal=True, backend=backend)
    assert not counts["traced"] and not counts["compiled"]


@pytest.mark.parametrize("new", [{"scale": 0.25}, {"softcap": 3.0}, {"window": (4, 0)}])
def test_options_that_are_constants_of_a_model_compile_once_each(new):
    asked = {"scale": 0.5, "softcap": 2.0, "window": (3, 0), "backend": "jax:flash"}
    out(jnp.asarray, **asked)
    with counted() as counts:
        out(jnp.asarray, **asked | new)
    assert counts["compiled"] == 1
    with counted() as counts:
        out(jnp.asarray, **asked | new)
    assert not counts["traced"] and not counts["compiled"]


@pytest.mark.parametrize("backend", [*JAX_BACKENDS, "numpy:oracle"])
def test_an_offset_is_right_however_it_comes(backend):
    """One number, the same as an array, and as a number within somebody's jit."""
    given = {"causal": True, "backend": backend}
    expected = out(jnp.asarray, **given, q_offset=np.array([4, 4]))
    as_number = out(jnp.asarray, **given, q_offset=4)
    in_jit = jax.jit(lambda *qkv: heedful.attention(*qkv, **given, q_offset=4))(Q, KV, KV)
    np.testing.assert_allclose(as_number, expected, rtol=1e-6)
    np.testing.assert_allclose(in_jit, expected, rtol=1e-6)
