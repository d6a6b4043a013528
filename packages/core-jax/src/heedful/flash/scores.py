"""One tile of scores, and the products that make and use it.

Within a tile the heads are folded: a tile of keys is (b·h, keys, D), b batch rows and h key heads; one
of queries (b·h, g·queries, D), the g query heads that share a key head below one another; one of scores
(b·h, g·queries, keys). So K and V are read as they lie and never repeated, and every product is a plain
batch of matrices.
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
        seen_keys: which keys somebody in the tile sees, (b·h, keys, 1); None where the tile is not
            masked.
    """

    scores: Array
    slope: Array | None
    seen_keys: Array | None


def queries_of(problem: Problem, tiles: Tiles, x: Array, index: Array) -> Array:
    """Query tile `index` of (batch, heads, Sq, ...), folded."""
    x = cut(x, 2, start(index, problem.q_length, tiles.queries), tiles.queries)
    heads = x.shape[0] * x.shape[1] // problem.group
    return x.reshape(heads, problem.group * tiles.queries, *x.shape[3:])


def keys_of(problem: Problem, tiles: Tiles, x: Array, index: Array) -> Array:
    """Key tile `index` of (batch, key heads, Sk, ...), folded."""
    x = cut(x, 2, start(index, problem.kv_length, tiles.keys), tiles.keys)
    return x.reshape(-1, *x.shape[2:])


def unfold_queries(problem: Problem, tiles: Tiles, x: Array) -> Array:
    """(b·h, g·queries, ...) → (b, h·g, queries, ...)."""
    return x.reshape(tiles.batch, -1, tiles.queries, *x.shape[2:])


def unfold_keys(tiles: Tiles, x: Array) -> Array:
    """(b·h, keys, ...) → (b, h, keys, ...)."""
    return x.reshape(tiles.batch, -1, *x.shape[1:])


def cut_scores(problem: Problem, tiles: Tiles, x: Array, i: Array, j: Array) -> Array:
    """Tile (i, j) of something shaped like the scores, each axis full or 1."""
    x = cut(x, 2, start(i, problem.q_length, tiles.queries), tiles.queries)
    return cut(x, 3, start(j, problem.kv_length, tiles.keys), tiles.keys)


def add_tile(
    problem: Problem, tiles: Tiles, total: Array, tile: Array, i: Array, j: Array
) -> Array:
    """Adds tile (i, j) of scores to something shaped like all of them, summed where an axis is 1."""
    tile = unfold_queries(problem, tiles, tile)
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
    folded = s.shape
    s = unfold_queries(problem, tiles, s)
    if operands.bias is not None:
        s = s + cut_scores(problem, tiles, operands.bias, i, j).astype(s.dtype)
    if not masked:
        return Tile(s.reshape(folded), slope, None)

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
        return Tile(s.reshape(folded), slope, None)
    if slope is not None:  # that of a NaN which nobody sees
        slope = jnp.where(see, unfold_queries(problem, tiles, slope), 0).reshape(folded)
    seen_keys = see.any(axis=2)  # (batch or 1, heads or 1, keys or 1)
    if seen_keys.shape[1] != 1:
        seen_keys = seen_keys.reshape(seen_keys.shape[0], -1, problem.group, seen_keys.shape[2])
        seen_keys = seen_keys.any(axis=2)
    seen_keys = jnp.broadcast_to(seen_keys, (tiles.batch, folded[0] // tiles.batch, folded[2]))
    s = jnp.where(see, s, -jnp.inf).reshape(folded)
    return Tile(s, slope, seen_keys.reshape(folded[0], folded[2], 1))


def clean(x: Array, seen: Array | None) -> Array:
    """Zeros where nobody looks: 0 · NaN would be NaN in the products that follow."""
    return x if seen is None else jnp.where(seen, x, 0)


def query_key(q: Array, k: Array) -> Array:
    """q kᵀ: (n, queries, D), (n, keys, D) → (n, queries, keys)."""
    return _product(q, k, contract=(2, 2))


def weigh(p: Array, v: Array) -> Array:
    """p v: (n, queries, keys), (n, keys, D) → (n, queries, D)."""
    return _product(p.astype(v.dtype), v, contract=(2, 1))


def gather(problem: Problem, p: Array, x: Array) -> Array:
    """pᵀ x: (n, queries, keys), (n, queries, D) → (n, keys, D)."""
    p = p.astype(x.dtype)
    if problem.platform != "cpu":
        return _product(p, x, contract=(1, 1))
    # XLA would fold the transpose into the product, which on a CPU then takes twice the time.
    return _product(lax.optimization_barrier(p.swapaxes(1, 2)), x, contract=(2, 1))


def _product(a: Array, b: Array, *, contract: tuple[int, int]) -> Array:
    """A batch of products that accumulate in float32, or float64 for float64."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((0,), (0,))),
        # Without this, accelerators round float32 operands to fewer bits.
        precision=lax.Precision.HIGHEST,
        preferred_element_type=a.dtype if a.dtype == jnp.float64 else jnp.float32,
    )
