"""Decoding against a float64 computation in NumPy, row by row, that keeps each row's tokens in a list.

Chunks of keys are small, so that a cache has several; and no size divides its room, so that the last one
overlaps the one before it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heedful
from compilations import counted
from heedful import cache
from heedful_crosscheck.callers import QUICKLY

B, Q_HEADS, KV_HEADS, DIM, VALUE_DIM, ROOM = 4, 4, 2, 8, 6, 23
LENGTHS = [0, 3, 17, 9]
POSITIONS, PAGE, BLOCKS = 32, 4, 6
ANGLES = np.random.default_rng(1).uniform(0, 6, (POSITIONS, 3))
SLOPES = np.array([0.5, 0.25, -0.1, 0.0])
SINKS = np.array([0.5, -1.0, 2.0, 0.0])


@pytest.fixture(autouse=True)
def float64_and_small_chunks(monkeypatch):
    monkeypatch.setattr(cache, "TILE_BYTES", 8 * KV_HEADS * DIM * 8)  # 8 keys
    with jax.enable_x64(True):
        yield


def rotated(x, place, interleaved):
    """A token's (H, D) rotated in complex numbers."""
    turn = np.exp(1j * ANGLES[place])
    size = 2 * len(turn)
    x = np.array(x, np.float64)
    real, imaginary = (
        (slice(0, size, 2), slice(1, size, 2))
        if interleaved
        else (slice(size // 2), slice(size // 2, size))
    )
    turned = (x[:, real] + 1j * x[:, imaginary]) * turn
    x[:, real], x[:, imaginary] = turned.real, turned.imag
    return x


def expected(
    q,
    keys,
    values,
    k,
    v,
    *,
    rotary=None,
    causal=False,
    window=None,
    scale=DIM**-0.5,
    softcap=None,
    sinks=None,
    alibi_slopes=None,
):
    """out, lse and each row's tokens afterwards; q, k and v are (B, S, H, D), rows lists of (H, D)."""
    out = np.zeros((*q.shape[:3], VALUE_DIM))
    lse = np.full((len(q), q.shape[2], q.shape[1]), -np.inf)
    rows = []
    for b in range(len(q)):
        before, of_keys, of_values = len(keys[b]), list(keys[b]), list(values[b])
        queries = [np.float64(x) for x in q[b]]
        if k is not None:
            of_values += list(v[b])
            of_new = list(k[b])
            if rotary is not None:
                of_new = [rotated(x, before + n, rotary) for n, x in enumerate(of_new)]
                moving = causal or window is not None
                queries = [rotated(x, before + n * moving, rotary) for n, x in enumerate(queries)]
            of_keys += of_new
        rows.append((of_keys, of_values))
        for i, query in enumerate(queries):
            place = i + len(of_keys) - len(queries)
            for h in range(Q_HEADS):
                scores, seen = [], []
                for j, key in enumerate(of_keys):
                    left, right = window or (None, None)
                    if (causal and j > place) or (left is not None and j < place - left):
                        continue
                    if right is not None and j > place + right:
                        continue
                    s = scale * query[h] @ np.float64(key[h // 2])
                    s = s if softcap is None else softcap * np.tanh(s / softcap)
                    s -= 0 if alibi_slopes is None else alibi_slopes[h] * abs(place - j)
                    scores.append(s)
                    seen.append(np.float64(of_values[j][h // 2]))
                weights = np.exp(scores)
                total = weights.sum() + (0 if sinks is None else np.exp(sinks[h]))
                if total:
                    lse[b, h, i] = np.log(total)
                    out[b, i, h] = sum(
                        (w / total * x for w, x in zip(weights, seen, strict=True)), 0
                    )
    return out, lse, rows


def ask(queries=1, new=1, lengths=LENGTHS, dtype=np.float64, seed=0):
    """q, each row's keys and values, k and v; (B, S, H, D)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))

    q = normal(len(lengths), queries, Q_HEADS, DIM)
    rows = [[normal(n, KV_HEADS, size) for n in lengths] for size in (DIM, VALUE_DIM)]
    k, v = (normal(len(lengths), new, KV_HEADS, size) if new else None for size in (DIM, VALUE_DIM))
    return q, *rows, k, v


def laid_out(question, layout, paged):
    """The arguments of `decode`, what nobody may see filled with NaN, and how to read a row again."""
    q, keys, values, k, v = question
    lengths = np.array([len(x) for x in keys], np.int32)
    turn = (lambda x: x) if layout == "bshd" else (lambda x: x.swapaxes(1, 2))
    table = None
    if paged:
        table = np.random.default_rng(5).permutation(len(q) * BLOCKS).reshape(len(q), BLOCKS)
        shape = (len(q) * BLOCKS, PAGE)
    else:
        shape = (len(q), ROOM)

    def row(x, b):
        """The places of a row in a cache of either kind, (tokens, Hkv, ·), in layout bshd."""
        return np.concatenate(x[table[b]]) if paged else x[b]

    caches = []
    for of_rows in (keys, values):
        x = np.full((*shape, *of_rows[0].shape[1:]), np.nan, q.dtype)
        for b, tokens in enumerate(of_rows):
            for place, token in enumerate(tokens):
                if paged:
                    x[table[b, place // PAGE], place % PAGE] = token
                else:
                    x[b, place] = token
        caches.append(turn(x))
    given = {"cache_lengths": lengths, "layout": layout}
    if paged:
        used = np.arange(BLOCKS) * PAGE < lengths[:, None] + (0 if k is None else k.shape[1])
        given["block_table"] = np.where(used, table, -7).astype(np.int32)
    arrays = [turn(q), *caches, *(turn(x) for x in (k, v) if x is not None)]
    return arrays, given, lambda x, b: row(turn(np.asarray(x)), b)


def check(question, layout, paged, convert=jnp.asarray, tolerance=1e-12, rotary=None, **options):
    arrays, given, row = laid_out(question, layout, paged)
    if rotary is not None:
        of_angles = {"rotary_cos": np.cos(ANGLES), "rotary_sin": np.sin(ANGLES)}
        given |= {
            name: convert(x.astype(np.float32 if tolerance > 1e-6 else np.float64))
            for name, x in of_angles.items()
        }
        given["rotary_interleaved"] = rotary
    arrays = [convert(x) for x in arrays]
    found = heedful.decode(*arrays, **given, **options)
    out, lse, rows = expected(*question, rotary=rotary, **options)
    if layout == "bhsd":
        out = out.swapaxes(1, 2)
    close = partial(np.testing.assert_allclose, rtol=0, atol=tolerance)
    close(np.float64(found.out), out)
    close(np.float64(found.lse), lse)
    assert found.out.dtype == arrays[0].dtype
    for x, n in ((found.k_cache, 0), (found.v_cache, 1)):
        for b, of_row in enumerate(rows):
            tokens = np.float64(row(x, b))
            close(tokens[: len(of_row[n])], np.reshape(of_row[n], (-1, *tokens.shape[1:])))
            assert np.isnan(tokens[len(of_row[n]) :]).all()
    return arrays, found


OPTIONS = {
    "full": {},
    "rotary": {"rotary": True},
    "rotary, causal": {"rotary": False, "causal": True},
    "window": {"window": (5, 1), "softcap": 0.8, "rotary": True},
    "window, causal": {"window": (4, None), "causal": True, "scale": 0.3},
    "sinks and alibi": {"sinks": SINKS, "alibi_slopes": SLOPES},
}


FORMS = {
    "rows": ("bhsd", False, (1, 1)),
    "rows, turned": ("bshd", False, (3, 4)),
    "pages": ("bshd", True, (1, 1)),
    "pages, turned": ("bhsd", True, (3, 4)),
}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("full", "rows, turned"),
        ("rotary", "pages, turned"),
        ("rotary, causal", "rows, turned"),
        ("rotary, causal", "pages"),
        ("window", "pages, turned"),
        ("window, causal", "rows"),
        ("sinks and alibi", "rows, turned"),
    ],
)
def test_it_is_what_the_rows_say(name, form):
    layout, paged, sizes = FORMS[form]
    check(ask(*sizes), layout, paged, **OPTIONS[name])


def test_half_precision_keeps_its_dtype():
    question = ask(2, 2, dtype="bfloat16")
    _, found = check(question, "bshd", False, tolerance=0.03, causal=True, rotary=True)
    assert found.lse.dtype == "float32"


def test_nothing_new():
    arrays, found = check(ask(2, 0), "bshd", True, causal=True)
    assert found.k_cache is arrays[1] and found.v_cache is arrays[2]


def test_a_cache_is_full_where_nothing_else_is_said():
    q, keys, values, *_ = question = ask(1, 0, [ROOM] * B)
    arrays = [jnp.asarray(x) for x in laid_out(question, "bhsd", False)[0]]
    for given, held in (({}, ROOM), ({"cache_lengths": 7}, 7)):
        wanted, *_ = expected(q, *([x[:held] for x in rows] for rows in (keys, values)), None, None)
        out = heedful.decode(*arrays, **given).out
        np.testing.assert_allclose(out.swapaxes(1, 2), wanted, atol=1e-12)


def test_numpy_in_numpy_out_and_no_cache_is_written_to():
    question = ask()
    arrays, given, _ = laid_out(question, "bhsd", False)
    before = [x.copy() for x in arrays]
    _, found = check(question, "bhsd", False, convert=np.asarray)
    assert all(isinstance(x, np.ndarray) and x.flags.writeable for x in found)
    found = heedful.decode(*arrays, **given)
    for x, y in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, y)


# Nothing is copied, nothing compiles anew


def test_a_cache_is_taken_over_and_written_in_place():
    arrays, given, _ = laid_out(ask(), "bhsd", True)
    q, k_cache, v_cache, k, v = map(jnp.array, arrays)
    places = [x.unsafe_buffer_pointer() for x in (k_cache, v_cache)]
    found = heedful.decode(q, k_cache, v_cache, k, v, **given)
    assert k_cache.is_deleted() and v_cache.is_deleted()
    assert [x.unsafe_buffer_pointer() for x in found[2:]] == places


@pytest.mark.parametrize("paged", [False, True])
def test_a_step_needs_no_memory_that_grows_with_the_cache(paged):
    """Whose caches alias what comes back; in bfloat16, of which XLA would rather make copies."""
    rows, room, page = 2, 8192, 64
    shape = (rows * room // page, page, KV_HEADS, DIM) if paged else (rows, room, KV_HEADS, DIM)
    table = np.arange(rows * room // page).reshape(rows, -1) if paged else None
    like = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    token = jax.ShapeDtypeStruct((rows, 1, KV_HEADS, DIM), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((rows, 1, Q_HEADS, DIM), jnp.bfloat16)

    def step(k_cache, v_cache, q, k, v, lengths):
        return heedful.decode(
            q, k_cache, v_cache, k, v, cache_lengths=lengths, block_table=table, layout="bshd"
        )

    lengths = jax.ShapeDtypeStruct((rows,), np.int32)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(like, like, q, token, token, lengths)
    memory = lowered.compile().memory_analysis()
    size = np.prod(shape) * like.dtype.itemsize
    assert memory.alias_size_in_bytes >= 2 * size
    assert memory.temp_size_in_bytes < size / 4


@pytest.mark.parametrize("paged", [False, True])
def test_no_token_compiles_anew(paged):
    arrays, given, _ = laid_out(ask(), "bhsd", paged)
    q, k_cache, v_cache, k, v = map(jnp.array, arrays)
    if paged:
        given["block_table"] = np.arange(B * BLOCKS).reshape(B, BLOCKS)
    lengths = jnp.array(given.pop("cache_lengths"))
    one = jnp.ones_like(lengths)

    def token(k_cache, v_cache, lengths):
        found = heedful.decode(
            q, k_cache, v_cache, k, v, cache_lengths=lengths, causal=True, **given
        )
        return *found[2:], lengths + one

    state = token(k_cache, v_cache, lengths)
    with counted() as counts:
        for _ in range(3):
            state = token(*state)
    assert not counts["traced"] and not counts["compiled"]


def test_tokens_in_a_scan_are_those_one_after_the_other():
    q, keys, values, k, v = ask(4, 4)
    arrays, given, _ = laid_out((q, keys, values, k, v), "bshd", False)
    k_cache, v_cache = map(jnp.array, arrays[1:3])
    tokens = [jnp.swapaxes(x, 0, 1)[:, :, None] for x in (q, k, v)]

    def token(state, of_token):
        *caches, lengths = state
        q, k, v = of_token
        found = heedful.decode(q, *caches, k, v, cache_lengths=lengths, layout="bshd")
        return (found.k_cache, found.v_cache, lengths + 1), found.out[:, 0]

    state = k_cache, v_cache, jnp.asarray(given["cache_lengths"])
    _, out = jax.jit(partial(jax.lax.scan, token))(state, tokens)
    wanted, *_ = expected(q, keys, values, k, v, causal=True)
    np.testing.assert_allclose(jnp.swapaxes(out, 0, 1), wanted, atol=1e-12)


@pytest.mark.parametrize("paged", [False, True])
def test_what_does_not_fit_is_not_written(paged):
    """Where lengths cannot be read."""
    arrays, given, _ = laid_out(ask(1, 3), "bshd", paged)
    q, k_cache, v_cache, k, v = map(jnp.array, arrays)
    if paged:
        given["block_table"] = np.arange(B * BLOCKS).reshape(B, BLOCKS)
    room = PAGE * BLOCKS if paged else ROOM
    given["cache_lengths"] = jnp.array([0, room, room + 5, -4])
    step = jax.jit(
        lambda *x, cache_lengths: heedful.decode(*x, **given | {"cache_lengths": cache_lengths})
    )
    found = step(q, k_cache, v_cache, k, v, cache_lengths=given["cache_lengths"])
    before, after = np.asarray(k_cache), np.asarray(found.k_cache)
    rows = after.reshape(B, -1, KV_HEADS, DIM), before.reshape(B, -1, KV_HEADS, DIM)
    np.testing.assert_array_equal(rows[0][0, :3], k[0])
    np.testing.assert_array_equal(rows[0][1:], rows[1][1:])


# Transformations


def test_gradients_are_those_of_attention():
    """Of queries, caches, what is appended, sinks and slopes."""
    arrays, given, _ = laid_out(ask(2, 2), "bshd", False)
    arrays = [jnp.nan_to_num(jnp.asarray(x)) for x in arrays]
    lengths = jnp.asarray(given["cache_lengths"])
    moving = *arrays, jnp.asarray(SINKS), jnp.asarray(SLOPES)

    def decoded(q, k_cache, v_cache, k, v, sinks, slopes):
        return heedful.decode(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_lengths=lengths,
            layout="bshd",
            causal=True,
            sinks=sinks,
            alibi_slopes=slopes,
        )[:2]

    def attended(q, k_cache, v_cache, k, v, sinks, slopes):
        place = jnp.arange(ROOM, dtype=lengths.dtype)[None] - lengths[:, None]
        fresh = ((place >= 0) & (place < 2))[..., None, None]
        rows = jnp.arange(B)[:, None]
        k, v = (
            jnp.where(fresh, new[rows, jnp.clip(place, 0, 1)], x)
            for x, new in ((k_cache, k), (v_cache, v))
        )
        return heedful.attention(
            q,
            k,
            v,
            kv_lengths=lengths + 2,
            layout="bshd",
            causal=True,
            sinks=sinks,
            alibi_slopes=slopes,
            return_lse=True,
            backend="jax:plain",
        )

    def gradients(attend):
        def loss(*moving):
            out, lse = attend(*moving)
            return jnp.sin(out).sum() + jnp.sin(lse).sum()

        gradient = jax.grad(loss, tuple(range(len(moving))))
        return jax.jit(gradient, compiler_options=dict(QUICKLY))(*moving)

    for x, y in zip(gradients(decoded), gradients(attended), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)
        assert np.abs(y).max() > 1e-3


def test_vmap_is_a_loop():
    questions = [ask(seed=seed, lengths=n) for seed, n in enumerate(([2, 9], [13, 0]))]
    rows = [laid_out(question, "bshd", False) for question in questions]
    stacked = [jnp.stack(x) for x in zip(*(arrays for arrays, *_ in rows), strict=True)]
    lengths = jnp.stack([given["cache_lengths"] for _, given, _ in rows])

    def attend(*x):
        return heedful.decode(*x[:-1], cache_lengths=x[-1], layout="bshd")

    attend_all = jax.jit(jax.vmap(attend), compiler_options=dict(QUICKLY))
    found = attend_all(*stacked, lengths)
    for n, question in enumerate(questions):
        for x, y in zip(found[:2], expected(*question)[:2], strict=True):
            np.testing.assert_allclose(x[n], y, atol=1e-12)


# What is refused


def zeros(*shape, dtype=np.float64):
    return np.zeros(shape, dtype)


PAGES = {
    "block_table": np.arange(12).reshape(2, 6),
    "k_cache": zeros(12, 2, 4, 8),
    "v_cache": zeros(12, 2, 4, 6),
}
ANGLES_GIVEN = {"rotary_cos": zeros(32, 3), "rotary_sin": zeros(32, 3)}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"cache_lengths": None}, ValueError, "takes cache_lengths.*Got none"),
        (
            {"cache_lengths": 21},
            ValueError,
            "between 0 and 20: there is room for 21 tokens with the 1 new",
        ),
        (
            {"cache_lengths": np.array([3, -1])},
            ValueError,
            "cache_lengths must lie between 0.*Got -1",
        ),
        ({"cache_lengths": np.array([3])}, ValueError, r"\(B,\) = \(2,\)\. Got shape \(1,\)"),
        ({"cache_lengths": zeros(2)}, TypeError, r"cache_lengths must hold integers\. Got float64"),
        ({"cache_lengths": [3, 4]}, TypeError, "cache_lengths must be a JAX array"),
        ({"v": None}, ValueError, "k and v are appended together. Got k without v"),
        (
            {"k": zeros(2, 1, 2, 8)},
            ValueError,
            r"k must fit its cache, \(2, 2, 2, 8\).*Got \(2, 1, 2, 8\)",
        ),
        ({"v": zeros(2, 2, 2, 6)}, ValueError, r"v must fit its cache, \(2, 2, 1, 6\)"),
        (
            {"v_cache": zeros(2, 2, 20, 6)},
            ValueError,
            "k_cache and v_cache must have the same shape up to",
        ),
        (
            {"k_cache": zeros(2, 2, 21, 8, dtype=np.float32)},
            TypeError,
            "one dtype. Got.*k_cache of float32",
        ),
        (
            {"q": zeros(2, 4, 8)},
            ValueError,
            r"q must have four axes, \(B, H, S, D\).*Got \(2, 4, 8\)",
        ),
        ({"q": zeros(3, 4, 1, 8), "k": None, "v": None}, ValueError, "same batch axes"),
        ({"k_cache": jnp.zeros((2, 2, 21, 8))}, TypeError, "one framework"),
        ({"causal": "top_left"}, ValueError, "causal must be True or False"),
        ({"layout": "hsd"}, ValueError, 'layout must be "bhsd" or "bshd"'),
        ({**PAGES, "block_table": np.arange(6)}, ValueError, r"block_table must be \(B, blocks\)"),
        ({**PAGES, "block_table": zeros(2, 6)}, TypeError, "block_table must hold integers"),
        (
            {**PAGES, "block_table": np.array([[0, 12], [1, 2]])},
            ValueError,
            r"pages from 0 to 11.*Got 12 at \[0, 1\], where row 0 has 5 tokens on pages of 4",
        ),
        ({**PAGES, "cache_lengths": 24}, ValueError, "between 0 and 23: there is room for 24"),
        (
            {"rotary_cos": zeros(32, 3)},
            ValueError,
            "both rotary_cos and rotary_sin. Got rotary_cos alone",
        ),
        ({"rotary_interleaved": False}, ValueError, "Got rotary_interleaved=False alone"),
        ({**ANGLES_GIVEN, "k": None, "v": None}, ValueError, "Got no k and v"),
        (
            {"rotary_cos": zeros(20, 3), "rotary_sin": zeros(20, 3)},
            ValueError,
            "room, 21.*Got .20, 3",
        ),
        (
            {**ANGLES_GIVEN, "q": zeros(2, 4, 2, 8), "causal": True},
            ValueError,
            "as many new keys as queries",
        ),
    ],
)
def test_one_clear_error_each(change, error, says):
    arguments = {
        "q": zeros(2, 4, 1, 8),
        "k_cache": zeros(2, 2, 21, 8),
        "v_cache": zeros(2, 2, 21, 6),
        "k": zeros(2, 2, 1, 8),
        "v": zeros(2, 2, 1, 6),
        "cache_lengths": 4,
        **change,
    }
    with pytest.raises(error, match=says):
        heedful.decode(**arguments)


def test_one_array_as_both_caches_is_refused():
    x = jnp.zeros((2, 2, 21, 8))
    with pytest.raises(ValueError, match="must be two arrays"):
        heedful.decode(x[:, :, :1], x, x, x[:, :, :1], x[:, :, :1], cache_lengths=0)


def test_a_mesh_with_explicit_axes_is_refused():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.device_put(
        jnp.zeros((2, 2, 5, 8)), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    )
    with pytest.raises(ValueError, match=r"no arrays on a mesh with explicit axes\. Got q of"):
        heedful.decode(x, x, x)


def test_torch_tensors_are_refused():
    torch = pytest.importorskip("torch", reason="core is tested without torch too")
    x = torch.zeros((2, 2, 5, 8))
    with pytest.raises(TypeError, match=r"takes JAX and NumPy arrays\. Got torch tensors"):
        heedful.decode(x, x, x)
