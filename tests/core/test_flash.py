"""What is special to the flash core: its tiles, its derivatives of every order, its memory.

That it computes the contract is shown in test_backends.py. Here tiles are small, so that a few dozen
queries and keys make several of each kind, the overlapping last ones among them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definition import visible_by_definition
from hypothesis import given
from hypothesis import strategies as st

import heedful
from heedful.call import Call
from heedful.flash import flash
from heedful.flash.autodiff import RESIDUALS
from heedful.flash.forward import forward
from heedful.flash.scores import numbered
from heedful.flash.tiles import TILE_BYTES, Tiles, keys_met, queries_met, start, tile_sizes
from heedful.plain import plain
from heedful_crosscheck.callers import QUICKLY
from reference import without_idle_offset

TILES = Tiles(batch=1, kv_heads=1, queries=16, keys=24)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def ask(*, batch=2, q_heads=4, kv_heads=2, q_length=37, kv_length=50, **options):
    """A problem, its operands, and a scalar function of the floating ones for any implementation."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape))

    q = normal(batch, q_heads, q_length, 8)
    k, v = normal(batch, kv_heads, kv_length, 8), normal(batch, kv_heads, kv_length, 6)
    call = Call.of(q, k, v, **options)
    problem, operands = call.problem, call.operands
    out_weights, lse_weights = normal(*q.shape[:3], 6), normal(*q.shape[:3])
    moving = operands.differentiable

    def loss(attend, moving):
        out, lse = attend(problem, operands._replace(**moving))
        lse = jnp.where(lse == -jnp.inf, 0, lse)
        return jnp.vdot(jnp.sin(out), out_weights) + jnp.vdot(jnp.sin(lse), lse_weights)

    return problem, operands, moving, loss


def normal_like(tree, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), tree)


