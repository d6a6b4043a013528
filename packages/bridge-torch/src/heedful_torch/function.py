"""Autograd functions that hold under every transformation of torch, or refuse in words of ours.

The functions here and in their subclasses are written with `setup_context`, `jvp` and `vmap`, which is
what torch.func, forward-mode dual tensors and `torch.compile` ask for. Three things are left over:

- torch.autograd's own batching (``is_grads_batched=True``, ``jacobian(vectorize=True)``) is older than
  torch.func, and hands an autograd function its batched tensors raw: no data to read. `Function` takes
  them to the same `vmap` rule.
- A gradient that nobody can differentiate again. torch's `once_differentiable` refuses a second
  derivative only where the cotangent requires grad; with a loss as plain as a sum it does not, and then
  the gradient counts as a constant: a gradient penalty loses this part of its own gradient, silently.
  A `FirstOrder` is a function of all that the gradient comes from, and refuses.
- Tensors without data (`has_no_data`), which ask for the shapes of an answer alone.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

Call = TypeVar("Call", bound=Callable[..., Any])

_BATCHED: Any = torch._C._parse_dispatch_key("Batched")  # torch.func's is "FuncTorchBatched"


class Mapped(NamedTuple):
    """What a `vmap` rule is told of the axis that it maps."""

    batch_size: int


class Function(torch.autograd.Function):
    """An autograd function whose `vmap` rule also serves torch.autograd's own batching."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1  # the only way to read it
        torch._C._vmapmode_decrement_nesting()
        batched = [level > 0 and _is_batched(x) for x in args]
        if not any(batched):
            if torch._C._are_functorch_transforms_active():
                return super().apply(*args)  # type: ignore[no-untyped-call]  # torch's own
            # What torch's apply does here, without inspecting the signature, 17 µs, at every call.
            args = unwrap_dead_wrappers(args)
            return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]  # in C
        if level > 1:
            raise NotImplementedError(
                "expected one batched backward pass at a time. Got one inside another. "
                "Use torch.func.vmap and torch.func.vjp, which nest."
            )
        args = tuple(
            torch._remove_batch_dim(x, level, 1, 0) if yes else x
            for x, yes in zip(args, batched, strict=True)
        )
        size = next(len(x) for x, yes in zip(args, batched, strict=True) if yes)
        in_dims = tuple(0 if yes else None for yes in batched)
        outputs, dims = cls.vmap(Mapped(size), in_dims, *args)  # type: ignore[no-untyped-call]  # torch's
        return tuple(
            x if dim is None else torch._add_batch_dim(x, dim, level)
            for x, dim in zip(outputs, dims, strict=True)
        )


class FirstOrder(Function):
    """A gradient, which depends on its arguments in a way that nobody here knows."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass  # nothing to remember

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> NoReturn:
        raise NotImplementedError(
            "this backend has no second derivatives: its gradient was differentiated. "
            "jax:flash, jax:plain and torch:sdpa-math have them."
        )

    jvp = backward


def no_forward_mode(ctx: Any, *tangents: Any) -> NoReturn:
    """The `jvp` of a kernel that has none: a tangent that vanished would count as zero."""
    raise NotImplementedError(
        "this backend has no forward mode, and a tensor with a tangent was handed to it (torch.func's "
        "jvp and jacfwd, torch.autograd.forward_ad). jax:flash, jax:plain and torch:sdpa-math have it."
    )


def without_gradient(
    why: str, results: tuple[Tensor, ...], primals: Iterable[Tensor]
) -> tuple[Tensor, ...]:
    """Results that depend on some tensors and cannot be differentiated: to try raises, and says why."""
    found: tuple[Tensor, ...] = _WithoutGradient.apply(why, len(results), *results, *primals)
    return found


class _WithoutGradient(Function):
    @staticmethod
    def forward(why: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.why = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> NoReturn:
        raise NotImplementedError(f"this backend computes no gradients here: {ctx.why}")

    jvp = backward

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], why: str, count: int, *tensors: Tensor) -> Any:
        return _WithoutGradient.apply(why, count, *tensors), in_dims[2 : 2 + count]


def has_no_data(x: Tensor) -> bool:
    """Whether a tensor has a shape and no data: on the device "meta", or torch's fake of another."""
    return x.is_meta or isinstance(x, FakeTensor)


def is_transformed(tensors: Iterable[Tensor]) -> bool:
    """Whether more is at work than reverse mode: a tangent, or an axis that the tensors do not show."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(map(_is_batched, tensors))
    )


def outside_compilation(function: Call) -> Call:
    """Decorates what torch.compile, which crashes inside JAX, has to stay out of."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:  # to import it takes a second
            return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch's own
        return function(*args, **kwargs)

    return cast(Call, functools.update_wrapper(call, function, updated=()))


def is_written_down() -> bool:
    """Whether torch makes a graph of what it is asked for now, of proxies: `make_fx`, AOTAutograd."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def refuse_recording(what: Any) -> None:
    """Raises where torch makes a graph of its own operations: those of `what` would be missing.

    The answer to one call would be a constant there. NotImplementedError is what `torch.compile` takes
    as a reason to break its graph.
    """
    if (
        is_written_down()
        or torch._C._get_tracing_state() is not None
        or TracingContext.try_get() is not None
    ):
        what = getattr(what, "__name__", what)
        raise NotImplementedError(
            f"torch is recording a graph of its operations, which cannot hold {what}. Compile without "
            "fullgraph=True, so that it runs between two graphs, or choose torch:sdpa-flash or "
            "torch:sdpa-math, which a graph can hold."
        )


def _is_batched(x: Any) -> bool:
    return isinstance(x, Tensor) and torch._C._dispatch_keys(x).has(_BATCHED)
