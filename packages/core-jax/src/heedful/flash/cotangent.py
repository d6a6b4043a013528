"""The backward pass, tile by tile: Dao et al. 2022, Algorithm 4, with the cotangent of l."""

from collections.abc import Iterable, Sequence
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
    add_cut,
    clean,
    gather,
    keys_of,
    queries_of,
    query_key,
    scores,
    seen_keys,
    tile_at,
    turn,
    turned_queries_of,
    unfold_keys,
    unfold_queries,
    weigh,
    wide,
    widen,
)
from heedful.flash.tiles import (
    Tiles,
    count,
    count_up,
    cut,
    join,
    over_heads,
    queries_met,
    start,
    tile_sizes,
    visit,
)
from heedful.rules.scores import added


def cotangent(
    problem: Problem,
    given: Numbered,
    kept: Kept,
    out_cotangent: Array,
    l_cotangent: Array,
    *,
    wanted: Sequence[str] = ("q", "k", "v"),
    tiles: Tiles | None = None,
    every_tile: bool = False,
) -> Operands:
    """What out's and l's cotangents make of the operands': gradients of q, k, v and all others wanted.

    From l = Σ exp(s − m) follows ∂l_i/∂s_ij = l_i p_ij, so the cotangent of l joins line 19 as
    dS = P ∘ (dP − D + l dl); it is taken off D before the loops. The loops are exchanged against the
    paper: keys outside, so that dk and dv stay in the tile and only dq is updated in memory.
    `every_tile` visits those that nobody sees too, in loops of a fixed length (see `tiles.visit`).
    """
    tiles = tiles or tile_sizes(problem)
    query_tiles = count(problem.q_length, tiles.queries)
    key_tiles = count(problem.kv_length, tiles.keys)
    accumulator = problem.accumulator
    # A row that sees no key has no gradient: its p is 0, and 0 is what it then meets.
    out, m, l = kept
    alive = l != 0
    q, d_out = (clean(x, alive[..., None]) for x in (given.operands.q, out_cotangent))
    given = given._replace(operands=given.operands._replace(q=q))
    # Line 19: D = rowsum(dO ∘ O), for all rows at once.
    delta = jnp.sum(d_out * out, axis=-1) - l * clean(l_cotangent, alive)
    inverse = clean(1 / jnp.where(alive, l, 1), alive)

    def head_tile(
        arrays: tuple[Numbered, Array, tuple[Array, Array, Array]], sums: dict[str, Array]
    ) -> tuple[tuple[Array, Array, Array], dict[str, Array]]:
        given, d_out, of_rows = arrays
        operands = given.operands
        turned = tuple(turn(problem, widen(problem, x)) for x in (operands.q, d_out))

        def key_tile(carry: Any, j: Array) -> tuple[Any, tuple[Array, Array]]:
            k = widen(problem, keys_of(problem, tiles, operands.k, j))
            v = widen(problem, keys_of(problem, tiles, operands.v, j))

            def step(i: Array, carry: Any, masked: bool) -> Any:
                dq, sums, dk, dv = carry
                q = widen(problem, queries_of(problem, tiles, operands.q, i))
                do = widen(problem, queries_of(problem, tiles, d_out, i))
                q_turned, do_turned = (turned_queries_of(problem, tiles, x, i) for x in turned)
                m, inverse, delta = (queries_of(problem, tiles, x, i)[..., None] for x in of_rows)
                tile = tile_at(problem, tiles, given, i, j, masked)
                seen = seen_keys(problem, tiles, tile.see)
                seen_turned = None if seen is None else seen.swapaxes(1, 2)
                seen_k, seen_v = clean(k, seen), clean(v, seen)
                s, slope, _ = scores(problem, tiles, tile, q, seen_k)
                p = jnp.exp(s - m) * inverse  # line 13
                dv = dv + clean(gather(p, do_turned), seen_turned)  # line 16
                dp = query_key(do, seen_v)  # line 17
                ds = p * (dp - delta)  # lines 19 and 20
                parts = _of_added(problem, tiles, tile, ds, sums)
                sums = {n: add_cut(problem, tiles, sums[n], x, i, j) for n, x in parts.items()}
                if slope is not None:
                    ds = ds * slope
                begin = start(i, problem.q_length, tiles.queries)
                rows = unfold_queries(problem, tiles, weigh(ds, seen_k))  # line 21
                rows = cut(dq, 2, begin, tiles.queries) + rows
                dq = lax.dynamic_update_slice_in_dim(dq, rows, begin, 2)
                dk = dk + clean(gather(ds, q_turned), seen_turned)  # line 22
                return dq, sums, dk, dv

            # Turned, as `gather` makes them: (b·h, D, keys).
            dk, dv = (jnp.zeros(x.swapaxes(1, 2).shape, accumulator) for x in (k, v))
            met = queries_met(problem, operands, tiles, start(j, problem.kv_length, tiles.keys))
            every = query_tiles if every_tile else None
            dq, sums, dk, dv = visit(met, step, (*carry, dk, dv), every=every)
            dk, dv = (unfold_keys(tiles, x.swapaxes(1, 2)) for x in (dk, dv))
            return (dq, sums), (dk, dv)

        carry = jnp.zeros(operands.q.shape, accumulator), sums
        (dq, sums), (dk, dv) = lax.scan(key_tile, carry, count_up(key_tiles))
        dk, dv = join(dk, problem.kv_length, 2), join(dv, problem.kv_length, 2)
        return (dq * problem.scale, dk * problem.scale, dv), sums

    others = {n: x for n, x in given.operands.over_scores.items() if n in wanted}
    sums = {name: jnp.zeros(x.shape, accumulator) for name, x in others.items()}
    gradients, sums = over_heads(
        problem, tiles, head_tile, (given, d_out, (m, inverse, delta)), sums
    )
    dq, dk, dv = (x.astype(problem.dtype) for x in gradients)
    found = {name: x.astype(others[name].dtype) for name, x in sums.items()}
    return Operands(clean(dq, alive[..., None]), dk, dv, **found)


def _of_added(
    problem: Problem, tiles: Tiles, tile: Tile, ds: Array, wanted: Iterable[str]
) -> dict[str, Array]:
    """What the cotangent of a tile of scores makes of that of each operand which is added to them."""
    at = wide({name: getattr(tile.operands, name) for name in wanted}, problem)
    if not at:
        return {}
    seen_ds = clean(unfold_queries(problem, tiles, ds), tile.see)

    def sum_of(operands: dict[str, Array]) -> Array:
        at = tile.operands._replace(**operands)
        return added(at, tile.distance, jnp.zeros_like(seen_ds))

    _, pull_back = jax.vjp(sum_of, at)
    (found,) = pull_back(seen_ds)
    return found
