"""Backends that bring their process to an end, or to its limits, in one case; and one that is honest."""

import os
import sys
import time

import numpy as np

import heedful
from heedful.backends.numpy_oracle import backend as honest

CASE = (3, 5)  # lengths of the case "tiny"


def write_garbage():
    """Into every socket, as a stray file descriptor might."""
    for number in range(3, 64):
        try:
            os.write(number, b"x" * 4096)
        except OSError:
            continue


def print_and_hang():
    print("going to sleep", flush=True)
    time.sleep(3600)


def print_and_abort():
    for _ in range(2000):
        print("x" * 1000)
    print("so much was said", flush=True)
    os.abort()


def fill():
    held = []
    while True:
        held.append(np.ones(2**26, np.uint8))


MISDEEDS = {
    "aborts": print_and_abort,
    "hangs": print_and_hang,
    "fills": fill,
    "exits": lambda: sys.exit(3),
    "leaves": lambda: os._exit(4),
    "garbles": write_garbage,
}


class Crashing:
    """The oracle, but in one case."""

    takes, reasons, gradients = honest.takes, honest.reasons, honest.gradients

    def __init__(self, misdeed):
        self.name, self.misdeed = f"numpy:{misdeed}", MISDEEDS[misdeed]

    def run(self, problem, operands):
        print("is asked", flush=True)
        if (problem.q_length, problem.kv_length) == CASE:
            self.misdeed()
        return honest.run(problem, operands)


for each in MISDEEDS:
    heedful.register(Crashing(each))
