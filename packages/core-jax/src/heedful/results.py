"""What a backend gives back, checked where it is called, whoever's arrays the caller has.

A wrong answer of the right form is the crosscheck's business. Of the wrong form it would be unpacked,
broadcast or cast on its way out, and reach the caller as somebody else's error, or as none.
"""

from typing import Any

import numpy as np

from heedful.call.arrays import Array, dtype_of, framework_of, place_of, shape_of
from heedful.call.operands import Operands
from heedful.call.problem import Problem


class WrongResult(TypeError):
    """A backend returned something else than its protocol says.

    Attributes:
        backend: its name.
        tensor: "out", "lse", or "dq" and so on, of an operand; None where it is about all of them.
    """

    def __init__(self, message: str, backend: str, tensor: str | None = None):
        super().__init__(message, backend, tensor)
        self.backend, self.tensor = backend, tensor

    def __str__(self) -> str:
        return str(self.args[0])


def checked_run(backend: Any, problem: Problem, operands: Operands) -> tuple[Array, Array | None]:
    """`backend.run`: out, and lse where the problem asks for it.

    Raises:
        WrongResult: it returned something else.
    """
    operands = _read_only(operands)
    answer = backend.run(problem, operands)
    out, lse = _items(answer, f"{backend.name}.run", ("out", "lse"), backend.name)
    queries = (problem.batch, problem.q_heads, problem.q_length)
    _check(backend, "out", out, (*queries, problem.value_dim), problem.dtype, operands.q)
    out = _apart(out, operands)
    if not problem.return_lse:
        return out, None
    if lse is None:
        raise WrongResult(
            f"{backend.name} returned no lse, which the problem asks for. "
            "A backend without one must say so in its reasons.",
            backend.name,
            "lse",
        )
    _check(backend, "lse", lse, queries, problem.accumulator, operands.q)
    return out, _apart(lse, operands)


def checked_gradients(
    backend: Any, problem: Problem, operands: Operands, out_cotangent: Array, lse_cotangent: Array
) -> Operands:
    """`backend.gradients` of a NumPy backend: of each differentiable operand that there is.

    Raises:
        WrongResult: it returned something else.
    """
    operands = _read_only(operands)
    cotangents = map(_read_only_array, (out_cotangent, lse_cotangent))
    found = backend.gradients(problem, operands, *cotangents)
    wanted = operands.differentiable
    if not isinstance(found, Operands):
        raise WrongResult(
            f"{backend.name}.gradients must return heedful.Operands: the gradients of "
            f"{', '.join(wanted)}. Got {type(found).__name__}.",
            backend.name,
        )
    for name, x in wanted.items():
        gradient = getattr(found, name)
        _check(backend, f"d{name}", gradient, shape_of(x), dtype_of(x), operands.q)
    return Operands(**{name: getattr(found, name) for name in wanted})


# NumPy's arrays are views of the caller's memory, JAX's and torch's too: nobody may write there.


def _read_only(operands: Operands) -> Operands:
    return Operands(*map(_read_only_array, operands))


def _read_only_array(x: Array | None) -> Array | None:
    if not isinstance(x, np.ndarray):
        return x
    x = x.view()
    x.flags.writeable = False
    return x


def _apart(result: Array, operands: Operands) -> Array:
    """A result in memory of its own: a caller may write into it."""
    if isinstance(result, np.ndarray) and any(
        isinstance(x, np.ndarray) and np.may_share_memory(result, x) for x in operands
    ):
        return result.copy()
    return result


def _items(answer: Any, function: str, names: tuple[str, ...], backend: str) -> tuple[Any, ...]:
    if not isinstance(answer, tuple) or len(answer) != len(names):
        got = type(answer).__name__
        if isinstance(answer, tuple | list):
            got = f"a {got} of {len(answer)}"
        raise WrongResult(
            f"{function} must return a tuple of {len(names)}: {', '.join(names)}. Got {got}.",
            backend,
        )
    return answer


def _check(
    backend: Any, tensor: str, x: Any, shape: tuple[Any, ...], dtype: str, beside: Array
) -> None:
    framework = backend.name.partition(":")[0]
    kind = framework_of(x)
    if kind != framework:
        got = type(x).__name__ if kind is None else f"an array of {kind}"
    elif (dtype_of(x), shape_of(x)) != (dtype, tuple(shape)):
        got = f"{dtype_of(x)} {shape_of(x)}"
    elif (place := place_of(x)) != (there := place_of(beside)) and None not in (place, there):
        got = f"one on {place}, and q lies on {there}"
    else:
        return
    raise WrongResult(
        f"{backend.name} returned the wrong {tensor}: expected {dtype} {tuple(shape)} of {framework}, "
        f"where q lies. Got {got}.",
        backend.name,
        tensor,
    )
