"""`torch:zentorch`: the SDPA of AMD's plugin zentorch, forward only, on a CPU.

Its kernel returns a second tensor that is no LSE. To import zentorch is to register its compiler with
torch.
"""

from importlib.metadata import version
from types import MappingProxyType

import torch
from torch import Tensor

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.dispatch.packages import why_not_imported
from heedful_torch.backends.kernel import (
    Arguments,
    Kernel,
    Results,
    attend_forward,
    limits,
    score_bytes,
)
from heedful_torch.backends.sdpa import LACKS, TAKES


def _forward(asked: Arguments) -> Results:
    q, k, v, mask, _, how = asked
    if mask is not None:  # it reads the keys' axis one after the other
        mask = mask.expand(*mask.shape[:3], k.shape[2]).contiguous()
    sdpa = torch.ops.zentorch.zentorch_sdpa
    out, _ = sdpa(q, k, v, is_causal=how.causal, attn_mask=mask, scale=how.scale)
    return Results(out, None)


KERNEL = Kernel(
    forward=_forward,
    backward=None,
    flag="upper left",
    masks="accumulator",
    alignment=8,  # it fails on heads of one number, whose stride is anything
    equal_head_sizes=True,
    grouped=True,
    opaque="torch:zentorch",
)


class Zentorch:
    """zentorch's SDPA. Memory grows with Sq + Sk, and with Sq · Sk for a mask."""

    name = "torch:zentorch"
    automatic = None
    takes = TAKES - {"return_lse"}
    lacks = MappingProxyType({**LACKS, "return_lse": "zentorch returns no LSE"})

    def reasons(self, problem: Problem) -> list[str]:
        reasons = limits(KERNEL, problem, self.takes)
        if problem.platform not in ("cpu", "meta"):
            reasons.append(f"zentorch runs on a CPU; the arrays lie on {problem.platform}")
        if problem.dtype == "float16":
            reasons.append(
                "in float16 its out is off by 0.2 %, eight times as far as plain attention's"
            )
        return reasons or [why for why in [why_not_imported("zentorch")] if why]

    def kernel(self, problem: Problem) -> str:
        return f"zentorch {version('zentorch')}"

    def forward_only(self, problem: Problem) -> str:
        return "zentorch has no backward pass"

    def score_bytes(self, problem: Problem) -> int:
        return score_bytes(KERNEL, problem, scores=False)

    def run(self, problem: Problem, operands: Operands) -> tuple[Tensor, None]:
        out, _ = attend_forward(KERNEL, problem, operands, self.forward_only(problem))
        return out, None


backend = Zentorch()
