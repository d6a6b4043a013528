"""What computes, what carries, what refuses: the protocols of whoever wants to be dispatched to."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem


@runtime_checkable
class Backend(Protocol):
    """One way to compute attention.

    It is closed by default: whatever of `problem.features` it does not name in `takes`, a collection of
    them, the dispatcher refuses for it, an option that is added after it was written too. `reasons` adds
    what is finer. Where there is more to say than that a feature is not taken, `lacks`, an optional
    mapping, says it by the feature's name.

    Seven more attributes are optional.

    - `automatic`: its rank in the automatic choice within its framework, lower first. Without it, the
      backend is taken by name alone.
    - `deterministic`: True where it claims that a repeated run is bitwise equal, which the crosscheck
      then holds it to.
    - `score_bytes(problem)`: how many bytes of scores, masks and the like, anything that grows with
      Sq · Sk, the forward pass builds beside its operands and results; the automatic choice weighs it.
      Without it, or where it is 0, the backend's memory is linear.
    - `kernel(problem)`: in words, what computes a problem that is accepted, for explanations and
      reports: a package, its version, which of its kernels.
    - `forward_only(problem)`: why a problem that it accepts cannot be differentiated, or None; to
      differentiate it then raises, in the framework's own way.
    - `largest`: how many scores, B · Hq · Sq · Sk, a call may have for the crosscheck to ask for it,
      where a kernel is too slow for more.
    - `unasked`: why the crosscheck asks it only where it is named.

    Attributes:
        name: "framework:kernel", for example "jax:flash"; the framework is that of the arrays which
            `run` takes and returns.
    """

    name: str

    def reasons(self, problem: Problem) -> Sequence[str]:
        """All but features that keeps this backend from the problem; empty where nothing does."""
        ...

    def run(self, problem: Problem, operands: Operands) -> tuple[Array, Array | None]:
        """Computes the problem on arrays of the backend's own framework.

        Returns:
            out (B, Hq, Sq, Dv) in the problem's dtype, and lse (B, Hq, Sq) in its accumulator dtype,
            which may be None where `problem.return_lse` is False. Both must be differentiable in the
            framework's own way; a NumPy backend has none, and offers `gradients` instead.
        """
        ...


@runtime_checkable
class Gradients(Protocol):
    """What a NumPy backend offers beside `run`, for frameworks that differentiate through it."""

    def gradients(
        self, problem: Problem, operands: Operands, out_cotangent: Array, lse_cotangent: Array
    ) -> Operands:
        """The gradients of `operands.differentiable`, by name, of their shapes and dtypes."""
        ...


class Bridge(Protocol):
    """Carries a call between the caller's framework and a backend of another."""

    def reasons(self, problem: Problem, framework: str) -> Sequence[str]:
        """Everything that keeps arrays of the problem from crossing to `framework` and back."""
        ...

    def run(
        self, backend: Backend, problem: Problem, operands: Operands
    ) -> tuple[Array, Array | None]:
        """Runs the backend on the caller's arrays; the result is differentiable where they are."""
        ...


class Refusal(ValueError):
    """No backend that was asked for can compute the problem.

    Attributes:
        reasons: the name of each backend that was asked, and everything that keeps it from running.
    """

    def __init__(self, message: str, reasons: Mapping[str, Sequence[str]]):
        self.reasons = dict(reasons)
        super().__init__(message, self.reasons)  # both, for pickle makes it of these again

    def __str__(self) -> str:
        return str(self.args[0])