def assert_close(a, b, tolerance=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


small_flash = partial(flash, tiles=TILES)
KEEPING = jax.checkpoint_policies.save_only_these_names(*RESIDUALS)

QUESTIONS = {
    "full": {},
    "sinks": {"sinks": np.array([0.5, -1.0, 2.0, 0.0]), "window": (20, 3), "q_offset": -4},
    "alibi": {
        "alibi_slopes": np.array([[0.5, 0.25, -0.1, 0.0], [1.0, 0.3, 0.2, 0.1]]),
        "kv_lengths": np.array([50, 13]),
        "bias": np.ones((1, 4, 1, 50)),
        "window": (30, 9),
    },
    "dropout": {
        "dropout_rate": 0.4,
        "dropout_seed": np.array([3, 2**31 - 1]),
        "sinks": np.array([0.5, -1.0, 2.0, 0.0]),
        "causal": True,
        "kv_lengths": np.array([50, 13]),
    },
    "causal": {"causal": True, "bias": np.ones((1, 4, 1, 50)), "softcap": 1.5},
    "window": {"window": (5, 3), "q_offset": 20},
    "lengths": {"kv_lengths": np.array([50, 13]), "q_lengths": np.array([5, 37]), "causal": True},
    "mask": {"mask": np.random.default_rng(3).random((2, 1, 37, 50)) < 0.5},
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_forward_and_reverse_mode_are_those_of_plain(name):
    _, _, moving, loss = ask(**QUESTIONS[name])
    along = normal_like(moving)
    for attend in (small_flash, flash):
        value, gradient = jax.value_and_grad(partial(loss, attend))(moving)
        expected, expected_gradient = jax.value_and_grad(partial(loss, plain))(moving)
        assert_close((value, gradient), (expected, expected_gradient))
    slope = jax.jvp(partial(loss, small_flash), (moving,), (along,))[1]
    exact = jax.tree.reduce(lambda a, b: a + b, jax.tree.map(jnp.vdot, expected_gradient, along))
    np.testing.assert_allclose(slope, exact, rtol=1e-12)


@pytest.mark.parametrize(
    "bias_shape", [(2, 4, 37, 50), (1, 4, 37, 50), (2, 1, 1, 50), (1, 1, 37, 1), (1, 1, 1, 1)]
)
def test_a_broadcast_bias_gets_the_sum_of_its_gradients(bias_shape):
    bias = jnp.asarray(np.random.default_rng(5).standard_normal(bias_shape))
    _, _, moving, loss = ask(bias=bias, causal=True)
    assert_close(
        jax.grad(partial(loss, small_flash))(moving)["bias"],
        jax.grad(partial(loss, plain))(moving)["bias"],
    )


def test_higher_orders_in_every_composition_are_those_of_plain():
    _, _, moving, loss = ask(batch=1, q_heads=2, kv_heads=1, softcap=1.5, causal=True)
    along = normal_like(moving)

    def derive(order, attend):
        f = jax.jit(partial(order, partial(loss, attend)), compiler_options=dict(QUICKLY))
        return f(moving, along)

    expected = derive(forward_over_reverse, plain)
    for order in (forward_over_reverse, reverse_over_forward, reverse_over_reverse):
        assert_close(derive(order, small_flash), expected, 1e-11)
    assert_close(derive(thrice_reverse, small_flash), derive(thrice_reverse, plain), 1e-10)


def test_hessians_are_those_of_plain():
    """Of all that is differentiable at once, each with all, under jit, vmap and a checkpoint."""
    slopes = np.array([0.5, 0.25, -0.1, 0.0])
    options = {"alibi_slopes": slopes, "sinks": slopes, "bias": np.ones((1, 4, 1, 7))}
    sizes = {"batch": 2, "q_length": 5, "kv_length": 7}
    _, _, moving, loss = ask(**sizes, **options, causal=True, softcap=1.5)
    attend = partial(flash, tiles=Tiles(1, 2, 2, 3))
    f = jax.checkpoint(partial(loss, attend), policy=KEEPING)
    found = jax.jit(jax.hessian(f), compiler_options=dict(QUICKLY))(moving)
    assert_close(found, jax.jit(jax.hessian(partial(loss, plain)))(moving), 1e-11)


def relative(found, expected):
    """The largest relative RMS error of a tree of arrays."""

    def one(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return np.linalg.norm(x - y) / (np.linalg.norm(y) or 1)

    return max(jax.tree.leaves(jax.tree.map(one, found, expected)))


def derivatives(attend, dtype, bias=0.0):
    """Gradients, tangent and second order where q is 0 and all keys share one bias."""
    rng = np.random.default_rng(2)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), "bfloat16").astype(dtype)

    qkv = jnp.zeros((1, 2, 40, 8), dtype), *(normal(1, 2, 50, 8) for _ in "kv")
    along = normal(1, 2, 40, 8), normal(1, 2, 50, 8), normal(1, 2, 50, 8)
    weights = normal(1, 2, 40, 8), normal(1, 2, 40)
    accumulator = "float64" if dtype == "float64" else "float32"
    options = {"bias": jnp.full((1, 1, 1, 50), bias, accumulator)}
    problem = Call.of(*qkv, **options).problem

    def loss(*qkv):
        out, lse = attend(problem, Call.of(*qkv, **options).operands)
        return jnp.vdot(out**2, weights[0]).astype(accumulator) + jnp.vdot(
            lse, weights[1].astype(accumulator)
        )

    @partial(jax.jit, compiler_options=dict(QUICKLY))
    def every(qkv):
        gradient = jax.grad(loss, (0, 1, 2))
        results = gradient(*qkv)
        out_and_lse = partial(attend, problem)
        tangent = jax.jvp(lambda *x: out_and_lse(Call.of(*x, **options).operands), qkv, along)[1]
        return results, tangent, jax.jvp(gradient, qkv, along)[1], jax.vjp(gradient, *qkv)[1](along)

    return every(qkv)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 6e-3)])
@pytest.mark.parametrize("bias", [-1e9, float(np.finfo(np.float32).min)])
def test_a_large_bias_that_all_keys_share_changes_no_derivative(bias, dtype, limit):
    expected = derivatives(plain, "float64")
    assert relative(derivatives(small_flash, dtype, bias=bias), expected) < limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_near_4096_lose_no_more_than_in_plain(dtype):
    rng = np.random.default_rng(0)
    q, k = (rng.integers(-1, 2, (1, 2, n, 8)) for n in (40, 50))
    q[..., 0], k[..., 0] = 64, 64  # in any dtype exact, and so are the products
    v, d_out = rng.integers(-4, 5, (1, 2, 50, 8)), rng.integers(-4, 5, (1, 2, 40, 8))

    def gradients(attend, dtype):
        qkv = [jnp.asarray(x, dtype) for x in (q, k, v)]
        problem = Call.of(*qkv, scale=1.0).problem

        def out(*qkv):
            return attend(problem, Call.of(*qkv).operands)[0]

        dq, dk, dv = jax.vjp(out, *qkv)[1](jnp.asarray(d_out, dtype))
        return dq[..., 1:], dk, dv  # what the keys have in common cancels in dq

    expected = gradients(plain, "float64")
    ours, plains = (relative(gradients(f, dtype), expected) for f in (small_flash, plain))
    assert ours < 2 * plains


