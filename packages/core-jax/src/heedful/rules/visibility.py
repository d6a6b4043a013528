"""Which keys a query sees: for the whole score matrix or a tile of it, and, in `reach`, as a range.

`visible` is written with operators alone, so that one text serves NumPy, JAX and torch: the caller
brings the place in its own framework, and the answer comes in that framework.
"""

import operator
from functools import reduce
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.rules.place import Place

FEATURES = frozenset(
    {
        "mask",
        "mask_mod",
        "causal",
        "window",
        "q_offset",
        "q_lengths",
        "kv_lengths",
        "q_segment_ids",
        "kv_segment_ids",
    }
)


def hiding(problem: Problem) -> dict[str, tuple[int, ...]]:
    """What hides keys, by option, beside position; each axis full or 1 of (B, Hq, Sq, Sk)."""
    batch, q_length, kv_length = problem.batch, problem.q_length, problem.kv_length
    found = {}
    if problem.mask_shape is not None:
        found["mask"] = problem.mask_shape
    if problem.q_lengths:
        found["q_lengths"] = (batch, 1, q_length, 1)
    if problem.kv_lengths:
        found["kv_lengths"] = (batch, 1, 1, kv_length)
    if problem.q_segment_ids:
        found["q_segment_ids"] = (batch, 1, q_length, kv_length)
    if problem.mask_mod is not None:
        found["mask_mod"] = (batch, problem.q_heads, q_length, kv_length)
    return found


def _column(per_batch: Array) -> Array:
    """(B,) → (B, 1, 1, 1), to stand beside scores."""
    return per_batch[:, None, None, None]


def q_offset(problem: Problem, operands: Operands) -> Any:
    """The place of query 0 among the keys: a number, or (B,) where rows differ.

    Where each query has one of its own it is (B or 1, 1, Sq, 1), or cut to a tile, and taken from there.
    """
    if problem.q_offset is not None:
        return problem.q_offset
    if operands.q_offset is not None:
        return operands.q_offset
    kv = problem.kv_length if operands.kv_lengths is None else operands.kv_lengths
    return kv - (problem.q_length if operands.q_lengths is None else operands.q_lengths)


def places(problem: Problem, operands: Operands, place: Place) -> Array:
    """p_i, the queries' places among the keys, (b or 1, 1, rows, 1)."""
    offset = q_offset(problem, operands)
    beside_scores = isinstance(offset, int) or _of_each_query(offset)
    return place.i + (offset if beside_scores else _column(offset))


def _of_each_query(offset: Any) -> bool:
    return not isinstance(offset, int) and len(offset.shape) == 4


def visible(problem: Problem, operands: Operands, place: Place) -> Array | None:
    """Which keys are seen: boolean, broadcastable to a tile of scores; None where all are.

    Args:
        problem: what is asked.
        operands: its arrays, those over the scores cut to the tile, and all to its batch rows.
        place: of the tile.
    """
    left, right = problem.band
    conditions = []
    if problem.positional:
        p = places(problem, operands, place)
        if left is not None:
            conditions.append(place.j >= p - left)
        if right is not None:
            conditions.append(place.j <= p + right)
    if operands.q_lengths is not None:
        conditions.append(place.i < _column(operands.q_lengths))
    if operands.kv_lengths is not None:
        conditions.append(place.j < _column(operands.kv_lengths))
    if operands.q_segment_ids is not None:
        conditions.append(operands.q_segment_ids == operands.kv_segment_ids)
    if operands.mask is not None:
        conditions.append(operands.mask)
    if problem.mask_mod is not None:  # JAX's, or torch's
        at = place.b, place.h, place.i, place.j
        conditions.append(problem.mask_mod(operands.floats, operands.words, *at))
    return reduce(operator.and_, conditions) if conditions else None


