"""A process of our own that computes: what becomes of what it raises, prints, and of its end."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from heedful_torch.worker import Worker, WorkerError

MODULE = """
import os, sys, time
import torch
from heedful_torch.worker import serve

def crash():
    print("the reason", file=sys.stderr, flush=True)
    os._exit(3)

def load():
    LOADING
    return {
        "twice": lambda x: 2 * x, "raises": lambda: 1 / 0, "crash": crash,
        "sleep": time.sleep, "exit": lambda: sys.exit("no more"), "print": lambda: print("noise"),
    }

serve(load)
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    started = []

    def make(loading="pass"):
        (tmp_path / "served.py").write_text(MODULE.replace("LOADING", loading))
        started.append(Worker("served"))
        return started[-1]

    yield make
    for worker in started:
        worker.stop()


@pytest.fixture
def worker(made):
    return made()


def test_tensors_go_there_and_back_in_any_dtype(worker):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bool):
        x = torch.ones(3, 2, dtype=dtype).t()
        got = worker.call("twice", x)
        assert torch.equal(got, 2 * x) and got.dtype == (2 * x).dtype
    recorded = 2 * torch.ones(2, requires_grad=True)
    assert not worker.call("twice", recorded).requires_grad


def test_it_is_one_process_that_stays(worker):
    assert worker.call("pid") == worker.call("pid") != os.getpid()


def test_what_it_prints_disturbs_nobody(worker, capfd):
    worker.call("print")
    assert worker.call("twice", 1) == 2
    assert capfd.readouterr() == ("", "")


def test_what_a_function_raises_is_one_line_and_no_end(worker):
    pid = worker.call("pid")
    with pytest.raises(WorkerError, match=r"^ZeroDivisionError: division by zero$"):
        worker.call("raises")
    assert worker.call("pid") == pid


def test_a_crash_is_one_line_with_what_was_said_last(worker):
    pid = worker.call("pid")
    with pytest.raises(
        WorkerError, match=r"^the process of served exited with 3 \(the reason\) during crash$"
    ):
        worker.call("crash")
    assert worker.call("pid") != pid  # the next one


def test_a_kill_during_a_call_is_one_line(worker):
    pid = worker.call("pid")
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(
        WorkerError, match=r"^the process of served was ended by signal 9 during sleep$"
    ):
        worker.call("sleep", 60)
    assert worker.call("twice", 2) == 4


INTERRUPTED = """
import os, signal, threading
from heedful_torch.worker import Worker

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
worker = Worker("served")
pid = worker.call("pid")
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    worker.call("sleep", 60)
except KeyboardInterrupt:
    print("interrupted")
assert worker.call("twice", 2) == 4
try:
    os.kill(pid, 0)
except ProcessLookupError:
    print("gone")
"""


def in_a_process(code, folder):
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_an_interrupt_ends_it_so_that_no_late_answer_is_taken_for_another(made, tmp_path):
    made()
    assert in_a_process(INTERRUPTED, tmp_path) == "interrupted\ngone\n"


@pytest.mark.parametrize(
    ("loading", "said"),
    [
        ("raise ImportError('no such thing')", "^ImportError: no such thing$"),
        ("sys.exit('not here')", "^SystemExit: not here$"),
        ("os._exit(7)", "^the process of served exited with 7 during its start$"),
    ],
)
def test_a_start_that_fails_says_why(made, loading, said):
    worker = made(loading)
    for _ in range(2):
        with pytest.raises(WorkerError, match=said):
            worker.start()


def test_it_ends_when_its_owner_does(made, tmp_path):
    made()
    code = "from heedful_torch.worker import Worker; print(Worker('served').call('pid'))"
    pid = int(in_a_process(code, tmp_path))
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("it is still there")
