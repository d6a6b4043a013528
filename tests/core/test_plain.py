"""What is special to plain attention: JAX itself differentiates it, and others are judged by it.

The contract that it shares with every backend is tested with every backend.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heedful import oracle
from heedful.call import Call
from heedful.plain import plain
from heedful.rules import scores as softcap

NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def nothing_promoted_silently():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def draw_arrays(q_length=4, kv_length=6, head_dim=3, dtype="float32", seed=0):
    """q, k, v of two batch rows, four heads on two, and the cotangents of out and lse."""
    random = np.random.default_rng(seed)
    accumulator = "float64" if dtype == "float64" else "float32"
    q, dout = (random.standard_normal((2, 4, q_length, head_dim)).astype(dtype) for _ in range(2))
    k, v = (random.standard_normal((2, 2, kv_length, head_dim)).astype(dtype) for _ in range(2))
    return q, k, v, dout, random.standard_normal((2, 4, q_length)).astype(accumulator)


def attention(q, k, v, **options):
    call = Call.of(q, k, v, **options)
    return plain(call.problem, call.operands)


@partial(jax.jit, static_argnames=("causal", "softcap", "window"))
def run(q, k, v, dout, dlse, **options):
    """out, lse, dq, dk, dv."""
    results, pull_back = jax.vjp(partial(attention, **options), q, k, v)
    return *results, *pull_back((dout, dlse))


def judge(q, k, v, dout, dlse, **options):
    call = Call.of(q, k, v, **options)
    problem, operands = call.problem, call.operands
    results = oracle.forward(problem, operands)
    return *results, *oracle.gradients(problem, operands, dout, dlse)[:3]


@pytest.mark.parametrize(
    ("dtype", "rounding"), [("float32", 8e-7), ("float16", 2.3e-4), ("bfloat16", 1.8e-3)]
)
def test_rounds_on_the_way_in_and_out_alone(dtype, rounding):
    """The error is hardly more than that of rounding the exact result once."""
    arrays = draw_arrays(96, 200, 32, dtype)
    found = run(*arrays, causal=True, softcap=5.0)
    for name, x, y in zip(NAMES, found, judge(*arrays, causal=True, softcap=5.0), strict=True):
        error = np.asarray(x, np.float64) - y
        assert np.sqrt((error**2).mean() / (y**2).mean()) < rounding, name


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_nobody_sees_plays_no_part_in_any_derivative(poison, softcap):
    clean = draw_arrays()
    poisoned = [x.copy() for x in clean]
    for x, first_hidden in zip(poisoned, (3, 4, 4, 3, 3), strict=True):
        x[:, :, first_hidden:] = poison
    options = {
        "q_lengths": np.array([3, 2], np.int32),
        "kv_lengths": np.array([4, 3], np.int32),
        "softcap": softcap,
    }
    expected, found = run(*clean, **options), run(*poisoned, **options)
    for name, x, y in zip(NAMES, found, expected, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)

    @jax.jit
    def second_order(q, k, v, dout, dlse):
        def gradients(*qkv):
            return run(*qkv, dout, dlse, **options)[2:]

        return jax.jvp(gradients, (q, k, v), tuple(map(jnp.ones_like, (q, k, v))))[1]

    for name, x, y in zip(NAMES[2:], second_order(*poisoned), second_order(*clean), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def test_a_key_that_is_masked_for_some_poisons_no_empty_row():
    q, k, v, dout, dlse = draw_arrays()
    k[:, :, 0], v[:, :, 0] = np.nan, np.nan
    q_offset = np.array([-2, -2], np.int32)
    out, lse, dq, _, _ = run(q, k, v, dout, dlse, causal=True, q_offset=q_offset)
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -np.inf).all()
    assert (dq[:, :, :2] == 0).all()


def test_a_bias_of_minus_infinity_gives_no_weight():
    arrays = draw_arrays()
    bias = np.zeros((4, 6), np.float32)
    bias[:, 3:] = -np.inf
    bias[0] = -np.inf
    found, expected = run(*arrays, bias=bias), run(*arrays, mask=bias == 0)
    for name, x, y in zip(NAMES, found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7, err_msg=name)


def test_second_order_by_every_mode():
    """The gradient's derivative along a direction, against differences of the oracle's gradient."""
    options = {"causal": True, "q_offset": -1, "softcap": 2.0}
    q, k, v, dout, dlse = draw_arrays(dtype="float64")
    point, cotangents = (q, k, v), (dout, dlse)
    way = draw_arrays(dtype="float64", seed=1)[:3]

    @jax.jit
    def along(point, way):
        def gradients(*point):
            return jax.vjp(partial(attention, **options), *point)[1](cotangents)

        def slope(*point):
            out, lse = jax.jvp(partial(attention, **options), point, way)[1]
            return (out * dout).sum() + jnp.where(jnp.isfinite(lse), lse * dlse, 0).sum()

        def product(*point):
            return sum((x * w).sum() for x, w in zip(gradients(*point), way, strict=True))

        everything = (0, 1, 2)
        forward_over_reverse = jax.jvp(gradients, point, way)[1]
        reverse_over_forward = jax.grad(slope, everything)(*point)
        reverse_over_reverse = jax.grad(product, everything)(*point)
        return forward_over_reverse, reverse_over_forward, reverse_over_reverse

    def oracle_gradients(step):
        moved = (x + step * w for x, w in zip(point, way, strict=True))
        return judge(*moved, *cotangents, **options)[2:]

    step = 1e-4
    ahead, behind = oracle_gradients(step), oracle_gradients(-step)
    expected = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
    with jax.enable_x64(True):
        for found in along(point, way):
            for name, x, y in zip(NAMES[2:], found, expected, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7, err_msg=name)


def test_integers_of_any_width():
    """300 − (a length in int8) would not fit into int8."""
    q, k, v, _, _ = draw_arrays(5, 300)
    lengths = np.array([5, 4])
    causal = jax.jit(partial(attention, causal=True))
    expected = causal(q, k, v, q_lengths=lengths.astype(np.int32))
    for dtype in (np.int8, np.uint32):
        found = causal(q, k, v, q_lengths=lengths.astype(dtype))
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("empty", ["B", "Sq", "Sk"])
def test_nothing_to_do(empty):
    q, k, v, dout, dlse = draw_arrays()
    if empty == "B":
        q, k, v, dout, dlse = (x[:0] for x in (q, k, v, dout, dlse))
    elif empty == "Sq":
        q, dout, dlse = (x[:, :, :0] for x in (q, dout, dlse))
    else:
        k, v = k[:, :, :0], v[:, :, :0]
    out, lse, *gradients = run(q, k, v, dout, dlse, causal=True)
    assert out.shape == dout.shape and (out == 0).all()
    assert lse.shape == dlse.shape and (lse == -np.inf).all()
    for x, y in zip(gradients, (q, k, v), strict=True):
        assert x.shape == y.shape and (x == 0).all()


def test_softcap_keeps_its_digits_where_it_is_nearly_reached():
    x = jnp.linspace(-9, 9, 301, dtype=jnp.float32)
    want = 1 / np.cosh(np.asarray(x, np.float64)) ** 2
    for found in (softcap.slope(x), jax.vmap(jax.grad(softcap.tanh))(x)):
        np.testing.assert_allclose(found, want, rtol=1e-6)
    with jax.enable_x64(True):
        x = jnp.asarray([-2.0, -0.3, 0.0, 0.7, 3.0])
        for order in (1, 2, 3, 4):
            ours, theirs = softcap.tanh, jnp.tanh
            for _ in range(order):
                ours, theirs = jax.grad(ours), jax.grad(theirs)
            np.testing.assert_allclose(
                jax.vmap(ours)(x), jax.vmap(theirs)(x), rtol=1e-12, atol=1e-12
            )
