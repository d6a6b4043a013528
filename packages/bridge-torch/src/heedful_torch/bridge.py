"""The bridge between torch and the other frameworks: the entry point "torch" of `heedful.bridges`.

=================  ===================================================================================
caller → backend   how
=================  ===================================================================================
torch → JAX        `jax_in_torch`: DLPack, one compilation for each backend and problem
JAX → torch        `torch_in_jax`: a callback on XLA's buffers, under jit, vmap and grad
torch → NumPy      the same memory; the backend's `run` and `gradients` make an autograd function
NumPy → torch      the same memory; the results are copies of the caller's own
=================  ===================================================================================

Arrays are shared. What cannot be shared as it lies in memory, such as a slice or a broadcast handed to
JAX, is copied with a `CopyWarning`. No array changes its dtype or its device, except lengths and offsets,
a few integers: they cross as int32 to JAX, which has no int64 by default, and as int64 to torch.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from heedful.dispatch import Backend
from heedful.problem import Array, Operands, Problem
from torch.autograd.function import once_differentiable

from heedful_torch.autograd import jax_in_torch, torch_in_jax
from heedful_torch.dlpack import CopyWarning

INTEGERS = ("q_lengths", "kv_lengths", "q_offset")
BFLOAT16 = np.dtype(jnp.bfloat16)

# Farther than any key or query: clamped to it, an offset of int64 means the same in int32.
FAR = 2**30


class TorchBridge:
    """Carries calls from torch to JAX and NumPy backends, and from JAX and NumPy to torch backends."""

    def reasons(self, problem: Problem, framework: str) -> list[str]:
        caller, platform = problem.framework, problem.platform
        if "numpy" in (caller, framework) and platform != "cpu":
            return [
                f"the arrays lie on a {platform} and NumPy's in host memory: "
                "nothing here moves silently between devices"
            ]
        if platform not in ("cpu", "gpu"):
            return [f"{framework} has no arrays on {platform}; move them to a CPU or a GPU"]
        if framework == "jax" and not _jax_has(platform):
            return [f"this JAX has no {platform}, where the arrays lie; move them, or install one that has"]
        if framework == "torch" and platform == "gpu" and not torch.cuda.is_available():
            return ["this torch has no gpu, where the arrays lie; move them, or install one that has"]
        return []

    def run(
        self, backend: Backend, problem: Problem, operands: Operands
    ) -> tuple[Array, Array | None]:
        there = {name: x for name, x in operands._asdict().items() if x is not None}
        call = _Call(backend, problem, tuple(there))
        match problem.framework, backend.name.partition(":")[0]:
            case "torch", "jax":
                tensors = [_int32(x) if name in INTEGERS else x for name, x in there.items()]
                results = jax_in_torch(call, copy=None)(*tensors)
            case "jax", "torch":
                results = torch_in_jax(call, _result_shapes(problem))(*map(jnp.asarray, there.values()))
            case "torch", "numpy":
                results = _NumpyInTorch.apply(call, *there.values())
            case "numpy", "torch":
                arrays = [x.astype(np.int64) if n in INTEGERS else x for n, x in there.items()]
                with torch.no_grad():
                    results = tuple(np.array(_as_array(y)) for y in call(*map(_as_tensor, arrays)))
            case caller, framework:
                raise ValueError(f"this bridge does not lead from {caller} to {framework}")
        return results[0], results[1] if problem.return_lse else None


bridge = TorchBridge()


@dataclass(frozen=True)
class _Call:
    """A backend and a problem as a function of those operands that are there, in the order of `names`.

    Equal calls are equal functions: JAX compiles them once.
    """

    backend: Backend
    problem: Problem
    names: tuple[str, ...]

    def __call__(self, *arrays: Array) -> tuple[Array, ...]:
        out, lse = self.backend.run(self.problem, self.operands(*arrays))
        return (out, lse) if self.problem.return_lse else (out,)

    def operands(self, *arrays: Array) -> Operands:
        return Operands(**dict(zip(self.names, arrays, strict=True)))


def _jax_has(platform: str) -> bool:
    try:
        return bool(jax.local_devices(backend=platform))
    except RuntimeError:
        return False


def _int32(x: torch.Tensor) -> torch.Tensor:
    return x.long().clamp(-FAR, FAR).int()


def _result_shapes(problem: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    queries = (problem.batch, problem.q_heads, problem.q_length)
    out = jax.ShapeDtypeStruct((*queries, problem.value_dim), problem.dtype)
    lse = jax.ShapeDtypeStruct(queries, problem.accumulator)
    return (out, lse) if problem.return_lse else (out,)


# torch and NumPy share the host's memory; NumPy's bfloat16 is ml_dtypes', which torch does not know


def _as_array(x: torch.Tensor) -> np.ndarray:
    x = x.detach()
    return x.view(torch.int16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy()


def _as_tensor(x: np.ndarray) -> torch.Tensor:
    if why := _why_torch_must_copy(x):
        warnings.warn(f"an array of shape {x.shape}, {x.dtype} was copied: {why}.", CopyWarning, 2)
        x = np.array(x, order="C")
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _why_torch_must_copy(x: np.ndarray) -> str | None:
    """The reason why torch cannot share this array's memory, or None if it can."""
    if not x.flags.writeable:
        return "it is read-only, and a torch tensor never is"
    if any(stride < 0 for stride in x.strides):
        return f"torch has no negative strides, and it has {x.strides} (bytes)"
    if any(stride % x.itemsize for stride in x.strides):
        return f"torch strides over whole numbers, and it has {x.strides} (bytes)"
    return None


class _NumpyInTorch(torch.autograd.Function):
    """A NumPy backend, recorded by torch autograd."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return tuple(_as_tensor(np.array(x)) for x in call(*map(_as_array, tensors)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call = ctx.call
        if not hasattr(call.backend, "gradients"):
            raise NotImplementedError(
                f"{call.backend.name} cannot be differentiated in torch: a NumPy backend needs a method "
                "`gradients` for that (heedful.dispatch.Gradients). Choose another backend."
            )
        operands = call.operands(*map(_as_array, ctx.saved_tensors))
        dout, *dlse = map(_as_array, cotangents)
        if not dlse:
            dlse = [np.zeros(dout.shape[:3], call.problem.accumulator)]
        found = call.backend.gradients(call.problem, operands, dout, *dlse)
        gradients = dict(zip(("q", "k", "v", "bias"), found, strict=True))
        return None, *(
            _as_tensor(np.array(gradients[name])) if gradients.get(name) is not None else None
            for name in call.names
        )