def test_half_precision_keeps_the_gradients_of_peaked_rows():
    rng = np.random.default_rng(0)
    shapes = (1, 1, 64, 16), (1, 1, 96, 16), (1, 1, 96, 16)
    peaked = [jnp.asarray(rng.uniform(-9, 9, shape), "bfloat16") for shape in shapes]
    two_keys = [jnp.asarray(x, "bfloat16").reshape(1, 1, -1, 1) for x in ([8], [1, 0], [1, 2])]

    def dq(attend, qkv, dtype, **options):
        q, k, v = (x.astype(dtype) for x in qkv)
        problem = Call.of(q, k, v, **options).problem
        return jax.grad(lambda q: attend(problem, Call.of(q, k, v).operands)[0].sum())(q)

    for qkv, options in ((peaked, {}), (two_keys, {"scale": 1.0})):
        expected = dq(plain, qkv, "float64", **options)
        assert relative(dq(flash, qkv, "bfloat16", **options), expected) < 6e-3


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "q_length", "kv_length", "size"),
    [
        (4, 1, 600, 7, 80),
        (8, 4, 70, 7, 80),
        (4, 4, 1, 133, 32),
        (1, 1, 1, 1, 1),
        (2, 2, 129, 64, 64),
    ],
)
def test_bfloat16_products_of_any_shape_compile(q_heads, kv_heads, q_length, kv_length, size):
    """XLA's CPU compiler fails on a product of bfloat16 that it has merged with a transpose."""
    rng = np.random.default_rng(0)
    shapes = (2, q_heads, q_length, size), *[(2, kv_heads, kv_length, size)] * 2
    qkv = [jnp.asarray(rng.standard_normal(shape), "bfloat16") for shape in shapes]
    problem = Call.of(*qkv).problem

    def gradients(attend):
        return jax.jit(
            jax.grad(lambda *x: attend(problem, Call.of(*x).operands)[0].sum(), (0, 1, 2))
        )(*qkv)

    for found, expected in zip(gradients(flash), gradients(plain), strict=True):
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (found, expected)), atol=0.05, rtol=0.05
        )


# What nobody sees may hold anything, and so may what stands in its place in tangents and cotangents


def gradient(f, x, along):
    return jax.grad(f)(x)


def first(f, x, along):
    return jax.grad(f)(x), jax.jvp(f, (x,), (along,))[1]


def forward_over_reverse(f, x, along):
    return jax.jvp(jax.grad(f), (x,), (along,))[1]


def reverse_over_forward(f, x, along):
    return jax.grad(lambda x: jax.jvp(f, (x,), (along,))[1])(x)


def reverse_over_reverse(f, x, along):
    return jax.vjp(jax.grad(f), x)[1](along)[0]


def thrice_reverse(f, x, along):
    return jax.vjp(partial(reverse_over_reverse, f, along=along), x)[1](along)[0]


def hiding(name):
    """A question, where its arrays of `ask` are hidden, and which of its queries see nothing."""
    rng = np.random.default_rng(4)
    options = {
        "lengths": {
            "kv_lengths": np.array([41, 13]),
            "q_lengths": np.array([5, 30]),
            "causal": True,
            "softcap": 1.5,
        },
        "mask": {"mask": rng.random((2, 4, 37, 50)) < 0.5},
        "window": {"window": (5, 3), "q_offset": 20, "kv_lengths": np.array([50, 27])},
    }[name]
    if name == "mask":
        options["mask"][:, :, 7] = False  # a row within a tile
        options["mask"][0, 1, 16:32] = False  # a tile of rows
        options["mask"][:, :2, :, [3, 30, 49]] = False  # keys, for one key head
        options["mask"][1, 2:, :, 24:48] = False  # a tile of keys
    sees = {n: x for n, x in options.items() if n != "softcap"}
    see = visible_by_definition(2, 4, 37, 50, **sees)
    key_seen = see.any(axis=2).reshape(2, 2, 2, 50).any(axis=2)[..., None]
    hidden = {"q": ~see.any(axis=3)[..., None], "k": ~key_seen, "v": ~key_seen, "bias": ~see}
    bias = rng.standard_normal(see.shape)
    bias[:, :, 35] = -np.inf  # a row that sees keys, and gives them no weight
    bias[:, :, :, 4] = -np.inf
    return options | {"bias": bias}, hidden


