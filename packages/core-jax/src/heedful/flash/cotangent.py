"""The backward pass, tile by tile: Dao et al. 2022, Algorithm 4, with the cotangent of l."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    beside_product,
    clean,
    gather,
    keys_of,
    of_seen,
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
from heedful.flash.sums import Sum, lying, sum_over_tiles
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
from heedful.rules.dropout import thinned


def cotangent(
    problem: Problem,
    given: Numbered,
    kept: Kept,
    out_cotangent: Array,
    l_cotangent: Array,
    *,
    wanted: Sequence[str] = ("q", "k", "v"),
    tiles: Tiles | None = None,
) -> Operands:
    """What out's and l's cotangents make of the operands': gradients of q, k, v and all others wanted.

    From l = Σ exp(s − m) follows ∂l_i/∂s_ij = l_i p_ij, so the cotangent of l joins line 19 as
    dS = P ∘ (dP − D + l dl); it is taken off D before the loops. The loops are exchanged against the
    paper: keys outside, so that dk and dv stay in the tile and only dq is updated in memory.
    """
    tiles = tiles or tile_sizes(problem)
    key_tiles = count(problem.kv_length, tiles.keys)
    accumulator = problem.accumulator
    q, d_out, *of_rows = _rows(given.operands.q, kept, out_cotangent, l_cotangent)
    given = given._replace(operands=given.operands._replace(q=q))

    def head_tile(
        arrays: tuple[Numbered, Array, list[Array]], sums: dict[str, Array]
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
                m, inverse, delta = (queries_of(problem, tiles, x, i) for x in of_rows)
                tile = tile_at(problem, tiles, given, i, j, masked)
                rows, dk_part, dv_part, parts = _of_tile(
                    problem, tiles, tile, sums, q, do, m, inverse, delta, k, v, q_turned, do_turned
                )
                sums = {n: add_cut(problem, tiles, sums[n], x, i, j) for n, x in parts.items()}
                begin = start(i, problem.q_length, tiles.queries)
                rows = cut(dq, 2, begin, tiles.queries) + unfold_queries(problem, tiles, rows)
                dq = lax.dynamic_update_slice_in_dim(dq, rows, begin, 2)
                return dq, sums, dk + dk_part, dv + dv_part

            # Turned, as `gather` makes them: (b·h, D, keys).
            dk, dv = (jnp.zeros(x.swapaxes(1, 2).shape, accumulator) for x in (k, v))
            met = queries_met(problem, operands, tiles, start(j, problem.kv_length, tiles.keys))
            dq, sums, dk, dv = visit(met, step, (*carry, dk, dv))
            dk, dv = (unfold_keys(tiles, x.swapaxes(1, 2)) for x in (dk, dv))
            return (dq, sums), (dk, dv)

        carry = jnp.zeros(operands.q.shape, accumulator), sums
        (dq, sums), (dk, dv) = lax.scan(key_tile, carry, count_up(key_tiles))
        dk, dv = join(dk, problem.kv_length, 2), join(dv, problem.kv_length, 2)
        return (dq * problem.scale, dk * problem.scale, dv), sums

    others = {n: x for n, x in given.operands.added.items() if n in wanted}
    sums = {name: jnp.zeros(x.shape, accumulator) for name, x in others.items()}
    arrays = given, d_out, of_rows
    (dq, dk, dv), sums = over_heads(problem, tiles, head_tile, arrays, sums)
    return _gradients(problem, kept, others, dq, dk, dv, sums)


def cotangent_as_sums(
    problem: Problem,
    given: Numbered,
    kept: Kept,
    out_cotangent: Array,
    l_cotangent: Array,
    *,
    wanted: Sequence[str] = ("q", "k", "v"),
    tiles: Tiles | None = None,
) -> Operands:
    """The same as a sum over tiles, which has derivatives of every order."""
    operands = given.operands
    others = {n: x for n, x in operands.added.items() if n in wanted}
    of_queries = _rows(operands.q, kept, out_cotangent, l_cotangent)
    of_keys = operands.k, operands.v
    read = lying(of_queries, of_keys, operands.added.values())
    like = lying([operands.q], of_keys, others.values())
    into = [Sum.of(along, x)._replace(dtype=problem.accumulator) for along, x in like]
    function = OfTile(tuple(operands.added), tuple(others))
    dq, dk, dv, *found = sum_over_tiles(problem, tiles, function, given, read, into)
    dq, dk = dq * problem.scale, dk * problem.scale
    return _gradients(problem, kept, others, dq, dk, dv, dict(zip(others, found, strict=True)))


@dataclass(frozen=True)
class OfTile:
    """`_of_tile` of what `sum_over_tiles` reads: what is added to the scores comes behind the rest."""

    added: tuple[str, ...]
    wanted: tuple[str, ...]

    def __call__(self, problem: Problem, tiles: Tiles, tile: Tile, *read: Array) -> list[Array]:
        beside, over_scores = read[:7], read[7:]
        added = dict(zip(self.added, over_scores, strict=True))
        tile = tile._replace(operands=tile.operands._replace(**added))
        turned = (lax.optimization_barrier(x.swapaxes(1, 2)) for x in beside[:2])
        dq, dk, dv, parts = _of_tile(problem, tiles, tile, self.wanted, *beside, *turned)
        # Or the turn back joins the product (see `turn`).
        dk, dv = lax.optimization_barrier((dk, dv))
        return [dq, dk.swapaxes(1, 2), dv.swapaxes(1, 2), *(parts[n] for n in self.wanted)]


def _rows(q: Array, kept: Kept, d_out: Array, d_l: Array) -> list[Array]:
    """q, d_out, m, 1 / l and delta. Of a row that sees no key p is 0, and 0 is what it then meets."""
    out, m, l = kept
    alive = l != 0
    q, d_out = (clean(x, alive[..., None]) for x in (q, d_out))
    # Line 19: D = rowsum(dO ∘ O), for all rows at once.
    delta = jnp.sum(d_out * out, axis=-1) - l * clean(d_l, alive)
    return [q, d_out, m, clean(1 / jnp.where(alive, l, 1), alive), delta]


def _of_tile(
    problem: Problem,
    tiles: Tiles,
    tile: Tile,
    wanted: Iterable[str],
    q: Array,
    do: Array,
    m: Array,
    inverse: Array,
    delta: Array,
    k: Array,
    v: Array,
    q_turned: Array,
    do_turned: Array,
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """What a tile adds to dq and, turned, to dk and dv, before they are scaled, and to others wanted."""
    m, inverse, delta = (x[..., None] for x in (m, inverse, delta))
    seen = seen_keys(problem, tiles, tile.see)
    seen_turned = None if seen is None else seen.swapaxes(1, 2)
    k, v = clean(k, seen), clean(v, seen)
    s, slope, _, capped = scores(problem, tiles, tile, q, k)
    p = jnp.exp(s - m) * inverse  # line 13
    left = thinned(problem, tile.kept, p)  # lines 14 and 15
    dv = clean(gather(left, do_turned), seen_turned)  # line 16
    dp = thinned(problem, tile.kept, query_key(do, v))  # lines 17 and 18
    ds = p * (dp - delta)  # lines 19 and 20
    parts = _of_added(problem, tiles, tile, capped, ds, wanted)
    if slope is not None:
        ds = ds * slope
    dq = weigh(ds, k)  # line 21
    dk = clean(gather(ds, q_turned), seen_turned)  # line 22
    return of_seen(problem, tile, (dq, dk, dv, parts))


def _gradients(
    problem: Problem,
    kept: Kept,
    others: dict[str, Array],
    dq: Array,
    dk: Array,
    dv: Array,
    sums: dict[str, Array],
) -> Operands:
    """The sums in the operands' dtypes; a row that sees no key has no gradient."""
    dq, dk, dv = (x.astype(problem.dtype) for x in (dq, dk, dv))
    found = {name: x.astype(others[name].dtype) for name, x in sums.items()}
    return Operands(clean(dq, (kept.l != 0)[..., None]), dk, dv, **found)


def _of_added(
    problem: Problem,
    tiles: Tiles,
    tile: Tile,
    capped: Array,
    ds: Array,
    wanted: Iterable[str],
) -> dict[str, Array]:
    """What the cotangent of a tile of scores makes of that of each operand which is added to them."""
    at = wide({name: getattr(tile.operands, name) for name in wanted}, problem)
    if not at:
        return {}
    seen_ds = clean(unfold_queries(problem, tiles, ds), tile.see)

    def sum_of(operands: dict[str, Array]) -> Array:
        return beside_product(problem, tile, tile.operands._replace(**operands), capped)

    _, pull_back = jax.vjp(sum_of, at)
    (found,) = pull_back(seen_ds)
    return found
