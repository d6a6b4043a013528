"""Packed sequences against the reference asked for each by itself; which tiles they visit, by count.

Tiles are small, so that there are some within a sequence, some that hold several, and some of both.
"""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import heedful
import reference
from compilations import counted
from heedful.flash import flash
from heedful.flash.tiles import Tiles, keys_met, queries_met, start
from heedful.plain import plain
from heedful.rules.place import Place
from heedful.rules.visibility import visible
from heedful.varlen import operands_of, packed
from heedful_crosscheck.callers import QUICKLY

# Of queries and keys: none, of one, of both; fewer queries than keys, more, as many.
LENGTHS = [(0, 0), (5, 9), (0, 3), (7, 0), (11, 4), (1, 13), (0, 0), (10, 10), (3, 1), (0, 0)]
SPARE = 4, 6  # rows of q and of k behind the last sequence

OPTIONS = {
    "full": {},
    "scale": {"scale": 0.3},
    "causal": {"causal": True},
    "top left": {"causal": "top_left"},
    "window": {"window": (3, 2)},
    "window, open": {"window": (None, 1), "softcap": 1.5},
    "window, causal": {"window": (4, None), "causal": True},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": np.array([0.5, -1.0, 2.0, 0.0]), "causal": True},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25, -0.1, 0.0])},
    "alibi, causal": {"alibi_slopes": np.array([0.5, 0.25, -0.1, 0.0]), "causal": True},
    "alibi of each sequence": {
        "alibi_slopes": np.linspace(-0.2, 0.5, 4 * len(LENGTHS)).reshape(-1, 4)
    },
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    small = partial(flash, tiles=Tiles(batch=1, kv_heads=1, queries=6, keys=8))
    monkeypatch.setattr(import_module("heedful.backends.jax_flash"), "flash", small)


def cumulated(lengths):
    return np.cumsum([(0, 0), *lengths], axis=0, dtype=np.int32).T


def ask(lengths=LENGTHS, spare=SPARE, seed=0, q_heads=4, kv_heads=2):
    """q, k, v and the cumulated lengths, and what is told of out and lse."""
    rng = np.random.default_rng(seed)
    cu_q, cu_k = cumulated(lengths)
    q_total, k_total = cu_q[-1] + spare[0], cu_k[-1] + spare[1]
    q, out_cotangent = (rng.standard_normal((q_total, q_heads, n)) for n in (8, 6))
    k, v = (rng.standard_normal((k_total, kv_heads, n)) for n in (8, 6))
    return (q, k, v, cu_q, cu_k), out_cotangent, rng.standard_normal((q_heads, q_total))


def expected(arguments, out_cotangent, lse_cotangent, **options):
    """out, lse, dq, dk, dv and the options' gradients, of one sequence after the other."""
    q, k, v, cu_q, cu_k = arguments
    out, lse = np.zeros(out_cotangent.shape), np.full(lse_cotangent.shape, -np.inf)
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    of_options = 0
    each = options.pop("alibi_slopes", None)
    of_each = each is not None and each.ndim == 2
    if "sinks" in options:  # of rows that see nothing too
        lse[:] = options["sinks"][:, None]
        of_options = lse_cotangent[:, cu_q[-1] :].sum(axis=1)
    for n in range(len(cu_q) - 1):
        i, j = (slice(cu[n], cu[n + 1]) for cu in (cu_q, cu_k))
        if each is not None:
            options["alibi_slopes"] = each[n] if of_each else each
        out[i], lse[:, i], dq[i], dk[j], dv[j], *found = reference.attention(
            q[i],
            k[j],
            v[j],
            out_cotangent[i],
            lse_cotangent[:, i],
            layout="bshd",
            **options,
        )
        found = sum(x for x in found if x is not None)
        of_options = [*(of_options or []), found] if of_each else of_options + found
    return out, lse, dq, dk, dv, of_options


def out_lse_and_gradients(arguments, out_cotangent, lse_cotangent, **options):
    q, k, v, cu_q, cu_k = map(jnp.asarray, arguments)
    moving = {n: jnp.asarray(options.pop(n)) for n in ("sinks", "alibi_slopes") if n in options}

    def loss(q, k, v, moving):
        out, lse = heedful.flash_attention_varlen(q, k, v, cu_q, cu_k, **options, **moving)
        seen = jnp.where(lse == -jnp.inf, 0, lse)
        return jnp.vdot(out, out_cotangent) + jnp.vdot(seen, lse_cotangent), (out, lse)

    gradients, results = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, moving)
    *of_arrays, of_options = gradients
    return *results, *of_arrays, *(of_options.values() or [0])


