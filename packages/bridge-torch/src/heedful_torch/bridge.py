"""The bridge between torch and the other frameworks: entry point "torch" of `heedful.bridges`.

=================  =============================================================================
caller → backend   how
=================  =============================================================================
torch → JAX        `jax_in_torch`: DLPack, one compilation for each backend and problem
JAX → torch        `torch_in_jax`: a callback on XLA's buffers, under jit, vmap and grad
torch → NumPy      shared memory; the backend's `run` and `gradients` make an autograd function
NumPy → torch      shared memory; the results are NumPy's own
=================  =============================================================================

What cannot be shared as it lies in memory, such as a slice or a broadcast handed to JAX, is copied
with a `CopyWarning`. No array changes its dtype or its device.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.dispatch import Backend
from heedful.results import checked_gradients, checked_run
from heedful_torch.autograd import jax_in_torch, torch_in_jax
from heedful_torch.dlpack import CopyWarning
from heedful_torch.function import (
    FirstOrder,
    Function,
    has_no_data,
    no_forward_mode,
    outside_compilation,
    refuse_recording,
)
from heedful_torch.transfers import crossed

BFLOAT16 = np.dtype(jnp.bfloat16)


class TorchBridge:
    """Carries calls from torch to JAX and NumPy backends, and from JAX and NumPy to torch's."""

    def reasons(self, problem: Problem, framework: str) -> list[str]:
        caller, platform = problem.framework, problem.platform
        if platform == "meta":  # nothing lies there: the shapes of the answer are all that crosses
            return []
        if problem.functions and "torch" in (caller, framework):
            return [
                f"{' and '.join(problem.functions)} of a call from {caller} do not speak {framework}: "
                "functions do not cross between frameworks"
            ]
        if "numpy" in (caller, framework):
            if platform == "cpu":
                return []
            return [
                f"the arrays lie on a {platform} and NumPy's in host memory: "
                "nothing here moves silently between devices"
            ]
        if platform not in ("cpu", "gpu"):
            return [f"arrays on {platform} do not cross between {caller} and {framework}"]
        if not _has(framework, platform):
            return [
                f"this {framework} has no {platform}, where the arrays lie: "
                "move them, or install one that has"
            ]
        return []

    def run(
        self, backend: Backend, problem: Problem, operands: Operands
    ) -> tuple[Array, Array | None]:
        # On a GPU, reading the offset would wait for it.
        if problem.framework == "jax" and problem.platform == "cpu":
            problem, operands = problem.compiled, problem.as_operand(operands)
        given = operands.given
        call = _Call(backend, problem, tuple(given))
        results: tuple[Array, ...]
        match problem.framework, backend.name.partition(":")[0]:
            case "torch", "jax":
                results = _torch_on_jax(call, given)
            case "jax", "torch":
                results = _jax_on_torch(call, given)
            case "torch", "numpy":
                results = _torch_on_numpy(call, given)
            case "numpy", "torch":
                results = _numpy_on_torch(call, given)
            case caller, framework:
                raise LookupError(f"this bridge does not lead from {caller} to {framework}")
        out, *lse = results
        return out, lse[0] if lse else None


bridge = TorchBridge()


def _has(framework: str, platform: str) -> bool:
    if framework == "torch":
        return platform == "cpu" or torch.cuda.is_available()
    try:
        return bool(jax.local_devices(backend=platform))
    except RuntimeError:
        return False


@dataclass(frozen=True)
class _Call:
    """A backend and a problem, as a function of those operands that are there, named by `names`.

    Equal calls are equal functions, which JAX compiles once.
    """

    backend: Backend
    problem: Problem
    names: tuple[str, ...]

    @property
    def __name__(self) -> str:  # in errors
        return self.backend.name

    def __call__(self, *arrays: Array) -> tuple[Array, ...]:
        problem, operands = self.problem, self.operands(arrays)
        if isinstance(operands.q, torch.Tensor):
            problem, operands = problem.as_number(operands)
        out, lse = checked_run(self.backend, problem, operands)
        return (out, lse) if self.problem.return_lse else (out,)

    def operands(self, arrays: tuple[Array, ...]) -> Operands:
        return Operands(**dict(zip(self.names, arrays, strict=True)))

    def result_shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        problem = self.problem
        queries = (problem.batch, problem.q_heads, problem.q_length)
        out = jax.ShapeDtypeStruct((*queries, problem.value_dim), problem.dtype)
        lse = jax.ShapeDtypeStruct(queries, problem.accumulator)
        return (out, lse) if problem.return_lse else (out,)


# torch and JAX


