"""What memory a case will take, said before it is run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import heedful
from heedful import Problem, oracle
from heedful.call import Call
from heedful_crosscheck.cases import Case, Inputs

# Measured: the oracle's and the yardsticks' tensors together, for each number of q, k, v and out; and
# the matrices of one part of the scores, of which they hold about 16 at a time.
BYTES_A_NUMBER = 40
BYTES_A_SCORE_AT_ONCE = 128
# A backend says what its forward pass builds; forward and backward together hold up to nine times that
# (jax:plain and jax:nn-xla 9, torch:sdpa-math 2, measured at 4096 × 4096).
DIFFERENTIATED = 9


@dataclass(frozen=True)
class Memory:
    """What a case takes, about.

    Attributes:
        scores: B · Hq, Sq and Sk.
        judge: bytes of inputs, oracle and yardsticks; grows with the inputs, not with the scores.
        backends: bytes of scores and masks, for each backend that builds them; up to.
        side_by_side: how many of these run at once.
    """

    case: str
    dtype: str
    scores: tuple[int, int, int]
    judge: int
    backends: dict[str, int]
    side_by_side: int

    @property
    def at_once(self) -> int:
        """Bytes at the worst moment."""
        largest = sorted(self.backends.values(), reverse=True)[: self.side_by_side]
        return self.judge + sum(largest)

    def __str__(self) -> str:
        heads, rows, columns = self.scores
        builders = ", ".join(f"{name} up to {_size(n)}" for name, n in self.backends.items())
        return (
            f"{self.case}, {self.dtype}: {heads} × {rows} × {columns} scores take up to "
            f"{_size(self.at_once)}, the judge {_size(self.judge)} of it"
            + (f"; what builds all scores: {builders}" if builders else "")
        )


def estimate(case: Case, dtype: str, backends: Sequence[str], side_by_side: int) -> Memory:
    """What running a case takes; makes its inputs, and computes nothing."""
    inputs = case.inputs(0, "float64")  # which holds its numbers, whatever the dtype does
    options = {n: _in_dtype(x, dtype) for n, x in inputs.options.items()}
    q, k, v = (_in_dtype(x, dtype) for x in (inputs.q, inputs.k, inputs.v))
    problem = Call.of(q, k, v, **options).problem
    found = {name: _built(name, problem) * DIFFERENTIATED for name in backends}
    return Memory(
        case.name,
        dtype,
        (problem.batch * problem.q_heads, problem.q_length, problem.kv_length),
        _judge(inputs, problem),
        {name: size for name, size in found.items() if size},
        side_by_side,
    )


def most(
    cases: Sequence[Case], dtypes: Sequence[str], backends: Sequence[str], side_by_side: int
) -> list[Memory]:
    """What each case takes, in the dtype in which it takes most."""
    found = ([estimate(case, dtype, backends, side_by_side) for dtype in dtypes] for case in cases)
    return [max(by_dtype, key=lambda memory: memory.at_once) for by_dtype in found]


def _in_dtype(x: Any, dtype: str) -> Any:
    """A stand-in of that dtype where x is floating; its numbers play no part."""
    floating = isinstance(x, np.ndarray) and x.dtype.kind == "f"
    return np.broadcast_to(np.zeros((), dtype), x.shape) if floating else x


def _judge(inputs: Inputs, problem: Problem) -> int:
    out = problem.batch * problem.q_heads * problem.q_length * problem.value_dim
    numbers = inputs.q.size + inputs.k.size + inputs.v.size + out
    # What is differentiated has a gradient beside it.
    numbers += sum(x.size for x in inputs.arrays.values() if x.dtype.kind == "f")
    masks = sum(x.nbytes for x in inputs.arrays.values() if x.dtype.kind != "f")
    at_once = min(problem.score_count, max(oracle.SCORES_AT_ONCE, problem.kv_length))
    return BYTES_A_NUMBER * numbers + BYTES_A_SCORE_AT_ONCE * at_once + masks


def _built(name: str, problem: Problem) -> int:
    """Bytes of scores and masks that a backend says its forward pass builds; 0 where it refuses."""
    backend = heedful.backends()[name]
    if not hasattr(backend, "score_bytes") or backend.reasons(problem):
        return 0
    return int(backend.score_bytes(problem))


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
