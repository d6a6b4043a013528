"""The tangent of the forward pass, tile by tile: what forward mode asks for, and the twin of cotangent.

With s' the tangent of the scores along those of the operands, e = exp(s − m), l = Σ e and
out = Σ e v / l give

    l'_i   = Σ_j e_ij s'_ij
    out'_i = (Σ_j e_ij (s'_ij v_j + v'_j) − l'_i out_i) / l_i

where m stands still: whatever is taken off the scores, out and lse = m + log l are the same. What the
forward pass kept makes e without a second softmax, as in Algorithm 4 of Dao et al. 2022.
"""

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
    beside_product,
    clean,
    cut_scores,
    keys_of,
    of_seen,
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
from heedful.flash.sums import Sum, lying, sum_over_tiles
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
from heedful.rules.dropout import thinned


def tangent(
    problem: Problem,
    given: Numbered,
    kept: Kept,
    tangents: Operands,
    *,
    tiles: Tiles | None = None,
) -> tuple[Array, Array]:
    """The tangents of out and l along those of the operands (None stands still; q, k, v never do)."""
    tiles = tiles or tile_sizes(problem)
    query_tiles = count(problem.q_length, tiles.queries)
    accumulator = problem.accumulator

    def head_tile(arrays: Any, _: tuple[()]) -> tuple[tuple[Array, Array], tuple[()]]:
        given, kept, tangents = arrays
        operands = given.operands

        def query_tile(i: Array) -> tuple[Array, Array]:
            out, m, l = (queries_of(problem, tiles, x, i) for x in kept)
            alive = (l != 0)[..., None]
            q, q_dot = (
                clean(widen(problem, queries_of(problem, tiles, x, i)), alive)
                for x in (operands.q, tangents.q)
            )

            def step(j: Array, carry: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
                out_sum, l_dot = carry
                tile = tile_at(problem, tiles, given, i, j, masked)
                of_keys = (
                    widen(problem, keys_of(problem, tiles, x, j))
                    for x in (operands.k, operands.v, tangents.k, tangents.v)
                )
                of_added = tangents.added.items()
                along = {n: cut_scores(problem, tiles, x, i, j) for n, x in of_added}
                out_part, l_part = _of_tile(problem, tiles, tile, along, q, q_dot, m, *of_keys)
                return out_sum + out_part, l_dot + l_part

            out_sum = jnp.zeros((*q.shape[:2], problem.value_dim), accumulator)
            l_dot = jnp.zeros(q.shape[:2], accumulator)
            met = keys_met(problem, operands, tiles, start(i, problem.q_length, tiles.queries))
            out_dot, l_dot = _of_rows(out, l, *visit(met, step, (out_sum, l_dot)))
            return unfold_queries(problem, tiles, out_dot), unfold_queries(problem, tiles, l_dot)

        out_dot, l_dot = lax.map(query_tile, count_up(query_tiles))
        return (join(out_dot, problem.q_length, 2), join(l_dot, problem.q_length, 2)), ()

    return over_heads(problem, tiles, head_tile, (given, kept, tangents))[0]


def tangent_as_sums(
    problem: Problem,
    given: Numbered,
    kept: Kept,
    tangents: Operands,
    *,
    tiles: Tiles | None = None,
) -> tuple[Array, Array]:
    """The same as a sum over tiles, which has derivatives of every order."""
    out, m, l = kept
    operands, alive = given.operands, (l != 0)[..., None]
    added, along = operands.added, tangents.added
    of_queries = clean(operands.q, alive), clean(tangents.q, alive), m
    of_keys = operands.k, operands.v, tangents.k, tangents.v
    read = lying(of_queries, of_keys, [*added.values(), *along.values()])
    into = [Sum.of("queries", x) for x in (out, l)]
    function = OfTile(tuple(added), tuple(along))
    return _of_rows(out, l, *sum_over_tiles(problem, tiles, function, given, read, into))


@dataclass(frozen=True)
class OfTile:
    """`_of_tile` of what `sum_over_tiles` reads: what is added to the scores comes behind the rest."""

    added: tuple[str, ...]
    moving: tuple[str, ...]

    def __call__(
        self, problem: Problem, tiles: Tiles, tile: Tile, *read: Array
    ) -> tuple[Array, Array]:
        beside, over_scores = read[:7], read[7:]
        added = dict(zip(self.added, over_scores, strict=False))
        along = dict(zip(self.moving, over_scores[len(added) :], strict=True))
        tile = tile._replace(operands=tile.operands._replace(**added))
        return _of_tile(problem, tiles, tile, along, *beside)


def _of_tile(
    problem: Problem,
    tiles: Tiles,
    tile: Tile,
    along: dict[str, Array],
    q: Array,
    q_dot: Array,
    m: Array,
    k: Array,
    v: Array,
    k_dot: Array,
    v_dot: Array,
) -> tuple[Array, Array]:
    """What a tile adds to Σ e (s' v + v') and to l'. `along`: of what is added to the scores."""
    seen = seen_keys(problem, tiles, tile.see)
    k, v, k_dot, v_dot = (clean(x, seen) for x in (k, v, k_dot, v_dot))
    s, slope, _, capped = scores(problem, tiles, tile, q, k)
    e = jnp.exp(s - m[..., None])
    s_dot = (query_key(q_dot, k) + query_key(q, k_dot)) * problem.scale
    if slope is not None:
        s_dot = s_dot * slope
    if along:
        s_dot = s_dot + _of_added(problem, tile, capped, along).reshape(s.shape)
    # Where e is 0, the tangent of the score may be anything, infinity too.
    e_dot = e * clean(s_dot, e != 0)
    l_part = e_dot.sum(axis=-1)
    e, e_dot = (thinned(problem, tile.kept, x) for x in (e, e_dot))
    return of_seen(problem, tile, (weigh(e_dot, v) + weigh(e, v_dot), l_part))


def _of_rows(out: Array, l: Array, out_sum: Array, l_dot: Array) -> tuple[Array, Array]:
    """out' and l' of what the tiles of a row add up to; a row that sees no key has no tangent."""
    alive = l != 0
    total = jnp.where(alive, l, 1)
    out_dot = (out_sum - l_dot[..., None] * out) / total[..., None]
    return clean(out_dot, alive[..., None]), clean(l_dot, alive)


def _of_added(problem: Problem, tile: Tile, capped: Array, tangents: dict[str, Array]) -> Array:
    """The tangent of a tile of scores along those of the operands beside q and k."""

    def sum_of(operands: dict[str, Array]) -> Array:
        return beside_product(problem, tile, tile.operands._replace(**operands), capped)

    at = {name: getattr(tile.operands, name) for name in tangents}
    _, found = jax.jvp(sum_of, (wide(at, problem),), (wide(tangents, problem),))
    return found
