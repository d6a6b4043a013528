"""Decoding: a few queries against a long cache of keys and values, to which new ones are appended.

A cache has room for more tokens than it holds. So it is attended to in chunks of keys, about as large
as a CPU's cache, from the first that a row's queries see to the last: time grows with what a row holds
and not with the room, and a chunk is brought into the flash core's form by itself, from either layout or
from the pages that a block table names. What rows come to is merged from chunk to chunk, as round a ring
of devices. (flash-attn gives its chunks to different processors and merges at the end; here a chunk is
divided among the cores by XLA, whose products over keys and heads fill them: benchmarks/decode.py.)

New keys and values are written into the cache's own memory, which the call takes over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from heedful import dispatch
from heedful.bridges.numpy import through_jax
from heedful.call import Call, options
from heedful.call.arrays import Array, dtype_of, framework_of, is_concrete_on_cpu, shape_of
from heedful.call.checks import (
    check_floating,
    check_integers,
    dtype_of_all,
    framework_of_all,
    is_integral,
    shown,
)
from heedful.call.form import LAYOUTS, Form
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.compiled import compiled
from heedful.flash.autodiff import forward_p
from heedful.flash.forward import Kept, merged, nothing
from heedful.flash.partition import varying_alike
from heedful.flash.scores import numbered
from heedful.flash.tiles import (
    TILE_BYTES,
    Tiles,
    count,
    count_up,
    cut,
    divisor,
    even,
    keys_met,
    over_heads,
    start,
    visit,
)
from heedful.rules.softmax import beyond_the_keys, log_sum_exp


class Decoded(NamedTuple):
    """What `decode` gives.

    Attributes:
        out: shaped like q with v's head size, in q's dtype.
        lse: (B, Hq, Sq), float32 (float64 for float64), natural log.
        k_cache, v_cache: with what was appended; where nothing was, those that came.
    """

    out: Array
    lse: Array
    k_cache: Array
    v_cache: Array


def decode(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    *,
    cache_lengths: int | Array | None = None,
    block_table: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    rotary_interleaved: bool = True,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    layout: str = "bhsd",
) -> Decoded:
    """Appends new keys and values to a cache and attends to all it then holds; by the JAX flash core.

    What `flash_attn_with_kvcache` of flash-attn (2.2 and later) computes. Row b of the batch holds
    cache_lengths[b] tokens before the call and Sk_b = cache_lengths[b] + Snew after it, of which its
    queries are the last: query i stands at p_i = i + Sk_b − Sq in causal, window and ALiBi alike, by the
    contract of `heedful.Problem`. Lengths and block tables are values: no token compiles anew.

    JAX's caches are donated where k and v are given: their memory is written in place, the arrays that
    came are deleted, and those that are returned take over. Under a `jit` of yours that is its
    business: `jax.jit(step, donate_argnums=...)`, or the caches as the carry of a `lax.scan`. NumPy's
    caches are never written to; they are copied in each call.

    Differentiable in all arrays that are not integers, to any order; then the time grows with the room,
    and caches are not donated.

    Args:
        q: queries, (B, Hq, Sq, D), or (B, Sq, Hq, D) in layout "bshd". A JAX or NumPy array of float64,
            float32, float16 or bfloat16.
        k_cache: keys, (B, Hkv, room, D), Hq a multiple of Hkv; framework, dtype and device of q. With a
            block table pages, (pages, Hkv, page size, D), of any size. Or in the order of `layout`.
        v_cache: values, (B, Hkv, room, Dv), or pages of them.
        k: new keys, (B, Hkv, Snew, D), written to the places cache_lengths[b] … of row b.
        v: new values, (B, Hkv, Snew, Dv).
        cache_lengths: how many tokens each row holds without the new ones, (B,) integers or one integer;
            by default, and only without k and v, the cache is full.
        block_table: (B, blocks) integers: tokens n · page size … of row b are page block_table[b, n].
            Rows may share pages they do not write to. Only a chunk of pages is gathered at a time.
            Entries behind a row's tokens may be anything.
        rotary_cos, rotary_sin: (positions, R / 2), no fewer positions than there is room; R ≤ D. The
            first R numbers of each new key are rotated by its place, those of query i by
            cache_lengths[b] + i with causal or a window, else by cache_lengths[b]. Of the dtype of q, or
            its accumulator's, in which it is computed. Keys in the cache are rotated already.
        rotary_interleaved: whether numbers 2n and 2n + 1 are rotated together (GPT-J), or n and
            n + R / 2 (GPT-NeoX, Llama).
        causal: whether a query sees no keys behind its place.
        window, scale, softcap, sinks, alibi_slopes: as in `heedful.attention`.
        layout: "bhsd", or "bshd" as in flash-attn, of all of them.

    Returns:
        (out, lse, k_cache, v_cache). A row that holds nothing has out 0 and lse −inf (the sink, where
        there is one).

    Raises:
        TypeError, ValueError: the call breaks the contract. Lengths that leave no room for the new
            tokens, and block tables that name no page, are told where they can be read: on a CPU,
            outside of a trace. Elsewhere nothing is written of what does not fit.
        Refusal: the flash core cannot honour the call; says why.
    """
    rotary = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
    new = {"k": k, "v": v}
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    of_rows = {"cache_lengths": cache_lengths, "block_table": block_table}
    of_heads = {"sinks": sinks, "alibi_slopes": alibi_slopes}
    given = _given({"q": q, **caches, **new, **of_rows, **rotary, **of_heads})
    room, appended = _checked_room(given, layout)
    given["cache_lengths"] = lengths = _lengths(given, room, appended)
    if not isinstance(causal, bool | np.bool_):
        raise ValueError(
            f"causal must be True or False. Got {shown(causal)}. "
            "The last query is aligned with the last key of its row."
        )
    rows = k_cache, v_cache
    if block_table is not None:
        rows = tuple(_as_rows(q, pages, room, layout) for pages in rows)
    call = Call.of(
        q,
        *rows,
        kv_lengths=lengths,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        layout=layout,
        return_lse=True,
        **of_heads,
    )
    dispatch.choose(call.problem, "jax:flash")  # or its refusal
    _refuse_explicit_axes(given)
    _check_rotary(given, call.problem, rotary_interleaved, room, appended)
    cache = Cache.of(call, k_cache, block_table, rotary_interleaved)
    shapes = tuple((name, shape_of(x)) for name, x in given.items())
    arrays = {name: x for name, x in given.items() if name not in caches}
    both = (k_cache, v_cache), arrays
    if call.problem.framework == "numpy":
        results = through_jax(lambda both: _run(cache, shapes, *both), both)
    elif k is None or any(isinstance(x, jax.core.Tracer) for x in given.values()):
        results = _run(cache, shapes, *both)
    else:
        results = _run_in_place(cache, shapes, *both)
    out, lse, written = results
    return Decoded(out, lse, *(written or (k_cache, v_cache)))


class Cache(NamedTuple):
    """What a call is compiled for. Hashable.

    Attributes:
        form: of the caller's arrays.
        problem: of all queries against all the room, whose lengths are those with the new tokens.
        page_size: of pages; None: rows lie as they are.
        tiles: a chunk: so many batch rows, all heads and queries, and so many keys.
        interleaved: of rotary embeddings.
    """

    form: Form
    problem: Problem
    page_size: int | None
    tiles: Tiles
    interleaved: bool

    @classmethod
    def of(
        cls, call: Call, k_cache: Array, block_table: Array | None, interleaved: bool
    ) -> "Cache":
        """Chunks of about TILE_BYTES of keys; of more, where merging queries would cost more."""
        form, problem = call.form, call.problem
        token = problem.kv_heads * problem.head_dim * jnp.dtype(problem.dtype).itemsize
        keys = max(TILE_BYTES // token, problem.group * problem.q_length, 1)
        room, page_size = problem.kv_length, None
        if block_table is not None:
            page_size = shape_of(k_cache)[form.tokens_axis]
            blocks = shape_of(block_table)[1]
            pages = even(blocks, max(keys // page_size, 1)) if blocks else 0
            keys = pages * page_size
            # The block table is made as long as whole chunks are.
            problem = replace(problem, kv_length=count(blocks, pages) * keys if blocks else 0)
        elif keys < room:
            divided = divisor(room, keys)
            keys = divided if 2 * divided >= keys else even(room, keys)
        keys = min(keys, problem.kv_length)
        rows = 1
        if keys == problem.kv_length and problem.batch and keys:
            rows = divisor(problem.batch, max(TILE_BYTES // (keys * token), 1))
        tiles = Tiles(rows, problem.kv_heads, problem.q_length, keys)
        return cls(form, problem, page_size, tiles, interleaved)

    @property
    def chunk(self) -> Problem:
        """One chunk: the queries of its batch rows against its keys."""
        problem, rows = self.problem, self.tiles.batch
        alibi = problem.alibi_shape
        if alibi is not None:
            alibi = (min(alibi[0], rows), *alibi[1:])
        return replace(problem, batch=rows, kv_length=self.tiles.keys, alibi_shape=alibi)

    def keys(self, x: Array, rows: Array, table: Array | None, j: Array) -> Array:
        """Chunk j of some rows' keys or values, (rows, Hkv, keys, ·), out of a cache as it lies."""
        keys, axis = self.tiles.keys, self.form.tokens_axis
        if table is None:
            begin = start(j, self.problem.kv_length, keys)
            zero = jnp.zeros_like(begin)
            begins, sizes = [rows[0], zero, zero, zero], [len(rows), *x.shape[1:]]
            begins[axis], sizes[axis] = begin, keys
            x = self.form.heads(lax.dynamic_slice(x, begins, sizes))
            if self.problem.kv_length % keys:
                # The last chunk overlaps the one before it: what is its own goes first, the rest to
                # where no row is so long.
                x = jnp.roll(x, begin - j * keys, axis=2)
            return x
        assert self.page_size is not None
        pages = keys // self.page_size
        numbers = cut(table, 2, j * pages, pages) if table.shape[2] > 1 else table
        x = jnp.take(x, numbers[:, 0], axis=0, mode="clip")  # (rows, pages, *of a page)
        x = jnp.moveaxis(x, 1, axis)
        shape = list(x.shape)
        shape[axis : axis + 2] = [keys]
        return self.form.heads(x.reshape(shape))


