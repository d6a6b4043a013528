"""One tile of scores, and the products that make and use it.

Within a tile the heads are folded: a tile of keys is (b·h, keys, D), b batch rows and h key heads; one
of queries (b·h, g·queries, D), the g query heads that share a key head below one another; one of scores
(b·h, g·queries, keys). So K and V are read as they lie and never repeated, and every product is a plain
batch of matrices.
"""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.flash.tiles import Tiles, count_up, cut, start
from heedful.rules.dropout import kept
from heedful.rules.place import Place
from heedful.rules.scores import added, capped, distance, modified, modified_with_slope
from heedful.rules.visibility import of_key_heads, visible


def queries_of(problem: Problem, tiles: Tiles, x: Array, index: Array) -> Array:
    """Query tile `index` of (batch, heads, Sq, ...), folded."""
    x = cut(x, 2, start(index, problem.q_length, tiles.queries), tiles.queries)
    heads = x.shape[0] * x.shape[1] // problem.group
    return x.reshape(heads, problem.group * tiles.queries, *x.shape[3:])


def turn(problem: Problem, x: Array) -> Array:
    """(b, h·g, Sq, D) → (b·h, D, g, Sq), whose tiles `gather` takes.

    Kept apart, or XLA folds the turn into the product, which on a CPU then takes twice the time, and
    of bfloat16 fails.
    """
    x = x.reshape(-1, problem.group, *x.shape[2:])
    return lax.optimization_barrier(x.transpose(0, 3, 1, 2))


def turned_queries_of(problem: Problem, tiles: Tiles, x: Array, index: Array) -> Array:
    """Query tile `index` of what was turned, folded: (b·h, D, g·queries)."""
    x = cut(x, 3, start(index, problem.q_length, tiles.queries), tiles.queries)
    return x.reshape(*x.shape[:2], problem.group * tiles.queries)


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
    """Tile (i, j) of something shaped like the scores, each axis full or 1.

    What functions close over, of rank 3, is all of it.
    """
    if x.ndim == 3:
        return x
    x = cut(x, 2, start(i, problem.q_length, tiles.queries), tiles.queries)
    return cut(x, 3, start(j, problem.kv_length, tiles.keys), tiles.keys)


def add_cut(problem: Problem, tiles: Tiles, total: Array, part: Array, i: Array, j: Array) -> Array:
    """Adds what `cut_scores` would cut out; `start` at 0 along an axis of 1."""
    if total.ndim == 3:
        return total + part
    zero = jnp.zeros_like(i)
    row = zero if total.shape[2] == 1 else start(i, problem.q_length, tiles.queries)
    column = zero if total.shape[3] == 1 else start(j, problem.kv_length, tiles.keys)
    before = cut_scores(problem, tiles, total, i, j)
    return lax.dynamic_update_slice(total, before + part, (zero, zero, row, column))


def widen(problem: Problem, x: Array) -> Array:
    """A tile as products take it: as it is, where the machine has a product of its dtype.

    A CPU has none of float16, and of bfloat16 only some have one: XLA's own emulation of it is several
    times slower than the float32 product.
    """
    native = problem.platform != "cpu" or (problem.dtype == "bfloat16" and multiplies_bfloat16())
    return x if native else x.astype(problem.accumulator)


@cache
def multiplies_bfloat16() -> bool:
    """Whether this process's CPU product of bfloat16 is faster than that of float32.

    It is with AVX512-BF16 or AMX, unless XLA is told to leave its library of kernels (YNN) alone.
    """
    left_alone = (
        "--xla_cpu_experimental_ynn_fusion_type=" in os.environ.get("XLA_FLAGS", "").split()
    )
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:  # no Linux: nobody has measured it there
        return False
    return not left_alone and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


