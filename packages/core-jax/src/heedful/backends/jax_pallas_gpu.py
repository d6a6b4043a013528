"""`jax:pallas-gpu`: the attention among JAX's Pallas kernels for GPUs. Not run on a GPU yet.

It takes (B, S, H, D), one length and one head size for q, k and v, aligns its causal mask top-left, and
its segments are the same for queries and keys. JAX has deprecated it since 0.11, in favour of tokamax.
"""

import math
from collections.abc import Callable
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import lax

from heedful.backends import jax_nn, jax_pallas
from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.compiled import compiled
from heedful.rules.visibility import of_key_heads

MODULE = "jax.experimental.pallas.ops.gpu.attention"
BLOCK = 128  # the kernel's own choice
SMALLEST = 16  # of what Triton multiplies


class PallasGpuBackend:
    """`mha` of Pallas.

    Queries are brought to the places of the keys by rows in front of them. A key that nobody sees is
    hidden by one more component of the head: large in every query, and its negative in that key.
    """

    name = "jax:pallas-gpu"
    automatic = None
    takes = frozenset(
        {
            "causal",
            "grouped_heads",
            "kv_lengths",
            "mask",
            "q_lengths",
            "q_offset",
            "return_lse",
            "scale",
            "value_dim",
        }
    )
    lacks = MappingProxyType(
        {
            "bias": "Pallas's mha adds nothing to the scores",
            "window": "Pallas's mha has no window",
            "softcap": "Pallas's mha has no softcap",
            "sinks": "Pallas's mha has no sinks",
            "q_segment_ids": "Pallas's mha takes the same segments for queries and keys alone",
            "kv_segment_ids": "Pallas's mha takes the same segments for queries and keys alone",
        }
    )

    @property
    def unasked(self) -> str | None:
        return jax_pallas.unasked("gpu")

    def reasons(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.positional and problem.q_offset is None:
            reasons.append("the offset is a value, and Pallas's mha is causal from the top left")
        if problem.mask_shape is not None:
            _, heads, queries, keys = problem.mask_shape
            if keys != 1 and (queries != 1 or (heads != 1 and problem.group != 1)):
                reasons.append(
                    "Pallas's mha hides keys for all queries of a key head alike, or it hides queries; "
                    f"the mask is {problem.mask_shape}"
                )
        if problem.dtype == "float16" and 0 < abs(problem.scale) < 1e-3:
            reasons.append(f"float16 has no number that hides a key at a scale of {problem.scale}")
        return reasons + jax_pallas.reasons(problem, "gpu", MODULE)

    def kernel(self, problem: Problem) -> str:
        return jax_pallas.words(problem, "Pallas GPU attention")

    def forward_only(self, problem: Problem) -> str | None:
        if problem.dtype not in ("float16", "bfloat16"):
            return None
        return f"Pallas's mha sums dO ∘ O in {problem.dtype}, and is farther off than need be"

    def run(self, problem: Problem, operands: Operands) -> tuple[Array, Array | None]:
        if why := self.forward_only(problem):
            q, k, v = jax_pallas.undifferentiated(why, lambda *x: x)(*operands[:3])
            operands = operands._replace(q=q, k=k, v=v)
        return self._run(problem, operands)

    @compiled(static=2)
    def _run(self, problem: Problem, operands: Operands) -> tuple[Array, Array | None]:
        seen = jax_nn.visibility(problem, operands)
        key_is_seen = jnp.ones((1, 1, 1), bool)
        if seen is not None:
            key_is_seen = of_key_heads(problem, seen.any(axis=2)).swapaxes(1, 2)

        def of(kernel: Callable[..., Array]) -> jax_nn.Kernel:
            kernel = jax_pallas.as_written(problem, partial(kernel, problem))
            return lambda q, k, v: kernel(q, k, v, key_is_seen)

        out = jax_nn.attend(problem, operands, seen, of(_mha))
        if not problem.return_lse:
            return out, None
        lse = jax_nn.attend(problem, operands, seen, of(_lse))[..., 0]
        return out, lse if seen is None else jnp.where(seen.any(axis=3), lse, -jnp.inf)


def _lse(problem: Problem, q: Array, k: Array, v: Array, key_is_seen: Array) -> Array:
    """The log-sum-exp, (B, Sq, Hq, 1)."""
    own_q, own_k, own_v = lax.stop_gradient((q, k, v))
    lse = _mha(problem, own_q, own_k, own_v, key_is_seen, residuals=True)
    mean_key = _mha(problem, own_q, own_k, k, key_is_seen)
    return jax_pallas.with_gradient(lse, problem.scale, q, mean_key)


def _mha(
    problem: Problem, q: Array, k: Array, v: Array, key_is_seen: Array, residuals: bool = False
) -> Array:
    """out, or with residuals the log-sum-exp, which has no gradient; (B, S, H, D)."""
    from jax.experimental.pallas.ops.gpu import attention

    offset, head_dim, value_dim = problem.q_offset or 0, q.shape[3], v.shape[3]
    behind = offset + problem.q_length  # the last query
    length = _power_of_two(max(problem.kv_length, behind))
    length = length if length <= BLOCK else -(-max(problem.kv_length, behind) // BLOCK) * BLOCK
    # Causal queries do not see what is padded behind the keys, unless they stand there themselves.
    padding_is_seen = length > problem.kv_length and not (
        problem.causal and behind <= problem.kv_length
    )
    hides = padding_is_seen or problem.kv_lengths or problem.mask_shape is not None
    width = _power_of_two(max(head_dim + hides, value_dim))

    scale = problem.scale or 1.0  # which a q of zeros makes zero
    q = _resized(q if problem.scale else jnp.zeros_like(q), (offset, length - behind), width)
    k, v = (_resized(x, (0, length - problem.kv_length), width) for x in (k, v))
    if hides:
        large = 2.0**15 if problem.dtype == "float16" else 2.0**50
        shape = problem.batch, problem.kv_length, problem.kv_heads
        unseen = jnp.broadcast_to(~key_is_seen, shape)
        unseen = jnp.pad(
            unseen, ((0, 0), (0, length - problem.kv_length), (0, 0)), constant_values=True
        )
        q = q.at[..., head_dim].set(large)
        k = k.at[..., head_dim].set(unseen * -math.copysign(large, scale))

    def of_one_in_each_group(q: Array) -> Array:
        result = attention.mha(
            q,
            k,
            v,
            None,
            sm_scale=scale,
            causal=problem.causal,
            interpret=problem.platform == "cpu",
            return_residuals=residuals,
        )
        return result[1].swapaxes(1, 2)[..., None] * math.log(2) if residuals else result

    grouped = q.reshape(*q.shape[:2], problem.kv_heads, problem.group, width)
    rows = jax.vmap(of_one_in_each_group, in_axes=3, out_axes=3)(grouped)
    rows = rows.reshape(*q.shape[:3], -1)[..., :value_dim]
    return _resized(rows, (-offset, behind - length), rows.shape[-1])


def _power_of_two(size: int) -> int:
    """The next that Triton multiplies."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def _resized(x: Array, rows: tuple[int, int], width: int) -> Array:
    """Zeros before and behind the rows of (B, S, H, D), negative ones cut off, and behind the head."""
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, ((0, 0, 0), (*rows, 0), (0, 0, 0), (0, width - x.shape[3], 0)))


backend = PallasGpuBackend()
