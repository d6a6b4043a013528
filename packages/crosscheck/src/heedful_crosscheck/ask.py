"""Puts a question to a backend the way a user would, from the framework whose arrays call."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np

from heedful import Problem, dispatch
from heedful.call import Call
from heedful.call.options import DIFFERENTIABLE
from heedful.dispatch.registry import backend_named
from heedful_crosscheck.callers import Attend, Named, caller_of
from heedful_crosscheck.cases import Inputs
from heedful_crosscheck.layouts import LAYOUTS
from heedful_crosscheck.question import Question
from heedful_crosscheck.yardstick import Tensors


class Refused(Exception):
    """A backend gave reasons why it cannot answer; whatever comes later is no refusal.

    Attributes:
        reasons: all of them.
    """

    def __init__(self, reasons: tuple[str, ...]):
        super().__init__("; ".join(reasons))
        self.reasons = reasons


def float64_where_asked(dtype: str) -> AbstractContextManager[object]:
    """JAX has float64 only while x64 is on, which each thread switches for itself."""
    return jax.enable_x64(True) if dtype == "float64" else nullcontext()


def framework(backend: str) -> str:
    """A backend's framework: "numpy", "jax" or "torch"."""
    return backend.partition(":")[0]


def about(backend: str, question: Question) -> tuple[str, str | None]:
    """What computes the answer, in the backend's words, and why it has no gradients, if it has none."""
    instance = backend_named(backend)
    if not (hasattr(instance, "kernel") or hasattr(instance, "forward_only")):
        return "", None
    problem = Asked(backend, question, question.inputs, with_lse=False).problem
    kernel = str(instance.kernel(problem)) if hasattr(instance, "kernel") else ""
    return kernel, dispatch.why_forward_only(instance, problem)


def why_left_out(backend: str, problem: Problem) -> str | None:
    """Why a backend is not asked, though it would answer, some day."""
    largest = getattr(backend_named(backend), "largest", None)
    if largest is None or problem.score_count <= largest:
        return None
    return f"left out: this kernel is too slow for more than {largest} scores in a crosscheck"


def check_accepted(backend: str, question: Question) -> None:
    """Nothing is computed.

    Raises:
        Refused: the backend cannot, not even without LSE.
    """
    _check_accepted(Asked(backend, question, question.inputs, with_lse=False))


def ask(
    backend: str,
    question: Question,
    inputs: Inputs,
    with_lse: bool,
) -> Tensors:
    """out, lse where it is asked for, and the gradients, dq and so on, where the caller differentiates.

    Args:
        backend: its name.
        question: what is asked.
        inputs: the question's inputs, or its poisoned ones.
        with_lse: whether LSE is asked for and differentiated.

    Returns:
        NumPy arrays in the rank and layout of the call.

    Raises:
        Refused: the backend cannot; and whatever it raises while it tries.
    """
    asked = Asked(backend, question, inputs, with_lse)
    _check_accepted(asked)
    found: Named | None
    if dispatch.why_forward_only(asked.attend.instance.backend, asked.problem):
        results, found = asked.attend(asked.primals, asked.constants), None
    else:
        results, found = asked.caller.pull_back(
            asked.attend, asked.primals, asked.constants, asked.cotangents()
        )
    answer = dict(zip(("out", "lse"), map(asked.caller.to_numpy, results), strict=False))
    if found is not None:
        answer |= {f"d{n}": asked.caller.to_numpy(x) for n, x in found.items()}
    elif framework(backend) == "numpy" and hasattr(asked.attend.instance.backend, "gradients"):
        answer |= _own_gradients(asked)
    asked.check_unwritten()
    return answer


