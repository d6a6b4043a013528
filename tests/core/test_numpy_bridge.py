"""NumPy arrays on JAX backends, and JAX arrays on NumPy backends under JAX's transformations.

What comes back is compared with the oracle called directly: here only the crossing is on trial.
"""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heedful import dispatch, oracle
from heedful.backends.jax_plain import backend as jax_plain
from heedful.backends.numpy_oracle import backend as numpy_oracle
from heedful.bridges.numpy import bridge
from heedful.call import Call
from heedful.oracle import FEATURES

ASKED = {"causal": True, "return_lse": True}


def draw_arrays(dtype="float32"):
    random = np.random.default_rng(0)
    shapes = ((2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2))
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def call(backend, q, k, v, **options):
    call = Call.of(q, k, v, **options)
    return bridge.run(backend, call.problem, call.operands)


def judge(q, k, v, **options):
    call = Call.of(q, k, v, **options)
    return oracle.forward(call.problem, call.operands)


def value(q, k, v, **options):
    """A number that depends on out and lse alike, and on each batch row by itself."""
    out, lse = call(numpy_oracle, q, k, v, **ASKED, **options)
    return (out.astype(lse.dtype) ** 2).sum() + jnp.sin(lse).sum()


def judge_value(q, k, v, **options):
    """The value and the gradients of q, k, v and bias."""
    call = Call.of(q, k, v, **ASKED, **options)
    problem, operands = call.problem, call.operands
    out, lse = oracle.forward(problem, operands)
    gradients = [*oracle.gradients(problem, operands, 2 * out, np.cos(lse)).differentiable.values()]
    return (out**2).sum() + np.sin(lse).sum(), gradients


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=rtol, atol=atol)


# NumPy arrays on a JAX backend


def test_numpy_gets_numpy_that_it_may_write_to():
    arrays = draw_arrays()
    before = [x.copy() for x in arrays]
    out, lse = call(jax_plain, *arrays, **ASKED)
    assert type(out) is type(lse) is np.ndarray
    assert out.dtype == lse.dtype == np.float32
    assert_close((out, lse), judge(*arrays, **ASKED))
    out[...], lse[...] = 7, 7
    for x, y in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_every_operand_crosses():
    arrays = draw_arrays("bfloat16")
    options = {
        "mask": np.random.default_rng(1).random((2, 6)) < 0.8,
        "bias": np.random.default_rng(2).standard_normal((4, 5, 6)).astype(np.float32),
        "q_lengths": np.array([5, 2]),
        "kv_lengths": np.array([3, 6], np.uint8),
        "window": (2, 2),
        "q_offset": np.array([1, 2], np.int64),
        "return_lse": True,
    }
    out, lse = call(jax_plain, *arrays, **options)
    assert out.dtype == arrays[0].dtype
    expected = judge(*arrays, **options)
    assert_close([out], expected[:1], rtol=4e-3)
    assert_close([lse], expected[1:])


def test_numpy_inside_a_jit_is_a_constant():
    arrays = draw_arrays()
    out, _ = call(jax_plain, *arrays)
    inside = jax.jit(lambda x: x + call(jax_plain, *arrays)[0])(np.zeros_like(out))
    np.testing.assert_array_equal(inside, out)


def test_an_lse_that_was_not_computed_stays_none():
    class OutAlone:
        name = "jax:out-alone"

        def run(self, problem, operands):
            assert all(isinstance(x, jax.Array) for x in operands[:3])
            return jax_plain.run(problem, operands)[0], None

    out, lse = call(OutAlone(), *draw_arrays())
    assert type(out) is np.ndarray
    assert lse is None


def test_numpy_float64_under_x64():
    arrays = draw_arrays("float64")
    with jax.enable_x64(True):
        found = call(jax_plain, *arrays, **ASKED)
    assert found[0].dtype == found[1].dtype == np.float64
    assert_close(found, judge(*arrays, **ASKED), rtol=1e-13)


# JAX arrays on a NumPy backend


def by_row(function):
    """A function of one batch row, from one of a batch."""
    return lambda *row: function(*(x[None] for x in row))


