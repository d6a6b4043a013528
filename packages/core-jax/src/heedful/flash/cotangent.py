"""The backward pass, tile by tile: Dao et al. 2022, Algorithm 4, with the cotangent of lse."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from heedful.flash.scores import (
    add_tile,
    clean,
    gather,
    keys_of,
    queries_of,
    query_key,
    tile_of_scores,
    unfold_keys,
    unfold_queries,
    weigh,
    widen,
)
from heedful.flash.tiles import (
    Tiles,
    count,
    count_up,
    cut,
    join,
    over_heads,
    queries_seen,
    start,
    tile_sizes,
    visit,
)
from heedful.problem import Array, Operands, Problem


def cotangent(
    problem: Problem,
    operands: Operands,
    out: Array,
    lse: Array,
    out_cotangent: Array,
    lse_cotangent: Array,
    *,
    of_bias: bool = False,
    tiles: Tiles | None = None,
    every_tile: bool = False,
) -> tuple[Array, ...]:
    """(dq, dk, dv), and dbias where `of_bias`: what out's and lse's cotangents make of the inputs'.

    From lse = log Σ exp(s) follows ∂lse_i/∂s_ij = p_ij, so the cotangent of lse joins line 19 as
    dS = P ∘ (dP − D + dlse); it is taken off D before the loops. The loops are exchanged against the
    paper: keys outside, so that dk and dv stay in the tile and only dq is updated in memory.
    """
    tiles = tiles or tile_sizes(problem)
    query_tiles = count(problem.q_length, tiles.queries)
    key_tiles = count(problem.kv_length, tiles.keys)
    accumulator = problem.accumulator
    # Line 19: D = rowsum(dO ∘ O), for all rows at once.
    delta = jnp.sum(out_cotangent.astype(accumulator) * out.astype(accumulator), axis=-1)
    delta = delta - lse_cotangent.astype(accumulator)
    # A row that sees no key has no gradient: with lse = +inf its p is 0, and 0 is what it then meets.
    alive = lse != -jnp.inf
    lse, delta = jnp.where(alive, lse, jnp.inf), jnp.where(alive, delta, 0)
    q, out_cotangent = (clean(x, alive[..., None]) for x in (operands.q, out_cotangent))
    operands = operands._replace(q=q)

    def head_tile(
        arrays: tuple[Operands, Array, Array, Array], d_bias: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
        operands, lse, d_out, delta = arrays

        def key_tile(carry: Any, j: Array) -> tuple[Any, tuple[Array, Array]]:
            k = widen(problem, keys_of(problem, tiles, operands.k, j))
            v = widen(problem, keys_of(problem, tiles, operands.v, j))

            def step(i: Array, carry: Any, masked: bool) -> Any:
                dq, d_bias, dk, dv = carry
                q = widen(problem, queries_of(problem, tiles, operands.q, i))
                do = widen(problem, queries_of(problem, tiles, d_out, i))
                row_lse = queries_of(problem, tiles, lse, i)
                row_delta = queries_of(problem, tiles, delta, i)

                s, slope, seen = tile_of_scores(problem, tiles, operands, q, k, i, j, masked)
                p = jnp.exp(s - row_lse[..., None])  # line 13
                dv = dv + gather(problem, p, do)  # line 16
                dp = query_key(do, clean(v, seen))  # line 17
                ds = p * (dp - row_delta[..., None])  # lines 19 and 20
                d_bias = tuple(add_tile(problem, tiles, x, ds, i, j) for x in d_bias)
                if slope is not None:
                    ds = ds * slope
                begin = start(i, problem.q_length, tiles.queries)
                rows = unfold_queries(problem, tiles, weigh(ds, clean(k, seen)))  # line 21
                rows = cut(dq, 2, begin, tiles.queries) + rows
                dq = lax.dynamic_update_slice_in_dim(dq, rows, begin, 2)
                return dq, d_bias, dk + gather(problem, ds, q), dv  # line 22

            dk, dv = jnp.zeros(k.shape, accumulator), jnp.zeros(v.shape, accumulator)
            seen = queries_seen(problem, operands, tiles, start(j, problem.kv_length, tiles.keys))
            every = query_tiles if every_tile else None
            dq, d_bias, dk, dv = visit(seen, step, (*carry, dk, dv), every=every)
            return (dq, d_bias), (unfold_keys(tiles, dk), unfold_keys(tiles, dv))

        carry = jnp.zeros(operands.q.shape, accumulator), d_bias
        (dq, d_bias), (dk, dv) = lax.scan(key_tile, carry, count_up(key_tiles))
        dk, dv = join(dk, problem.kv_length, 2), join(dv, problem.kv_length, 2)
        return (dq * problem.scale, dk * problem.scale, dv), d_bias

    bias = operands.bias if of_bias else None
    d_bias = () if bias is None else (jnp.zeros(bias.shape, accumulator),)
    gradients, d_bias = over_heads(
        problem, tiles, head_tile, (operands, lse, out_cotangent, delta), d_bias
    )
    dq, dk, dv = (x.astype(problem.dtype) for x in gradients)
    return dq, dk, dv, *(x.astype(problem.bias_dtype) for x in d_bias)
