"""What `jax:nn-xla` and `jax:nn-cudnn` share: the contract around `jax.nn.dot_product_attention`.

jax.nn takes (B, S, H, D), aligns its own causal mask and window top-left, gives a query that sees no
key the mean of V, and lets a NaN in a masked V through (0 · NaN). So what a query sees is worked out
here, by `heedful.rules.visibility`, and what nobody sees is kept out of the kernel on both sides.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.rules.place import Place
from heedful.rules.visibility import FEATURES, of_key_heads, visible

Kernel = Callable[[Array, Array, Array], Array]  # q, k, v → out, all (B, S, H, D)

TAKES = FEATURES | {"bias", "grouped_heads", "scale"}
LACKS = {
    "softcap": "jax.nn.dot_product_attention has no softcap",
    "return_lse": "jax.nn.dot_product_attention stops the gradient of its log-sum-exp "
    "and rounds it to q's dtype",
    "value_dim": "jax.nn.dot_product_attention takes no value head size of its own",
}


def kernel(implementation: str, problem: Problem, **options: Any) -> Kernel:
    """`jax.nn.dot_product_attention` with its implementation pinned."""
    return partial(
        jax.nn.dot_product_attention,
        implementation=implementation,
        scale=problem.scale,
        **options,
    )


def half_limits(function: str, problem: Problem) -> list[str]:
    """What keeps half precision from what asks XLA for its products."""
    reasons = []
    promotion = jax.config.jax_numpy_dtype_promotion  # type: ignore[attr-defined]  # untyped
    if problem.dtype in ("float16", "bfloat16") and promotion == "strict":
        reasons.append(
            f"{function} promotes {problem.dtype} to float32 implicitly, "
            'which jax_numpy_dtype_promotion="strict" forbids'
        )
    if problem.dtype == "float16" and problem.platform != "gpu":
        reasons.append(
            f"{function} asks XLA for the product F16_F16_F32, "
            f"which XLA has on GPUs alone; q lies on {problem.platform}"
        )
    return reasons


def visibility(problem: Problem, operands: Operands) -> Array | None:
    """Which keys each query sees, each axis full or 1 of (B, Hq, Sq, Sk); None where all are seen.

    A bias of −inf hides a key too: jax.nn would prefer a masked key to it, and NaN to a row of them.
    """
    place = Place.whole(problem, partial(jnp.arange, dtype=jnp.int32))
    seen = visible(problem, operands, place)
    if operands.bias is None:
        return seen
    possible = operands.bias != -jnp.inf
    return possible if seen is None else seen & possible


def attend(problem: Problem, operands: Operands, seen: Array | None, kernel: Kernel) -> Array:
    """Runs a kernel on canonical operands, with everything that nobody sees put to zero.

    Select, never multiply: a select passes no NaN on, neither forward nor in its transpose, so the
    gradients of what was put to zero are exactly zero whatever the kernel makes of those rows.
    """
    q, k, v = operands.q, operands.k, operands.v
    if seen is None:
        return _run(problem, kernel, q, k, v)
    query_sees = seen.any(axis=3)[..., None]
    key_is_seen = of_key_heads(problem, seen.any(axis=2))[..., None]
    q = jnp.where(query_sees, q, 0)
    k, v = jnp.where(key_is_seen, k, 0), jnp.where(key_is_seen, v, 0)
    return jnp.where(query_sees, _run(problem, kernel, q, k, v), 0)


def _run(problem: Problem, kernel: Kernel, *heads_first: Array) -> Array:
    """A kernel on (B, H, S, D) arrays."""
    q, k, v = map(_bhsd, heads_first)
    if problem.platform == "cpu" and problem.dtype == "bfloat16":
        # Left to fuse the transposition into the product, XLA of jax 0.12 sums it in bfloat16, and out
        # is off by 1.4 % instead of 0.2 %.
        q, k, v = lax.optimization_barrier((q, k, v))
    return _bhsd(kernel(q, k, v))


def _bhsd(x: Array) -> Array:
    """(B, S, H, D) ↔ (B, H, S, D)."""
    return x.swapaxes(1, 2)