def ask_second(
    backend: str, question: Question, inputs: Inputs, with_lse: bool, direction: Tensors
) -> Tensors | None:
    """The second derivatives along a direction: d2q and so on, as called.

    Args:
        backend: its name.
        question: what is asked.
        inputs: the question's inputs, or its poisoned ones.
        with_lse: whether LSE is asked for and differentiated.
        direction: of q, k and v, in canonical form, and of options as called.

    Returns:
        NumPy arrays; None where the caller is NumPy, which differentiates nothing.

    Raises:
        whatever the backend raises, where it has none too.
    """
    asked = Asked(backend, question, inputs, with_lse)
    along = {
        n: asked.array(question.as_called(u) if n in "qkv" else u) for n, u in direction.items()
    }
    found = asked.caller.pull_back_twice(
        asked.attend, asked.primals, asked.constants, asked.cotangents(), along
    )
    if found is None:
        return None
    return {f"d2{n}": asked.caller.to_numpy(x) for n, x in found.items()}


class Asked:
    """A question's arrays in the caller's framework.

    Attributes:
        backend: its name.
        caller: whose arrays they are.
        primals, constants: the arrays that are differentiated, and the others.
        options: those that are no arrays.
    """

    def __init__(self, backend: str, question: Question, inputs: Inputs, with_lse: bool):
        self.backend, self.question, self.with_lse = backend, question, with_lse
        try:
            self.caller = question.caller or caller_of(question.calls_from or framework(backend))
        except LookupError as missing:
            raise Refused((str(missing),)) from missing
        self.given = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.arrays}
        arrays = {name: self.array(x) for name, x in self.given.items()}
        self.primals: Named = {n: x for n, x in arrays.items() if n in DIFFERENTIABLE}
        self.constants: Named = {n: x for n, x in arrays.items() if n not in DIFFERENTIABLE}
        options = {n: x for n, x in inputs.options.items() if n not in arrays}
        self.options = options | {"return_lse": with_lse}
        self.attend = Attend.by(backend, self.options)

    @property
    def problem(self) -> Problem:
        """What is asked."""
        return Call.of(**self.primals, **self.constants, **self.options).problem

    def array(self, x: np.ndarray) -> Any:
        return self.caller.array(x, LAYOUTS[self.question.case.memory])

    def cotangents(self) -> list[Any]:
        """Of out, and of lse where it is asked for, in its rank and layout."""
        question = self.question
        of_lse = question.rows_as_called(question.lse_cotangent)
        both = question.as_called(question.out_cotangent), of_lse
        return [self.caller.array(x, LAYOUTS["packed"]) for x in both[: 1 + self.with_lse]]

    def check_unwritten(self) -> None:
        if self.caller.framework == "jax":  # whose arrays are immutable
            return
        for name, x in (self.primals | self.constants).items():
            if self.caller.to_numpy(x).tobytes() != self.given[name].tobytes():
                raise RuntimeError(f"the call wrote into {name}, which is the caller's")


def _check_accepted(asked: Asked) -> None:
    """Raises `Refused` where the backend gives reasons, and what it raises instead of giving them."""
    problem = asked.problem
    instance = asked.attend.instance.backend
    canonical = problem.compiled if framework(asked.attend.backend) == "jax" else problem
    # Asked here, where what goes wrong in it is the backend's fault.
    own = instance.reasons(canonical)
    if isinstance(own, str) or not all(isinstance(reason, str) for reason in own):
        raise TypeError(f"reasons must be a list of strings, and are of {type(own).__name__}")
    if reasons := dispatch.reasons(instance, problem):
        raise Refused(reasons)
    if reason := why_left_out(asked.attend.backend, problem):
        raise Refused((reason,))


def _own_gradients(asked: Asked) -> Tensors:
    """NumPy differentiates nothing: a NumPy backend's own `gradients` stand for it."""
    question = asked.question
    call = Call.of(**asked.primals, **asked.constants, **asked.options)
    of_lse = question.lse_cotangent * asked.with_lse
    found = asked.attend.instance.backend.gradients(
        call.problem, call.operands, question.out_cotangent, of_lse
    )
    gradients = {n: getattr(found, n) for n in asked.primals}
    return {f"d{n}": question.gradient_as_called(n, x) for n, x in gradients.items()}