@pytest.mark.parametrize(
    "order", [first, forward_over_reverse, reverse_over_forward, reverse_over_reverse]
)
@pytest.mark.parametrize("attend", [small_flash, plain], ids=["flash", "plain"])
@pytest.mark.parametrize("name", ["lengths", "mask", "window"])
def test_what_nobody_sees_plays_no_part_at_any_order(name, attend, order):
    check_hidden(name, attend, order)


@pytest.mark.parametrize("attend", [small_flash, plain], ids=["flash", "plain"])
def test_what_nobody_sees_plays_no_part_in_a_third_derivative(attend):
    check_hidden("lengths", attend, thrice_reverse)


def check_hidden(name, attend, order):
    options, hidden = hiding(name)
    problem, operands, moving, _ = ask(**options)
    along = normal_like(moving, seed=7)
    weights = normal_like(jax.eval_shape(partial(plain, problem), operands), seed=8)

    @partial(jax.jit, compiler_options=dict(QUICKLY))
    def derive(moving, along, weights):
        def loss(moving):
            out, lse = attend(problem, operands._replace(**moving))
            lse = jnp.where(lse == -jnp.inf, 0, lse)
            return jnp.vdot(jnp.sin(out), weights[0]) + jnp.vdot(jnp.sin(lse), weights[1])

        return order(loss, moving, along)

    expected = derive(moving, along, weights)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(expected))
    for poison in (jnp.nan, jnp.inf):
        x, way = (
            {n: jnp.where(hidden[n], poison, x) for n, x in tree.items()}
            for tree in (moving, along)
        )
        dead = hidden["q"]
        of_rows = jnp.where(dead, poison, weights[0]), jnp.where(dead[..., 0], poison, weights[1])
        found = derive(x, way, of_rows)
        if order is first:  # the slope of a NaN loss is its own business
            found, wanted = found[0], expected[0]
        else:
            wanted = expected
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_nan_that_is_seen_is_not_hidden_from_the_gradients():
    _, _, moving, loss = ask(causal=True)
    poisoned = moving | {"q": moving["q"].at[0, 0, 20, 0].set(jnp.nan)}
    expected = jax.grad(partial(loss, plain))(poisoned)
    assert jnp.isnan(expected["q"][0, 0, 20]).all() and jnp.isnan(expected["k"][0, 0, :34]).all()
    for attend in (small_flash, flash):
        got = jax.grad(partial(loss, attend))(poisoned)
        assert jnp.isnan(got["q"][0, 0, 20]).all() and jnp.isnan(got["k"][0, 0, :34]).all()
        assert jnp.isfinite(got["q"][1]).all() and jnp.isfinite(got["v"][1]).all()


@pytest.mark.parametrize("moved", ["q", "kv", "bias", "everything"])
def test_vmap_is_a_loop(moved):
    bias = np.ones((1, 4, 1, 50))
    problem, operands, _, _ = ask(bias=bias, kv_lengths=np.array([50, 13]), causal=True)
    names = {"q": ["q"], "kv": ["k", "v"], "bias": ["bias"]}.get(
        moved, ["q", "k", "v", "bias", "kv_lengths"]
    )
    stacked = {
        name: jnp.stack([x, 2 * x if x.dtype == float else x // 2], axis=1)
        for name in names
        for x in [getattr(operands, name)]
    }
    cotangents = normal_like(jax.eval_shape(partial(small_flash, problem), operands))

    def value_and_gradients(replaced):
        floats = {n: x for n, x in replaced.items() if x.dtype == float}
        pair, pullback = jax.vjp(
            lambda floats: small_flash(problem, operands._replace(**{**replaced, **floats})), floats
        )
        return pair, pullback(cotangents)

    together = jax.vmap(value_and_gradients, in_axes=1)(stacked)
    one_by_one = [
        value_and_gradients(jax.tree.map(lambda x, n=n: x[:, n], stacked)) for n in range(2)
    ]
    assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *one_by_one))


def test_it_survives_scan_checkpoint_export_and_jacfwd():
    problem, operands, moving, loss = ask(causal=True, batch=1, q_heads=2)
    f = partial(loss, small_flash)
    expected = jax.grad(f)(moving)
    assert_close(jax.grad(jax.checkpoint(f))(moving), expected)
    scanned = jax.grad(lambda x: jax.lax.scan(lambda s, _: (s + f(x), None), 0.0, length=2)[0])
    assert_close(jax.jit(scanned)(moving), jax.tree.map(lambda x: 2 * x, expected))
    exported = jax.export.export(jax.jit(f))(moving)
    assert_close(exported.call(moving), f(moving))
    row = operands.q[0, 0, 0]

    def through(row):
        q = operands.q.at[0, 0, 0].set(row)
        return small_flash(problem, operands._replace(q=q))[0]

    assert_close(jax.jacfwd(through)(row), jax.jacrev(through)(row))


