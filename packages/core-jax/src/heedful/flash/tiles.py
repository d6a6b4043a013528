"""How the score matrix is cut into tiles, and which of them are visited.

A tile of scores is (batch rows, heads, queries, keys). Query and key axes are cut into tiles of one
size; where that size does not divide the length, the last tile starts earlier and overlaps the one
before it, so nothing is ever padded or copied, and what the overlap repeats is left out.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.rules.visibility import Reach, reach

# One tile of scores, all its heads counted, should stay in a CPU's cache. Measured on 8 heads of
# 2048 × 64 in float32, on one core with 1 MiB of L2: 512 × 512 for two heads at a time is within 6 %
# of torch's own kernel, forward and backward; 256 × 512 for all eight is 20 % slower backward, and
# 1024 × 1024 for one head takes twice the time.
TILE_BYTES = 2 * 2**20
TILE_QUERIES = 512
TILE_KEYS = 512
FEWEST_QUERIES = 16  # of a tile, however many heads share a key head


class Tiles(NamedTuple):
    """Sizes of a tile: batch rows, key heads, queries, keys."""

    batch: int
    kv_heads: int
    queries: int
    keys: int


def tile_sizes(problem: Problem) -> Tiles:
    """Tiles of about TILE_BYTES, that cut each axis into parts as equal as can be."""
    if not all(isinstance(n, int) for n in (problem.batch, problem.q_length, problem.kv_length)):
        return _symbolic_tile_sizes(problem)
    scores = TILE_BYTES // jnp.dtype(problem.accumulator).itemsize
    # The query heads of a group stand below one another in a tile, so they count as queries.
    shared = max(scores // (problem.group * TILE_KEYS), FEWEST_QUERIES)
    queries = even(problem.q_length, min(TILE_QUERIES, shared))
    keys = even(problem.kv_length, TILE_KEYS)
    heads = max(scores // (problem.group * queries * keys), 1)
    if heads < problem.kv_heads:
        kv_heads, batch = divisor(problem.kv_heads, heads), 1
    else:
        kv_heads, batch = problem.kv_heads, divisor(problem.batch, heads // problem.kv_heads)
    # Few heads leave room: longer tiles spend it.
    rows = batch * kv_heads * problem.group
    queries = even(problem.q_length, max(min(scores // (rows * keys), 2 * TILE_QUERIES), queries))
    keys = even(problem.kv_length, max(scores // (rows * queries), keys))
    return Tiles(batch, kv_heads, queries, keys)


def _symbolic_tile_sizes(problem: Problem) -> Tiles:
    """Tiles that fit whatever numbers the symbols of `jax.export` will stand for, one batch row each."""
    scores = TILE_BYTES // jnp.dtype(problem.accumulator).itemsize
    shared = max(scores // (problem.group * TILE_KEYS), FEWEST_QUERIES)
    largest = min(TILE_QUERIES, shared)
    heads = max(scores // (problem.group * largest * TILE_KEYS), 1)
    queries = jax.core.min_dim(problem.q_length, largest)
    keys = jax.core.min_dim(problem.kv_length, TILE_KEYS)
    return Tiles(1, divisor(problem.kv_heads, heads), queries, keys)


def even(length: int, largest: int) -> int:
    """The size that cuts a length into the fewest tiles of at most `largest`, as equal as can be."""
    return math.ceil(length / math.ceil(length / largest))


def divisor(number: int, largest: int) -> int:
    """The largest that is no larger, and at least 1."""
    return max(d for d in range(1, min(number, largest) + 1) if number % d == 0)


def count(length: int, size: int) -> int:
    """How many tiles of a size cover a length."""
    return -(-length // size)


def count_up(n: int) -> Array:
    """0 … n − 1, in int32 whatever JAX's default: that of lengths and offsets."""
    return jnp.arange(n, dtype=jnp.int32)


def start(index: Array, length: int, size: int) -> Array:
    """Where tile `index` begins: the last one early enough to be whole."""
    return jnp.minimum(index * size, length - size)


def cut(x: Array, axis: int, begin: Array, size: int) -> Array:
    """`size` entries of an axis from `begin`; an axis of size 1 is broadcast and stays as it is."""
    return x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, begin, size, axis)


