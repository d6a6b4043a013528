"""`torch:sdpa-flash`: the flash kernels that torch carries: its own on a CPU, FlashAttention-2 on CUDA.

The CPU kernel takes an additive mask in the accumulator's dtype, and so every problem but those with a
softcap. The CUDA kernel takes none, and refuses what a diagonal ending in the lower right corner does
not say. It has not been run on a GPU yet.
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
from heedful_torch.backends.sdpa import LACKS, TAKES

aten = torch.ops.aten


def _cpu_forward(asked: Arguments) -> Results:
    q, k, v, mask, _, how = asked
    return Results(
        *aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, how.causal, attn_mask=mask, scale=how.scale
        )
    )


def _cpu_backward(
    dout: Tensor, asked: Arguments, results: Results, mask_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, mask, _, how = asked
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, results.out, results.lse, 0.0, how.causal, attn_mask=mask, scale=how.scale
    )
    return dq, dk, dv, None


def _cuda_forward(asked: Arguments) -> Results:
    q, k, v, *_, how = asked
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, how.causal, False, scale=how.scale
    )
    return Results(out, lse, (seed, offset))


def _cuda_backward(
    dout: Tensor, asked: Arguments, results: Results, mask_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    (q, k, v, *_, how), (out, lse, (seed, offset)) = asked, results
    lengths = (None, None, q.shape[2], k.shape[2])  # of dense sequences: no cumulative ones
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, *lengths, 0.0, how.causal, seed, offset, scale=how.scale
    )
    return dq, dk, dv, None


CPU = Kernel(
    forward=_cpu_forward,
    backward=_cpu_backward,
    flag="upper left",
    masks="accumulator",
    equal_head_sizes=True,
)
CUDA = Kernel(
    forward=_cuda_forward,
    backward=_cuda_backward,
    # On unequal lengths SDPA refuses is_causal, whose meaning FlashAttention 2.1 changed to this.
    flag="lower right",
    masks=None,
    alignment=8,
    equal_head_sizes=True,
    grouped=True,
    largest_head=256,
    widened=(192, 256),  # consumer GPUs lack the backward pass for 193 to 224, but not for 256
)


class SdpaFlash:
    """SDPA's flash kernels, pinned. Memory grows with Sq + Sk, and with Sq · Sk for a mask."""

    name = "torch:sdpa-flash"
    automatic = 0
    takes, lacks = TAKES, LACKS

    @property
    def deterministic(self) -> bool:
        # On a GPU the backward pass sums dq by atomic additions, in any order.
        return not torch.cuda.is_available()

    def reasons(self, problem: Problem) -> list[str]:
        if problem.platform in ("cpu", "meta"):
            return limits(CPU, problem, self.takes)
        reasons = cuda_limits(problem, ("float16", "bfloat16"), (8, 0)) + limits(
            CUDA, problem, self.takes
        )
        if not torch.backends.cuda.is_flash_attention_available():
            reasons.append("this torch is built without flash attention for GPUs")
        return reasons

    def score_bytes(self, problem: Problem) -> int:
        return score_bytes(CUDA if problem.platform == "gpu" else CPU, problem)

    def run(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor | None]:
        return attend(CUDA if problem.platform == "gpu" else CPU, problem, operands)


backend = SdpaFlash()
