"""The tangent of the forward pass, tile by tile: what forward mode asks for, and the twin of cotangent.

With s' the tangent of the scores along those of q, k, v and bias, out = P V and lse = log Σ exp(s) give

    lse'_i = Σ_j p_ij s'_ij
    out'_i = Σ_j p_ij (s'_ij v_j + v'_j) − lse'_i out_i

The statistics saved by the forward pass make p without a second softmax, as in Algorithm 4 of Dao et
al. 2022.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from heedful.flash.scores import (
    clean,
    cut_scores,
    keys_of,
    queries_of,
    query_key,
    tile_of_scores,
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
from heedful.problem import Array, Operands, Problem


def tangent(
    problem: Problem,
    operands: Operands,
    out: Array,
    lse: Array,
    tangents: tuple[Array, Array, Array, Array | None],
    *,
    tiles: Tiles | None = None,
    every_tile: bool = False,
) -> tuple[Array, Array]:
    """The tangents of out and lse along `tangents` of q, k, v and bias (None: bias stands still)."""
    tiles = tiles or tile_sizes(problem)
    query_tiles = count(problem.q_length, tiles.queries)
    key_tiles = count(problem.kv_length, tiles.keys)
    accumulator = problem.accumulator

    def head_tile(arrays: Any, _: tuple[()]) -> tuple[tuple[Array, Array], tuple[()]]:
        operands, out, lse, (q_dot, k_dot, v_dot, bias_dot) = arrays

        def query_tile(i: Array) -> tuple[Array, Array]:
            row_lse = queries_of(problem, tiles, lse, i)
            alive = row_lse != -jnp.inf  # a row that sees no key has no tangent
            q = clean(widen(problem, queries_of(problem, tiles, operands.q, i)), alive[..., None])
            dq = clean(widen(problem, queries_of(problem, tiles, q_dot, i)), alive[..., None])

            def step(j: Array, carry: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
                out_sum, lse_sum = carry
                k = widen(problem, keys_of(problem, tiles, operands.k, j))
                v = widen(problem, keys_of(problem, tiles, operands.v, j))
                dk = widen(problem, keys_of(problem, tiles, k_dot, j))
                dv = widen(problem, keys_of(problem, tiles, v_dot, j))
                s, slope, seen = tile_of_scores(problem, tiles, operands, q, k, i, j, masked)
                p = jnp.exp(s - jnp.where(alive, row_lse, jnp.inf)[..., None])
                k, v, dk, dv = (clean(x, seen) for x in (k, v, dk, dv))
                s_dot = (query_key(dq, k) + query_key(q, dk)) * problem.scale
                if slope is not None:
                    s_dot = s_dot * slope
                if bias_dot is not None:
                    moved = cut_scores(problem, tiles, bias_dot, i, j).astype(accumulator)
                    s_dot = (unfold_queries(problem, tiles, s_dot) + moved).reshape(s_dot.shape)
                # Where p is 0, the tangent of the score may be anything, infinity too.
                p_dot = jnp.where(p > 0, p * s_dot, 0)
                out_sum = out_sum + weigh(p_dot, v) + weigh(p, dv)
                return out_sum, lse_sum + p_dot.sum(axis=-1)

            out_sum = jnp.zeros((*q.shape[:2], problem.value_dim), accumulator)
            lse_sum = jnp.zeros(q.shape[:2], accumulator)
            seen = keys_seen(problem, operands, tiles, start(i, problem.q_length, tiles.queries))
            every = key_tiles if every_tile else None
            out_sum, lse_dot = visit(seen, step, (out_sum, lse_sum), every=every)
            row_out = queries_of(problem, tiles, out, i).astype(accumulator)
            out_dot = out_sum - lse_dot[..., None] * row_out
            out_dot, lse_dot = (unfold_queries(problem, tiles, x) for x in (out_dot, lse_dot))
            return out_dot.astype(problem.dtype), lse_dot

        out_dot, lse_dot = lax.map(query_tile, count_up(query_tiles))
        return (join(out_dot, problem.q_length, 2), join(lse_dot, problem.q_length, 2)), ()

    return over_heads(problem, tiles, head_tile, (operands, out, lse, tangents))[0]
