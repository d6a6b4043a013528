"""`numpy:oracle`: the float64 oracle as a backend, its results rounded to the caller's dtypes."""

import numpy as np

from heedful import oracle
from heedful.call.arrays import Array, dtype_of
from heedful.call.operands import Operands
from heedful.call.problem import Problem


class OracleBackend:
    """Takes every problem. Slow: it is there to judge the others."""

    name = "numpy:oracle"
    automatic = 0
    deterministic = True
    takes = oracle.FEATURES

    def reasons(self, problem: Problem) -> tuple[str, ...]:
        return ()

    def run(self, problem: Problem, operands: Operands) -> tuple[np.ndarray, np.ndarray]:
        out, lse = oracle.forward(problem, operands)
        return _rounded(out, problem.dtype), _rounded(lse, problem.accumulator)

    def gradients(
        self, problem: Problem, operands: Operands, out_cotangent: Array, lse_cotangent: Array
    ) -> Operands:
        found = oracle.gradients(problem, operands, out_cotangent, lse_cotangent)
        of = operands.differentiable
        return Operands(**{n: _rounded(getattr(found, n), dtype_of(x)) for n, x in of.items()})


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # beyond float16's range lies infinity, as in any framework
        return x.astype(dtype)


backend = OracleBackend()
