"""`jax:plain`: the score matrix materialised, as the formula stands."""

import numpy as np

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.compiled import compiled
from heedful.plain import plain
from heedful.rules import FEATURES


class PlainBackend:
    """Takes every problem; its memory grows with Sq · Sk."""

    name = "jax:plain"
    automatic = 1
    deterministic = True
    takes = FEATURES | {"grouped_heads", "return_lse", "value_dim"}

    def reasons(self, problem: Problem) -> tuple[str, ...]:
        return ()

    def score_bytes(self, problem: Problem) -> int:
        return problem.score_count * np.dtype(problem.accumulator).itemsize

    @compiled(static=2)
    def run(self, problem: Problem, operands: Operands) -> tuple[Array, Array]:
        return plain(problem, operands)


backend = PlainBackend()
