"""The forward pass, tile by tile: Dao et al. 2022, Algorithms 1 and 2 (Rabe & Staats 2021, §3)."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from heedful.flash.scores import (
    clean,
    keys_of,
    queries_of,
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


def forward(
    problem: Problem, operands: Operands, *, tiles: Tiles | None = None, every_tile: bool = False
) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) in the problem's dtype and lse (B, Hq, Sq) in its accumulator.

    `tiles` are this problem's own by default; `every_tile` visits those that nobody sees too, in loops
    of a fixed length (see `tiles.visit`).
    """
    tiles = tiles or tile_sizes(problem)
    query_tiles = count(problem.q_length, tiles.queries)
    key_tiles = count(problem.kv_length, tiles.keys)
    smallest = np.finfo(problem.accumulator).min

    def head_tile(operands: Operands, _: tuple[()]) -> tuple[tuple[Array, Array], tuple[()]]:
        def query_tile(i: Array) -> tuple[Array, Array]:
            q = widen(problem, queries_of(problem, tiles, operands.q, i))

            def step(
                j: Array, carry: tuple[Array, Array, Array], masked: bool
            ) -> tuple[Array, Array, Array]:
                m, l, out = carry
                k = widen(problem, keys_of(problem, tiles, operands.k, j))  # Alg. 1, line 6
                v = widen(problem, keys_of(problem, tiles, operands.v, j))
                s, _, seen = tile_of_scores(problem, tiles, operands, q, k, i, j, masked)  # line 9
                m_new = jnp.maximum(m, s.max(axis=-1))  # lines 10 and 11
                p = jnp.exp(s - m_new[..., None])
                shrink = jnp.exp(m - m_new)
                l_new = shrink * l + p.sum(axis=-1)
                # Line 12, but divided by l once at the end, not in every step.
                return m_new, l_new, shrink[..., None] * out + weigh(p, clean(v, seen))

            rows = q.shape[:2]
            # The paper starts m at −inf; the smallest number keeps −inf − (−inf) out of line 10.
            m = jnp.full(rows, smallest, problem.accumulator)
            l = jnp.zeros(rows, problem.accumulator)
            out = jnp.zeros((*rows, problem.value_dim), problem.accumulator)
            seen = keys_seen(problem, operands, tiles, start(i, problem.q_length, tiles.queries))
            m, l, out = visit(seen, step, (m, l, out), every=key_tiles if every_tile else None)

            empty = l == 0
            total = jnp.where(empty, 1, l)
            out = out / total[..., None]
            lse = jnp.where(
                empty, -jnp.inf, m + jnp.log(total)
            )  # line 13 keeps m and l; we, their sum
            out, lse = (unfold_queries(problem, tiles, x) for x in (out, lse))
            return out.astype(problem.dtype), lse

        out, lse = lax.map(query_tile, count_up(query_tiles))
        return (join(out, problem.q_length, 2), join(lse, problem.q_length, 2)), ()

    return over_heads(problem, tiles, head_tile, operands)[0]