def test_a_checkpoint_that_saves_the_named_residuals_runs_forward_once():
    _, _, moving, loss = ask()
    f = partial(loss, small_flash)

    def forwards(order, policy):
        checkpointed = jax.checkpoint(f, policy=policy)
        text = str(jax.make_jaxpr(partial(order, checkpointed))(moving, moving))
        return text.count("heedful_forward[")

    for order, without in ((gradient, 2), (forward_over_reverse, 2), (reverse_over_reverse, 3)):
        assert forwards(order, None) == without
        assert forwards(order, KEEPING) == 1


# Which tiles are visited


@given(
    q_length=st.integers(1, 40),
    kv_length=st.integers(1, 40),
    queries=st.integers(1, 12),
    keys=st.integers(1, 12),
    causal=st.booleans(),
    window=st.none() | st.tuples(st.none() | st.integers(0, 9), st.none() | st.integers(0, 9)),
    q_offset=st.none() | st.integers(-20, 45),
    kv_real=st.none() | st.integers(0, 40),
    q_real=st.none() | st.integers(0, 40),
)
def test_tiles_seen_are_exactly_those_with_a_visible_pair(
    q_length, kv_length, queries, keys, causal, window, q_offset, kv_real, q_real
):
    options = {"causal": causal, "window": window, "q_offset": q_offset}
    options = without_idle_offset(options)
    for name, real, longest in (
        ("q_lengths", q_real, q_length),
        ("kv_lengths", kv_real, kv_length),
    ):
        if real is not None:
            options[name] = np.array([min(real, longest)])
    q, k = np.zeros((1, 1, q_length, 1)), np.zeros((1, 1, kv_length, 1))
    problem = Call.of(q, k, k, **options).problem
    operands = jax.tree.map(jnp.asarray, Call.of(q, k, k, **options).operands)
    options = {name: x for name, x in options.items() if name != "causal"}
    pairs = visible_by_definition(1, 1, q_length, kv_length, causal=causal, **options)[0, 0]
    tiles = Tiles(1, 1, min(queries, q_length), min(keys, kv_length))
    for see, seen, own, other in (
        (pairs, keys_met, tiles.queries, tiles.keys),
        (pairs.T, queries_met, tiles.keys, tiles.queries),
    ):
        for i in range(-(-see.shape[0] // own)):
            begin = start(jnp.int32(i), see.shape[0], own)
            met = seen(problem, operands, tiles, begin)[:4]
            first, clear, clear_end, end = map(int, met)
            rows = see[begin : begin + own]
            for j in range(-(-see.shape[1] // other)):
                tile = rows[:, j * other : (j + 1) * other]
                if tile.any():
                    assert first <= j < end
                if clear <= j < clear_end:
                    assert tile.all() and tile.shape[1] == other
            # Nothing is visited in vain, but for rows that windows and lengths leave empty.
            if rows.any(axis=1).all():
                visited = range(first, end)
                assert all(rows[:, j * other : (j + 1) * other].any() for j in visited)


def test_of_packed_sequences_the_tiles_of_each_are_visited_alone():
    ids = np.repeat([0, 1, 2, 3], 40)[None]
    q = np.zeros((1, 1, 160, 1))
    call = Call.of(q, q, q, q_segment_ids=ids, kv_segment_ids=ids)
    operands = jax.tree.map(jnp.asarray, call.operands)
    for seen in (keys_met, queries_met):
        visited = 0
        for i in range(8):
            found = seen(call.problem, operands, Tiles(1, 1, 20, 20), jnp.int32(20 * i))
            assert (int(found.first), int(found.end)) == (i // 2 * 2, i // 2 * 2 + 2)
            visited += int(found.end) - int(found.first)
        assert visited == 16  # of 64: Σ Sq·Sk of the sequences


@given(
    batch=st.integers(1, 200),
    kv_heads=st.integers(1, 40),
    group=st.integers(1, 8),
    q_length=st.integers(1, 5000),
    kv_length=st.integers(1, 5000),
)
def test_tiles_divide_the_heads_and_fit_their_size(batch, kv_heads, group, q_length, kv_length):
    shapes = [(batch, kv_heads * group, q_length, 64), (batch, kv_heads, kv_length, 64)]
    q, k = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
    tiles = tile_sizes(Call.of(q, k, k).problem)
    assert batch % tiles.batch == 0 and kv_heads % tiles.kv_heads == 0
    assert tiles.batch == 1 or tiles.kv_heads == kv_heads
    assert 1 <= tiles.queries <= q_length and 1 <= tiles.keys <= kv_length
    size = 4 * tiles.batch * tiles.kv_heads * group * tiles.queries * tiles.keys
    assert size <= max(TILE_BYTES, 4 * group * 512 * 512)


# Memory, as the compiler plans it


def planned_bytes(function, length, heads=1):
    q = jax.ShapeDtypeStruct((1, heads, length, 64), "float32")
    compiled = jax.jit(function, compiler_options=dict(QUICKLY)).lower(q, q, q).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def attend(q, k, v):
    call = Call.of(q, k, v, causal=True)
    return flash(call.problem, call.operands)[0]


def gradients(q, k, v):
    return jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("function", [attend, gradients])
def test_memory_is_linear_in_the_length(function):
    short, long = (planned_bytes(function, length) for length in (16384, 65536))
    arrays = 65536 * 64 * 4
    assert long - short < 6 * arrays
    assert long < 65536**2 * 4 / 100  # a score matrix, and two orders of magnitude to spare


@pytest.mark.parametrize(
    "order",
    [first, forward_over_reverse, reverse_over_forward, reverse_over_reverse, thrice_reverse],
)
def test_memory_is_linear_in_the_length_at_any_order(order):
    """Of more heads than a tile holds."""

    def loss(qkv):
        call = Call.of(*qkv, causal=True)
        out, lse = flash(call.problem, call.operands)
        return jnp.sin(out).sum() + jnp.sin(lse).sum()

    def derivative(*qkv):
        return order(loss, qkv, qkv)

    short, long = (planned_bytes(derivative, length, heads=4) for length in (4096, 8192))
    assert long < 2.2 * short


def test_grouped_keys_are_not_repeated():
    q, k = jnp.zeros((1, 8, 640, 16)), jnp.zeros((1, 2, 640, 16))
    problem = Call.of(q, k, k).problem
    text = str(
        jax.make_jaxpr(partial(forward, problem))(numbered(problem, Call.of(q, k, k).operands))
    )
    assert "f64[1,2,640,16]" in text  # K and V as they came
    tile = tile_sizes(problem)
    assert f"f64[1,8,{tile.keys},16]" not in text
    assert f"f64[1,2,4,{tile.keys},16]" not in text


def by_number(problem, operands, place):
    """A rule that asks where a tile stands along every axis."""
    b, h = place.batch[:, None, None, None], place.heads[None, :, None, None]
    return (3 * b + 5 * h + place.i + place.j) % 4 != 0


@pytest.mark.parametrize("tiles", [Tiles(1, 1, 16, 32), Tiles(2, 2, 16, 32)])
def test_a_tile_knows_its_batch_rows_heads_queries_and_keys(monkeypatch, tiles):
    """Under vmap, whose axis becomes part of the batch, each member counts its rows from 0."""
    monkeypatch.setattr("heedful.flash.scores.visible", by_number)
    monkeypatch.setattr("heedful.plain.visible", by_number)
    monkeypatch.setattr("heedful.rules.visibility.hiding", lambda problem: {"by_number": ()})
    problem, operands, _, _ = ask()
    ours, whole = partial(flash, problem, tiles=tiles), partial(plain, problem)
    assert_close(ours(operands), whole(operands))
    members = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x], axis=1), operands)
    assert_close(jax.vmap(ours, in_axes=1)(members), jax.vmap(whole, in_axes=1)(members))


def test_a_call_on_arrays_that_a_trace_closes_over_leaves_nothing_behind():
    q = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 6, 4)))  # a shape of its own

    def closed_over(s):
        return s * heedful.attention(q, q, q, backend="jax:flash")

    inside = jax.jit(closed_over)(1.0)
    jax.eval_shape(closed_over, 1.0)
    looped = jax.lax.fori_loop(0, 2, lambda _, s: s + closed_over(1.0).sum(), 0.0)
    outside = closed_over(1.0)
    np.testing.assert_allclose(outside, inside, rtol=1e-6)
    np.testing.assert_allclose(looped, 2 * outside.sum(), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(closed_over)(2.0), 2 * outside, rtol=1e-6)