class Numbered(NamedTuple):
    """Operands, and the numbers that the caller gives their batch rows and query heads (see `Place`).

    As arrays beside them, cut, folded and sharded as they are, these stay what they were.

    Attributes:
        operands: of a call, or of the tile of its batch rows and heads.
        batch, heads: (B,) and (1, Hq), int32.
    """

    operands: Operands
    batch: Array
    heads: Array


_numbers: dict[Any, tuple[Array, Array]] = {}  # once made, outside of a trace
KEPT = 64


def numbered(problem: Problem, operands: Operands) -> Numbered:
    """The operands of a whole call."""
    # Outside of a trace the numbers would cost every call operations of its own. What a trace makes is
    # its own; and their types speak of the mesh.
    key = jax.sharding.get_abstract_mesh(), problem.batch, problem.q_heads
    if (found := _numbers.get(key)) is None:
        found = count_up(problem.batch), count_up(problem.q_heads)[None]
        if len(_numbers) < KEPT and not any(isinstance(x, jax.core.Tracer) for x in found):
            _numbers[key] = found
    return Numbered(operands, *found)


class Tile(NamedTuple):
    """What a tile of scores is made of beside q and k.

    Attributes:
        place: its numbers.
        operands: those over the scores cut to it.
        distance: see `rules.scores`.
        kept: what dropout keeps of it, (b, h·g, queries, keys); None: all.
        see: what is seen in it, likewise, each axis full or 1; None: all.
    """

    place: Place
    operands: Operands
    distance: Array | None
    kept: Array | None
    see: Array | None


def tile_at(
    problem: Problem, tiles: Tiles, given: Numbered, i: Array, j: Array, masked: bool
) -> Tile:
    """Tile (i, j) of the batch rows and heads given; `masked` says whether it asks what is seen."""
    rows = start(i, problem.q_length, tiles.queries) + count_up(tiles.queries)
    columns = start(j, problem.kv_length, tiles.keys) + count_up(tiles.keys)
    place = Place(given.batch, given.heads[0], rows, columns)
    over_scores = given.operands.over_scores
    cuts = {name: cut_scores(problem, tiles, x, i, j) for name, x in over_scores.items()}
    operands = given.operands._replace(**cuts)
    apart = distance(problem, operands, place)
    left = kept(problem, operands, place)
    if left is not None:  # batch rows of a `jax.vmap` share their numbers
        left = jnp.broadcast_to(left, (tiles.batch, *left.shape[1:]))
    if not masked:
        return Tile(place, operands, apart, left, None)
    see = visible(problem, operands, place)
    if problem.kv_length % tiles.keys:  # the last tile overlaps the one before it: count keys once
        fresh = place.j >= j * tiles.keys
        see = fresh if see is None else see & fresh
    if problem.q_length % tiles.queries:
        fresh = place.i >= i * tiles.queries
        see = fresh if see is None else see & fresh
    return Tile(place, operands, apart, left, see)


def seen_keys(problem: Problem, tiles: Tiles, see: Array | None) -> Array | None:
    """Which keys of a tile somebody in it sees, (b·h, keys, 1); None: all."""
    if see is None:
        return None
    seen = of_key_heads(problem, see.any(axis=2))  # (b or 1, h or 1, keys or 1)
    seen = jnp.broadcast_to(seen, (tiles.batch, tiles.kv_heads, tiles.keys))
    return seen.reshape(-1, tiles.keys, 1)


def wide(arrays: Mapping[str, Array], problem: Problem) -> dict[str, Array]:
    """In the accumulator's dtype, in which they are differentiated and summed."""
    return {name: x.astype(problem.accumulator) for name, x in arrays.items()}


class Scores(NamedTuple):
    """A tile of scores, (n, queries, keys).

    Attributes:
        scores: scaled, capped, modified, biased, −inf where nothing is seen.
        slope: the derivative of the score by the scaled product; None where that is 1.
        highest: the largest score of each query, (n, queries).
        capped: the scores before the caller's function and bias, (b, h·g, queries, keys).
    """

    scores: Array
    slope: Array | None
    highest: Array
    capped: Array


