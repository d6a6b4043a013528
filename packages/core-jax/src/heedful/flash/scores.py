"""One tile of scores, and the products that make and use it.

Tiles of queries are (batch, heads, queries, D), of keys (batch, key heads, keys, D), of scores
(batch, heads, queries, keys). Grouped heads are folded into the rows of a product, so that K and V are
read as they lie and never repeated.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from heedful.flash.tiles import Tiles, count_up, cut, start
from heedful.problem import Array, Operands, Problem
from heedful.visibility import visible


class Tile(NamedTuple):
    """A tile of scores.

    Attributes:
        scores: capped, biased, −inf where nothing is visible.
        slope: derivative of the capped score by the uncapped one; None without softcap.
        seen_keys: which keys somebody in the tile sees, (batch, key heads or 1, keys, 1); None where
            the tile is not masked.
    """

    scores: Array
    slope: Array | None
    seen_keys: Array | None


def queries_of(problem: Problem, tiles: Tiles, x: Array, index: Array) -> Array:
    """Query tile `index` of (batch, heads, Sq, ...)."""
    return cut(x, 2, start(index, problem.q_length, tiles.queries), tiles.queries)


def keys_of(problem: Problem, tiles: Tiles, x: Array, index: Array) -> Array:
    """Key tile `index` of (batch, key heads, Sk, ...)."""
    return cut(x, 2, start(index, problem.kv_length, tiles.keys), tiles.keys)


def cut_scores(problem: Problem, tiles: Tiles, x: Array, i: Array, j: Array) -> Array:
    """Tile (i, j) of something shaped like the scores, each axis full or 1."""
    x = cut(x, 2, start(i, problem.q_length, tiles.queries), tiles.queries)
    return cut(x, 3, start(j, problem.kv_length, tiles.keys), tiles.keys)


def add_tile(
    problem: Problem, tiles: Tiles, total: Array, tile: Array, i: Array, j: Array
) -> Array:
    """Adds tile (i, j) of scores to something shaped like all of them, summed where an axis is 1."""
    tile = tile.sum(axis=[n for n in range(4) if total.shape[n] == 1], keepdims=True)
    zero = jnp.zeros_like(i)
    row = zero if total.shape[2] == 1 else start(i, problem.q_length, tiles.queries)
    column = zero if total.shape[3] == 1 else start(j, problem.kv_length, tiles.keys)
    before = cut_scores(problem, tiles, total, i, j)
    return lax.dynamic_update_slice(total, before + tile, (zero, zero, row, column))


def widen(problem: Problem, x: Array) -> Array:
    """A tile as products take it: on a CPU in the accumulator's dtype, elsewhere as it is.

    XLA's own half-precision product on a CPU is several times slower than the float32 one.
    """
    return x.astype(problem.accumulator) if problem.platform == "cpu" else x


def tile_of_scores(
    problem: Problem,
    tiles: Tiles,
    operands: Operands,
    q: Array,
    k: Array,
    i: Array,
    j: Array,
    masked: bool,
) -> Tile:
    """The scores of query tile i against key tile j.

    Args:
        q, k: the tiles, already cut and widened.
        operands: the arrays of this tile's batch rows and heads, whole along queries and keys.
        i, j: the tiles' indices.
        masked: whether to ask what is visible; where False the caller knows that all is.
    """
    if q.dtype == problem.accumulator:
        s = query_key(q * problem.scale, k)  # one pass less over the tile than to scale the scores
    else:
        s = query_key(q, k) * problem.scale
    slope = None
    if problem.softcap is not None:
        ratio = jnp.tanh(s / problem.softcap)
        s, slope = problem.softcap * ratio, 1 - ratio**2
    if operands.bias is not None:
        s = s + cut_scores(problem, tiles, operands.bias, i, j).astype(s.dtype)
    if not masked:
        return Tile(s, slope, None)

    rows = start(i, problem.q_length, tiles.queries) + count_up(tiles.queries)
    columns = start(j, problem.kv_length, tiles.keys) + count_up(tiles.keys)
    mask = operands.mask
    if mask is not None:
        mask = cut_scores(problem, tiles, mask, i, j)
    see = visible(problem, operands._replace(mask=mask), rows, columns)
    if problem.kv_length % tiles.keys:  # the last tile overlaps the one before it: count keys once
        fresh = (columns >= j * tiles.keys)[None, None, None, :]
        see = fresh if see is None else see & fresh
    if problem.q_length % tiles.queries:
        fresh = (rows >= i * tiles.queries)[None, None, :, None]
        see = fresh if see is None else see & fresh
    if see is None:
        return Tile(s, slope, None)
    slope = None if slope is None else jnp.where(see, slope, 0)  # of a NaN that nobody sees
    seen_keys = see.any(axis=2)  # (batch or 1, heads or 1, keys)
    if seen_keys.shape[1] != 1:
        seen_keys = seen_keys.reshape(seen_keys.shape[0], k.shape[1], -1, seen_keys.shape[2])
        seen_keys = seen_keys.any(axis=2)
    return Tile(jnp.where(see, s, -jnp.inf), slope, seen_keys[..., None])


def clean(x: Array, seen: Array | None) -> Array:
    """Zeros where nobody looks: 0 · NaN would be NaN in the products that follow."""
    return x if seen is None else jnp.where(seen, x, 0)


def query_key(q: Array, k: Array) -> Array:
    """q kᵀ: (b, h·g, queries, D), (b, h, keys, D) → (b, h·g, queries, keys)."""
    s = _product(_fold(q, k.shape[1]), k, ((3,), (3,)))
    return s.reshape(*q.shape[:3], k.shape[2])


def weigh(p: Array, v: Array) -> Array:
    """p v: (b, h·g, queries, keys), (b, h, keys, D) → (b, h·g, queries, D)."""
    out = _product(_fold(p, v.shape[1]).astype(v.dtype), v, ((3,), (2,)))
    return out.reshape(*p.shape[:3], v.shape[3])


def gather(problem: Problem, p: Array, x: Array) -> Array:
    """pᵀ x, summed over each group: (b, h·g, queries, keys), (b, h·g, queries, D) → (b, h, keys, D)."""
    heads = p.shape[1] // problem.group
    p_transposed = _fold(p, heads).swapaxes(2, 3).astype(x.dtype)
    if problem.platform == "cpu":
        # XLA would fold the transpose into the product, which on a CPU then takes twice the time.
        p_transposed = lax.optimization_barrier(p_transposed)
    return _product(p_transposed, _fold(x, heads), ((3,), (2,)))


def _fold(x: Array, kv_heads: int) -> Array:
    """(b, h·g, rows, n) → (b, h, g·rows, n)."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[3])


def _product(a: Array, b: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """A product over axes of (b, h, ...) that accumulates in float32, or float64 for float64."""
    return lax.dot_general(
        a,
        b,
        (contract, ((0, 1), (0, 1))),
        # Without this, accelerators round float32 operands to fewer bits.
        precision=lax.Precision.HIGHEST,
        preferred_element_type=a.dtype if a.dtype == jnp.float64 else jnp.float32,
    )
