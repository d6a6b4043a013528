"""`numpy:oracle`: the float64 oracle as a backend, its results rounded to the caller's dtypes."""

import numpy as np

from heedful import oracle
from heedful.call.arrays import Array
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
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        dq, dk, dv, dbias = oracle.gradients(problem, operands, out_cotangent, lse_cotangent)
        dtype = problem.dtype
        if dbias is not None and problem.bias_dtype is not None:
            dbias = _rounded(dbias, problem.bias_dtype)
        return _rounded(dq, dtype), _rounded(dk, dtype), _rounded(dv, dtype), dbias


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # beyond float16's range lies infinity, as in any framework
        return x.astype(dtype)


backend = OracleBackend()
