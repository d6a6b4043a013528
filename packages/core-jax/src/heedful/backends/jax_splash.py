"""`jax:splash`: JAX's splash attention, the Pallas kernel for TPUs. Not run on a TPU yet.

It takes (H, S, D), lengths in blocks of 128, and q with the scale in it. A query that sees no key gets
the mean of V, or NaN where a whole block of them sees none, and the log-sum-exp has no gradient.
"""

import math
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from heedful.backends import jax_nn, jax_pallas
from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.compiled import compiled
from heedful.rules.visibility import FEATURES

MODULE = "jax.experimental.pallas.ops.tpu.splash_attention"
BLOCK = 128  # the kernel's own choice, and the least it takes
NOBODY = -1  # the segment of a key that no query may see
FAR = -1e30  # a logit that is nothing beside any other


class SplashBackend:
    """Splash attention.

    A band whose place is known it has of its own, and segments, of which lengths and masks of keys are
    made; its memory is linear then. Any other mask, and an offset that is a value, reach it as what it
    calls a dynamic mask, materialised.
    """

    name = "jax:splash"
    automatic = None
    takes = FEATURES | {"grouped_heads", "return_lse", "scale", "sinks", "softcap", "value_dim"}
    lacks = MappingProxyType({"bias": "splash attention adds nothing to the scores"})

    @property
    def unasked(self) -> str | None:
        return jax_pallas.unasked("tpu")

    def reasons(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.dtype == "float16" and problem.platform == "tpu":
            reasons.append("a TPU computes in bfloat16 and float32, not in float16")
        if problem.return_lse and problem.softcap is not None:
            reasons.append("beside a softcap, the log-sum-exp of splash attention has no gradient")
        if problem.sinks and problem.dtype != "float32" and jax.__version_info__ < (0, 12):
            reasons.append(
                f"splash attention of jax {jax.__version__} rounds the gradient of sinks to "
                f"{problem.dtype} before it is summed"
            )
        return reasons + jax_pallas.reasons(problem, "tpu", MODULE)

    def kernel(self, problem: Problem) -> str:
        return jax_pallas.words(problem, "Pallas TPU splash attention")

    def score_bytes(self, problem: Problem) -> int:
        return 0 if _static(problem) else problem.score_count

    @compiled(static=2)
    def run(self, problem: Problem, operands: Operands) -> tuple[Array, Array | None]:
        seen = jax_nn.visibility(problem, operands)
        hiding = _segments(problem, operands) if _static(problem) else _mask(problem, seen)
        sinks = operands.sinks
        if sinks is not None:  # finite ones: −inf makes NaN of a block that sees nothing
            sinks = jnp.maximum(sinks.reshape(-1).astype("float32"), FAR)

        def of(kernel: Callable[..., Array]) -> jax_nn.Kernel:
            kernel = jax_pallas.as_written(problem, partial(kernel, problem))
            return lambda q, k, v: kernel(q, k, v, hiding, sinks)

        out = jax_nn.attend(problem, operands, seen, of(_splash))
        if not problem.return_lse:
            return out, None
        lse = jax_nn.attend(problem, operands, seen, of(_lse))[..., 0]
        if seen is not None:
            empty = -jnp.inf if operands.sinks is None else operands.sinks[..., 0].astype("float32")
            lse = jnp.where(seen.any(axis=3), lse, empty)
        return out, lse


def _static(problem: Problem) -> bool:
    """Whether a band that is known and segments say all: no mask over (Sq, Sk) is built then."""
    by_keys = problem.mask_shape is None or problem.mask_shape[1:3] == (1, 1)
    known = not (problem.positional and problem.q_offset is None)
    return by_keys and known and not problem.functions


def _mask(problem: Problem, seen: Array) -> Array:
    """What is seen, (B · Hq, Sq, Sk) in whole blocks."""
    shape = (problem.batch, problem.q_heads, problem.q_length, problem.kv_length)
    heads = jnp.broadcast_to(seen, shape).reshape(-1, *shape[2:])
    return _in_blocks(_in_blocks(heads, 1), 2)


def _segments(problem: Problem, operands: Operands) -> tuple[Array, Array] | None:
    """(B, Sq) and (B, Sk) in whole blocks: a query sees the keys of its number; None: it sees all."""
    q_ids = jnp.zeros((problem.batch, problem.q_length), jnp.int32)
    kv_ids = jnp.zeros((problem.batch, problem.kv_length), jnp.int32)
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        # Numbered anew from 0, since any number may be among them.
        ids = operands.q_segment_ids[:, 0, :, 0], operands.kv_segment_ids[:, 0, 0]
        count = partial(jnp.unique, return_inverse=True, size=problem.q_length + problem.kv_length)
        _, ranks = jax.vmap(count)(jnp.concatenate(ids, axis=1))
        q_ids, kv_ids = jnp.split(ranks, [problem.q_length], axis=1)
    elif not problem.kv_lengths and problem.mask_shape is None and problem.kv_length % BLOCK == 0:
        return None
    if operands.kv_lengths is not None:
        there = jnp.arange(problem.kv_length)[None] < operands.kv_lengths[:, None]
        kv_ids = jnp.where(there, kv_ids, NOBODY)
    if operands.mask is not None:
        kv_ids = jnp.where(operands.mask[:, 0, 0], kv_ids, NOBODY)
    return _in_blocks(q_ids, 1), _in_blocks(kv_ids, 1, NOBODY)


def _lse(problem: Problem, q: Array, k: Array, v: Array, hiding: Any, sinks: Any) -> Array:
    """The log-sum-exp, (B, Sq, Hq, 1)."""
    own_q, own_k, own_v, own_sinks = lax.stop_gradient((q, k, v, sinks))
    lse = _splash(problem, own_q, own_k, own_v, hiding, own_sinks, residuals=True)
    if sinks is not None:  # the sink is one more key, of that score
        by_head = (1, 1, -1, 1)
        share = jnp.exp(own_sinks.reshape(by_head) - lse)
        lse += share * (sinks - own_sinks).reshape(by_head)
    mean_key = _splash(problem, own_q, own_k, k, hiding, own_sinks)
    return jax_pallas.with_gradient(lse, problem.scale, q, mean_key)


def _splash(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    hiding: Any,
    sinks: Any,
    residuals: bool = False,
) -> Array:
    """out, or with residuals the log-sum-exp, which has no gradient; (B, S, H, D)."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    make = partial(
        splash_attention.make_splash_mha,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=problem.softcap,
        save_residuals=residuals,
        interpret=problem.platform == "cpu",
    )
    q, k = _scaled(problem.scale, q, k)
    q, k, v = (_in_blocks(x.swapaxes(1, 2), 2) for x in (q, k, v))
    if _static(problem):
        lengths = q.shape[2], k.shape[2]
        band: splash_attention.Mask = splash_attention.FullMask(lengths)
        if problem.positional and problem.q_offset is not None:
            band = splash_attention.LocalMask(lengths, problem.band, problem.q_offset)
        kernel = make(splash_attention.MultiHeadMask([band] * problem.q_heads))
        segments = None if hiding is None else splash_attention.SegmentIds(*hiding)
        results = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(q, k, v, segments, sinks)
    else:
        kernel = make(hiding)
        # Under jit the flag is no bool, which calling the kernel asks for, to name its scope.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=None)
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        results = kernel(q, k, v, None, None if sinks is None else jnp.tile(sinks, problem.batch))
    rows = results[1][0][..., None] if residuals else results
    rows = rows.reshape(problem.batch, problem.q_heads, *rows.shape[-2:])
    return rows[:, :, : problem.q_length].swapaxes(1, 2)


def _scaled(scale: float, q: Array, k: Array) -> tuple[Array, Array]:
    """q with the scale in it, and k; in half precision with what q is rounded by beside it, and k again.

    Left rounded, q makes bfloat16's out wrong by 2 % where logits are large.
    """
    scaled = scale * q.astype("float32")
    high = scaled.astype(q.dtype)
    if q.dtype == "float32" or math.frexp(abs(scale))[0] in (0, 0.5):  # exact
        return high, k
    low = (scaled - high.astype("float32")).astype(q.dtype)
    return jnp.concatenate([high, low], axis=-1), jnp.concatenate([k, k], axis=-1)


def _in_blocks(x: Array, axis: int, filler: int = 0) -> Array:
    """An axis in whole blocks."""
    behind = [(0, -n % BLOCK if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, behind, constant_values=filler)


backend = SplashBackend()