def _torch_on_jax(call: _Call, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    place = given["q"].device  # a q_offset that was a number is NumPy's
    tensors = (
        torch.tensor(x, device=place) if isinstance(x, np.ndarray) else x for x in given.values()
    )
    return jax_in_torch(call, copy=None)(*tensors)


def _jax_on_torch(call: _Call, given: Mapping[str, Array]) -> tuple[jax.Array, ...]:
    # a mask or a length may be NumPy's: to JAX it is a constant
    return torch_in_jax(call, call.result_shapes())(*map(jnp.asarray, given.values()))


# torch and NumPy, which share the host's memory


def _torch_on_numpy(call: _Call, given: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    refuse_recording(call)
    return _NumpyInTorch.apply(call, *given.values())


def _numpy_on_torch(call: _Call, given: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    with torch.no_grad():
        results = call(*map(_to_tensor, given.values()))
    return tuple(np.array(_to_numpy(result, copied=True)) for result in results)


class _NumpyInTorch(Function):
    """A NumPy backend, recorded by torch autograd."""

    @staticmethod
    def forward(call: _Call, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if any(map(has_no_data, tensors)):
            return tuple(
                tensors[0].new_empty(x.shape, dtype=getattr(torch, x.dtype.name))
                for x in call.result_shapes()
            )
        results = call(*map(_to_numpy, tensors))
        return tuple(_to_tensor(np.array(result), copied=True) for result in results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @outside_compilation
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *_NumpyPullBack.apply(
            ctx.call, len(cotangents), *cotangents, *ctx.saved_tensors
        )

    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _one_by_one(_NumpyInTorch, info.batch_size, in_dims, args)


class _NumpyPullBack(FirstOrder):
    """(cotangents, operands) → the operands' gradients, None where there is none."""

    @staticmethod
    def forward(call: _Call, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        backend, problem = call.backend, call.problem
        if not hasattr(backend, "gradients"):
            raise NotImplementedError(
                f"{backend.name} cannot be differentiated in torch: a NumPy backend needs a method "
                "`gradients` for that (heedful.dispatch.Gradients). Choose another backend."
            )
        if any(map(has_no_data, tensors)):
            primals = call.operands(tensors[count:]).differentiable
            gradients = {name: x.new_empty(x.shape) for name, x in primals.items()}
        else:
            dout, *dlse = map(_to_numpy, tensors[:count])
            if not dlse:
                dlse = [np.zeros(dout.shape[:3], problem.accumulator)]
            operands = call.operands(tuple(map(_to_numpy, tensors[count:])))
            found = checked_gradients(backend, problem, operands, dout, *dlse)
            primals = found.differentiable
            gradients = {n: _to_tensor(np.array(x), copied=True) for n, x in primals.items()}
        return tuple(gradients.get(name) for name in call.names)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _one_by_one(_NumpyPullBack, info.batch_size, in_dims, args)


def _one_by_one(
    function: type[Function], size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int | None, ...]]:
    """The `vmap` rule of a function that takes nothing but what it was made for."""
    results = [
        function.apply(
            *(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True))
        )
        for i in range(size)
    ]
    stacked = tuple(
        None if parts[0] is None else torch.stack(parts) for parts in zip(*results, strict=True)
    )
    return stacked, tuple(None if x is None else 0 for x in stacked)


OWN = "the caller's own, whatever memory a backend returns"  # why a result is copied


def _to_numpy(x: torch.Tensor, *, copied: bool = False) -> np.ndarray:
    """The same memory; that the caller copies it is for the report to say."""
    x = x.detach()
    crossed("torch", "numpy", x, copied=copied, why=OWN if copied else "the same memory")
    if x.dtype == torch.bfloat16:  # ml_dtypes' in NumPy, which torch does not know
        return x.view(torch.int16).numpy().view(BFLOAT16)
    return x.numpy()


def _to_tensor(x: np.ndarray, *, copied: bool = False) -> torch.Tensor:
    """The same memory where that can be; of an array that the caller has copied, if `copied`."""
    why = _why_torch_must_copy(x)
    crossed(
        "numpy",
        "torch",
        x,
        copied=copied or why is not None,
        why=OWN if copied else why or "the same memory",
    )
    if why:
        warnings.warn(
            f"an array of shape {x.shape}, {x.dtype} was copied: {why}.", CopyWarning, stacklevel=2
        )
        x = np.array(x, order="C")
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _why_torch_must_copy(x: np.ndarray) -> str | None:
    """The reason why torch cannot share this array's memory, or None if it can."""
    if not x.flags.writeable:
        return "it is read-only, and a torch tensor never is"
    if any(stride < 0 or stride % x.itemsize for stride in x.strides):
        return f"torch cannot step over memory by {x.strides} bytes"
    return None
