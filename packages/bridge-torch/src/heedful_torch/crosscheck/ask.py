"""Puts a question to a backend the way a user would, in each of the three frameworks.

What is judged is what users get: `heedful.attention` on arrays of the framework, and the framework's own
differentiation. Arrays get there and back through NumPy, not over the bridge, so that a fault of the
bridge cannot hide one of a backend; the cases with a caller are the ones that cross it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import heedful
from heedful import dispatch
from heedful.call import Call
from heedful_torch.crosscheck.cases import Inputs
from heedful_torch.crosscheck.question import Question
from heedful_torch.crosscheck.yardstick import Tensors

Named = dict[str, Any]  # arrays of one framework, or options


class Refused(Exception):
    """A backend gave reasons why it cannot answer; whatever comes later is no refusal.

    Attributes:
        reasons: all of them.
    """

    def __init__(self, reasons: tuple[str, ...]):
        super().__init__("; ".join(reasons))
        self.reasons = reasons


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
        Refused: the backend cannot; and whatever it raises while it tries.
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
    memory = MEMORY[question.case.memory]
    match question.case.caller or framework(backend):
        case "jax":
            results, gradients = _ask_jax(backend, arrays, options, cotangents)
        case "torch":
            results, gradients = _ask_torch(backend, arrays, options, cotangents, memory)
        case _:
            results, gradients = _ask_numpy(backend, question, arrays, options, memory)
    named = dict(zip(("out", "lse"), results, strict=False))
    return named | {f"d{name}": gradient for name, gradient in gradients.items()}


def _check_accepted(backend: str, arrays: Named, options: Named) -> None:
    """Raises `Refused` where the backend gives reasons, and what it raises instead of giving them."""
    problem = Call.of(**arrays, **options).problem
    instance = heedful.backends()[backend]
    canonical = problem.compiled if framework(backend) == "jax" else problem
    own = instance.reasons(
        canonical
    )  # asked here, where what goes wrong in it is the backend's fault
    if isinstance(own, str) or not all(isinstance(reason, str) for reason in own):
        raise TypeError(f"reasons must be a list of strings, and are of {type(own).__name__}")
    if reasons := dispatch.reasons(instance, problem):
        raise Refused(reasons)


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _ask_jax(
    backend: str, arrays: Named, options: Named, cotangents: list[np.ndarray]
) -> tuple[list[np.ndarray], Tensors]:
    array_options = {n: jnp.asarray(x) for n, x in options.items() if isinstance(x, np.ndarray)}
    rest = tuple((n, x) for n, x in options.items() if n not in array_options)
    arrays = {n: jnp.asarray(x) for n, x in arrays.items()}
    _check_accepted(backend, arrays, options | array_options)
    results, gradients = _compiled(backend, _Itself(heedful.backends()[backend]), rest)(
        arrays, array_options, [jnp.asarray(c) for c in cotangents]
    )
    return [np.asarray(x) for x in results], {n: np.asarray(x) for n, x in gradients.items()}


def ask_second(
    backend: str, question: Question, with_lse: bool, direction: Tensors
) -> Tensors | None:
    """The second derivatives along a direction: d2q, d2k, d2v and d2bias, as called.

    Args:
        backend: its name.
        question: what is asked, with poison where nobody looks.
        with_lse: whether LSE is asked for and differentiated.
        direction: of q, k and v, in canonical form, and of bias as called.

    Returns:
        NumPy arrays; None where the caller is NumPy, which differentiates nothing.

    Raises:
        whatever the backend raises, where it has none too.
    """
    inputs = question.poisoned or question.inputs
    options = {**inputs.options, "return_lse": with_lse}
    arrays: Named = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    if "bias" in options:
        arrays["bias"] = options.pop("bias")
    along = {n: question.as_called(u) for n, u in direction.items() if n != "bias"}
    if "bias" in direction:
        along["bias"] = direction["bias"]
    cotangents = [question.as_called(question.out_cotangent)]
    if with_lse:
        cotangents.append(question.rows_as_called(question.lse_cotangent))
    match question.case.caller or framework(backend):
        case "jax":
            found = _second_in_jax(backend, arrays, options, cotangents, along)
        case "torch":
            found = _second_in_torch(backend, arrays, options, cotangents, along)
        case _:
            return None
    return {f"d2{n}": x for n, x in found.items()}


def _second_in_jax(
    backend: str, arrays: Named, options: Named, cotangents: list[np.ndarray], along: Tensors
) -> Tensors:
    constants = {n: jnp.asarray(x) for n, x in options.items() if isinstance(x, np.ndarray)}
    rest = {n: x for n, x in options.items() if n not in constants}

    @jax.jit
    def product(
        arrays: Named, constants: Named, cotangents: list[jax.Array], along: Named
    ) -> Named:
        def attend(arrays: Named) -> tuple[jax.Array, ...]:
            return _as_tuple(heedful.attention(**arrays, **constants, **rest, backend=backend))

        def projected(arrays: Named) -> jax.Array:
            results, pull = jax.vjp(attend, arrays)
            pairs = zip(cotangents, results, strict=True)
            (gradients,) = pull(tuple(c.astype(x.dtype) for c, x in pairs))
            wide = jnp.float64 if arrays["q"].dtype == jnp.float64 else jnp.float32
            return sum((gradients[n].astype(wide) * along[n].astype(wide)).sum() for n in gradients)

        return jax.grad(projected)(arrays)

    found = product(
        {n: jnp.asarray(x) for n, x in arrays.items()},
        constants,
        [jnp.asarray(c) for c in cotangents],
        {n: jnp.asarray(u) for n, u in along.items()},
    )
    return {n: np.asarray(x) for n, x in found.items()}


def _second_in_torch(
    backend: str, arrays: Named, options: Named, cotangents: list[np.ndarray], along: Tensors
) -> Tensors:
    options = {n: to_tensor(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    leaves: Named = {n: to_tensor(x).requires_grad_() for n, x in arrays.items()}
    results = _as_tuple(heedful.attention(**leaves, **options, backend=backend))
    first = torch.autograd.grad(
        results,
        list(leaves.values()),
        [to_tensor(c).to(x.dtype) for c, x in zip(cotangents, results, strict=True)],
        create_graph=True,
        materialize_grads=True,
    )
    pairs = zip(first, leaves, strict=True)
    wide = torch.float64 if leaves["q"].dtype == torch.float64 else torch.float32
    projected = [(g.to(wide) * to_tensor(along[n]).to(wide)).sum() for g, n in pairs]
    connected = [x for x in projected if x.requires_grad]
    if not connected:  # a gradient that is a constant: its derivative is 0
        return {n: np.zeros_like(x) for n, x in arrays.items()}
    second = torch.autograd.grad(connected, list(leaves.values()), materialize_grads=True)
    return {n: to_array(x) for n, x in zip(leaves, second, strict=True)}


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
    backend: str, arrays: Named, options: Named, cotangents: list[np.ndarray], memory: "Memory"
) -> tuple[list[np.ndarray], Tensors]:
    options = {
        n: memory.laid_out(x, to_tensor) if isinstance(x, np.ndarray) else x
        for n, x in options.items()
    }
    leaves: Named = {
        n: memory.laid_out(x, to_tensor).detach().requires_grad_() for n, x in arrays.items()
    }
    _check_accepted(backend, leaves, options)
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
    backend: str, question: Question, arrays: Named, options: Named, memory: "Memory"
) -> tuple[list[np.ndarray], Tensors]:
    """NumPy differentiates nothing: a NumPy backend's own `gradients` stand for it."""
    given, arrays = arrays, {n: memory.laid_out(x, np.copy) for n, x in arrays.items()}
    options = {
        n: memory.laid_out(x, np.copy) if isinstance(x, np.ndarray) else x
        for n, x in options.items()
    }
    _check_accepted(backend, arrays, options)
    results = _as_tuple(heedful.attention(**arrays, **options, backend=backend))
    _check_unwritten(given, arrays)
    instance = heedful.backends()[backend]
    if framework(backend) != "numpy" or not hasattr(instance, "gradients"):
        return list(results), {}
    call = Call.of(**arrays, **options)
    lse_cotangent = question.lse_cotangent * call.problem.return_lse
    found = instance.gradients(call.problem, call.operands, question.out_cotangent, lse_cotangent)
    gradients = {n: question.as_called(getattr(found, n)) for n in "qkv"}
    if found.bias is not None:
        gradients["bias"] = question.as_bias_came(found.bias).reshape(arrays["bias"].shape)
    return list(results), gradients


