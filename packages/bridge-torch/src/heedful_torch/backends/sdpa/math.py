"""`torch:sdpa-math`: SDPA's composite kernel, the score matrix materialised, on any device.

It computes float16 and bfloat16 in float32, and returns no LSE.
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful_torch.backends.kernel import (
    Arguments,
    Kernel,
    Results,
    attend,
    limits,
    score_bytes,
)
from heedful_torch.backends.sdpa import LACKS, TAKES
from heedful_torch.outside_autocast import outside_autocast


def _forward(asked: Arguments) -> Results:
    # Made of ordinary operations: torch differentiates them in q, k, v and the mask.
    tensors = (x for x in asked[:4] if isinstance(x, Tensor))
    (out,) = outside_autocast(_Math(asked.how.scale), *tensors)
    return Results(out, None)


@dataclass(frozen=True)
class _Math:
    """The operator, as a function of tensors alone."""

    scale: float

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor]:
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, mask, 0.0, False, None, scale=self.scale
        )
        return (out,)


KERNEL = Kernel(forward=_forward, backward=None, flag=None, masks="accumulator")


class SdpaMath:
    """SDPA's math kernel, pinned. Memory grows with Sq · Sk."""

    name = "torch:sdpa-math"
    automatic = 3
    takes = TAKES - {"return_lse"}
    lacks = MappingProxyType(
        {**LACKS, "return_lse": "this kernel returns no LSE; torch:sdpa-flash does"}
    )
    deterministic = True

    def reasons(self, problem: Problem) -> list[str]:
        reasons = limits(KERNEL, problem, self.takes)
        is_rounded = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
        rounded = is_rounded()  # type: ignore[no-untyped-call]  # torch's own
        if rounded and problem.dtype in ("float16", "bfloat16"):
            reasons.append(
                f"this torch is set to round scores to {problem.dtype}: call "
                "torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)"
            )
        return reasons

    def score_bytes(self, problem: Problem) -> int:
        return score_bytes(KERNEL, problem)

    def run(self, problem: Problem, operands: Operands) -> tuple[Tensor, None]:
        out, _ = attend(KERNEL, problem, operands)
        return out, None


backend = SdpaMath()