def assert_close(found, wanted, tolerance=1e-10):
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_is_attended_by_itself(name):
    question, options = ask(), OPTIONS[name]
    found = jax.jit(partial(out_lse_and_gradients, **options))(*question)
    assert_close(found, expected(*question, **options))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (5, 1)}])
def test_sequences_of_random_lengths(options):
    """So many each time that they are compiled once."""
    ours = jax.jit(partial(out_lse_and_gradients, **options))
    for seed in range(4):
        rng = np.random.default_rng(seed)
        parts = (rng.multinomial(n, rng.dirichlet(np.full(9, 0.4))) for n in (50, 60))
        question = ask(list(zip(*parts, strict=True)), (2, 0), seed)
        assert_close(ours(*question), expected(*question, **options))


@pytest.mark.usefixtures("small_tiles")
def test_dropout_is_that_of_one_row():
    """Which `reference.attention` is asked for, with a mask for what else hides keys."""
    (q, k, v, cu_q, cu_k), *cotangents = question = ask()
    mask = np.zeros((len(q), len(k)), bool)
    for n in range(len(LENGTHS)):
        for i in range(cu_q[n], cu_q[n + 1]):
            place = i + cu_k[n + 1] - cu_q[n + 1]
            begin = max(cu_k[n], place - 4)
            mask[i, begin : max(begin, place + 1)] = True
    told = {"dropout_rate": 0.3, "dropout_seed": 7}
    ours = partial(out_lse_and_gradients, **told, causal=True, window=(4, None))
    found = jax.jit(ours, compiler_options=dict(QUICKLY))(*question)
    wanted = reference.attention(q, k, v, *cotangents, mask=mask, **told, layout="bshd")
    assert_close(found[:5], wanted[:5])


@pytest.mark.parametrize("lengths", [[], [(0, 5)], [(4, 0)], [(1, 1)]])
@pytest.mark.parametrize("spare", [(0, 0), (2, 3)])
def test_few_sequences_or_none(lengths, spare):
    question = ask(lengths or np.zeros((0, 2), int), spare)
    assert_close(out_lse_and_gradients(*question, causal=True), expected(*question, causal=True))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_numpy_arrays_and_integers_of_any_kind(dtype):
    (q, k, v, cu_q, cu_k), *cotangents = ask()
    out, lse = heedful.flash_attention_varlen(
        q, k, v, cu_q.astype(dtype), cu_k.astype(dtype), causal=True
    )
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    assert_close((out, lse), expected((q, k, v, cu_q, cu_k), *cotangents, causal=True)[:2])


def test_what_stands_behind_the_last_sequence_plays_no_part():
    question = ask()
    (q, k, v, cu_q, cu_k), out_cotangent, lse_cotangent = question
    wanted = out_lse_and_gradients(*question, causal=True)
    for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k), (out_cotangent, cu_q)):
        x[cu[-1] :] = np.nan
    found = out_lse_and_gradients((q, k, v, cu_q, cu_k), *question[1:], causal=True)
    assert np.isnan(out_cotangent).any() and lse_cotangent.all()
    assert_close(found, wanted)
    assert not np.asarray(found[0][cu_q[-1] :]).any()
    assert (found[1][:, cu_q[-1] :] == -np.inf).all()


def test_half_precision_keeps_its_dtype():
    (q, k, v, cu_q, cu_k), *_ = ask()
    q, k, v = (jnp.asarray(x, "bfloat16") for x in (q, k, v))
    out, lse = heedful.flash_attention_varlen(q, k, v, cu_q, cu_k)
    assert (out.dtype, lse.dtype) == ("bfloat16", "float32")
    exact, _ = heedful.flash_attention_varlen(*(np.float64(x) for x in (q, k, v)), cu_q, cu_k)
    np.testing.assert_allclose(np.float64(out), exact, atol=0.03)