def of_key_heads(problem: Problem, by_query_heads: Array) -> Array:
    """Whether any query head that reads a key head says so: boolean (b, h, ·) → (b, h / group, ·).

    An axis of 1 says it for all heads, and stays.
    """
    batch, heads, *rest = by_query_heads.shape
    if heads == 1:
        return by_query_heads
    grouped = by_query_heads.reshape(batch, heads // problem.group, problem.group, *rest)
    return grouped.any(axis=2)


# The same as a range, for JAX


class Reach(NamedTuple):
    """A range of one axis that a tile of the other meets: low ≤ … < high, whole within the clear part.

    Attributes:
        low, high: nothing outside is seen by anybody in the tile.
        clear_low, clear_high: what lies between is seen by all of them; None: nothing is known to be.
    """

    low: Any
    high: Any
    clear_low: Any
    clear_high: Any | None


def reach(
    problem: Problem,
    operands: Operands,
    first: Array,
    size: int,
    along: Literal["keys", "queries"],
) -> Reach:
    """The keys that so many queries from `first` on meet, or the queries that so many keys meet.

    Each bound is over all batch rows. p_i − left ≤ j ≤ p_i + right is, the other way round,
    j − right ≤ p_i ≤ j + left.
    """
    last = first + size - 1
    left, right = problem.band
    offset: Any = q_offset(problem, operands) if problem.positional else 0
    own_segments, segments = operands.q_segment_ids, operands.kv_segment_ids
    own_lengths, lengths, length = operands.q_lengths, operands.kv_lengths, problem.kv_length
    first_own, last_own = first, last
    if by_query := _of_each_query(offset):
        offset = offset[:, 0, :, 0]
        if along == "keys":
            # Places in no order: the outermost may be those of any query.
            first_own = last_own = first + jnp.arange(size, dtype=jnp.int32)[None]
            offset = lax.dynamic_slice_in_dim(offset, first, size, axis=1)
    if along == "queries":
        left, right, offset = right, left, -offset
        own_lengths, lengths, length = operands.kv_lengths, operands.q_lengths, problem.q_length
        own_segments, segments = segments, own_segments
    low: Any = 0
    high: Any = length
    clear_low: Any = 0
    clear_high: Any = length
    met = []
    if by_query and along == "queries":
        met += _of_places(-offset, first, last, left, right)
        left, right = None, None
    if left is not None:
        low = jnp.min(first_own + offset - left)
        clear_low = jnp.max(last_own + offset - left)
    if right is not None:
        clear_high = jnp.minimum(clear_high, jnp.min(first_own + offset + right) + 1)
        high = jnp.minimum(high, jnp.max(last_own + offset + right) + 1)
    if lengths is not None:
        clear_high = jnp.minimum(clear_high, jnp.min(lengths))
        high = jnp.minimum(high, jnp.max(lengths))
    if own_lengths is not None:
        clear_high = jnp.where(last < jnp.min(own_lengths), clear_high, 0)
        high = jnp.where(first < jnp.max(own_lengths), high, 0)
    if own_segments is not None and segments is not None:
        met.append(_of_segments(own_segments, segments, first, size))
    if met:
        begin, end = _extent(reduce(operator.and_, met))
        low, high = jnp.maximum(low, begin), jnp.minimum(high, end)
    known = along == "keys" or not by_query
    elsewhere = {"q_lengths", "kv_lengths"}
    if operands.blocks is not None:
        elsewhere.add("mask_mod")
    if not known or hiding(problem).keys() - elsewhere:
        return Reach(low, high, clear_low, None)
    return Reach(low, high, clear_low, clear_high)


def _of_segments(own: Array, others: Array, first: Array, size: int) -> Array:
    """Which are of segments between the least and the greatest of a tile's, (B, ·).

    Of sequences packed one after the other that is no more than its own segments.
    """
    own, others = (x.reshape(len(x), -1) for x in (own, others))
    tile = lax.dynamic_slice_in_dim(own, first, size, axis=1)
    least, greatest = tile.min(axis=1, keepdims=True), tile.max(axis=1, keepdims=True)
    return (others >= least) & (others <= greatest)


def _of_places(
    offset: Array, first: Array, last: Array, left: int | None, right: int | None
) -> list[Array]:
    """Which queries stand where somebody sees keys from `first` to `last`: two conditions, (B, Sq) each.

    For queries with an offset of their own, (B, Sq), whose places are in no order: a sequence of more
    queries than keys begins in front of its first key.
    """
    p = jnp.arange(offset.shape[1], dtype=jnp.int32)[None] + offset
    met = []
    if left is not None:
        met.append(p >= first - left)
    if right is not None:
        met.append(p <= last + right)
    return met


def _extent(met: Array) -> tuple[Array, Array]:
    """From where to where any batch row has something."""
    met = met.any(axis=0)
    begin, behind = jnp.argmax(met), jnp.argmax(met[::-1])
    end = jnp.where(met.any(), met.shape[0] - behind, 0)
    return begin.astype(jnp.int32), end.astype(jnp.int32)
