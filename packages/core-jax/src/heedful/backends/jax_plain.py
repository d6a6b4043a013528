"""`jax:plain`: the score matrix materialised, as the formula stands."""

from functools import partial

import jax
import numpy as np

from heedful.plain import plain
from heedful.problem import Array, Operands, Problem


class PlainBackend:
    """Takes every problem; its memory grows with Sq · Sk."""

    name = "jax:plain"
    automatic = 1
    deterministic = True

    def reasons(self, problem: Problem) -> tuple[str, ...]:
        return ()

    def score_bytes(self, problem: Problem) -> int:
        return problem.score_count * np.dtype(problem.accumulator).itemsize

    @partial(jax.jit, static_argnums=(0, 1))
    def run(self, problem: Problem, operands: Operands) -> tuple[Array, Array]:
        return plain(problem, operands)


backend = PlainBackend()
