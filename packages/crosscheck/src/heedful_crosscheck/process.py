"""A worker's process: how it is started, what it is asked, which limits it has, and how it ended."""

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # has no types

from heedful_crosscheck import wire
from heedful_crosscheck.respondent import Crashed
from heedful_crosscheck.yardstick import Tensors

GIB = 2**30
SECONDS = 300.0  # for an answer, and for all that is imported
LOOK = 0.05  # seconds between two looks at a worker's memory; at that of what it started, 1
KEPT = 2**16  # bytes of what a worker printed last
SHOWN = 2000  # characters of them in an outcome

# On a GPU JAX takes three quarters of the memory at once, and leaves none to the next worker.
SHARED_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

# What faulthandler writes where a process ends by a signal: what was printed before, and where it was.
FATAL = re.compile(r"^Fatal Python error: ", re.MULTILINE)
PLACE = re.compile(r'^Current thread.*\n  File "(.*)", line (\d+) in (.+)$', re.MULTILINE)


@dataclass(frozen=True)
class Limits:
    """How much a worker may take for one answer.

    Attributes:
        seconds: of time.
        memory: bytes it holds, with what it started itself.
    """

    seconds: float = SECONDS
    memory: int = field(default_factory=lambda: memory_here() // 2)

    @property
    def of_start(self) -> "Limits":
        """Those until it can be asked."""
        return replace(self, seconds=max(self.seconds, SECONDS))


def memory_here() -> int:
    """Bytes of memory that this process may have: the machine's, or its control group's limit."""
    found = psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # "max", or no such file
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


class Process:
    """A worker's process: what it is asked, and how it ends."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.printed, printing = os.pipe()
        path = [entry or os.getcwd() for entry in sys.path]  # what is found here is found there
        self.popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "heedful_crosscheck.worker", str(theirs.fileno())],
            env=SHARED_GPU | os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=printing,
            stderr=printing,
            start_new_session=True,  # an interrupt is for the one who waits
        )
        theirs.close()
        os.close(printing)
        ours.setblocking(False)
        os.set_blocking(self.printed, False)
        self.socket = ours
        self.watched = psutil.Process(self.popen.pid)
        self.output = b""
        self.events = selectors.DefaultSelector()
        self.events.register(self.printed, selectors.EVENT_READ)
        self.events.register(self.socket, selectors.EVENT_READ)

    def ask(self, *request: Any, limits: Limits, most: int = 0) -> tuple[dict[str, Any], Tensors]:
        """The words and the arrays of its answer.

        Raises:
            Crashed: it came to an end, or to its limits, or what it sent is no answer.
        """
        watch = _Watch(self, limits)
        try:
            self._send(wire.request(*request), watch)
            words, arrays = wire.sizes(bytes(self._receive(wire.ANSWER.size, watch)), most)
            return wire.read(
                bytes(self._receive(words, watch)), bytes(self._receive(arrays, watch))
            )
        except wire.Garbled as garbled:
            raise self._crash(f"what it sent is no answer: it {garbled}", signal.SIGKILL) from None
        except _Exceeded as exceeded:
            raise self._crash(str(exceeded), signal.SIGABRT) from None
        except (EOFError, OSError):
            raise self._crash("", None) from None

    def memory(self) -> int:
        """Bytes that it holds itself."""
        with suppress(psutil.Error):
            return int(self.watched.memory_info().rss)
        return 0

    def memory_of_all(self) -> int:
        """Bytes that it holds, and what it started."""
        found = self.memory()
        with suppress(psutil.Error):
            for child in self.watched.children(recursive=True):
                with suppress(psutil.Error):
                    found += child.memory_info().rss
        return found

    def kill(self) -> None:
        """Ends it at once, with what it started in its own session."""
        if self.popen.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)

    def end(self) -> None:
        """Ends it, and lets go of all that is held for it."""
        if self.socket.fileno() < 0:
            return
        self.kill()
        self.popen.wait()
        self.events.close()
        self.socket.close()
        os.close(self.printed)

    def _send(self, data: bytes, watch: "_Watch") -> None:
        view = memoryview(data)
        self.events.modify(self.socket, selectors.EVENT_WRITE)
        try:
            while view:
                if self._is_ready(watch):
                    view = view[self.socket.send(view) :]
        finally:
            self.events.modify(self.socket, selectors.EVENT_READ)

    def _receive(self, size: int, watch: "_Watch") -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            if self._is_ready(watch):
                count = self.socket.recv_into(view)
                if not count:
                    raise EOFError
                view = view[count:]
        return data

    def _is_ready(self, watch: "_Watch") -> bool:
        """Whether the socket is, within a moment; what was printed is taken, and the limits are held."""
        ready = {key.fileobj for key, _ in self.events.select(LOOK)}
        if self.printed in ready:
            self._take_output()
        watch.look()
        return self.socket in ready

    def _take_output(self) -> None:
        with suppress(BlockingIOError):
            some = os.read(self.printed, KEPT)
            self.output = (self.output + some)[-KEPT:]
            if not some:  # closed there
                self.events.unregister(self.printed)

    def _crash(self, how: str, by: signal.Signals | None) -> Crashed:
        """Ends it where it has not ended, and says how and where that was."""
        if by is not None and self.popen.poll() is None:
            self.popen.send_signal(by)  # by SIGABRT it says where it is
        try:
            code = self.popen.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()
            code, how = self.popen.wait(), how or "closed its connection, and went on"
        self.kill()
        while len(self.output) <= KEPT and self.printed in self.events.get_map():
            before = self.output
            self._take_output()
            if self.output == before:
                break
        text = self.output.decode(errors="replace")
        printed, *trace = FATAL.split(text, maxsplit=1)
        place = PLACE.search("".join(trace))
        where = f", in {place[3]} ({Path(place[1]).name}:{place[2]})" if place else ""
        last = printed.strip().splitlines()[-1:]
        said = f"; it printed last: {last[0][:200]}" if last else ""
        return Crashed(f"{how or _ended(code)}{where}{said}", text.strip()[-SHOWN:])


class _Exceeded(Exception):
    """A worker came to one of its limits; `str` of it says which."""


class _Watch:
    """The limits of one answer."""

    def __init__(self, process: Process, limits: Limits):
        self.process, self.limits = process, limits
        self.started = self.looked = self.looked_at_all = time.monotonic()

    def look(self) -> None:
        """Raises `_Exceeded` where it is time to."""
        now = time.monotonic()
        if now - self.started > self.limits.seconds:
            raise _Exceeded(f"exceeded {self.limits.seconds:g} s")
        if now - self.looked < LOOK:
            return
        self.looked = now
        held = self.process.memory()
        if now - self.looked_at_all > 1:
            self.looked_at_all = now
            held = self.process.memory_of_all()
        if held > self.limits.memory:
            raise _Exceeded(f"held {held / GIB:.2g} GiB, more than {self.limits.memory / GIB:.3g}")


def _ended(code: int) -> str:
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