def test_vmap_is_a_loop():
    """Over packed rows of other lengths, and over lengths alone."""
    lengths = [(3, 9), (0, 4), (8, 8)], [(7, 10), (4, 0), (0, 11)], [(0, 0), (0, 0), (11, 21)]
    rows = [ask(of_row, (0, 0), seed) for seed, of_row in enumerate(lengths)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    ours = jax.jit(partial(out_lse_and_gradients, window=(4, 1)))
    for n, together in enumerate(zip(*jax.jit(jax.vmap(ours))(*stacked), strict=True)):
        assert_close(together, ours(*rows[n]))
    (q, k, v, *_), *_ = rows[0]
    cu_q, cu_k = (jnp.stack([row[0][n] for row in rows]) for n in (3, 4))
    q, k, v = map(jnp.asarray, (q, k, v))
    causal = partial(heedful.flash_attention_varlen, q, k, v, causal=True)
    for n, together in enumerate(zip(*jax.vmap(causal)(cu_q, cu_k), strict=True)):
        assert_close(together, causal(cu_q[n], cu_k[n]))


def test_forward_mode_and_second_order():
    question = ask(LENGTHS[1:6])
    (q, k, v, cu_q, cu_k), out_cotangent, _ = question
    q, k, v = map(jnp.asarray, (q, k, v))
    along = tuple(jnp.sin(7 * x) for x in (q, k, v))

    @partial(jax.jit, static_argnums=0, compiler_options=dict(QUICKLY))
    def derivatives(attend):
        def loss(q, k, v):
            call = packed(q, k, v, cu_q, cu_k, causal=True)
            out, _ = attend(call.problem, operands_of(call))
            return jnp.vdot(jnp.sin(out[0].swapaxes(0, 1)), out_cotangent)

        slope = jax.jvp(loss, (q, k, v), along)[1]
        return slope, *jax.jvp(jax.grad(loss, (0, 1, 2)), (q, k, v), along)[1]

    small = partial(flash, tiles=Tiles(1, 1, 6, 8))
    assert_close(derivatives(small), derivatives(plain))


def test_new_lengths_neither_trace_nor_compile():
    (q, k, v, *_), *_ = ask()
    q, k, v = map(jnp.asarray, (q, k, v))

    def call(lengths):
        cu_q, cu_k = cumulated(lengths)
        return heedful.flash_attention_varlen(q, k, v, cu_q, cu_k, causal=True)

    call(LENGTHS)
    with counted() as counts:
        call(LENGTHS[::-1])
        call([(0, 0)] * len(LENGTHS))
    assert not counts["traced"] and not counts["compiled"]


def test_an_exported_program_is_right_for_any_number_of_tokens():
    of_q, of_k = jax.export.symbolic_shape("q, k")
    (q, k, v, cu_q, cu_k), *_ = ask()

    def gradients(q, k, v, cu_q, cu_k):
        attend = partial(heedful.flash_attention_varlen, causal=True)
        return jax.grad(lambda *x: jnp.sin(attend(*x, cu_q, cu_k)[0]).sum(), (0, 1, 2))(q, k, v)

    sizes = zip((q, k, v), (of_q, of_k, of_k), strict=True)
    shapes = [jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype) for x, n in sizes]
    program = jax.export.export(jax.jit(gradients))(*shapes, cu_q, cu_k)
    assert_close(program.call(q, k, v, cu_q, cu_k), gradients(q, k, v, cu_q, cu_k))


# Which tiles are visited


