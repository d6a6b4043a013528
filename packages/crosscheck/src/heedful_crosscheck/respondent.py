"""Who is asked: a backend, in this process here, or in one of its own (`isolation`)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock, current_thread, main_thread
from typing import Protocol

from heedful.dispatch.registry import backend_named, in_a_line
from heedful.results import WrongResult
from heedful_crosscheck.ask import (
    Refused,
    about,
    ask,
    ask_second,
    check_accepted,
    float64_where_asked,
    framework,
)
from heedful_crosscheck.cases import Inputs
from heedful_crosscheck.question import Question
from heedful_crosscheck.second import is_refusal
from heedful_crosscheck.settings import Settings
from heedful_crosscheck.yardstick import Tensors

# torch chooses its SDPA kernel for the whole process, so what calls torch there runs one at a time.
_one_at_a_time = Lock()


class Raised(Exception):
    """A backend raised; `str` of it is what, in a line.

    Attributes:
        tensor: the one that was no result, where that is what was raised.
    """

    def __init__(self, said: str, tensor: str | None = None):
        super().__init__(said)
        self.tensor = tensor


class Crashed(Exception):
    """The process of a backend came to an end, or to its limits; `str` of it says how.

    Attributes:
        output: what it printed last.
    """

    def __init__(self, how: str, output: str = ""):
        super().__init__(how)
        self.output = output


class Stopped(Exception):
    """The run is ended from outside, and nobody waits for the answer."""


@dataclass(frozen=True)
class About:
    """What a backend says of a question that it answers.

    Attributes:
        kernel: what computes, in its words, where there is more to say than its name.
        forward_only: why it has no gradients; None where it has.
        deterministic: whether it claims that a repeated run is bitwise equal.
    """

    kernel: str
    forward_only: str | None
    deterministic: bool


class Respondent(Protocol):
    """A backend that is asked; whatever it does, the one who asks gets an answer or an error of these.

    All that ask raise `Refused`, `Raised`, `Crashed` or `Stopped`.
    """

    @property
    def name(self) -> str:
        """The backend's."""
        ...

    def start(self, question: Question) -> None:
        """Gets ready, so that the first answer takes no longer than others; it may refuse already."""
        ...

    def why_unasked(self) -> str | None:
        """Why it is asked only where it is named; None where it is not so."""
        ...

    def answer(self, question: Question, inputs: Inputs, with_lse: bool) -> Tensors:
        """out, lse and the gradients, as of `ask.ask`."""
        ...

    def second(
        self, question: Question, inputs: Inputs, with_lse: bool, direction: Tensors
    ) -> Tensors:
        """The second derivatives along a direction, as of `ask.ask_second`; `Refused`: it has none."""
        ...

    def about(self, question: Question) -> About:
        """What it says of a question."""
        ...

    def stop(self) -> None:
        """Ends what it computes, where that can be done."""
        ...


@dataclass(frozen=True)
class Here:
    """A backend in this process.

    Attributes:
        settings: what is set again after each answer; None: nothing is.
    """

    name: str
    settings: Settings | None = None

    def start(self, question: Question) -> None:
        backend_named(self.name)

    def check_accepted(self, question: Question) -> None:
        """Raises `Refused`; nothing is computed."""
        with self._asked(question):
            check_accepted(self.name, question)

    def why_unasked(self) -> str | None:
        return getattr(backend_named(self.name), "unasked", None)

    def answer(self, question: Question, inputs: Inputs, with_lse: bool) -> Tensors:
        with self._asked(question):
            return ask(self.name, question, inputs, with_lse)

    def second(
        self, question: Question, inputs: Inputs, with_lse: bool, direction: Tensors
    ) -> Tensors:
        with self._asked(question):
            try:
                found = ask_second(self.name, question, inputs, with_lse, direction)
            except Exception as error:  # which kind says "there is none" differs by framework
                if is_refusal(error):
                    why = "its gradient cannot be differentiated again"
                    raise Refused((why,)) from error
                raise
            if found is None:
                raise Refused(("NumPy differentiates nothing",))
            return found

    def about(self, question: Question) -> About:
        with self._asked(question):
            kernel, why_no_gradients = about(self.name, question)
            backend = backend_named(self.name)
            claims = bool(getattr(backend, "deterministic", False))
            return About(kernel, why_no_gradients, claims)

    def stop(self) -> None:
        pass

    @contextmanager
    def _asked(self, question: Question) -> Iterator[None]:
        beside_others = framework(self.name) == "jax" and question.calls_from in (None, "jax")
        kept = nullcontext() if self.settings is None else self.settings.kept()
        try:
            with (
                nullcontext() if beside_others else _one_at_a_time,
                kept,
                float64_where_asked(question.dtype),
            ):
                yield
        except Refused:
            raise
        except BaseException as error:  # whatever a backend raises
            ends = not isinstance(error, Exception | SystemExit)
            # An interrupt, which other threads never see.
            if ends and current_thread() is main_thread():
                raise
            tensor = error.tensor if isinstance(error, WrongResult) else None
            raise Raised(in_a_line(error), tensor) from error