def join(parts: Array, length: int, axis: int) -> Array:
    """Undoes the cutting: tiles (n, ..., size, ...) → (..., length, ...), `axis` counted without n."""
    n, size = parts.shape[0], parts.shape[axis + 1]
    whole = jnp.moveaxis(parts[:-1], 0, axis)
    whole = whole.reshape(*whole.shape[:axis], (n - 1) * size, *whole.shape[axis + 2 :])
    rest = lax.slice_in_dim(parts[-1], n * size - length, size, axis=axis)
    return jnp.concatenate([whole, rest], axis)


def over_heads(
    problem: Problem,
    tiles: Tiles,
    function: Callable[[Any, Any], tuple[Any, Any]],
    arrays: Any,
    sums: Any = (),
) -> tuple[Any, Any]:
    """Runs `function` for each tile of batch rows and heads, one after the other.

    Args:
        problem: what is asked.
        tiles: the sizes.
        function: (its part of arrays, its part of sums) → (results, its part of sums, increased).
        arrays: a pytree whose leaves have axes (batch, heads, ...) or (batch,), each full or 1.
        sums: likewise; a part that several tiles share goes through all of them.

    Returns:
        the results, joined along (batch, heads, ...), and the sums.
    """
    across = problem.kv_heads // tiles.kv_heads
    n = problem.batch // tiles.batch * across
    if n == 1:
        return function(arrays, sums)

    def begins(x: Array, index: Array) -> list[Array]:
        """Where the tile begins in x, by axis; key and query heads differ only in their number."""
        zero = jnp.zeros_like(index)
        row = zero if x.shape[0] == 1 else index // across * tiles.batch
        if x.ndim == 1:
            return [row]
        head = zero if x.shape[1] == 1 else index % across * (x.shape[1] // across)
        return [row, head] + [zero] * (x.ndim - 2)

    def one(sums: Any, index: Array) -> tuple[Any, Any]:
        def take(x: Array) -> Array:
            sizes = [min(tiles.batch, x.shape[0])]
            if x.ndim > 1:
                sizes += [max(x.shape[1] // across, 1), *x.shape[2:]]
            return lax.dynamic_slice(x, begins(x, index), sizes)

        def put(x: Array, part: Array) -> Array:
            return lax.dynamic_update_slice(x, part, begins(x, index))

        result, part = function(jax.tree.map(take, arrays), jax.tree.map(take, sums))
        return jax.tree.map(put, sums, part), result

    sums, results = lax.scan(one, sums, count_up(n))

    def whole(x: Array) -> Array:
        # A tile is part of one batch row's heads, or all heads of some rows: either way the tiles in
        # order are the whole in order, and joining them moves nothing.
        return x.reshape(problem.batch, across * x.shape[2], *x.shape[3:])

    return jax.tree.map(whole, results), sums


class Met(NamedTuple):
    """The tiles along one axis that a tile of the other axis meets: first ≤ clear ≤ clear_end ≤ end.

    Those in [clear, clear_end) are seen whole and need no mask; those outside of [first, end) not at
    all. With an `order` all of these are places in it, and the tiles stand there.
    """

    first: Any
    clear: Any
    clear_end: Any
    end: Any
    order: Array | None = None

    def tile(self, n: Array) -> Array:
        return n if self.order is None else self.order[n]


def keys_met(problem: Problem, operands: Operands, tiles: Tiles, begin: Array) -> Met:
    """The key tiles that the query tile from `begin` meets."""
    found = reach(problem, operands, begin, tiles.queries, along="keys")
    met = _met(found, problem.kv_length, tiles.keys)
    if operands.blocks is None:
        return met
    own = begin, tiles.queries
    return _of_blocks(problem, operands.blocks, own, met, problem.kv_length, tiles.keys)


def queries_met(problem: Problem, operands: Operands, tiles: Tiles, begin: Array) -> Met:
    """The query tiles that meet the key tile from `begin`."""
    found = reach(problem, operands, begin, tiles.keys, along="queries")
    # A last tile that overlaps the one before it would give its share of dq twice: mask it.
    if problem.kv_length % tiles.keys and found.clear_high is not None:
        overlaps = begin % tiles.keys != 0
        found = found._replace(clear_high=jnp.where(overlaps, 0, found.clear_high))
    met = _met(found, problem.q_length, tiles.queries)
    if operands.blocks is None:
        return met
    blocks, own = operands.blocks.swapaxes(2, 3), (begin, tiles.keys)
    return _of_blocks(problem, blocks, own, met, problem.q_length, tiles.queries)


def _of_blocks(
    problem: Problem, blocks: Array, own: tuple[Array, int], met: Met, length: int, size: int
) -> Met:
    """Those of the tiles met in whose blocks something is seen, in order: first what needs a mask.

    Args:
        problem: what is asked, of what block size.
        blocks: (b, h, along the tile's own axis, along the tiles met) (see `Operands`).
        own: where the tile begins, and its size.
        met: by all else.
        length: of the axis of the tiles met.
        size: of a tile there.
    """
    n = count(length, size)
    begin, extent = own
    mine = _overlaps(problem, blocks.shape[2], begin[None], extent)[0]
    theirs = _overlaps(problem, blocks.shape[3], start(count_up(n), length, size), size)
    some = ((blocks > 0).any((0, 1)) & mine[:, None]).any(0)[None]
    every = ((blocks == 2).all((0, 1)) | ~mine[:, None]).all(0)[None]
    some, every = (some & theirs).any(1), (every | ~theirs).all(1)
    tile = count_up(n)
    seen = some & (met.first <= tile) & (tile < met.end)
    clear = seen & every & (met.clear <= tile) & (tile < met.clear_end)
    rank = jnp.where(clear, 1, jnp.where(seen, 0, 2))
    masked, all_seen = (x.sum(dtype=jnp.int32) for x in (seen & ~clear, seen))
    return Met(0, masked, all_seen, all_seen, jnp.argsort(rank).astype(jnp.int32))


def _overlaps(problem: Problem, n: int, begin: Array, size: int) -> Array:
    """Which of n blocks overlap tiles of a size: (tiles, n)."""
    assert problem.block_size is not None
    first, begin = (count_up(n) * problem.block_size)[None], begin[:, None]
    return (first < begin + size) & (first + problem.block_size > begin)


def _met(found: Reach, length: int, size: int) -> Met:
    """A range of one axis, in tiles of a size."""
    n = count(length, size)
    first = _clip(found.low // size, 0, n)
    end = _clip(-(-found.high // size), first, n)
    if found.clear_high is None:
        return Met(first, end, end, end)
    clear = _clip(-(-found.clear_low // size), first, end)
    return Met(first, clear, _clip(found.clear_high // size, clear, end), end)


def _clip(x: Any, low: Any, high: Any) -> Any:
    if all(isinstance(a, int) for a in (x, low, high)):
        return max(low, min(x, high))
    return jnp.clip(x, low, high)


def visit(
    met: Met, step: Callable[[Array, Any, bool], Any], carry: Any, *, every: int | None = None
) -> Any:
    """Folds `step(tile index, carry, masked)` over the tiles that one meets.

    Args:
        met: which tiles.
        step: computes one tile; `masked` says whether it must ask what is visible.
        carry: what the fold starts from.
        every: visit this many tiles, masked, met or not: loops with a fixed number of steps, which
            JAX can differentiate in reverse.
    """
    if every is not None:
        body = jax.checkpoint(lambda carry, index: (step(index, carry, True), None))
        return lax.scan(body, carry, count_up(every))[0]
    before, after = met.clear - met.first, met.end - met.clear_end

    def boundary(n: Array, carry: Any) -> Any:
        n = jnp.where(n < before, met.first + n, met.clear_end + n - before)
        return step(met.tile(n), carry, True)

    def clear(n: Array, carry: Any) -> Any:
        return step(met.tile(n), carry, False)

    # Both boundaries in one loop: half the code to compile, and the order of tiles is free.
    for begin, end, body in ((0, before + after, boundary), (met.clear, met.clear_end, clear)):
        if not _same(begin, end):
            carry = lax.fori_loop(jnp.int32(begin), jnp.int32(end), body, carry)
    return carry


def _same(a: Any, b: Any) -> bool:
    """Whether two bounds are known to be equal before any value is."""
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)
