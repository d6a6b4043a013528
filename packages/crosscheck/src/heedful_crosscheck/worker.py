"""The process in which a backend is asked; `isolation` starts it, by `python -m`, and asks.

Whatever a backend does here, the one who asks sees an answer, or the end of this process.
"""

import contextlib
import faulthandler
import pickle
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from heedful.dispatch.registry import in_a_line
from heedful_crosscheck import combinations, wire
from heedful_crosscheck.ask import Refused
from heedful_crosscheck.cases import Case
from heedful_crosscheck.in_process import InProcess
from heedful_crosscheck.origin import Origin, OriginError
from heedful_crosscheck.question import Question
from heedful_crosscheck.respondent import Here, Raised
from heedful_crosscheck.run import COPIED
from heedful_crosscheck.settings import Settings
from heedful_crosscheck.yardstick import Tensors

Words = dict[str, Any]
NOTHING: Tensors = {}


class Serving:
    """What can be asked of a worker, by the names of the methods; each answers words and arrays."""

    def load(self, origin: Origin) -> tuple[Words, Tensors]:
        """Which backends there are, and what the function is."""
        self.judged = InProcess(origin)
        return {"names": self.judged.names, "function": self.judged.function}, NOTHING

    def fitted(self, cases: Sequence[Case], dtypes: Sequence[str] | None) -> tuple[Words, Tensors]:
        """Which cases the function is asked: by name, and where they are of the table the row."""
        found = self.judged.fitted(cases, dtypes)
        rows = [None if c.row is None else combinations.written(c.row) for c in found]
        return {"cases": [[c.name, row] for c, row in zip(found, rows, strict=True)]}, NOTHING

    def memory(
        self, cases: Sequence[Case], backends: Sequence[str], dtypes: Sequence[str], jobs: int
    ) -> tuple[Words, Tensors]:
        """What each case takes, in words."""
        return {"memory": self.judged.memory(cases, backends, dtypes, jobs)}, NOTHING

    def environment(self) -> tuple[Words, Tensors]:
        return {"environment": self.judged.environment}, NOTHING

    def start(self, name: str) -> tuple[Words, Tensors]:
        """Why the backend wants to be named, if it does."""
        self.here = Here(name, Settings.now())
        return {"unasked": self.here.why_unasked()}, NOTHING

    def check_accepted(self, question: Question) -> tuple[Words, Tensors]:
        self.here.check_accepted(question)
        return {}, NOTHING

    def about(self, question: Question) -> tuple[Words, Tensors]:
        about = self.here.about(question)
        return {"about": [about.kernel, about.forward_only, about.deterministic]}, NOTHING

    def answer(self, question: Question, with_lse: bool, most: int) -> tuple[Words, Tensors]:
        return {}, _at_most(most, self.here.answer(question, question.inputs, with_lse))

    def second(
        self, question: Question, with_lse: bool, direction: Tensors, most: int
    ) -> tuple[Words, Tensors]:
        found = self.here.second(question, question.inputs, with_lse, direction)
        return {}, _at_most(most, found)


def _at_most(most: int, tensors: Tensors) -> Tensors:
    size = sum(x.nbytes for x in tensors.values())
    if size > most:
        raise Raised(f"answered with {size} bytes, of {most} at most")
    return tensors


def answered(method: Callable[..., tuple[Words, Tensors]], asked: Sequence[Any]) -> bytes:
    """The answer, as it is sent; a backend that exits ends this process."""
    tensors = NOTHING
    try:
        words, tensors = method(*asked)
    except Refused as refusal:
        words = {"refused": list(refusal.reasons)}
    except Raised as raised:
        if isinstance(raised.__cause__, SystemExit):
            raise raised.__cause__ from None
        words = {"raised": str(raised), "tensor": raised.tensor}
    except OriginError as error:
        words = {"not_to_be_had": str(error)}
    except SystemExit:
        raise
    except BaseException as error:  # whatever else comes of a backend
        words = {"raised": in_a_line(error), "tensor": None}
    return wire.answer(words, tensors)


def serve(connection: socket.socket) -> None:
    """Answers until the one who asks is gone."""
    serving = Serving()
    with connection, connection.makefile("rb") as requests:
        while header := requests.read(wire.REQUEST.size):
            (length,) = wire.REQUEST.unpack(header)
            name, *asked = pickle.loads(requests.read(length))
            connection.sendall(answered(getattr(serving, name), asked))


def main() -> None:
    """Serves over the socket whose number is the one argument."""
    faulthandler.enable()
    _die_with_parent()
    warnings.filterwarnings("ignore", COPIED, UserWarning)
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # has no types

    # As in the process that asks: of NumPy's small products threads would wait for each other.
    with threadpool_limits(1, user_api="blas"):
        serve(socket.socket(fileno=int(sys.argv[1])))


def _die_with_parent() -> None:
    """Where it can be told: a killed run leaves nobody who hangs; out of memory this one goes first."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        import ctypes
        import signal

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")


if __name__ == "__main__":
    main()
