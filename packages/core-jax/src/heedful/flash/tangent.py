"""The tangent of the forward pass, tile by tile: what forward mode asks for, and the twin of cotangent.

With s' the tangent of the scores along those of q, k, v and bias, e = exp(s − m), l = Σ e and
out = Σ e v / l give

    l'_i   = Σ_j e_ij s'_ij
    out'_i = (Σ_j e_ij (s'_ij v_j + v'_j) − l'_i out_i) / l_i

where m stands still: whatever is taken off the scores, out and lse = m + log l are the same. What the
forward pass kept makes e without a second softmax, as in Algorithm 4 of Dao et al. 2022.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.flash.forward import Kept
from heedful.flash.scores import (
    clean,
    cut_scores,
    keys_of,
    queries_of,
    query_key,
    scores,
    seen_in_tile,
    seen_keys,
    unfold_queries,
    weigh,
    widen,
)
from heedful.flash.tiles import (
    Tiles,
    count,
    count_up,
    join,
    keys_seen,
    over_heads,
    start,
    tile_sizes,
    visit,
)


def tangent(
    problem: Problem,
    operands: Operands,
    kept: Kept,
    tangents: tuple[Array, Array, Array, Array | None],
    *,
    tiles: Tiles | None = None,
    every_tile: bool = False,
) -> tuple[Array, Array]:
    """The tangents of out and l along `tangents` of q, k, v and bias (None: bias stands still).

    `every_tile` visits those that nobody sees too, in loops of a fixed length (see `tiles.visit`).
    """
    tiles = tiles or tile_sizes(problem)
    query_tiles = count(problem.q_length, tiles.queries)
    key_tiles = count(problem.kv_length, tiles.keys)
    accumulator = problem.accumulator

    def head_tile(arrays: Any, _: tuple[()]) -> tuple[tuple[Array, Array], tuple[()]]:
        operands, kept, (q_dot, k_dot, v_dot, bias_dot) = arrays

        def query_tile(i: Array) -> tuple[Array, Array]:
            out, m, l = (queries_of(problem, tiles, x, i) for x in kept)
            alive = l != 0  # a row that sees no key has no tangent
            q = clean(widen(problem, queries_of(problem, tiles, operands.q, i)), alive[..., None])
            dq = clean(widen(problem, queries_of(problem, tiles, q_dot, i)), alive[..., None])

            def step(j: Array, carry: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
                out_sum, l_dot = carry
                k = widen(problem, keys_of(problem, tiles, operands.k, j))
                v = widen(problem, keys_of(problem, tiles, operands.v, j))
                dk = widen(problem, keys_of(problem, tiles, k_dot, j))
                dv = widen(problem, keys_of(problem, tiles, v_dot, j))
                see = seen_in_tile(problem, tiles, operands, i, j) if masked else None
                seen = seen_keys(problem, tiles, see)
                k, v, dk, dv = (clean(x, seen) for x in (k, v, dk, dv))
                s, slope, _ = scores(problem, tiles, operands, q, k, i, j, see)
                e = jnp.exp(s - m[..., None])
                s_dot = (query_key(dq, k) + query_key(q, dk)) * problem.scale
                if slope is not None:
                    s_dot = s_dot * slope
                if bias_dot is not None:
                    moved = cut_scores(problem, tiles, bias_dot, i, j).astype(accumulator)
                    s_dot = (unfold_queries(problem, tiles, s_dot) + moved).reshape(s_dot.shape)
                # Where e is 0, the tangent of the score may be anything, infinity too.
                e_dot = e * clean(s_dot, e != 0)
                out_sum = out_sum + weigh(e_dot, v) + weigh(e, dv)
                return out_sum, l_dot + e_dot.sum(axis=-1)

            out_sum = jnp.zeros((*q.shape[:2], problem.value_dim), accumulator)
            l_dot = jnp.zeros(q.shape[:2], accumulator)
            seen = keys_seen(problem, operands, tiles, start(i, problem.q_length, tiles.queries))
            every = key_tiles if every_tile else None
            out_sum, l_dot = visit(seen, step, (out_sum, l_dot), every=every)
            total = jnp.where(alive, l, 1)
            out_dot = (out_sum - l_dot[..., None] * out) / total[..., None]
            out_dot, l_dot = clean(out_dot, alive[..., None]), clean(l_dot, alive)
            return unfold_queries(problem, tiles, out_dot), unfold_queries(problem, tiles, l_dot)

        out_dot, l_dot = lax.map(query_tile, count_up(query_tiles))
        return (join(out_dot, problem.q_length, 2), join(l_dot, problem.q_length, 2)), ()

    return over_heads(problem, tiles, head_tile, (operands, kept, tangents))[0]
