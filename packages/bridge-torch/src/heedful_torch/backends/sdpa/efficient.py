"""`torch:sdpa-efficient`: SDPA's memory-efficient kernel (xformers' cutlass kernel), CUDA only.

It has not been run on a GPU yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.rules.scores import adding
from heedful.rules.visibility import hiding
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
from heedful_torch.backends.within_range import LARGEST, within_range

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


def _forward(asked: Arguments) -> Results:
    q, k, v, mask, _, how = asked
    aligned, top = None, None
    if mask is not None:
        within, top = within_range(mask)
        aligned = _aligned_mask(within, (*q.shape[:3], k.shape[2]))
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        q, k, v, aligned, True, 0.0, how.causal, scale=how.scale
    )
    # This LSE has room for a multiple of 32 queries, and the backward kernel wants it like that.
    own = lse[:, :, : q.shape[2]].clone()
    if top is not None:
        own = torch.where(top.abs() > LARGEST, top, own)
    return Results(out, own, (lse, seed, offset))


def _backward(
    dout: Tensor, asked: Arguments, results: Results, mask_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    (q, k, v, mask, _, how), (out, _, (its_lse, seed, offset)) = asked, results
    aligned = None
    if mask is not None:
        aligned = _aligned_mask(within_range(mask)[0], (*q.shape[:3], k.shape[2]))
    wanted = [True, True, True, mask_wanted]
    dq, dk, dv, dmask = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, aligned, out, its_lse, seed, offset, 0.0, wanted, how.causal, scale=how.scale
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
    takes, lacks = TAKES, LACKS
    deterministic = False

    def reasons(self, problem: Problem) -> list[str]:
        capability = (8, 0) if problem.dtype == "bfloat16" else (5, 0)
        dtypes = ("float32", "float16", "bfloat16")
        reasons = cuda_limits(problem, dtypes, capability) + limits(KERNEL, problem, self.takes)
        hides = hiding(problem) or adding(problem) or span_of(problem).hides != "nothing"
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
