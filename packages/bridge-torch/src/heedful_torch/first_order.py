"""Backward passes that have no derivative of their own.

torch's `once_differentiable` refuses a second derivative only where the cotangent requires grad. With a
loss as plain as a sum it does not, and then the gradient counts as a constant: a gradient penalty loses
this part of its own gradient, silently. Here every such gradient remembers what it came from.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(backward: Backward) -> Backward:
    """Decorates `backward` of an autograd function: differentiating its results raises.

    The inputs of the function must be among its saved tensors.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *cotangents)
        if not torch.is_grad_enabled():  # no create_graph=True: nobody can ask for more
            return gradients
        origins = [x for x in (*ctx.saved_tensors, *cotangents) if x is not None]
        return tuple(
            None if x is None else _Refused.apply(x, *origins)  # type: ignore[no-untyped-call]
            for x in gradients
        )

    return refusing


class _Refused(torch.autograd.Function):
    """A gradient, which depends on its origins in a way that nobody here knows."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *origins: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise NotImplementedError(
            "this backend has no second derivatives: its gradient was differentiated. "
            "jax:flash and torch:sdpa-math have them."
        )
