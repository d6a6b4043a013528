"""Facts about arrays of any framework, without importing torch."""

import sys
from functools import cache
from typing import Any

import jax
import numpy as np

Array = Any  # a JAX array, a NumPy array or a torch tensor: core never imports torch


def framework_of(x: Array) -> str | None:
    """Whose array: "numpy", "jax" (tracers and ShapeDtypeStruct too), "torch"; None for no array."""
    if kind := _framework_of_type(type(x)):  # type: ignore[arg-type]  # a class is hashable
        return kind
    return "jax" if isinstance(x, jax.Array | jax.ShapeDtypeStruct) else None


@cache
def _framework_of_type(kind: type) -> str | None:
    """Of NumPy's and torch's arrays; whether a tracer is an array JAX says of each anew."""
    # A masked array's mask would be lost, and a matrix is of rank 2 whatever is done with it.
    if issubclass(kind, np.ndarray) and not issubclass(kind, np.ma.MaskedArray | np.matrix):
        return "numpy"
    if any(t.__module__ == "torch" and t.__name__ == "Tensor" for t in kind.__mro__):
        return "torch"
    return None


def dtype_of(x: Array) -> str:
    """The dtype's name, the same in every framework."""
    return _dtype_name(x.dtype)


@cache  # NumPy takes microseconds to spell one
def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def accumulator_of(dtype: str) -> str:
    """The dtype that products of this one accumulate in."""
    return "float64" if dtype == "float64" else "float32"


def shape_of(x: Array) -> tuple[Any, ...]:
    """Its sizes; what is a symbol to torch, while it records a graph, becomes the number it stands for.

    torch remembers that it was asked, and records another graph for other sizes.
    """
    return tuple(map(int, x.shape)) if framework_of(x) == "torch" else tuple(x.shape)


def platform_of(x: Array) -> str:
    """Where it lies: "cpu", "gpu" or "tpu"; a JAX tracer has no place yet and takes JAX's default."""
    match framework_of(x):
        case "jax" if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            return next(iter(x.devices())).platform
        case "jax":
            default = jax.config.jax_default_device  # type: ignore[attr-defined]  # untyped config
            return getattr(default, "platform", default) or jax.default_backend()
        case "torch":
            return {"cuda": "gpu", "xla": "tpu"}.get(x.device.type, x.device.type)
    return "cpu"


def place_of(x: Array) -> str | None:
    """The device, as text to compare; None where there is none, or where JAX is free to move it."""
    match framework_of(x):
        case "torch":
            return str(x.device)
        # What is not committed JAX moves to where the others are, as it does a number.
        case "jax" if not isinstance(x, jax.core.Tracer) and getattr(x, "committed", False):
            return ", ".join(sorted(str(device) for device in x.devices()))
    return None


def is_concrete_on_cpu(x: Array) -> bool:
    """Whether its values can be read without waiting for a device, outside of any trace."""
    if isinstance(x, jax.core.Tracer) or platform_of(x) != "cpu":
        return False
    if framework_of(x) != "torch":
        return True
    # Inside torch.func's transforms, or torch.compile, no tensor has data that NumPy can read.
    torch, fakes = sys.modules["torch"], sys.modules.get("torch._subclasses.fake_tensor")
    return not (torch._C._are_functorch_transforms_active() or (fakes and fakes.is_fake(x)))


def broadcast_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The array broadcast to a shape, as a view where the framework has views; differentiable."""
    match framework_of(x):
        case "jax":
            return jax.numpy.broadcast_to(x, shape)
        case "torch":
            return x.expand(shape)
    return np.broadcast_to(x, shape)


def cast_like(x: Array, other: Array) -> Array:
    """The array in another one's dtype."""
    return x.to(other.dtype) if framework_of(x) == "torch" else x.astype(other.dtype)


def as_int32(x: Array) -> Array:
    """The array in int32."""
    return x.int() if framework_of(x) == "torch" else x.astype("int32")
