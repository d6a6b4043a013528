"""`jax:nn-cudnn`: `jax.nn.dot_product_attention` as cuDNN's fused kernel.

Written against jax 0.10 to 0.12; not run on a GPU yet.
"""

from typing import Any

import jax
import jax.numpy as jnp

from heedful.backends import jax_nn
from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.compiled import compiled
from heedful.rules.visibility import hiding


class CudnnBackend:
    """jax.nn with `implementation="cudnn"`.

    What cuDNN has of its own, a top-left causal diagonal and lengths, it is asked for natively, and its
    memory is linear then. With a bias or a mask, a window, or any other alignment, all that hides keys
    reaches it as one bias of (B, Hq, Sq, Sk) in q's dtype, materialised: jax.nn turns a mask into a
    bias of large negative numbers, and which broadcast biases have a gradient differs between versions.

    Its backward pass makes the probabilities of an LSE in float32: beside a bias of -1e9 at every key of
    a row they need not sum to 1. Hide keys by `mask`, not by a bias.
    """

    name = "jax:nn-cudnn"
    automatic = None
    takes, lacks = jax_nn.TAKES, jax_nn.LACKS

    def reasons(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.dtype not in ("float16", "bfloat16"):
            reasons.append(f"cuDNN's attention takes float16 and bfloat16, not {problem.dtype}")
        if 0 in (problem.batch, problem.q_length, problem.kv_length):
            reasons.append("cuDNN takes no empty arrays")
        if problem.bias_dtype not in (None, problem.dtype):
            reasons.append(f"cuDNN takes a bias of q's dtype alone, not {problem.bias_dtype}")
        odd = problem.q_length % 2 or problem.kv_length % 2
        if odd and not _native(problem):
            reasons.append(
                "cuDNN's gradient with a bias, which is what hides keys here, needs even lengths: "
                f"Sq = {problem.q_length}, Sk = {problem.kv_length}"
            )
        capability = compute_capability() if problem.platform == "gpu" else None
        if capability is None:
            reasons.append("cuDNN runs on NVIDIA GPUs alone; " + _place(problem.platform))
        elif capability < (8, 0):
            reasons.append(
                "cuDNN's attention needs a GPU of compute capability 8.0 or more; "
                f"this one has {capability[0]}.{capability[1]}"
            )
        # The head sizes of the newest GPUs, where there is none to ask.
        widest = 128 if capability is not None and capability < (9, 0) else 256
        if problem.head_dim % 8 or problem.head_dim > widest:
            reasons.append(
                f"cuDNN's attention takes head sizes up to {widest} that are multiples of 8, "
                f"not {problem.head_dim}"
            )
        return reasons

    def score_bytes(self, problem: Problem) -> int:
        hidden = problem.positional or hiding(problem)
        builds = problem.bias_shape or (hidden and not _native(problem))
        return 2 * problem.score_count if builds else 0

    @compiled(static=2)
    def run(self, problem: Problem, operands: Operands) -> tuple[Array, None]:
        seen = jax_nn.visibility(problem, operands)
        bias = operands.bias
        asked: dict[str, Any] = {}
        scores = (problem.batch, problem.q_heads, problem.q_length, problem.kv_length)
        if bias is not None:
            assert seen is not None  # a bias may hide keys
            bias = jnp.broadcast_to(jnp.where(seen, bias, 0), scores)
        if _native(problem):
            asked["is_causal"] = problem.causal
            asked["query_seq_lengths"] = _at_least_one(operands.q_lengths)
            asked["key_value_seq_lengths"] = _at_least_one(operands.kv_lengths)
        elif seen is not None:
            asked["mask"] = jnp.broadcast_to(seen, scores)
        kernel = jax_nn.kernel("cudnn", problem, bias=bias, **asked)
        return jax_nn.attend(problem, operands, seen, kernel), None


def _native(problem: Problem) -> bool:
    """Whether cuDNN needs no bias: all keys are seen, or what lengths and a top-left diagonal leave."""
    top_left = problem.band == (None, 0) and problem.q_offset == 0
    biased = problem.bias_shape is not None or hiding(problem).keys() - {"q_lengths", "kv_lengths"}
    return not biased and (top_left or not problem.positional)


def _at_least_one(lengths: Array | None) -> Array | None:
    """Lengths as jax.nn wants them; an empty row sees one key, put to zero, and its out is dropped."""
    return None if lengths is None else jnp.maximum(lengths, 1)


def compute_capability() -> tuple[int, int] | None:
    """Of this process's first NVIDIA GPU; None where there is none."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:  # no such platform here
        return None
    major, minor = device.compute_capability.split(".")
    return int(major), int(minor)


def _place(platform: str) -> str:
    return "this GPU is none of theirs" if platform == "gpu" else f"q lies on {platform}"


backend = CudnnBackend()
