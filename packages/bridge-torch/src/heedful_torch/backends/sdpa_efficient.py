"""`torch:sdpa-efficient`: SDPA's memory-efficient kernel (xformers' cutlass kernel), CUDA only.

It has not been run on a GPU yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.problem import Operands, Problem
from heedful_torch.backends.score_mask import masking, span
from heedful_torch.backends.sdpa import Kernel, attend, cuda_limits, limits, score_bytes

aten = torch.ops.aten

MASK_ALIGNMENT = 16  # elements from one row of the mask to the next
LONGEST_MASKED = 2**16


def _aligned_mask(mask: Tensor, scores: tuple[int, int, int, int]) -> Tensor:
    """The mask as (B, H, Sq, Sk), its broadcast axes as views, with room to the right of each row.

    The kernel reads rows of the mask in aligned chunks, past their ends.
    """
    length = scores[-1]
    room = -length % MASK_ALIGNMENT
    return F.pad(mask.expand(-1, -1, -1, length), (0, room))[..., :length].expand(scores)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    if mask is not None:
        mask = _aligned_mask(mask, (*q.shape[:3], k.shape[2]))
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, True, 0.0, causal, scale=scale
    )
    # This LSE has room for a multiple of 32 queries, and the backward kernel wants it like that.
    return out, lse[:, :, : q.shape[2]].clone(), (lse, seed, offset)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
    kept: tuple[Tensor, ...],
    mask_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    its_lse, seed, offset = kept
    aligned = None if mask is None else _aligned_mask(mask, (*q.shape[:3], k.shape[2]))
    wanted = [True, True, True, mask_wanted]
    dq, dk, dv, dmask = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, aligned, out, its_lse, seed, offset, 0.0, wanted, causal, scale=scale
    )
    if mask is None or not mask_wanted:
        return dq, dk, dv, None
    return dq, dk, dv, dmask.sum_to_size(mask.shape)


KERNEL = Kernel(
    forward=_forward,
    backward=_backward,
    flag="upper left",
    masks="q",
    mask_gradient=True,
    alignment=8,
)


class SdpaEfficient:
    """SDPA's memory-efficient kernel, pinned. Memory grows with Sq + Sk, Sq · Sk for a mask."""

    name = "torch:sdpa-efficient"
    automatic = 1
    deterministic = False

    def reasons(self, problem: Problem) -> list[str]:
        capability = (8, 0) if problem.dtype == "bfloat16" else (5, 0)
        dtypes = ("float32", "float16", "bfloat16")
        reasons = cuda_limits(problem, dtypes, capability) + limits(KERNEL, problem)
        hides = masking(problem) or problem.bias_shape or span(problem).hides != "nothing"
        if hides and max(problem.q_length, problem.kv_length) > LONGEST_MASKED:
            reasons.append(
                f"with a mask this kernel is wrong on lengths over {LONGEST_MASKED}, silently "
                "(pytorch#162588)"
            )
        return reasons

    def score_bytes(self, problem: Problem) -> int:
        return score_bytes(KERNEL, problem)

    def run(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor | None]:
        return attend(KERNEL, problem, operands)


backend = SdpaEfficient()
