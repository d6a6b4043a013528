"""Which keys a query sees, for the whole score matrix or for one tile of it.

Written with operators alone, so that one text serves NumPy, JAX and torch: the caller brings the row
and column numbers in its own framework, and the answer comes in that framework.
"""

import operator
from functools import reduce
from typing import Any

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem

# The features that this is about: who asks here takes them all.
FEATURES = frozenset({"mask", "causal", "window", "q_offset", "q_lengths", "kv_lengths"})


def _column(per_batch: Array) -> Array:
    """(B,) → (B, 1, 1, 1), to stand beside scores."""
    return per_batch[:, None, None, None]


def q_offset(problem: Problem, operands: Operands) -> Any:
    """The place of query 0 among the keys: a number, or (B,) where rows differ."""
    if problem.q_offset is not None:
        return problem.q_offset
    if operands.q_offset is not None:
        return operands.q_offset
    kv = problem.kv_length if operands.kv_lengths is None else operands.kv_lengths
    return kv - (problem.q_length if operands.q_lengths is None else operands.q_lengths)


def visible(problem: Problem, operands: Operands, rows: Array, columns: Array) -> Array | None:
    """Which keys are seen: boolean, broadcastable to (B, Hq, rows, columns); None where all are.

    Args:
        problem: what is asked.
        operands: its arrays; `mask` cut to the rows and columns of the tile, the rest whole.
        rows: query numbers i, integers of shape (rows,).
        columns: key numbers j, integers of shape (columns,).
    """
    i, j = rows[None, None, :, None], columns[None, None, None, :]
    left, right = problem.band
    conditions = []
    if problem.positional:
        offset = q_offset(problem, operands)
        p = i + (offset if isinstance(offset, int) else _column(offset))
        if left is not None:
            conditions.append(j >= p - left)
        if right is not None:
            conditions.append(j <= p + right)
    if operands.q_lengths is not None:
        conditions.append(i < _column(operands.q_lengths))
    if operands.kv_lengths is not None:
        conditions.append(j < _column(operands.kv_lengths))
    if operands.mask is not None:
        conditions.append(operands.mask)
    return reduce(operator.and_, conditions) if conditions else None
