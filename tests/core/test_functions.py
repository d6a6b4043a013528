"""score_mod and mask_mod: what they close over, what is hidden, what compiles, what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heedful
from compilations import counted
from heedful import oracle
from heedful.call import Call
from heedful.flash.autodiff import flash
from heedful.flash.scores import numbered
from heedful.flash.tiles import Tiles, keys_met, queries_met

B, HQ, HKV, SQ, SK, D = 2, 4, 2, 21, 34, 4
TILES = Tiles(batch=1, kv_heads=1, queries=8, keys=8)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape)


Q, K, V, DOUT = (
    normal(B, HQ, SQ, D),
    normal(B, HKV, SK, D),
    normal(B, HKV, SK, D),
    normal(B, HQ, SQ, D),
)
DLSE, TABLE, PARTS = normal(B, HQ, SQ), normal(HQ, SQ + SK), np.arange(SK, dtype=np.int16) % 3


def functions(table, parts):
    """Neither has a value, or a slope, where the other or causal hides the key."""
    table, parts = jnp.asarray(table), jnp.asarray(parts)

    def score_mod(score, b, h, i, j):
        away = (i + SK - SQ - j).astype(score.dtype)
        return score * jnp.sqrt(1 + away) + table[h, i - j + SK] * jnp.log1p(away)

    def mask_mod(b, h, i, j):
        return parts[j].astype(b.dtype) != b

    return {"score_mod": score_mod, "mask_mod": mask_mod, "causal": True}


def value(q, k, v, table, backend):
    options = functions(table, PARTS) | {"backend": backend, "return_lse": True}
    out, lse = heedful.attention(q, k, v, **options)
    return (out * DOUT).sum() + (lse * DLSE).sum()


def arguments():
    return tuple(map(jnp.asarray, (Q, K, V, TABLE)))


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(np.abs(b).max(), 1))


def test_what_they_close_over_has_the_gradient_of_the_dense_formula():
    def dense(q, k, v, table):
        b, h, i, j = np.ogrid[:B, :HQ, :SQ, :SK]
        away = i + SK - SQ - j
        seen = (away >= 0) & (PARTS[j] != b)
        away = np.where(seen, away, 0)
        k, v = (jnp.repeat(x, HQ // HKV, axis=1) for x in (k, v))
        s = jnp.einsum("bhid,bhjd->bhij", q, k) * D**-0.5
        s = s * np.sqrt(1 + away) + table[h, i - j + SK] * np.log1p(away)
        s = jnp.where(seen, s, -jnp.inf)
        lse = jax.scipy.special.logsumexp(s, axis=-1)
        out = jnp.einsum("bhij,bhjd->bhid", jnp.exp(s - lse[..., None]), v)
        return (out * DOUT).sum() + (lse * DLSE).sum()

    every = tuple(range(4))
    expected = jax.value_and_grad(dense, every)(*arguments())
    for backend in ("jax:flash", "jax:plain"):
        assert_close(jax.value_and_grad(value, every)(*arguments(), backend), expected)
    call = Call.of(Q, K, V, **functions(TABLE, PARTS))
    found = oracle.gradients(call.problem, call.operands, DOUT, DLSE)
    assert_close((*found[:3], found.floats.reshape(TABLE.shape)), expected[1])


@pytest.mark.parametrize("backend", ["jax:flash", "jax:plain"])
def test_of_tiles_and_second_order(backend):
    """Along a direction, forwards over reverse, with tiles that overlap and of which nothing is seen."""
    along = tuple(map(jnp.asarray, (normal(*x.shape)[::-1] for x in arguments())))
    step = 1e-6

    def gradient(*at):
        if backend == "jax:flash":
            return jax.grad(by_tiles, (0, 1, 2, 3))(*at)
        return jax.grad(value, (0, 1, 2, 3))(*at, backend)

    def by_tiles(q, k, v, table):
        call = Call.of(q, k, v, **functions(table, PARTS))
        out, lse = flash(call.problem, call.operands, TILES)
        return (out * DOUT).sum() + (lse * DLSE).sum()

    _, found = jax.jvp(gradient, arguments(), along)
    ahead, back = (
        gradient(*(x + sign * step * u for x, u in zip(arguments(), along, strict=True)))
        for sign in (1, -1)
    )
    for dot, a, b in zip(found, ahead, back, strict=True):
        np.testing.assert_allclose(dot, (a - b) / (2 * step), rtol=0, atol=1e-6 * np.abs(dot).max())


def test_a_mapped_axis_gives_each_member_what_it_closes_over():
    tables = jnp.stack([arguments()[3], -arguments()[3], 0 * arguments()[3]])
    gradient = jax.grad(value, (0, 1, 2, 3))
    found = jax.vmap(gradient, (None, None, None, 0, None))(*arguments()[:3], tables, "jax:flash")
    for n, table in enumerate(tables):
        one = gradient(*arguments()[:3], table, "jax:plain")
        assert_close([x[n] for x in found], one)


def test_other_values_and_another_function_of_the_same_text_compile_nothing():
    def call(factor):
        table = jnp.full((HQ,), factor)
        return heedful.attention(
            *arguments()[:3],
            backend="jax:flash",
            score_mod=lambda s, b, h, i, j: jnp.tanh(s) * table[h],
            mask_mod=lambda b, h, i, j: (i + j) % 2 == 0,
        )

    first = call(1.0)
    jnp.full((HQ,), 2.0)
    with counted() as counts:
        second = call(2.0)
    assert counts["compiled"] == 0
    assert not np.allclose(first, second)


def test_functions_that_differ_in_a_constant_or_a_rule_are_not_confused():
    @jax.custom_jvp
    def tripled(x):
        return 1.0 * x

    tripled.defjvp(lambda primals, tangents: (primals[0], 3 * tangents[0]))
    same = jax.custom_jvp(lambda x: 1.0 * x)
    same.defjvp(lambda primals, tangents: (primals[0], tangents[0]))

    def gradient(bend):
        def of(q):
            mod = lambda s, b, h, i, j: bend(s)  # noqa: E731  # one text
            return heedful.attention(q, k, v, backend="jax:flash", score_mod=mod)[..., 0].sum()

        q, k, v, _ = arguments()
        return jax.grad(of)(q)

    assert_close(gradient(tripled), 3 * gradient(same))
    problems = {
        Call.of(Q, K, V, score_mod=lambda s, b, h, i, j, n=n: s * n).problem
        for n in (2.0, 3.0, 2.0)
    }
    assert len(problems) == 2


# Block masks


def documents(b, h, i, j):
    return (i // 8 == j // 8) | ((h == 1) & (j < 3))


def test_a_block_mask_says_of_each_block_what_its_function_says():
    mask = heedful.block_mask(documents, None, HQ, SQ, SK, block_size=5)
    b, h, i, j = np.ogrid[:1, :HQ, :SQ, :SK]
    whole = documents(b, h, i, j)
    for n in np.ndindex(mask.blocks.shape):
        block = whole[0, n[1], 5 * n[2] : 5 * n[2] + 5, 5 * n[3] : 5 * n[3] + 5]
        assert mask.blocks[n] == int(block.any()) + int(block.all())


@pytest.mark.parametrize(
    ("size", "options"), [(3, {"causal": True}), (128, {"window": (9, 2)})], ids=str
)
def test_with_a_block_mask_the_answer_is_the_same(size, options):
    @jax.jit  # a mask is a pytree
    def by_blocks(q, k, v, mask):
        call = Call.of(q, k, v, mask_mod=mask, **options)
        return flash(call.problem, call.operands, TILES)

    def gradients(function):
        def of(*arrays):
            out, lse = function(*arrays)
            return (out * DOUT).sum() + jnp.where(jnp.isfinite(lse), lse * DLSE, 0).sum()

        return jax.grad(of, (0, 1, 2))(*arguments()[:3])

    mask = heedful.block_mask(documents, None, HQ, SQ, SK, block_size=size)
    asked = {"backend": "jax:plain", "mask_mod": documents, "return_lse": True, **options}
    by_formula = partial(heedful.attention, **asked)
    by_mask = partial(by_blocks, mask=mask)
    assert_close(by_mask(*arguments()[:3])[0], by_formula(*arguments()[:3])[0])
    assert_close(gradients(by_mask), gradients(by_formula))


def test_tiles_that_a_block_mask_hides_are_not_visited_and_whole_ones_not_masked():
    """Of the band of tiles i − 1 ≤ j ≤ i of causal and window those of even j, which are seen whole."""
    size, n = 8, 6
    q = jnp.zeros((1, 1, n * size, D))
    mask = heedful.block_mask(
        lambda b, h, i, j: j // size % 2 == 0, 1, 1, n * size, n * size, block_size=4
    )
    call = Call.of(q, q, q, mask_mod=mask, causal=True, window=(size, None))
    operands = numbered(call.problem, call.operands).operands
    for i in range(n):
        met = keys_met(call.problem, operands, TILES, jnp.int32(i * size))
        assert sorted(met.order[: met.end].tolist()) == [
            j for j in (i - 1, i) if j >= 0 and j % 2 == 0
        ]
        assert met.clear_end == met.clear  # each of them crosses the band's edge
        met = queries_met(call.problem, operands, TILES, jnp.int32(i * size))
        assert sorted(met.order[: met.end].tolist()) == [
            x for x in (i, i + 1) if x < n and i % 2 == 0
        ]
    open_call = Call.of(q, q, q, mask_mod=mask)
    met = keys_met(open_call.problem, open_call.operands, TILES, jnp.int32(0))
    assert (met.clear, met.clear_end, met.end) == (0, n // 2, n // 2)


# Refusals

HALF = jnp.ones(HQ, jnp.bfloat16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"score_mod": 3}, TypeError, "score_mod must be a function. Got 3."),
        ({"score_mod": lambda s: s}, TypeError, "of JAX numbers, score, b, h, q_idx and kv_idx"),
        (
            {"mask_mod": lambda b, h, i, j: bool(i > j)},
            TypeError,
            "To trace it raised TracerBoolConversionError",
        ),
        (
            {"mask_mod": lambda b, h, i, j: i - j},
            TypeError,
            r"mask_mod must give one number of bool. Got int32\[\]. True is visible.",
        ),
        (
            {"score_mod": lambda s, b, h, i, j: (s, s)},
            TypeError,
            r"must give one number of float64. Got float64\[\], float64\[\]",
        ),
        (
            {"score_mod": lambda s, b, h, i, j: s.astype(jnp.float32)},
            TypeError,
            r"Got float32\[\]. Cast it, or what it adds.",
        ),
        (
            {"score_mod": lambda s, b, h, i, j: s + HALF[h].astype(s.dtype)},
            TypeError,
            r"closes over must be float64.*Got bfloat16 \(4,\)",
        ),
        (
            {"mask_mod": heedful.block_mask(documents, 1, HQ, SQ, SK + 1)},
            ValueError,
            r"must be made for the call's .* = \(2, 4, 21, 34\). Got one for \(1, 4, 21, 35\)",
        ),
        ({"block_mask": documents}, TypeError, "Here it is mask_mod="),
    ],
)
def test_what_is_no_such_function_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        heedful.attention(Q, K, V, **options)


def test_a_block_mask_of_no_size_is_refused():
    with pytest.raises(ValueError, match=r"Sk must be an integer of at least 1\. Got 0\."):
        heedful.block_mask(documents, 1, 1, 4, 0)
    with pytest.raises(
        ValueError, match=r"block_size must be an integer of at least 1\. Got 1\.5\."
    ):
        heedful.block_mask(documents, 1, 1, 4, 4, block_size=1.5)


def test_a_mesh_with_explicit_axes_is_refused():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(TypeError, match="on a mesh with explicit axes"):
        heedful.attention(*arguments()[:3], mask_mod=documents)


def test_who_takes_no_functions_refuses_by_name():
    with pytest.raises(heedful.Refusal, match="score_mod"):
        heedful.attention(*arguments()[:3], backend="jax:nn-xla", score_mod=lambda s, b, h, i, j: s)
    with pytest.raises(heedful.Refusal, match="mask_mod would be asked in a callback"):
        heedful.attention(*arguments()[:3], backend="numpy:oracle", mask_mod=documents)
