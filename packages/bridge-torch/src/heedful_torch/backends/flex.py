"""`torch:flex` and `torch:flex-compiled`: torch's FlexAttention, on any device.

What is seen becomes its block mask, softcap and bias its `score_mod`. Eager it materialises the scores;
compiled, each new shape and number takes seconds. On a CPU it has no backward pass. On a GPU neither
has been run here yet.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.rules.scores import ADDED
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
from heedful_torch.backends.within_range import LARGEST, within_range

NO_BACKWARD = "FlexAttention has no backward pass on a CPU"
KEPT = 256  # kinds of calls that are compiled in a process


def _eager() -> Callable[..., Any]:
    return flex_attention


@cache
def _compiled() -> Callable[..., Any]:
    from torch._dynamo import config  # seconds

    # Of sizes and numbers that are symbols torch 2.13 compiles a wrong or no `score_mod` for a CPU.
    function = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call(*args: Any, **options: Any) -> Any:
        # Beyond eight kinds of calls torch gives up compiling.
        with config.patch(recompile_limit=KEPT, accumulated_recompile_limit=KEPT):
            return function(*args, **options)

    return call


def _forward(function: Callable[[], Callable[..., Any]], lse: bool, asked: Arguments) -> Results:
    q, k, v, given, _, how = asked
    additive, top = (None, None) if given is None else _within_range(given)
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, q_length, _ = q.shape
    modify, (row, column) = (how.functions or {}).get("score_mod"), how.first

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
        if modify is not None:
            s = modify.function(s, b, h, i + row, j + column)
        return s if additive is None else s + added(b, h, i, j)

    changed = additive is not None or how.softcap is not None or modify is not None
    hidden = additive is not None or how.below is not None or how.above is not None
    mask_heads = None if additive is None or additive.shape[1] == 1 else heads
    mask_batch = None if additive is None or additive.shape[0] == 1 else batch
    lengths = (q_length, k.shape[2])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*called without torch.compile")  # as is meant
        found = function()(
            q,
            k,
            v,
            score_mod=score if changed else None,
            block_mask=create_block_mask(sees, mask_batch, mask_heads, *lengths, device=q.device)
            if hidden
            else None,
            scale=how.scale,
            enable_gqa=heads != k.shape[1],
            return_aux=AuxRequest(lse=True) if lse else None,
        )
    if not lse:
        return Results(found, None)
    out, aux = found
    own = aux.lse.to(accumulator)
    if top is not None:
        own = torch.where(top.isfinite() & (top.abs() > LARGEST), _valued(own, top), own)
    return Results(out, own)


def _within_range(additive: Tensor) -> tuple[Tensor, Tensor | None]:
    """`within_range`, and the gradient is that of the mask as it was."""
    within, top = within_range(additive.detach())
    moved = (within != additive) & (additive != -torch.inf)
    return torch.where(moved, _valued(additive, within), additive), top


def _valued(x: Tensor, value: Tensor) -> Tensor:
    """The value, with the gradient of x."""
    return value + (x - x.detach())


flex_kernel = partial(
    Kernel, backward=None, once=True, flag=None, masks="accumulator", windows="any", grouped=True
)
EAGER = flex_kernel(forward=partial(_forward, _eager, True), opaque="torch:flex")
ON_CPU = flex_kernel(forward=partial(_forward, _compiled, False), opaque="torch:flex-compiled")
ON_GPU = flex_kernel(
    forward=partial(_forward, _compiled, True), opaque="torch:flex-compiled", widened=(0, 16)
)


class FlexAttention:
    """FlexAttention, eager. Memory grows with Sq · Sk."""

    name = "torch:flex"
    automatic = None
    takes = (
        FEATURES
        | ADDED
        | {"grouped_heads", "return_lse", "scale", "score_mod", "softcap", "value_dim"}
    )

    @property
    def deterministic(self) -> bool:
        # On a GPU the gradient of the bias is summed by atomic additions, in any order.
        return not torch.cuda.is_available()

    def used(self, problem: Problem) -> Kernel:
        """The kernel for a problem."""
        return EAGER

    def reasons(self, problem: Problem) -> list[str]:
        return limits(self.used(problem), problem, self.takes)

    def forward_only(self, problem: Problem) -> str | None:
        return NO_BACKWARD if problem.platform == "cpu" else None

    def score_bytes(self, problem: Problem) -> int:
        return score_bytes(self.used(problem), problem)

    def run(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor | None]:
        why = self.forward_only(problem)
        if why is None:
            return attend(self.used(problem), problem, operands)
        return attend_forward(self.used(problem), problem, operands, why)


class CompiledFlexAttention(FlexAttention):
    """FlexAttention, compiled: no scores, but masks over (Sq, Sk) while its block mask is made."""

    name = "torch:flex-compiled"
    unasked = "each kind of call is compiled for seconds"

    def used(self, problem: Problem) -> Kernel:
        return ON_GPU if problem.platform == "gpu" else ON_CPU

    def reasons(self, problem: Problem) -> list[str]:
        reasons = super().reasons(problem)
        if problem.platform == "cpu" and problem.return_lse:
            reasons.append("FlexAttention compiled for a CPU returns no LSE")
        if problem.dtype == "float64":
            reasons.append(
                "FlexAttention is compiled for float32, float16 and bfloat16, not float64"
            )
        return reasons or list(filter(None, [_why_no_compiler(problem.platform)]))

    def kernel(self, problem: Problem) -> str:
        return f"FlexAttention of torch {torch.__version__}, compiled by inductor"

    def score_bytes(self, problem: Problem) -> int:
        return score_bytes(self.used(problem), problem, scores=False)


@cache
def _why_no_compiler(platform: str) -> str | None:
    """Why torch.compile can make no kernels for a platform."""
    if platform == "gpu":
        return None if find_spec("triton") else "torch.compile needs triton for a GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler for a CPU, and finds none"
    return None


eager = FlexAttention()
compiled = CompiledFlexAttention()