def _decode(
    cache: Cache,
    _shapes: tuple[Any, ...],
    caches: tuple[Array, Array],
    arrays: Mapping[str, Array],
) -> tuple[Array, Array, tuple[Array, ...]]:
    """out, lse and the caches where something was appended, in the caller's form."""
    form, problem = cache.form, cache.problem
    asked = {name: x for name, x in arrays.items() if name in ("sinks", "alibi_slopes")}
    of_heads = options.canonical(asked, form, problem)
    q, before = form.heads(arrays["q"]), arrays["cache_lengths"].astype(jnp.int32)
    table = arrays.get("block_table")
    if table is not None:
        more = -table.shape[1] % max(cache.tiles.keys // (cache.page_size or 1), 1)
        table = jnp.pad(table.astype(jnp.int32), ((0, 0), (0, more)))[:, None]
    length, appended = before, False
    if "k" in arrays:
        k, v = form.heads(arrays["k"]), form.heads(arrays["v"])
        length, appended = before + k.shape[2], True
        if "rotary_cos" in arrays:
            cos, sin = arrays["rotary_cos"], arrays["rotary_sin"]
            moving = problem.band != (None, None)
            i = count_up(q.shape[2]) if moving else jnp.zeros(q.shape[2], jnp.int32)
            q = _rotated(cache, q, before[:, None] + i[None], cos, sin)
            k = _rotated(cache, k, before[:, None] + count_up(k.shape[2])[None], cos, sin)
        of_each = zip(caches, (k, v), strict=True)
        caches = tuple(_appended(cache, x, form.out(new), before, table) for x, new in of_each)
    operands = Operands(
        q=q,
        k=None,
        v=None,
        kv_lengths=length,
        q_offset=length - problem.q_length if problem.positional else None,
        alibi_slopes=of_heads.get("alibi_slopes"),
    )
    kept = _attended(cache, *varying_alike((operands, caches, table)))
    of_sinks = operands._replace(sinks=of_heads.get("sinks"))
    out, m, l = beyond_the_keys(of_sinks, *kept)
    results = form.out(out.astype(problem.dtype)), form.lse(log_sum_exp(m, l))
    return *results, caches if appended else ()


_run = compiled(static=2)(_decode)
_run_in_place = compiled(static=2, donate_argnums=(0,))(_decode)


def _rotated(cache: Cache, x: Array, places: Array, cos: Array, sin: Array) -> Array:
    """Rotary embeddings (Su et al. 2021) of (B, H, S, D) at (B, S) places."""
    accumulator = cache.problem.accumulator
    cos, sin = (
        jnp.take(table, places, axis=0, mode="clip")[:, None].astype(accumulator)
        for table in (cos, sin)
    )
    size = 2 * cos.shape[-1]
    turning, rest = x[..., :size].astype(accumulator), x[..., size:]
    if cache.interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = jnp.split(turning, 2, axis=-1)
    turned = a * cos - b * sin, b * cos + a * sin
    if cache.interleaved:
        both = jnp.stack(turned, axis=-1).reshape(turning.shape)
    else:
        both = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([both.astype(x.dtype), rest], axis=-1)


def _appended(cache: Cache, x: Array, new: Array, before: Array, table: Array | None) -> Array:
    """A cache with new tokens, both as the caller lays them out.

    Row by row, or token by token where they go to pages: XLA writes such a piece in place, where it
    scatters bfloat16 on a CPU into a copy of all.
    """
    axis = cache.form.tokens_axis
    tokens = new.shape[axis]
    if tokens == 0:
        return x
    pieces, size = (1, tokens) if table is None else (tokens, 1)

    def put(x: Array, n: Array) -> tuple[Array, None]:
        row, token, zero = n // pieces, n % pieces, jnp.zeros_like(n)
        place = before[row] + token
        page, fits = row, place >= 0
        if table is not None:
            block = place // cache.page_size
            page, place = table[row, 0, block], place % cache.page_size
            fits &= (block < table.shape[2]) & (page >= 0) & (page < x.shape[0])
        begin = [page, zero, zero, zero]
        begin[axis] = place
        of_new = [row, zero, zero, zero]
        of_new[axis] = token
        sizes = [1, *new.shape[1:]]
        sizes[axis] = size
        piece = lax.dynamic_slice(new, of_new, sizes)
        fits &= place + size <= x.shape[axis]

        def write(x: Array) -> Array:
            return lax.dynamic_update_slice(x, piece, begin)

        # A piece that does not fit would be moved to where it does.
        return lax.cond(fits, write, lambda x: x, x), None

    return lax.scan(put, x, count_up(len(before) * pieces))[0]


def _over_keys(
    cache: Cache,
    operands: Operands,
    caches: tuple[Array, Array],
    table: Array | None,
    *,
    every_chunk: bool = False,
) -> Kept:
    """out, m and l over the keys of the caches, chunk by chunk.

    `every_chunk` visits those that nobody sees too, in loops of a fixed length (see `tiles.visit`).
    """
    problem, tiles, chunk = cache.problem, cache.tiles, cache.chunk
    if 0 in (problem.batch, problem.q_length, problem.kv_length):
        return nothing(problem, (problem.batch, problem.q_heads, problem.q_length))

    def of_rows(arrays: Any, _: tuple[()]) -> tuple[Kept, tuple[()]]:
        operands, rows, table = arrays

        def step(j: Array, kept: Kept, _masked: bool) -> Kept:
            # XLA's CPU would widen a cache in bfloat16 before the loop, all of it, if it could see that
            # it is the same each time.
            at, lying = lax.optimization_barrier((j, caches))
            k, v = (cache.keys(x, rows, table, at) for x in lying)
            begin = j * tiles.keys
            offset = None if operands.q_offset is None else operands.q_offset - begin
            lengths = jnp.clip(operands.kv_lengths - begin, 0, tiles.keys)
            part = operands._replace(k=k, v=v, kv_lengths=lengths, q_offset=offset)
            leaves, tree = jax.tree.flatten(varying_alike(numbered(chunk, part)))
            found = forward_p.bind(*leaves, problem=chunk, tree=tree, tiles=None)
            return merged(kept, Kept(*found))

        begin = nothing(problem, operands.q.shape[:3])
        begin = varying_alike((begin, operands.q))[0]
        met = keys_met(replace(problem, batch=tiles.batch), operands, tiles, jnp.int32(0))
        # The flash core asks by itself which of a chunk's keys are seen whole.
        met = met._replace(clear=met.end, clear_end=met.end)
        every = count(problem.kv_length, tiles.keys) if every_chunk else None
        return visit(met, step, begin, every=every), ()

    numbers = varying_alike((count_up(problem.batch), operands.q))[0]
    return over_heads(problem, tiles, of_rows, (operands, numbers, table))[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attended(
    cache: Cache, operands: Operands, caches: tuple[Array, Array], table: Array | None
) -> Kept:
    return _over_keys(cache, operands, caches, table)


@_attended.defjvp
def _attended_jvp(
    cache: Cache, primals: Sequence[Any], tangents: Sequence[Any]
) -> tuple[Kept, Kept]:
    return jax.jvp(partial(_over_keys, cache, every_chunk=True), primals, tangents)


# Checks of what belongs to a cache; the others are those of any call


def _given(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that there are; all arrays of one framework, but a number for all lengths."""
    given = {name: x for name, x in arrays.items() if x is not None}
    framework = framework_of_all(
        {n: x for n, x in given.items() if not (n == "cache_lengths" and is_integral(x))}
    )
    if framework == "torch":
        raise TypeError(
            "decode takes JAX and NumPy arrays. Got torch tensors. "
            "Pass heedful.attention the caches as k and v, and kv_lengths=."
        )
    for name in ("k_cache", "v_cache", "k", "v"):
        if name in given and framework_of(given[name]) != framework:
            raise TypeError(
                f"q, the caches and what is appended must be of one framework. Got q of {framework} and "
                f"{name} of {framework_of(given[name])}. Convert one of them: a cache is never copied "
                "silently."
            )
    return given


def _checked_room(given: Mapping[str, Array], layout: str) -> tuple[int, int]:
    """How many tokens a row has room for, and how many are new; checks shapes and dtypes of both."""
    if layout not in LAYOUTS:
        raise ValueError(
            f'layout must be "bhsd" or "bshd". Got {shown(layout)}. '
            "It is never guessed: say where the head axis stands."
        )
    shapes = {name: shape_of(x) for name, x in given.items() if name != "cache_lengths"}
    for name in ("q", "k_cache", "v_cache", "k", "v"):
        if name in given and len(shapes[name]) != 4:
            axes = "(B, H, S, D)" if layout == "bhsd" else "(B, S, H, D)"
            raise ValueError(
                f"{name} must have four axes, {axes} in layout {layout!r}. Got {shapes[name]}. "
                "Add the missing ones: they are never guessed."
            )
    of_k, of_v = shapes["k_cache"], shapes["v_cache"]
    if of_k[:-1] != of_v[:-1]:
        raise ValueError(
            "k_cache and v_cache must have the same shape up to the head size. "
            f"Got {of_k} and {of_v}."
        )
    dtypes = {n: dtype_of(given[n]) for n in ("q", "k_cache", "v_cache", "k", "v") if n in given}
    dtype_of_all(*[given["q"]] * 3)
    if len(set(dtypes.values())) > 1:
        raise TypeError(
            "q, the caches and what is appended must have one dtype. Got "
            + ", ".join(f"{name} of {dtype}" for name, dtype in dtypes.items())
            + ". Cast them: nothing here casts silently."
        )
    batch = shapes["q"][0]
    axis = _tokens_axis(layout)
    room = of_k[axis]
    if "block_table" in given:
        check_integers("block_table", given["block_table"])
        table = shapes["block_table"]
        if len(table) != 2 or table[0] != batch:
            raise ValueError(
                f"block_table must be (B, blocks), B = {batch}. Got {table}. "
                "It says which pages hold a row's tokens, in their order."
            )
        room *= table[1]
    if ("k" in given) != ("v" in given):
        came, missing = ("k", "v") if "k" in given else ("v", "k")
        raise ValueError(f"k and v are appended together. Got {came} without {missing}.")
    if "k" not in given:
        return room, 0
    if given["k_cache"] is given["v_cache"]:
        raise ValueError(
            "k_cache and v_cache must be two arrays, each of which is written to. Got one array twice. "
            "Copy it."
        )
    new = shapes["k"][axis]
    for name, of in (("k", of_k), ("v", of_v)):
        expected = [batch, *of[1:]]
        expected[axis] = new
        if shapes[name] != tuple(expected):
            raise ValueError(
                f"{name} must fit its cache, {tuple(expected)} for {new} new tokens of {batch} rows. "
                f"Got {shapes[name]} in layout {layout!r}."
            )
    return room, new


def _lengths(given: Mapping[str, Any], room: int, new: int) -> Array:
    """How many tokens each row holds before the call, (B,) integers, checked where they can be read."""
    batch = shape_of(given["q"])[0]
    lengths = given.get("cache_lengths")
    if lengths is None:
        if "k" in given:
            raise ValueError(
                "to append k and v takes cache_lengths, which says behind which tokens. Got none. "
                "Pass 0 for an empty cache."
            )
        lengths = room
    if is_integral(lengths):
        lengths = np.full(batch, lengths, np.int64)
    check_integers("cache_lengths", lengths)
    if shape_of(lengths) != (batch,):
        raise ValueError(
            f"cache_lengths must be an integer or (B,) = {(batch,)}. Got shape {shape_of(lengths)}."
        )
    if not batch or not is_concrete_on_cpu(lengths):
        return lengths
    values = np.asarray(lengths).astype(np.int64)
    if values.min() < 0 or values.max() + new > room:
        wrong = values.min() if values.min() < 0 else values.max()
        beside = f" with the {new} new tokens" if new else ""
        raise ValueError(
            f"cache_lengths must lie between 0 and {room - new}: there is room for {room} tokens"
            f"{beside}. Got {wrong}. Make the cache longer, or attend to less of it by a window."
        )
    table = given.get("block_table")
    if table is not None and is_concrete_on_cpu(table) and 0 not in shape_of(table):
        _check_pages(given, values + new, room)
    return lengths.astype(np.int32) if isinstance(lengths, np.ndarray) else lengths


def _refuse_explicit_axes(given: Mapping[str, Any]) -> None:
    for name, x in given.items():
        if isinstance(x, jax.Array) and AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types:
            raise ValueError(
                f"decode takes no arrays on a mesh with explicit axes. Got {name} of {jax.typeof(x)}. "
                "Call it within jax.shard_map, or make the mesh with axis_types of AxisType.Auto, where "
                "devices that hold heads of their own need not talk."
            )


def _as_rows(q: Array, pages: Array, room: int, layout: str) -> Array:
    """What has the shape of the rows that pages hold, their dtype and framework, and no data."""
    batch, *rest = shape_of(q)[0], *shape_of(pages)[1:]
    rest[_tokens_axis(layout) - 1] = room
    shape = (batch, *rest)
    if isinstance(pages, np.ndarray):
        return np.broadcast_to(np.empty((), pages.dtype), shape)
    return jax.ShapeDtypeStruct(shape, pages.dtype)


def _tokens_axis(layout: str) -> int:
    return Form(4, layout, ()).tokens_axis


def _check_pages(given: Mapping[str, Any], lengths: np.ndarray, room: int) -> None:
    table, pages = np.asarray(given["block_table"]), shape_of(given["k_cache"])[0]
    page_size = room // table.shape[1]
    used = np.arange(table.shape[1]) * page_size < lengths[:, None]
    wrong = np.argwhere(used & ((table < 0) | (table >= pages)))
    if len(wrong):
        row, block = (int(n) for n in wrong[0])
        raise ValueError(
            f"block_table must name pages from 0 to {pages - 1} for the tokens of each row. "
            f"Got {table[row, block]} at [{row}, {block}], where row {row} has {lengths[row]} tokens "
            f"on pages of {page_size}."
        )


def _check_rotary(
    given: Mapping[str, Any], problem: Problem, interleaved: Any, room: int, new: int
) -> None:
    names = [name for name in ("rotary_cos", "rotary_sin") if name in given]
    if not isinstance(interleaved, bool | np.bool_):
        raise TypeError(f"rotary_interleaved must be True or False. Got {shown(interleaved)}.")
    if len(names) < 2:
        if names or not interleaved:
            came = names[0] if names else "rotary_interleaved=False"
            raise ValueError(
                f"rotary embedding takes both rotary_cos and rotary_sin. Got {came} alone."
            )
        return
    shapes = [shape_of(given[name]) for name in names]
    for name in names:
        check_floating(name, given[name], problem.dtype)
    if "k" not in given:
        raise ValueError(
            "rotary_cos and rotary_sin rotate what is appended, and queries with it. Got no k and v. "
            "Keys in a cache are rotated already: rotate q before the call."
        )
    of_cos, of_sin = shapes
    fits = len(of_cos) == 2 and of_cos[0] >= room and 2 * of_cos[1] <= problem.head_dim
    if of_cos != of_sin or not fits:
        raise ValueError(
            "rotary_cos and rotary_sin must both be (positions, R / 2), of no fewer positions than "
            f"there is room, {room}, and R at most D = {problem.head_dim}. Got {of_cos} and {of_sin}."
        )
    moving = problem.band != (None, None)
    if new < (problem.q_length if moving else min(problem.q_length, 1)):
        raise ValueError(
            "with rotary_cos query i is rotated by the place of new key i, so there must be as many new "
            f"keys as queries. Got {new} and {problem.q_length}. Rotate q before the call."
        )
