"""`torch:sdpa-cudnn`: cuDNN's attention as torch binds it, CUDA only.

Taken by name alone, and without masks or bias: SDPA's default on Hopper, it has live bugs of silent
corruption (pytorch#193893, pytorch#196678). It has not been run on a GPU yet.
"""

import torch
from torch import Tensor

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful_torch.backends.kernel import (
    Arguments,
    Kernel,
    Results,
    attend,
    cuda_limits,
    limits,
    score_bytes,
)
from heedful_torch.backends.score_mask import span_of
from heedful_torch.backends.sdpa import LACKS, TAKES

aten = torch.ops.aten


def _forward(asked: Arguments) -> Results:
    q, k, v, *_, how = asked
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, how.causal, False, scale=how.scale
    )
    # cuDNN's lse is (B, H, Sq, 1).
    return Results(out, lse.reshape(q.shape[:3]).clone(), (lse, seed, offset))


def _backward(
    dout: Tensor, asked: Arguments, results: Results, mask_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    (q, k, v, *_, how), (out, _, (its_lse, seed, offset)) = asked, results
    lengths = (None, None, q.shape[2], k.shape[2])  # of dense sequences: no cumulative ones
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, its_lse, seed, offset, None, *lengths, 0.0, how.causal, scale=how.scale
    )
    return dq, dk, dv, None


KERNEL = Kernel(
    forward=_forward,
    backward=_backward,
    flag="upper left",
    masks=None,
    alignment=8,
    largest_head=128,
)


class SdpaCudnn:
    """cuDNN's attention, pinned. Memory grows with Sq + Sk."""

    name = "torch:sdpa-cudnn"
    automatic = None
    takes, lacks = TAKES, LACKS
    deterministic = False

    def reasons(self, problem: Problem) -> list[str]:
        reasons = cuda_limits(problem, ("float16", "bfloat16"), (8, 0)) + limits(
            KERNEL, problem, self.takes
        )
        if problem.kv_length == 1:
            reasons.append("cuDNN's attention takes no single key")
        place = span_of(problem)
        if place.above is not None and len(place.rows) != len(place.columns):
            reasons.append("this kernel is trusted with causal on equal lengths only")
        version = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]  # torch's own
        if version < 90000:
            reasons.append(f"this kernel needs cuDNN 9; this torch has {version or 'none'}")
        if torch.cuda.is_available():
            major, _ = torch.cuda.get_device_capability()
            if major == 10 and problem.kv_heads < 8:
                reasons.append(
                    "on this GPU it is wrong for fewer than 8 key heads, silently (pytorch#193893)"
                )
        return reasons

    def score_bytes(self, problem: Problem) -> int:
        return score_bytes(KERNEL, problem)

    def run(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor | None]:
        return attend(KERNEL, problem, operands)


backend = SdpaCudnn()
