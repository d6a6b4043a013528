"""NumPy arrays on JAX backends, and JAX arrays on NumPy backends.

The first way is easy: NumPy records no derivatives, so a call is carried over, computed and copied
back.

The second has to work inside JAX's transformations. A NumPy backend's `run` and `gradients` become
the two halves of a `jax.custom_vjp`, each a callback on XLA's own buffers. `jax.pure_callback` would
be the usual way, but it makes JAX arrays inside the callback, and so waits for a thread of XLA's while
holding one: on a single core it hangs from about a million elements on (as in jax-ml/jax#24255).
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.compiled import compiled
from heedful.dispatch.backend import Backend
from heedful.results import checked_gradients, checked_run


class NumpyBridge:
    """The bridge between "numpy" and "jax", both ways, within the host's memory."""

    def reasons(self, problem: Problem, framework: str) -> tuple[str, ...]:
        if problem.platform != "cpu":
            return (
                f"the arrays lie on a {problem.platform} and NumPy's in host memory: "
                "nothing here moves silently between devices",
            )
        if framework == "numpy" and problem.functions:
            return (
                f"{' and '.join(problem.functions)} would be asked in a callback, which may not wait "
                "for JAX",
            )
        if framework == "jax" and _cpu() is None:
            return ("JAX has no CPU device here: the platforms it was told to use leave cpu out",)
        return ()

    def run(
        self, backend: Backend, problem: Problem, operands: Operands
    ) -> tuple[Array, Array | None]:
        if problem.framework == "numpy":
            return _run_in_jax(backend, problem, operands)
        return _run_in_numpy(backend, problem.compiled, problem.as_operand(operands))


bridge = NumpyBridge()


# NumPy arrays on a JAX backend


def _cpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _run_in_jax(
    backend: Backend, problem: Problem, operands: Operands
) -> tuple[np.ndarray, np.ndarray | None]:
    return through_jax(partial(_run_compiled, backend, problem), operands)


def through_jax(compute: Callable[[Any], Any], arrays: Any) -> Any:
    """A compiled function of JAX arrays, of a pytree of NumPy arrays."""
    # Inside somebody's jit, NumPy arrays are constants: they are computed with at once, not traced.
    # Elsewhere that would compile each constant of the backend by itself.
    at_once = jax.ensure_compile_time_eval() if _is_tracing() else contextlib.nullcontext()
    with at_once:
        answer = compute(jax.device_put(arrays, _cpu()))
        return jax.tree.map(np.array, answer)  # copies: the caller may write to them


def _is_tracing() -> bool:
    return isinstance(jax.numpy.zeros(()), jax.core.Tracer)


_run_compiled = compiled(static=2)(checked_run)


# JAX arrays on a NumPy backend


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@compiled(static=2)
def _run_in_numpy(
    backend: Backend, problem: Problem, operands: Operands
) -> tuple[jax.Array, jax.Array | None]:
    def run(operands: Operands) -> tuple[np.ndarray, np.ndarray | None]:
        return checked_run(backend, problem, operands)

    queries = (problem.batch, problem.q_heads, problem.q_length)
    out = jax.ShapeDtypeStruct((*queries, problem.value_dim), problem.dtype)
    lse = jax.ShapeDtypeStruct(queries, problem.accumulator) if problem.return_lse else None
    return _on_host(f"{backend.name}.run", run, (out, lse), operands)


def _run_and_remember(
    backend: Backend, problem: Problem, operands: Operands
) -> tuple[tuple[jax.Array, jax.Array | None], Operands]:
    if not hasattr(backend, "gradients"):
        raise NotImplementedError(
            f"{backend.name} cannot be differentiated in JAX: a NumPy backend needs a method "
            "`gradients` for that (heedful.dispatch.Gradients). Choose another backend."
        )
    return _run_in_numpy(backend, problem, operands), operands


@compiled(static=2)
def _gradients_in_numpy(
    backend: Any,  # a Backend with Gradients
    problem: Problem,
    operands: Operands,
    cotangents: tuple[jax.Array, jax.Array | None],
) -> tuple[Operands]:
    def gradients(
        operands: Operands, cotangents: tuple[np.ndarray, np.ndarray | None]
    ) -> tuple[Array, ...]:
        dout, dlse = cotangents
        if dlse is None:
            dlse = np.zeros(dout.shape[:3], problem.accumulator)
        found = checked_gradients(backend, problem, operands, dout, dlse)
        return tuple(found.differentiable.values())

    of = operands.differentiable
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in of.values()]
    found = _on_host(f"{backend.name}.gradients", gradients, shapes, operands, cotangents)
    return (Operands(**dict(zip(of, found, strict=True))),)


_run_in_numpy.defvjp(_run_and_remember, _gradients_in_numpy)


def _on_host(
    name: str, function: Callable[..., Sequence[Any]], shapes: Sequence[Any], *arguments: Any
) -> Any:
    """Calls a function of NumPy arrays from within a JAX computation.

    Args:
        name: of the function, for the error when it returns something else than promised.
        function: takes the arguments as read-only NumPy arrays. It must not call JAX, which may be
            waiting for it.
        shapes: of what it returns, a `jax.ShapeDtypeStruct` or None for each.
        arguments: pytrees of JAX arrays.
    """

    def on_buffers(_context: Any, results: Sequence[Any], *buffers: Any) -> None:
        returned = function(*jax.tree.map(np.asarray, buffers))
        for result, x in zip(results, returned, strict=True):
            if result is None:  # not asked for
                continue
            target = np.asarray(result)
            if x is None or (x.shape, x.dtype) != (target.shape, target.dtype):
                got = "None" if x is None else f"{x.dtype} {x.shape}"
                raise ValueError(f"{name} must return {target.dtype} {target.shape}. Got {got}.")
            target[...] = x

    return buffer_callback(on_buffers, shapes, vmap_method="sequential")(*arguments)