def _check_unwritten(given: Tensors, now: Tensors) -> None:
    for name, x in given.items():
        if x.tobytes() != now[name].tobytes():
            raise RuntimeError(f"the call wrote into {name}, which is the caller's")


# How arrays lie in memory


class Memory(NamedTuple):
    """A layout in memory.

    Attributes:
        store: from an array to the one that is made, all of whose memory is its own.
        view: from that one, of any framework, back to the numbers of the first.
    """

    store: Callable[[np.ndarray], np.ndarray]
    view: Callable[[Any], Any]

    def laid_out(self, x: np.ndarray, make: Callable[[np.ndarray], Any]) -> Any:
        """An array like x, of the framework that `make` copies NumPy's arrays to, laid out so."""
        if x.ndim < 2:
            return make(x)
        if 0 in x.strides:  # axes that were expanded stay so
            once = make(x[tuple(slice(1) if step == 0 else slice(None) for step in x.strides)])
            expand = torch.broadcast_to if isinstance(once, torch.Tensor) else np.broadcast_to
            return expand(once, x.shape)
        return self.view(make(self.store(x)))


def _cut_from(x: np.ndarray) -> np.ndarray:
    """x as the end of a larger array, whose rest is NaN, or True."""
    shape = (*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5)
    larger = np.full(shape, True if x.dtype.kind in "biu" else np.nan, x.dtype)
    larger[..., 3:, 5:] = x
    return larger


MEMORY = {
    "packed": Memory(lambda x: x, lambda x: x),
    # heads and positions, or the two last axes, in the other order
    "transposed": Memory(
        lambda x: x.swapaxes(0, -2) if x.ndim < 3 else x.swapaxes(-3, -2),
        lambda x: x.swapaxes(0, -2) if x.ndim < 3 else x.swapaxes(-3, -2),
    ),
    "columns": Memory(lambda x: x.swapaxes(-2, -1), lambda x: x.swapaxes(-2, -1)),
    "strided": Memory(lambda x: np.repeat(x, 2, axis=-1), lambda x: x[..., ::2]),
    "sliced": Memory(_cut_from, lambda x: x[..., 3:, 5:]),
    "expanded": Memory(lambda x: x, lambda x: x),
}


# NumPy to torch and back: torch knows no NumPy bfloat16, so its bits travel as integers.


def to_tensor(x: np.ndarray) -> torch.Tensor:
    """A copy, on the GPU where torch has one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bits = x.view(np.uint16) if x.dtype.name == "bfloat16" else x
    # A copy, so that nobody writes into an array that others are asked with; and one by torch, whose
    # memory is aligned as JAX wants it.
    tensor = torch.from_numpy(np.array(bits, order="C")).clone()
    return (tensor.view(torch.bfloat16) if bits is not x else tensor).to(device)


def to_array(x: torch.Tensor) -> np.ndarray:
    """Its numbers, without its graph."""
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy().view("bfloat16")
    return x.numpy()
