"""Computing in the dtypes that were given, whatever `torch.autocast` says.

Autocast rounds the factors of every product within its block, and those of a backward pass too where
`backward` is called there. To switch it off holds for what runs in that block: for a kernel, and for an
autograd function. Operations that torch itself differentiates have to be made one: `outside_autocast`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heedful_torch.function import Function, outside_compilation

TensorFunction = Callable[..., tuple[Tensor, ...]]


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off within the block, for the kind of device that x lies on."""
    kind = x.device.type  # "meta" has no autocast
    on = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def outside_autocast(function: TensorFunction, *tensors: Tensor) -> tuple[Tensor, ...]:
    """function(*tensors), computed and differentiated without autocast, to any order.

    ``function`` takes floating tensors and returns a tuple of them, by operations that torch
    differentiates. Its derivatives compute it again.
    """
    outputs: tuple[Tensor, ...] = _OutsideAutocast.apply(function, *tensors)
    return outputs


class _OutsideAutocast(Function):
    """A function whose pull-back, push-forward and map over an axis are such functions again."""

    @staticmethod
    def forward(function: TensorFunction, *tensors: Tensor) -> tuple[Tensor, ...]:
        with no_autocast(tensors[0]):
            return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @outside_compilation
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        pull_back = _PullBack(ctx.function, wanted)
        each = iter(outside_autocast(pull_back, *ctx.saved_tensors, *cotangents))
        return None, *(next(each) if want else None for want in wanted)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        moving = tuple(tangent is not None for tangent in tangents)
        given = (tangent for tangent in tangents if tangent is not None)
        return outside_autocast(_PushForward(ctx.function, moving), *ctx.saved_tensors, *given)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], function: TensorFunction, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = outside_autocast(_Mapped(function, tuple(in_dims[1:])), *tensors)
        return outputs, (0,) * len(outputs)


@dataclass(frozen=True)
class _PullBack:
    """(inputs, cotangents) → gradients of the wanted inputs."""

    function: TensorFunction
    wanted: tuple[bool, ...]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, cotangents = tensors[: len(self.wanted)], tensors[len(self.wanted) :]
        return _pull_back_of(self.function, self.wanted, inputs)(cotangents)


@dataclass(frozen=True)
class _PushForward:
    """(inputs, tangents of the moving inputs) → tangents.

    The pull-back is linear in the cotangents, and its own pull-back is the push-forward. Forward mode
    itself would not do: torch opens no second level of it within one of `torch.autograd.forward_ad`.
    """

    function: TensorFunction
    moving: tuple[bool, ...]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, tangents = tensors[: len(self.moving)], tensors[len(self.moving) :]
        pull_back = _pull_back_of(self.function, self.moving, inputs)
        anywhere = tuple(map(torch.zeros_like, self.function(*inputs)))
        of_cotangents = torch.func.vjp(lambda *cotangents: pull_back(cotangents), *anywhere)
        pushed: tuple[Tensor, ...] = of_cotangents[1](tangents)
        return pushed


@dataclass(frozen=True)
class _Mapped:
    """A function over one more axis of some of its arguments, the first one of its results."""

    function: TensorFunction
    in_dims: tuple[int | None, ...]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = torch.func.vmap(self.function, self.in_dims)(*tensors)
        return outputs


def _pull_back_of(
    function: TensorFunction, chosen: tuple[bool, ...], inputs: tuple[Tensor, ...]
) -> TensorFunction:
    """Of the function of the chosen inputs: a tuple of cotangents → a tuple of gradients."""

    def of_chosen(*varied: Tensor) -> tuple[Tensor, ...]:
        each = iter(varied)
        return function(*(next(each) if yes else x for yes, x in zip(chosen, inputs, strict=True)))

    varied = (x for yes, x in zip(chosen, inputs, strict=True) if yes)
    pull_back: TensorFunction = torch.func.vjp(of_chosen, *varied)[1]
    return pull_back
