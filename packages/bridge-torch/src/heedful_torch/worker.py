"""Functions called in a Python process of their own: what must not run in the user's.

A library may have to be patched before it runs here, and may crash; neither is the user's to bear. A
module that ends in `serve(load)` is run by `python -m`, and `Worker(module).call("name", …)` calls its
functions there. Arguments and results are pickled: CPU tensors are copied both ways.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, Literal, Self

import jax
from torch import Tensor

from heedful.dispatch.registry import in_a_line

PROTOCOL = pickle.HIGHEST_PROTOCOL


class WorkerError(RuntimeError):
    """A function of the worker could not be called, or raised; the message is one line."""


class Worker:
    """A process, started at the first call, and again where it was lost or this process was forked.

    Attributes:
        module: what it runs.
    """

    def __init__(self, module: str):
        self.module = module
        self._lock = threading.Lock()
        self._served: _Served | None = None

    def start(self) -> None:
        """Starts the process where it does not run yet.

        Raises:
            WorkerError: it did not start.
        """
        with self._lock:
            self._running()

    def call(self, function: str, *arguments: Any) -> Any:
        """The function's result.

        Raises:
            WorkerError: the process did not start, the function raised, or the process ended on it.
        """
        with self._lock:
            return self._asked(self._running(), function, jax.tree.map(_detached, arguments))

    def stop(self) -> None:
        """Ends the process; a later call starts another. It ends by itself when this one does."""
        with self._lock:
            self._end()

    def _running(self) -> "_Served":
        if self._served is not None and self._served.owner == os.getpid():
            return self._served
        self._served = started = _Served.start(self.module)
        weakref.finalize(self, started.end)
        self._asked(started, "its start")
        return started

    def _asked(self, served: "_Served", function: str, arguments: Any = None) -> Any:
        try:
            if arguments is not None:
                served.connection.send_bytes(pickle.dumps((function, arguments), PROTOCOL))
            kind, answer = pickle.loads(served.connection.recv_bytes())
        except (EOFError, OSError) as error:
            how = self._end()
            raise WorkerError(f"the process of {self.module} {how} during {function}") from error
        except BaseException:  # an interrupt: the answer is still to come, for nobody
            self._end()
            raise
        if kind == "failed":
            self._end()
        if kind != "result":
            raise WorkerError(answer)
        return answer

    def _end(self) -> str:
        served, self._served = self._served, None
        return "" if served is None else served.end()


@dataclass(eq=False)
class _Served:
    """A process that runs, by whom it was started, and what it prints."""

    owner: int
    process: subprocess.Popen[bytes]
    connection: Connection
    said: IO[bytes]

    @classmethod
    def start(cls, module: str) -> Self:
        ours, theirs = Pipe()
        said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        path = [entry or os.getcwd() for entry in sys.path]  # what is found here is found there
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(theirs.fileno())],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,  # an interrupt is for the one who waits
        )
        theirs.close()
        return cls(os.getpid(), process, ours, said)

    def end(self) -> str:
        """Ends it, and says how it ended; nothing where that was done, or is another process's."""
        if self.said.closed or self.owner != os.getpid():
            return ""
        self.connection.close()
        try:
            code = self.process.wait(timeout=1)  # it ends by itself, or has, and says how
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.said.seek(0)
        last = self.said.read().decode(errors="replace").strip().splitlines()[-1:]
        self.said.close()
        how = f"was ended by signal {-code}" if code < 0 else f"exited with {code}"
        return f"{how} ({last[0]})" if last else how


def _detached(x: Any) -> Any:
    """Without what autograd knows of a tensor, which does not travel."""
    return x.detach() if isinstance(x, Tensor) else x


def serve(load: Callable[[], Mapping[str, Callable[..., Any]]]) -> None:
    """Answers the `Worker` that started this process, until it is gone; "pid" beside the functions.

    Args:
        load: imports and patches what has to be, and gives the functions by name.
    """
    connection = Connection(int(sys.argv[1]))

    def send(kind: Literal["result", "error", "failed"], answer: Any) -> None:
        connection.send_bytes(pickle.dumps((kind, answer), PROTOCOL))

    try:
        functions = {"pid": os.getpid, **load()}
    except BaseException as error:  # a package may even exit when it is imported
        send("failed", in_a_line(error))
        return
    send("result", None)
    while True:
        try:
            name, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = functions[name](*arguments)
        except Exception as error:  # whatever it raises is the answer
            send("error", in_a_line(error))
        else:
            send("result", answer)
