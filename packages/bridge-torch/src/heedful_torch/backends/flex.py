"""`torch:flex`: torch's FlexAttention, eager: the score matrix materialised, on any device.

What is seen becomes its block mask, softcap and bias its `score_mod`. On a CPU it has no backward pass.
On a GPU it has not been run here yet.
"""

import warnings

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.rules.visibility import FEATURES
from heedful_torch.backends.kernel import (
    Arguments,
    Kernel,
    Results,
    attend,
    attend_forward,
    limits,
    score_bytes,
)

NO_BACKWARD = "FlexAttention has no backward pass on a CPU"


def _forward(asked: Arguments) -> Results:
    q, k, v, additive, how = asked
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, q_length, _ = q.shape

    def added(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert additive is not None
        index = (b, h, i, j)
        return additive[
            tuple(x if n > 1 else 0 for x, n in zip(index, additive.shape, strict=True))
        ]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = torch.ones_like(i, dtype=torch.bool)
        if additive is not None:
            seen = seen & (added(b, h, i, j) > -torch.inf)
        if how.below is not None:
            seen = seen & (j >= i + how.below)
        return seen if how.above is None else seen & (j <= i + how.above)

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if how.softcap is not None:
            s = how.softcap * torch.tanh(s / how.softcap)
        return s if additive is None else s + added(b, h, i, j)

    hidden = additive is not None or how.below is not None or how.above is not None
    mask_heads = None if additive is None or additive.shape[1] == 1 else heads
    mask_batch = None if additive is None or additive.shape[0] == 1 else batch
    lengths = (q_length, k.shape[2])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*called without torch.compile")  # as is meant
        out, aux = flex_attention(
            q,
            k,
            v,
            score_mod=score if how.softcap is not None or additive is not None else None,
            block_mask=create_block_mask(sees, mask_batch, mask_heads, *lengths, device=q.device)
            if hidden
            else None,
            scale=how.scale,
            enable_gqa=heads != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    assert aux.lse is not None  # which was asked for
    return Results(out, aux.lse.to(accumulator))


KERNEL = Kernel(
    forward=_forward,
    backward=None,
    flag=None,
    masks="accumulator",
    windows="any",
    grouped=True,
    opaque="torch:flex",
)


class FlexAttention:
    """FlexAttention, eager. Memory grows with Sq · Sk."""

    name = "torch:flex"
    automatic = None
    takes = FEATURES | {"bias", "grouped_heads", "return_lse", "scale", "softcap", "value_dim"}
    deterministic = True

    def reasons(self, problem: Problem) -> list[str]:
        return limits(KERNEL, problem, self.takes)

    def forward_only(self, problem: Problem) -> str | None:
        return NO_BACKWARD if problem.platform == "cpu" else None

    def score_bytes(self, problem: Problem) -> int:
        return score_bytes(KERNEL, problem)

    def run(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor | None]:
        why = self.forward_only(problem)
        if why is None:
            return attend(KERNEL, problem, operands)
        return attend_forward(KERNEL, problem, operands, why)


backend = FlexAttention()