EVERY = (0, 1, 2)
VALUES = {
    "eager": value,
    "jit": jax.jit(value),
    "vmap": lambda *arrays: jax.vmap(by_row(value))(*arrays).sum(),
}
GRADIENTS = {
    "grad": jax.grad(value, EVERY),
    "jit of grad": jax.jit(jax.grad(value, EVERY)),
    "jit of grad of checkpoint": jax.jit(jax.grad(jax.checkpoint(value), EVERY)),
    "jit of vmap of grad": jax.jit(jax.vmap(jax.grad(by_row(value), EVERY))),
}


@pytest.mark.parametrize("transformed", VALUES.values(), ids=VALUES)
def test_values(transformed):
    arrays = draw_arrays()
    assert_close([transformed(*map(jnp.asarray, arrays))], [judge_value(*arrays)[0]])


@pytest.mark.parametrize("transformed", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients(transformed):
    arrays = draw_arrays()
    found = transformed(*map(jnp.asarray, arrays))
    assert [x.dtype for x in found] == ["float32"] * 3
    assert_close(found, judge_value(*arrays)[1][:3])


def test_one_key_for_every_row_of_a_vmap():
    q, k, v = draw_arrays()
    k[1] = k[0]
    found = jax.vmap(by_row(value), in_axes=(0, None, 0))(*map(jnp.asarray, (q, k[0], v)))
    assert_close([found.sum()], [judge_value(q, k, v)[0]])


def test_shapes_without_computing():
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw_arrays("bfloat16")]
    out, lse = jax.eval_shape(lambda *arrays: call(numpy_oracle, *arrays, **ASKED), *arrays)
    assert (out.shape, out.dtype) == ((2, 4, 5, 2), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), jnp.float32)
    out, lse = jax.eval_shape(lambda *arrays: call(numpy_oracle, *arrays), *arrays)
    assert lse is None


@pytest.mark.parametrize("constants", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_bias_is_differentiated_and_the_rest_left_alone(constants):
    arrays = draw_arrays("bfloat16")
    bias = np.random.default_rng(1).standard_normal((4, 1, 6)).astype(np.float32)
    options = {
        "mask": np.random.default_rng(2).random((5, 6)) < 0.8,
        "kv_lengths": np.array([5, 6], np.int32),
        "q_offset": np.array([3, 4], np.int32),
    }

    def of_bias(q, k, v, bias):
        return value(q, k, v, bias=bias, **{n: constants(x) for n, x in options.items()})

    found = jax.grad(of_bias, (*EVERY, 3))(*map(jnp.asarray, (*arrays, bias)))
    *expected, dbias = judge_value(*arrays, bias=bias, **options)[1]
    assert [x.dtype for x in found] == ["bfloat16"] * 3 + ["float32"]
    assert_close(found, (*expected, dbias[0]), rtol=0.02, atol=0.01)


def test_out_alone_has_gradients_too():
    arrays = draw_arrays()
    found = jax.grad(lambda *arrays: call(numpy_oracle, *arrays)[0].sum(), EVERY)(
        *map(jnp.asarray, arrays)
    )
    problem = Call.of(*arrays).problem
    ones, zeros = np.ones((2, 4, 5, 2)), np.zeros((2, 4, 5))
    expected = oracle.gradients(problem, Call.of(*arrays).operands, ones, zeros)
    assert_close(found, expected[:3])


def test_jax_float64_under_x64():
    arrays = draw_arrays("float64")
    with jax.enable_x64(True):
        found = jax.jit(jax.grad(value, EVERY))(*map(jnp.asarray, arrays))
    assert found[0].dtype == np.float64
    assert_close(found, judge_value(*arrays)[1][:3], rtol=1e-13, atol=1e-15)


class ForwardAlone:
    """A NumPy backend without gradients, which does with its results what it is told."""

    name = "numpy:forward-alone"

    def __init__(self, change=lambda out, lse: (out, lse)):
        self.change = change

    def run(self, problem, operands):
        assert all(type(x) is np.ndarray for x in operands if x is not None)
        return self.change(*numpy_oracle.run(problem, operands))


def test_a_backend_without_gradients_runs_forward():
    arrays = draw_arrays()
    q, k, v = map(jnp.asarray, arrays)
    assert_close(call(ForwardAlone(), q, k, v, **ASKED), judge(*arrays, **ASKED))
    with pytest.raises(NotImplementedError, match="numpy:forward-alone cannot be differentiated"):
        jax.grad(lambda q: call(ForwardAlone(), q, k, v)[0].sum())(q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda out, lse: (out.astype(np.float64), lse),
            r"wrong out: expected float32 \(2, 4, 5, 2\).* Got float64 \(2, 4, 5, 2\)",
        ),
        (
            lambda out, lse: (out[:1], lse),
            r"wrong out: expected float32 \(2, 4, 5, 2\).* Got float32 \(1, 4, 5, 2\)",
        ),
        (lambda out, _: (out, None), "returned no lse"),
    ],
    ids=["dtype", "shape", "no lse"],
)
def test_a_backend_that_breaks_its_promise(change, message):
    arrays = [jnp.asarray(x) for x in draw_arrays()]
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(ForwardAlone(change), *arrays, return_lse=True))


