"""The softmax's denominator: its logarithm, and the sinks that it holds beyond the keys. For JAX.

A sink is a logit that takes weight and gives nothing: as if there were one more key, which every query
sees and whose value is 0.
"""

import jax.numpy as jnp
from jax import lax

from heedful.call.arrays import Array
from heedful.call.operands import Operands

FEATURES = frozenset({"sinks"})


def log_sum_exp(m: Array, l: Array) -> Array:
    """m + log l; −inf where l, Σ exp(s − m), is 0, whatever m is."""
    empty = l == 0
    return jnp.where(empty, -jnp.inf, m + jnp.log(jnp.where(empty, 1, l)))


def beyond_the_keys(
    operands: Operands, out: Array, m: Array, l: Array
) -> tuple[Array, Array, Array]:
    """What rows of keys alone come to, with the sinks in their denominators; as it is without sinks.

    Of l = Σ exp(s − m), not of lse: rounded beside large scores, that has lost what the weights sum to.

    Args:
        operands: of which the sinks are asked.
        out: (B, Hq, Sq, Dv), in the accumulator's dtype.
        m, l: (B, Hq, Sq); l is 0 where no key is seen, whatever m is. m stands still in derivatives.
    """
    if operands.sinks is None:
        return out, m, l
    sink = operands.sinks[..., 0].astype(l.dtype)  # (1, Hq, 1)
    of_keys = jnp.where(l == 0, -jnp.inf, m)
    top = lax.stop_gradient(jnp.maximum(of_keys, sink))
    top = jnp.where(top == -jnp.inf, 0, top)
    kept = l * jnp.exp(of_keys - top)
    total = kept + jnp.exp(sink - top)
    return out * (kept / jnp.where(total == 0, 1, total))[..., None], top, total
