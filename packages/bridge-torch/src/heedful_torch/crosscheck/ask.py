"""Puts a question to a backend the way a user would, in each of the three frameworks.

What is judged is what users get: `heedful.attention` on arrays of the framework, and the framework's own
differentiation. Arrays get there and back through NumPy, not over the bridge, so that a fault of the
bridge cannot hide one of a backend; the cases of the group "bridge" are the ones that cross it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import heedful
from heedful import Problem
from heedful_torch.crosscheck.cases import Inputs
from heedful_torch.crosscheck.question import Question
from heedful_torch.crosscheck.yardstick import Tensors

Named = dict[str, Any]  # arrays of one framework, or options


def framework(backend: str) -> str:
    """A backend's framework: "numpy", "jax" or "torch"."""
    return backend.partition(":")[0]


def ask(
    backend: str,
    question: Question,
    inputs: Inputs,
    with_lse: bool,
    lse_cotangent: np.ndarray | None = None,
) -> Tensors:
    """out, lse where it is asked for, and dq, dk, dv and dbias where the caller can differentiate.

    Args:
        backend: its name.
        question: what is asked.
        inputs: the question's inputs, or its poisoned ones.
        with_lse: whether LSE is asked for and differentiated.
        lse_cotangent: (B, Hq, Sq), in place of the question's own.

    Returns:
        NumPy arrays in the rank and layout of the call.

    Raises:
        heedful.Refusal: the backend cannot; and whatever else it raises.
    """
    if lse_cotangent is None:
        lse_cotangent = question.lse_cotangent
    out_cotangent = question.as_called(question.out_cotangent)
    lse_cotangent = question.rows_as_called(lse_cotangent)
    options = {**inputs.options, "return_lse": with_lse}
    arrays: Named = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    if "bias" in options:
        arrays["bias"] = options.pop("bias")
    cotangents = [out_cotangent, lse_cotangent] if with_lse else [out_cotangent]
    match question.case.caller or framework(backend):
        case "jax":
            results, gradients = _ask_jax(backend, arrays, options, cotangents)
        case "torch":
            results, gradients = _ask_torch(backend, arrays, options, cotangents)
        case _:
            results, gradients = _ask_numpy(backend, question, arrays, options)
    named = dict(zip(("out", "lse"), results, strict=False))
    return named | {f"d{name}": gradient for name, gradient in gradients.items()}


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _ask_jax(
    backend: str, arrays: Named, options: Named, cotangents: list[np.ndarray]
) -> tuple[list[np.ndarray], Tensors]:
    array_options = {n: jnp.asarray(x) for n, x in options.items() if isinstance(x, np.ndarray)}
    rest = tuple((n, x) for n, x in options.items() if n not in array_options)
    results, gradients = _compiled(backend, _Itself(heedful.backends()[backend]), rest)(
        {n: jnp.asarray(x) for n, x in arrays.items()},
        array_options,
        [jnp.asarray(c) for c in cotangents],
    )
    return [np.asarray(x) for x in results], {n: np.asarray(x) for n, x in gradients.items()}


class _Itself:
    """A backend as part of a key: another one registered under the same name is another one."""

    def __init__(self, backend: Any):
        self.backend = backend

    def __hash__(self) -> int:
        return id(self.backend)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.backend is other.backend


@lru_cache(maxsize=24)  # for cases that share a shape, and other seeds; each holds megabytes
def _compiled(
    backend: str, _: _Itself, options: tuple[tuple[str, Any], ...]
) -> Callable[[Named, Named, list[jax.Array]], tuple[tuple[jax.Array, ...], Named]]:
    """Results and gradients in one: compiled together they take half as long as apart."""

    @jax.jit
    def differentiated(
        arrays: Named, array_options: Named, cotangents: list[jax.Array]
    ) -> tuple[tuple[jax.Array, ...], Named]:
        def attend(arrays: Named) -> tuple[jax.Array, ...]:
            return _as_tuple(
                heedful.attention(**arrays, **array_options, **dict(options), backend=backend)
            )

        results, pull = jax.vjp(attend, arrays)
        pairs = zip(cotangents, results, strict=True)
        (gradients,) = pull(tuple(c.astype(x.dtype) for c, x in pairs))
        return results, gradients

    return differentiated


def _ask_torch(
    backend: str, arrays: Named, options: Named, cotangents: list[np.ndarray]
) -> tuple[list[np.ndarray], Tensors]:
    options = {n: to_tensor(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    leaves: Named = {n: to_tensor(x).requires_grad_() for n, x in arrays.items()}
    results = _as_tuple(heedful.attention(**leaves, **options, backend=backend))

    # A result cut off from an input gives it no gradient: judged like any other wrong one.
    gradients = {n: torch.zeros_like(x) for n, x in leaves.items()}
    pairs = zip(results, cotangents, strict=True)
    connected = [(x, to_tensor(c).to(x.dtype)) for x, c in pairs if x.requires_grad]
    if connected:
        found = torch.autograd.grad(
            [x for x, _ in connected],
            list(leaves.values()),
            [c for _, c in connected],
            materialize_grads=True,
        )
        gradients = dict(zip(leaves, found, strict=True))
    _check_unwritten(arrays, {n: to_array(x) for n, x in leaves.items()})
    return [to_array(x) for x in results], {n: to_array(x) for n, x in gradients.items()}


def _ask_numpy(
    backend: str, question: Question, arrays: Named, options: Named
) -> tuple[list[np.ndarray], Tensors]:
    """NumPy differentiates nothing: a NumPy backend's own `gradients` stand for it."""
    given, arrays = arrays, {n: x.copy() for n, x in arrays.items()}
    results = _as_tuple(heedful.attention(**arrays, **options, backend=backend))
    _check_unwritten(given, arrays)
    instance = heedful.backends()[backend]
    if framework(backend) != "numpy" or not hasattr(instance, "gradients"):
        return list(results), {}
    problem = Problem.of(**arrays, **options)
    lse_cotangent = question.lse_cotangent * problem.return_lse
    *heads, dbias = instance.gradients(
        problem, problem.canonical(**arrays, **options), question.out_cotangent, lse_cotangent
    )
    gradients = {n: question.as_called(x) for n, x in zip("qkv", heads, strict=True)}
    if dbias is not None:
        gradients["bias"] = dbias.reshape(arrays["bias"].shape)
    return list(results), gradients


def _check_unwritten(given: Tensors, now: Tensors) -> None:
    for name, x in given.items():
        if x.tobytes() != now[name].tobytes():
            raise RuntimeError(f"the call wrote into {name}, which is the caller's")


# NumPy to torch and back: torch knows no NumPy bfloat16, so its bits travel as integers.


def to_tensor(x: np.ndarray) -> torch.Tensor:
    """A copy, on the GPU where torch has one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bits = x.view(np.uint16) if x.dtype.name == "bfloat16" else x
    # A copy, so that nobody writes into an array that others are asked with; and one by torch, whose
    # memory is aligned as JAX wants it.
    tensor = torch.from_numpy(np.ascontiguousarray(bits)).clone()
    return (tensor.view(torch.bfloat16) if bits is not x else tensor).to(device)


def to_array(x: torch.Tensor) -> np.ndarray:
    """Its numbers, without its graph."""
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy().view("bfloat16")
    return x.numpy()
