"""The tangent of the forward pass, tile by tile: what forward mode asks for, and the twin of cotangent.

With s' the tangent of the scores along those of the operands, e = exp(s − m), l = Σ e and
out = Σ e v / l give

    l'_i   = Σ_j e_ij s'_ij
    out'_i = (Σ_j e_ij (s'_ij v_j + v'_j) − l'_i out_i) / l_i

where m stands still: whatever is taken off the scores, out and lse = m + log l are the same. What the
forward pass kept makes e without a second softmax, as in Algorithm 4 of Dao et al. 2022.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.flash.forward import Kept
from heedful.flash.scores import (
    Numbered,
    Tile,
    clean,
    cut_scores,
    keys_of,
    queries_of,
    query_key,
    scores,
    seen_keys,
    tile_at,
    unfold_queries,
    weigh,
    wide,
    widen,
)
from heedful.flash.tiles import (
    Tiles,
    count,
    count_up,
    join,
    keys_met,
    over_heads,
    start,
    tile_sizes,
    visit,
)
from heedful.rules.scores import added


def tangent(
    problem: Problem,
    given: Numbered,
    kept: Kept,
    tangents: Operands,
    *,
    tiles: Tiles | None = None,
    every_tile: bool = False,
) -> tuple[Array, Array]:
    """The tangents of out and l along those of the operands (None: it stands still; q, k, v never do).

    `every_tile` visits those that nobody sees too, in loops of a fixed length (see `tiles.visit`).
    """
    tiles = tiles or tile_sizes(problem)
    query_tiles = count(problem.q_length, tiles.queries)
    key_tiles = count(problem.kv_length, tiles.keys)
    accumulator = problem.accumulator

    def head_tile(arrays: Any, _: tuple[()]) -> tuple[tuple[Array, Array], tuple[()]]:
        given, kept, tangents = arrays
        operands = given.operands

        def query_tile(i: Array) -> tuple[Array, Array]:
            out, m, l = (queries_of(problem, tiles, x, i) for x in kept)
            alive = l != 0  # a row that sees no key has no tangent
            q, q_dot = (
                clean(widen(problem, queries_of(problem, tiles, x, i)), alive[..., None])
                for x in (operands.q, tangents.q)
            )

            def step(j: Array, carry: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
                out_sum, l_dot = carry
                tile = tile_at(problem, tiles, given, i, j, masked)
                seen = seen_keys(problem, tiles, tile.see)
                k, v, k_dot, v_dot = (
                    clean(widen(problem, keys_of(problem, tiles, x, j)), seen)
                    for x in (operands.k, operands.v, tangents.k, tangents.v)
                )
                s, slope, _ = scores(problem, tiles, tile, q, k)
                e = jnp.exp(s - m[..., None])
                s_dot = (query_key(q_dot, k) + query_key(q, k_dot)) * problem.scale
                if slope is not None:
                    s_dot = s_dot * slope
                if along := tangents.over_scores:
                    cuts = {n: cut_scores(problem, tiles, x, i, j) for n, x in along.items()}
                    s_dot = s_dot + _of_added(problem, tiles, tile, s.shape, cuts)
                # Where e is 0, the tangent of the score may be anything, infinity too.
                e_dot = e * clean(s_dot, e != 0)
                out_sum = out_sum + weigh(e_dot, v) + weigh(e, v_dot)
                return out_sum, l_dot + e_dot.sum(axis=-1)

            out_sum = jnp.zeros((*q.shape[:2], problem.value_dim), accumulator)
            l_dot = jnp.zeros(q.shape[:2], accumulator)
            met = keys_met(problem, operands, tiles, start(i, problem.q_length, tiles.queries))
            every = key_tiles if every_tile else None
            out_sum, l_dot = visit(met, step, (out_sum, l_dot), every=every)
            total = jnp.where(alive, l, 1)
            out_dot = (out_sum - l_dot[..., None] * out) / total[..., None]
            out_dot, l_dot = clean(out_dot, alive[..., None]), clean(l_dot, alive)
            return unfold_queries(problem, tiles, out_dot), unfold_queries(problem, tiles, l_dot)

        out_dot, l_dot = lax.map(query_tile, count_up(query_tiles))
        return (join(out_dot, problem.q_length, 2), join(l_dot, problem.q_length, 2)), ()

    return over_heads(problem, tiles, head_tile, (given, kept, tangents))[0]


def _of_added(
    problem: Problem,
    tiles: Tiles,
    tile: Tile,
    shape: tuple[int, ...],
    tangents: dict[str, Array],
) -> Array:
    """The tangent of what is added to a tile of scores, in their shape, along those of its operands."""
    nothing = jnp.zeros(shape, problem.accumulator)

    def sum_of(operands: dict[str, Array]) -> Array:
        all_of_them = tile.operands._replace(**operands)
        return added(all_of_them, tile.distance, unfold_queries(problem, tiles, nothing))

    at = {name: getattr(tile.operands, name) for name in tangents}
    _, found = jax.jvp(sum_of, (wide(at, problem),), (wide(tangents, problem),))
    return found.reshape(shape)