def run(backend, q, k, v, **options):
    call = Call.of(q, k, v, **options)
    return dispatch.run(backend, call.problem, call.operands)


class Writer:
    """Writes into what it is handed."""

    name = "numpy:writer"

    takes = FEATURES

    def __init__(self, field):
        self.field = field

    def reasons(self, problem):
        return ()

    def run(self, problem, operands):
        if (x := getattr(operands, self.field, None)) is not None:
            x[...] = 2
        return numpy_oracle.run(problem, operands)

    def gradients(self, problem, operands, out_cotangent, lse_cotangent):
        {"dout": out_cotangent, "dlse": lse_cotangent}[self.field][...] = 2
        return numpy_oracle.gradients(problem, operands, out_cotangent, lse_cotangent)


@pytest.mark.parametrize("field", ["q", "k", "v", "mask", "bias", "kv_lengths"])
@pytest.mark.parametrize("convert", [np.array, jnp.asarray], ids=["numpy", "jax"])
def test_a_backend_cannot_write_into_what_it_is_handed(field, convert):
    arrays = [convert(x) for x in draw_arrays()]
    batch, heads, queries, keys = 2, 4, 5, arrays[1].shape[2]
    options = {
        "mask": convert(np.ones((batch, 1, queries, keys), bool)),
        "bias": convert(np.ones((1, heads, queries, keys), np.float32)),
        "kv_lengths": convert(np.full(batch, keys, np.int32)),
    }
    before = [np.array(x) for x in (*arrays, *options.values())]
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="read-only"):
        jax.block_until_ready(run(Writer(field), *arrays, **options))
    for x, y in zip(before, (*arrays, *options.values()), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("field", ["dout", "dlse"])
def test_a_backend_cannot_write_into_its_cotangents(field):
    q, k, v = map(jnp.asarray, draw_arrays())
    with pytest.raises(jax.errors.JaxRuntimeError, match="read-only"):
        jax.block_until_ready(jax.grad(lambda q: call(Writer(field), q, k, v)[0].sum())(q))


def test_what_a_backend_returns_is_not_the_callers_memory():
    class Echo(ForwardAlone):
        def run(self, problem, operands):
            return operands.q, np.zeros(operands.q.shape[:3], np.float32)

    q = np.ones((1, 2, 3, 4), np.float32)
    out, _ = run(Echo(), q, q, q, return_lse=True)
    out[...] = 5
    assert (q == 1).all()


def test_an_accelerator_is_refused():
    problem = Call.of(*map(jnp.asarray, draw_arrays())).problem
    assert bridge.reasons(problem, "numpy") == ()
    (reason,) = bridge.reasons(dataclasses.replace(problem, platform="gpu"), "numpy")
    assert reason.startswith("the arrays lie on a gpu and NumPy's in host memory")


ON_ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp
from heedful.backends.numpy_oracle import backend
from heedful.bridges.numpy import bridge
from heedful.call import Call

def value(q):
    q = jnp.sin(q)
    call = Call.of(q, q, q)
    return bridge.run(backend, call.problem, call.operands)[0].sum()

print(jax.jit(jax.grad(value))(jnp.ones((2, 1, 4, 250_000))).shape)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's sched_setaffinity")
def test_large_arrays_on_a_single_core_do_not_hang():
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_CORE],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "(2, 1, 4, 250000)\n", done.stderr
