"""The forward pass, tile by tile: Dao et al. 2022, Algorithms 1 and 2 (Rabe & Staats 2021, §3)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from heedful.call.arrays import Array
from heedful.call.problem import Problem
from heedful.flash.scores import (
    Numbered,
    clean,
    keys_of,
    queries_of,
    scores,
    seen_keys,
    tile_at,
    unfold_queries,
    weigh,
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
from heedful.rules.dropout import thinned


class Kept(NamedTuple):
    """What the forward pass gives and the backward pass needs, all in the accumulator's dtype.

    lse = m + log l would not do in their place: rounded, it loses log l beneath a large m, and
    exp(s − lse) no longer sums to 1. Nor would an out that is rounded to half precision: on peaked
    rows dP − rowsum(dO ∘ O) is smaller than that rounding.

    Attributes:
        out: (B, Hq, Sq, Dv), not rounded; 0 where nothing is seen.
        m: (B, Hq, Sq), the largest score of a row; the smallest number where nothing is seen.
        l: (B, Hq, Sq), Σ exp(s − m); 0 where nothing is seen.
    """

    out: Array
    m: Array
    l: Array


def nothing(problem: Problem, rows: tuple[int, ...]) -> Kept:
    """What rows (B, Hq, Sq) come to that have met no key yet."""
    accumulator = problem.accumulator
    return Kept(
        out=jnp.zeros((*rows, problem.value_dim), accumulator),
        m=jnp.full(rows, np.finfo(accumulator).min, accumulator),
        l=jnp.zeros(rows, accumulator),
    )


def merged(a: Kept, b: Kept) -> Kept:
    """What rows come to with the keys of both."""
    m = jnp.maximum(a.m, b.m)
    of_a, of_b = (x.l * jnp.exp(x.m - m) for x in (a, b))
    l = of_a + of_b
    out = of_a[..., None] * a.out + of_b[..., None] * b.out
    return Kept(out / jnp.where(l == 0, 1, l)[..., None], m, l)


def forward(problem: Problem, given: Numbered, *, tiles: Tiles | None = None) -> Kept:
    """out, m and l; without `tiles`, `tile_sizes` chooses them."""
    tiles = tiles or tile_sizes(problem)
    query_tiles = count(problem.q_length, tiles.queries)
    smallest = np.finfo(problem.accumulator).min

    def head_tile(given: Numbered, _: tuple[()]) -> tuple[Kept, tuple[()]]:
        operands = given.operands

        def query_tile(i: Array) -> Kept:
            q = widen(problem, queries_of(problem, tiles, operands.q, i))

            def step(
                j: Array, carry: tuple[Array, Array, Array], masked: bool
            ) -> tuple[Array, Array, Array]:
                m, l, out = carry
                k = widen(problem, keys_of(problem, tiles, operands.k, j))  # Alg. 1, line 6
                v = widen(problem, keys_of(problem, tiles, operands.v, j))
                tile = tile_at(problem, tiles, given, i, j, masked)
                s, _, highest, _ = scores(problem, tiles, tile, q, k)  # line 9
                m_new = jnp.maximum(m, highest)  # lines 10 and 11
                p = jnp.exp(s - m_new[..., None])
                shrink = jnp.exp(m - m_new)
                l_new = shrink * l + p.sum(axis=-1)
                # Line 12, but divided by l once at the end, not in every step.
                v = clean(v, seen_keys(problem, tiles, tile.see))
                # Of what dropout leaves; l is the sum of all.
                p = thinned(problem, tile.kept, p)
                return m_new, l_new, shrink[..., None] * out + weigh(p, v)

            rows = q.shape[:2]
            # The paper starts m at −inf; the smallest number keeps −inf − (−inf) out of line 10.
            m = jnp.full(rows, smallest, problem.accumulator)
            l = jnp.zeros(rows, problem.accumulator)
            out = jnp.zeros((*rows, problem.value_dim), problem.accumulator)
            met = keys_met(problem, operands, tiles, start(i, problem.q_length, tiles.queries))
            m, l, out = visit(met, step, (m, l, out))
            out = out / jnp.where(l == 0, 1, l)[..., None]
            return Kept(*(unfold_queries(problem, tiles, x) for x in (out, m, l)))  # line 13

        kept = lax.map(query_tile, count_up(query_tiles))
        return Kept(*(join(x, problem.q_length, 2) for x in kept)), ()

    return over_heads(problem, tiles, head_tile, given)[0]
