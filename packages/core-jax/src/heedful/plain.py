"""Attention as the formula stands, in JAX: the whole score matrix, and JAX's own derivatives of it.

Everything is computed in the accumulator dtype, so half precision rounds on the way in and on the
way out and nowhere between. (On a CPU it is also faster: XLA's own bfloat16 product is slow there.)

The derivative of what `where` did not choose is zero times a slope, and zero times NaN is NaN. So
what nobody sees is replaced before the arithmetic, and not only after it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.rules.dropout import kept, thinned
from heedful.rules.place import Place
from heedful.rules.scores import added, capped, distance, modified
from heedful.rules.softmax import beyond_the_keys, log_sum_exp
from heedful.rules.visibility import of_key_heads, visible


def plain(problem: Problem, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """out (B, Hq, Sq, Dv) in the problem's dtype and lse (B, Hq, Sq) in its accumulator dtype.

    Differentiable in all of `operands.differentiable`, forwards and backwards, to any order. Keys that
    no query of their head sees, and queries that see no key, may hold NaN and infinity; elsewhere those
    spread.
    """
    scores_shape = (problem.batch, problem.q_heads, problem.q_length, problem.kv_length)
    grouped = (problem.batch, problem.kv_heads, problem.group)
    q, k, v = (jnp.asarray(x, problem.accumulator) for x in (operands.q, operands.k, operands.v))

    place = Place.whole(problem, partial(jnp.arange, dtype=jnp.int32))
    seen = visible(problem, operands, place)
    if seen is not None:
        seen = jnp.broadcast_to(seen, scores_shape)
        sees = seen.any(axis=3, keepdims=True)
        is_seen = of_key_heads(problem, seen.any(axis=2))[..., None]
        q, k, v = jnp.where(sees, q, 0), jnp.where(is_seen, k, 0), jnp.where(is_seen, v, 0)

    q = q.reshape(*grouped, problem.q_length, problem.head_dim)
    scores = problem.scale * _einsum("bhgid,bhjd->bhgij", q, k).reshape(scores_shape)
    scores = modified(problem, operands, place, seen, capped(problem, scores)[0])
    scores = added(operands, distance(problem, operands, place), scores)
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)

    # Any shift gives the same softmax and the same lse, so its derivative is none of ours.
    highest = lax.stop_gradient(scores.max(axis=3, keepdims=True, initial=-jnp.inf))
    highest = jnp.where(highest == -jnp.inf, 0, highest)
    exponentials = jnp.exp(scores - highest)
    total = exponentials.sum(axis=3, keepdims=True)

    empty = total == 0
    weights = thinned(
        problem, kept(problem, operands, place), exponentials / jnp.where(empty, 1, total)
    )
    weights = weights.reshape(*grouped, *scores_shape[2:])
    out = _einsum("bhgij,bhjd->bhgid", weights, v).reshape(*scores_shape[:3], problem.value_dim)
    out, highest, total = beyond_the_keys(
        operands, jnp.where(empty, 0, out), highest[..., 0], total[..., 0]
    )
    return out.astype(problem.dtype), log_sum_exp(highest, total)


def _einsum(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # Left alone, GPUs and TPUs round float32 factors to fewer bits.
    return jnp.einsum(formula, a, b, precision=lax.Precision.HIGHEST)