@partial(jax.jit, static_argnums=(0, 1, 2))
def all_met(seen, tiles, problem, operands):
    """`seen` of each tile in turn."""
    length, own = (
        (problem.q_length, tiles.queries) if seen is keys_met else (problem.kv_length, tiles.keys)
    )
    begins = [start(jnp.int32(i), length, own) for i in range(-(-length // own))]
    met = [seen(problem, operands, tiles, begin) for begin in begins]
    return list(zip(begins, met, strict=True))


@given(
    lengths=st.lists(st.tuples(*[st.integers(0, 5)] * 2), min_size=5, max_size=5),
    size=st.sampled_from([(3, 8), (9, 4)]),
    option=st.sampled_from(["full", "causal", "top left", "window", "window, causal"]),
)
def test_no_tile_that_somebody_sees_is_left_out(lengths, size, option):
    q, k = np.zeros((25, 1, 1)), np.zeros((26, 1, 1))
    call = packed(q, k, k, *cumulated(lengths), **{"causal": False, **OPTIONS[option]})
    problem, operands = call.problem, operands_of(call)
    place = Place.whole(problem, partial(np.arange, dtype=np.int32))
    see = np.broadcast_to(visible(problem, operands, place), (1, 1, 25, 26))[0, 0]
    tiles = Tiles(1, 1, *size)
    for pairs, seen, own, other in (
        (see, keys_met, tiles.queries, tiles.keys),
        (see.T, queries_met, tiles.keys, tiles.queries),
    ):
        for begin, met in jax.tree.map(int, all_met(seen, tiles, problem, operands)):
            for j in pairs[begin : begin + own].any(axis=0).nonzero()[0]:
                assert met.first <= j // other < met.end
            assert met.clear == met.clear_end


def visited(seen, call, size):
    """How many tiles are visited, of so many queries and keys each."""
    operands = jax.tree.map(jnp.asarray, operands_of(call))
    length = call.problem.q_length
    total = 0
    for begin in range(0, length, size):
        met = seen(call.problem, operands, Tiles(1, 1, size, size), jnp.int32(begin))
        total += int(met.end) - int(met.first)
    return total


@pytest.mark.parametrize("seen", [keys_met, queries_met])
@pytest.mark.parametrize(
    ("options", "of_each"),
    [({"causal": False}, 16), ({"causal": True}, 10), ({"causal": True, "window": (10, 0)}, 7)],
)
@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_tiles_visited_grow_with_the_sequences_and_not_with_all_tokens(
    sequences, options, of_each, seen
):
    (q, k, v, cu_q, cu_k), *_ = ask([(40, 40)] * sequences, (0, 0))
    call = packed(q, k, v, cu_q, cu_k, **options)
    assert visited(seen, call, 10) == sequences * of_each


@pytest.mark.parametrize("seen", [keys_met, queries_met])
def test_tokens_behind_the_last_sequence_are_not_visited(seen):
    (q, k, v, cu_q, cu_k), *_ = ask([(40, 40)], (120, 120))
    assert visited(seen, packed(q, k, v, cu_q, cu_k, causal=False), 20) == 4


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"cu_seqlens_q": [0, 5, 9]}, TypeError, "cu_seqlens_q must be a JAX array.*Got list"),
        (
            {"cu_seqlens_k": np.array([0.0, 5, 9])},
            TypeError,
            r"cu_seqlens_k must hold integers\. Got float64",
        ),
        (
            {"cu_seqlens_q": np.array([[0, 5, 9]])},
            ValueError,
            r"of shape \(sequences \+ 1,\)\. Got \(1, 3\) and \(3,\)",
        ),
        ({"cu_seqlens_k": np.array([0, 5])}, ValueError, r"Got \(3,\) and \(2,\)"),
        (
            {"cu_seqlens_q": np.array([1, 5, 9])},
            ValueError,
            "cu_seqlens_q must begin with 0. Got 1",
        ),
        (
            {"cu_seqlens_k": np.array([0, 5, 4])},
            ValueError,
            r"cu_seqlens_k must not fall\. Got 4 behind 5, at \[2\]",
        ),
        (
            {"cu_seqlens_k": np.array([0, 5, 11])},
            ValueError,
            "cu_seqlens_k must end within k, which has 10 tokens. Got 11",
        ),
        ({"q": np.zeros((1, 9, 4, 8))}, ValueError, r"must be packed: .*Got q \(1, 9, 4, 8\), k"),
        ({"k": np.zeros((9, 2, 8))}, ValueError, "k and v must have the same length"),
        ({"alibi_slopes": np.zeros((2, 3))}, ValueError, r"alibi_slopes must .*\(Hq,\) = \(4,\)"),
        ({"alibi_slopes": np.zeros((3, 4))}, ValueError, r"\(sequences, Hq\), .* 2\. Got \(3, 4\)"),
        ({"alibi_slopes": jax.numpy.zeros((2, 4))}, TypeError, "of one framework"),
        ({"dropout_rate": 0.2}, ValueError, "dropout_rate=0.2 needs dropout_seed"),
        ({"window": (1,)}, ValueError, "window must be a pair"),
        ({"causal": 1}, ValueError, "causal must be False, True"),
    ],
)
def test_one_clear_error_each(change, error, says):
    ends = np.array([0, 5, 9])
    arguments = {"q": np.zeros((9, 4, 8)), "k": np.zeros((10, 2, 8)), "v": np.zeros((10, 2, 8))}
    arguments |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, **change}
    with pytest.raises(error, match=says):
        heedful.flash_attention_varlen(**arguments)


def test_torch_tensors_are_refused():
    torch = pytest.importorskip("torch", reason="core is tested without torch too")
    q, cu = torch.zeros((5, 2, 8)), torch.tensor([0, 5])
    with pytest.raises(TypeError, match=r"takes JAX and NumPy arrays\. Got torch tensors"):
        heedful.flash_attention_varlen(q, q, q, cu, cu)


def test_lengths_of_a_trace_are_not_read():
    (q, k, v, cu_q, cu_k), *cotangents = ask()
    traced = jax.jit(partial(heedful.flash_attention_varlen, causal=True))(q, k, v, cu_q, cu_k)
    assert_close(traced, expected((q, k, v, cu_q, cu_k), *cotangents, causal=True)[:2])
