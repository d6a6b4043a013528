"""The oracle on trial: autodiff of a dense JAX function, finite differences, exactness."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from definition import visible_by_definition
from hypothesis import given
from hypothesis import strategies as st

from heedful import oracle
from heedful.backends.numpy_oracle import backend
from heedful.call import Call
from heedful_crosscheck.ask import ask
from heedful_crosscheck.contract.cases import CASES, FORMS
from heedful_crosscheck.question import Question
from reference import attention, without_idle_offset

# (B, Hq, Hkv, Sq, Sk, D, Dv). Few, because JAX compiles the dense function anew for each.
SHAPES = {
    "grouped, fewer queries": (2, 4, 2, 4, 6, 3, 3),
    "one key head, more queries, wide values": (2, 3, 1, 7, 4, 2, 5),
    "one head each, as many": (1, 2, 2, 5, 5, 4, 2),
}


def draw_arrays(shape, seed=0, dtype=np.float64):
    """q, k, v and the cotangents of out and lse."""
    batch, q_heads, kv_heads, q_length, kv_length, head_dim, value_dim = shape
    sizes = (
        (batch, q_heads, q_length, head_dim),
        (batch, kv_heads, kv_length, head_dim),
        (batch, kv_heads, kv_length, value_dim),
        (batch, q_heads, q_length, value_dim),
        (batch, q_heads, q_length),
    )
    random = np.random.default_rng(seed)
    return [random.standard_normal(size).astype(dtype) for size in sizes]


def judge(q, k, v, dout, dlse, **options):
    """out, lse, dq, dk, dv, dbias, all by the oracle."""
    call = Call.of(q, k, v, **options)
    problem, operands = call.problem, call.operands
    gradients = oracle.gradients(problem, operands, dout, dlse)
    return (*oracle.forward(problem, operands), *gradients[:3], gradients.bias)


# Against the tests' own reference, which shares no line with it, over all that backends are judged on


@pytest.mark.parametrize("case", CASES + FORMS, ids=lambda case: case.name)
def test_agrees_with_attention_row_by_row(case):
    """Backends are judged by the oracle, and the oracle by this."""
    question = Question.of(case, 0, "float64")
    inputs = question.inputs
    right = attention(
        inputs.q,
        inputs.k,
        inputs.v,
        question.as_called(question.out_cotangent),
        question.rows_as_called(question.lse_cotangent),
        **inputs.options,
    )
    got = ask("numpy:oracle", question, question.poisoned or inputs, with_lse=True)
    names = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks", "dalibi_slopes")
    for name, want in zip(names, right, strict=True):
        if want is None:
            assert name not in got
            continue
        assert got[name].shape == want.shape, name
        np.testing.assert_array_equal(np.isneginf(got[name]), np.isneginf(want))
        largest = np.abs(want, where=np.isfinite(want), out=np.zeros_like(want)).max(initial=1)
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-12 * largest)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# Against autodiff of the naive formula: K and V repeated, no shift in the exponent, one big softmax


@partial(jax.jit, static_argnames="capped")
def dense(q, k, v, bias, seen, scale, softcap, dout, dlse, capped):
    def attention(q, k, v, bias):
        group = q.shape[1] // k.shape[1]
        k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
        s = scale * jnp.einsum("bhid,bhjd->bhij", q, k)
        if capped:
            s = softcap * jnp.tanh(s / softcap)
        e = jnp.where(seen, jnp.exp(s + bias), 0)
        total = e.sum(axis=-1)
        sees = seen.any(axis=-1)
        divisor = jnp.where(sees, total, 1)
        out = jnp.einsum("bhij,bhjd->bhid", e, v) / divisor[..., None]
        return out, jnp.where(sees, jnp.log(divisor), -jnp.inf)

    (out, lse), pull_back = jax.vjp(attention, q, k, v, bias)
    return out, lse, *pull_back((dout, dlse))


def judge_by_autodiff(q, k, v, dout, dlse, *, bias=None, scale=None, softcap=None, **options):
    full = (*q.shape[:3], k.shape[2])
    *others, dbias = dense(
        q,
        k,
        v,
        np.broadcast_to(0.0 if bias is None else bias, full),
        visible_by_definition(*full, **options),
        q.shape[3] ** -0.5 if scale is None else scale,
        1.0 if softcap is None else softcap,
        dout,
        dlse,
        capped=softcap is not None,
    )
    if bias is None:
        return *others, None
    (dbias,) = jax.linear_transpose(lambda x: jnp.broadcast_to(x, full), bias)(dbias)
    return *others, dbias


NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")


def assert_same(found, expected, rtol=1e-11, atol=1e-12):
    for name, x, y in zip(NAMES[: len(expected)], found, expected, strict=True):
        if y is None:
            assert x is None, name
        else:
            assert x.dtype == np.float64, name
            np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=name)


def broadcastable(draw, full):
    return [draw(st.sampled_from([1, size])) for size in full]


def per_row(batch, low, high):
    numbers = st.lists(st.integers(low, high), min_size=batch, max_size=batch)
    return numbers.map(lambda x: np.array(x, np.int64))


@st.composite
def option_sets(draw, shape):
    batch, q_heads, _, q_length, kv_length, _, _ = shape
    full = (batch, q_heads, q_length, kv_length)
    random = np.random.default_rng(draw(st.integers(0, 999)))
    side = st.none() | st.integers(0, 5)
    options = {
        "causal": st.sampled_from([False, True, "top_left"]),
        "window": st.tuples(side, side),
        "q_offset": st.integers(-4, 6) | per_row(batch, -4, 6),
        "q_lengths": per_row(batch, 0, q_length),
        "kv_lengths": per_row(batch, 0, kv_length),
        "scale": st.sampled_from([0.3, -1.0]),
        "softcap": st.sampled_from([0.7, 5.0]),
        "mask": st.builds(lambda: random.random(broadcastable(draw, full)) < 0.7),
        "bias": st.builds(lambda: random.standard_normal(broadcastable(draw, full))),
    }
    wanted = draw(st.sets(st.sampled_from(sorted(options))))
    return without_idle_offset({name: draw(options[name]) for name in sorted(wanted)})


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@given(data=st.data())
def test_is_what_autodiff_says(shape, data):
    options = data.draw(option_sets(shape))
    arrays = draw_arrays(shape, seed=data.draw(st.integers(0, 999)))
    with jax.enable_x64(True):
        assert_same(judge(*arrays, **options), judge_by_autodiff(*arrays, **options))


@pytest.mark.parametrize("axes", list(np.ndindex(2, 2, 2, 2)), ids=str)
def test_every_form_of_bias(axes, x64):
    shape = SHAPES["grouped, fewer queries"]
    arrays = draw_arrays(shape)
    full = np.array((*arrays[3].shape[:3], shape[4]))
    bias = np.random.default_rng(1).standard_normal(np.where(axes, full, 1))
    found = judge(*arrays, bias=bias, causal=True)
    assert found[-1].shape == bias.shape
    assert_same(found, judge_by_autodiff(*arrays, bias=bias, causal=True))


# Against finite differences: no derivative rule on either side


EVERYTHING = {
    "nothing": {},
    "softcap and bias": {"softcap": 0.8, "bias": "all", "scale": 0.9},
    "a row that sees nothing": {"causal": True, "q_offset": -2},
    "lengths and a window": {"kv_lengths": np.array([3, 6]), "window": (2, 1), "bias": "keys"},
}


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
def test_is_what_finite_differences_say(options):
    shape = SHAPES["grouped, fewer queries"]
    q, k, v, dout, dlse = draw_arrays(shape)
    random = np.random.default_rng(2)
    point = {"q": q, "k": k, "v": v}
    if "bias" in options:
        wide = (*q.shape[:3], shape[4]) if options["bias"] == "all" else (1, 1, 1, shape[4])
        point["bias"] = random.standard_normal(wide)
    fixed = {name: x for name, x in options.items() if name != "bias"}

    def value(point):
        out, lse = judge(dout=dout, dlse=dlse, **point, **fixed)[:2]
        return (out * dout).sum() + (lse * dlse)[np.isfinite(lse)].sum()

    gradients = judge(dout=dout, dlse=dlse, **point, **fixed)[2:]
    for (name, x), gradient in zip(point.items(), gradients, strict=False):  # bias or none
        for _ in range(3):
            way, step = random.standard_normal(x.shape), 1e-5
            ahead, behind = (value({**point, name: x + s * way}) for s in (step, -step))
            along = (gradient * way).sum()
            assert (ahead - behind) / (2 * step) == pytest.approx(along, rel=1e-6, abs=1e-8), name


# Exactness: what nobody sees plays no part, and who sees nothing gets nothing


def test_a_query_that_sees_no_key():
    arrays = draw_arrays(SHAPES["one head each, as many"])
    arrays[3][:, :, :2] = np.nan
    arrays[4][:, :, :2] = np.nan
    out, lse, dq, *rest = judge(*arrays, causal=True, q_offset=-2, bias=np.zeros((5, 5)))
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -np.inf).all()
    assert (dq[:, :, :2] == 0).all()
    assert all(np.isfinite(x).all() for x in (out, lse[:, :, 2:], dq, *rest))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_nobody_sees_plays_no_part(poison, softcap):
    shape = SHAPES["grouped, fewer queries"]
    clean, poisoned = draw_arrays(shape), draw_arrays(shape)
    for x, first_hidden in zip(poisoned, (3, 4, 4, 3, 3), strict=True):
        x[:, :, first_hidden:] = poison
    options = {"q_lengths": np.array([3, 2]), "kv_lengths": np.array([4, 3]), "softcap": softcap}
    assert_same(judge(*poisoned, **options), judge(*clean, **options), rtol=0, atol=0)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_some_see_reaches_only_them(poison):
    """The last key is seen by the last query alone: the other queries must not learn of it."""
    shape = SHAPES["one head each, as many"]
    clean, poisoned = draw_arrays(shape), draw_arrays(shape)
    for x in poisoned[:3]:
        x[:, :, -1] = poison

    def compare(count, **options):
        """The first results, but for the last query or key: untouched. Returns the poisoned ones."""
        expected, found = (judge(*arrays, **options)[:count] for arrays in (clean, poisoned))
        for name, x, y in zip(NAMES[:count], found, expected, strict=True):
            np.testing.assert_array_equal(x[:, :, :-1], y[:, :, :-1], err_msg=name)
        return found

    # The last query sees every key, and so dk and dv of every key are its own.
    for x in compare(3, causal=True):
        assert not np.isfinite(x[:, :, -1]).any()
    compare(5, window=(0, 0))


def test_a_nan_stays_in_its_column_of_v():
    shape = SHAPES["one head each, as many"]
    clean, poisoned = draw_arrays(shape), draw_arrays(shape)
    poisoned[2][:, :, 3, 0] = np.nan
    expected, found = (judge(*arrays, causal=True)[0] for arrays in (clean, poisoned))
    assert np.isnan(found[:, :, 3:, 0]).all()
    np.testing.assert_allclose(found[..., 1:], expected[..., 1:], rtol=1e-14)


def test_a_bias_of_minus_infinity_gives_no_weight():
    arrays = draw_arrays(SHAPES["one head each, as many"])
    bias = np.zeros((5, 5))
    bias[:, 3:] = -np.inf
    bias[0] = -np.inf
    mask = bias == 0
    assert_same(judge(*arrays, bias=bias)[:5], judge(*arrays, mask=mask)[:5])


def test_scores_beyond_exp():
    q, k, v, dout, dlse = draw_arrays(SHAPES["one head each, as many"])
    bias = np.full((1, 1, 1, 1), 5000.0)
    far, near = judge(q, k, v, dout, dlse, bias=bias), judge(q, k, v, dout, dlse)
    np.testing.assert_allclose(far[0], near[0], rtol=1e-11)
    np.testing.assert_allclose(far[1], near[1] + 5000, rtol=1e-14)


# Sizes, dtypes, and the backend


@pytest.mark.parametrize("empty", ["B", "Sq", "Sk"])
def test_nothing_to_do(empty):
    shape = [2, 4, 2, 4, 6, 3, 5]
    shape[{"B": 0, "Sq": 3, "Sk": 4}[empty]] = 0
    arrays = draw_arrays(shape)
    bias = np.ones((1, 4, 1, 1))
    out, lse, dq, dk, dv, dbias = judge(*arrays, bias=bias, causal=True)
    for x, y in zip((dq, dk, dv, out, lse), arrays, strict=True):
        assert x.shape == y.shape
    assert (out == 0).all() and (lse == -np.inf).all() and (dbias == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_other_dtypes_are_widened_first(dtype):
    narrow = draw_arrays(SHAPES["grouped, fewer queries"], dtype=dtype)
    bias = np.ones((4, 6), dtype) / 3
    wide = [x.astype(np.float64) for x in narrow]
    found = judge(*narrow, bias=bias, causal=True)
    assert_same(found, judge(*wide, bias=bias.astype(np.float64), causal=True), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.int64])
def test_integers_of_any_width(dtype):
    """300 − (a length in int8) would not fit into int8, and 3 − 5 would wrap in uint32."""
    arrays = draw_arrays((2, 1, 1, 5, 300, 2, 2))
    lengths = {"q_lengths": [5, 4], "kv_lengths": [100, 3]}
    expected = judge(*arrays, causal=True, **{n: np.array(x) for n, x in lengths.items()})
    found = judge(*arrays, causal=True, **{n: np.array(x, dtype) for n, x in lengths.items()})
    assert_same(found, expected, rtol=0, atol=0)
    one = {"q_lengths": np.array(lengths["q_lengths"], dtype)}
    assert np.isfinite(judge(*arrays, causal=True, **one)[1][0]).all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_backend_rounds(dtype):
    q, k, v, dout, dlse = draw_arrays(SHAPES["grouped, fewer queries"], dtype=dtype)
    bias = np.zeros((6,), "float64" if dtype == "float64" else "float32")
    call = Call.of(q, k, v, bias=bias)
    problem, operands = call.problem, call.operands
    assert backend.reasons(problem) == ()
    out, lse = backend.run(problem, operands)
    d = backend.gradients(problem, operands, dout, dlse)
    assert out.dtype == d.q.dtype == d.k.dtype == d.v.dtype == q.dtype
    assert lse.dtype == d.bias.dtype == bias.dtype
    np.testing.assert_array_equal(out, oracle.forward(problem, operands)[0].astype(q.dtype))


def test_the_backend_rounds_beyond_float16_to_infinity():
    q = np.full((1, 1, 1, 1), 6e4, np.float16)
    problem = Call.of(q, q, q).problem
    big = np.full((1, 1, 1, 1), 6e4, np.float32)
    dv = backend.gradients(problem, Call.of(q, q, q).operands, 2 * big, big[..., 0]).v
    assert dv == np.inf