def scores(problem: Problem, tiles: Tiles, tile: Tile, q: Array, k: Array) -> Scores:
    """The scores of a tile of queries against a tile of keys.

    Args:
        q, k: the tiles, cut and widened; in a function that is differentiated, clean too.
        tile: what else it is made of.
    """
    if widened := q.dtype == problem.accumulator:
        # One pass less over the tile than to scale it.
        product = s = query_key(q * problem.scale, k)
    else:
        product = query_key(q, k)  # to scale a bfloat16 q would round it
        s = product * problem.scale
    s, slope = capped(problem, s)
    before = s = unfold_queries(problem, tiles, s)
    s, bend = modified_with_slope(problem, tile.operands, tile.place, tile.see, s)
    if bend is not None:
        bend = bend.reshape(product.shape)
        slope = bend if slope is None else slope * bend
    s = added(tile.operands, tile.distance, s)
    if tile.see is not None:
        s = jnp.where(tile.see, s, -jnp.inf)
    s = s.reshape(product.shape)
    as_they_were = slope is None and not tile.operands.over_scores and tile.see is None
    if as_they_were and problem.scale > 0:
        # The same number, since rounding keeps order, for one pass less over the tile.
        highest = product.max(axis=-1) * (1 if widened else problem.scale)
    else:
        highest = s.max(axis=-1)
    return Scores(s, slope, highest, before)


def beside_product(problem: Problem, tile: Tile, operands: Operands, capped: Array) -> Array:
    """A tile of scores, as made of its capped ones: what the operands beside q and k make of them."""
    s = modified(problem, operands, tile.place, tile.see, capped)
    return added(operands, tile.distance, s)


def of_seen(problem: Problem, tile: Tile, parts: Any) -> Any:
    """What a tile adds to sums: nothing, where there was no place to ask (see `rules.scores`)."""
    if not problem.functions or tile.see is None:
        return parts
    seen = tile.see.any()
    return jax.tree.map(lambda x: jnp.where(seen, x, 0), parts)


def clean(x: Array, seen: Array | None) -> Array:
    """Zeros where nobody looks: 0 · NaN would be NaN in the arithmetic that follows.

    Before that arithmetic and not after it, for its derivatives are products too. Results are cleaned
    as well: in the derivative's transpose they are where cotangents come in.
    """
    return x if seen is None else jnp.where(seen, x, 0)


def query_key(q: Array, k: Array) -> Array:
    """q kᵀ: (n, queries, D), (n, keys, D) → (n, queries, keys)."""
    return _product(q, k, contract=(2, 2))


def weigh(p: Array, v: Array) -> Array:
    """p v: (n, queries, keys), (n, keys, D) → (n, queries, D)."""
    return _product(p.astype(v.dtype), v, contract=(2, 1))


def gather(p: Array, x: Array) -> Array:
    """xᵀ p: (n, queries, keys), (n, D, queries) → (n, D, keys), which is pᵀ x turned.

    Of the three ways to say it this one turns what is smallest, and that beforehand: a CPU's product
    that has to turn p first takes two to six times as long.
    """
    return _product(x, p.astype(x.dtype), contract=(2, 1))


def _product(a: Array, b: Array, *, contract: tuple[int, int]) -> Array:
    """A batch of products that accumulate in float32, or float64 for float64."""
    half = a.dtype == jnp.bfloat16
    if half:
        # XLA's CPU compiler fails on some that it has merged with a turn of what goes in or out.
        a, b = lax.optimization_barrier((a, b))
    result = lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((0,), (0,))),
        # Without this, accelerators round float32 operands to fewer bits.
        precision=lax.Precision.HIGHEST,
        preferred_element_type=a.dtype if a.dtype == jnp.float64 else jnp.float32,
    )
    return lax.optimization_barrier(result) if half else result
