"""Attention and its gradients in float64 NumPy: the judge of every backend, written to be read.

One key head at a time. Its keys are one matrix, the queries of all heads that read it are stacked
into another, and so everything in between is the contract (the docstring of `heedful.Problem`) on
plain matrices: a row for each query i, a column for each key j.

Two rules run through it. What a query does not see takes no part in its arithmetic at all, not even
as zero times NaN. And a NaN or an infinity that a query does see spreads as floating point has it,
silently: that is the caller's arithmetic, nothing to warn of here.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from heedful.problem import Array, Operands, Problem
from heedful.visibility import visible

_silently = np.errstate(invalid="ignore", over="ignore")


@_silently
def forward(problem: Problem, operands: Operands) -> tuple[np.ndarray, np.ndarray]:
    """out and lse.

    Args:
        problem: what is asked.
        operands: NumPy arrays of any float dtype, in canonical form; converted to float64 first.

    Returns:
        out (B, Hq, Sq, Dv) and lse (B, Hq, Sq), both float64.
    """
    batch, kv_heads, rows = _stack(problem)
    out = np.zeros((batch, kv_heads, rows, problem.value_dim))
    lse = np.zeros((batch, kv_heads, rows))
    for at, head in _heads(problem, operands):
        weights, lse[at], _ = _softmax(problem, head)
        out[at] = _sum_over_seen(weights, head.seen, head.v)
    return out.reshape(*_queries(problem), problem.value_dim), lse.reshape(_queries(problem))


@_silently
def gradients(
    problem: Problem, operands: Operands, out_cotangent: Array, lse_cotangent: Array
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """The gradients of Σ out ∘ out_cotangent + Σ lse ∘ lse_cotangent.

    Args:
        problem: what is asked.
        operands: NumPy arrays of any float dtype, in canonical form; converted to float64 first.
        out_cotangent: (B, Hq, Sq, Dv), floating.
        lse_cotangent: (B, Hq, Sq), floating.

    Returns:
        dq, dk, dv and dbias, float64, shaped like q, k, v and bias; dbias is None where bias is.
    """
    stack = _stack(problem)
    dout = _float64(out_cotangent).reshape(*stack, problem.value_dim)
    dlse = _float64(lse_cotangent).reshape(*stack)

    dq = np.zeros((*stack, problem.head_dim))
    dk = np.zeros(operands.k.shape)
    dv = np.zeros(operands.v.shape)
    dbias = None if operands.bias is None else np.zeros((*stack, problem.kv_length))

    for at, head in _heads(problem, operands):
        weights, _, slope = _softmax(problem, head)
        dv[at] = _sum_over_seen(weights.T, head.seen.T, dout[at])
        dweights = np.where(head.seen, dout[at] @ head.v.T, 0)
        dscores = _softmax_gradient(head.seen, weights, dweights, dlse[at])
        if dbias is not None:
            dbias[at] = dscores
        dproduct = np.where(head.seen, problem.scale * slope * dscores, 0)
        dq[at] = _sum_over_seen(dproduct, head.seen, head.k)
        dk[at] = _sum_over_seen(dproduct.T, head.seen.T, head.q)

    dq = dq.reshape(*_queries(problem), problem.head_dim)
    if dbias is not None:
        dbias = dbias.reshape(*_queries(problem), problem.kv_length)
        dbias = _sum_over_broadcast(dbias, operands.bias)
    return dq, dk, dv, dbias


# The algebra, on matrices


def _sum_over_seen(weights: np.ndarray, seen: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Row i is Σ_j weights_ij x_j over the j that it sees, whatever the other x_j hold."""
    finite = np.isfinite(x)
    total = weights @ np.where(finite, x, 0)
    for j in np.flatnonzero(~finite.all(axis=1) & seen.any(axis=0)):
        rest = weights[:, [j]] * np.where(finite[j], 0, x[j])
        total += np.where(seen[:, [j]], rest, 0)
    return total


def _softmax(problem: Problem, head: "_Head") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The weights p_ij, lse_i, and the slope of the softcap at each score."""
    scores = problem.scale * (head.q @ head.k.T)
    slope = np.ones_like(scores)
    if problem.softcap is not None:
        tanh = np.tanh(scores / problem.softcap)
        scores = problem.softcap * tanh
        slope = 1 - tanh**2
    scores = np.where(head.seen, scores + head.bias, -np.inf)

    highest = scores.max(axis=1, keepdims=True, initial=-np.inf)
    highest = np.where(highest == -np.inf, 0, highest)
    exponentials = np.exp(scores - highest)
    total = exponentials.sum(axis=1, keepdims=True)

    empty = total == 0
    weights = np.where(head.seen, exponentials / np.where(empty, 1, total), 0)
    lse = np.where(empty, -np.inf, highest + np.log(np.where(empty, 1, total)))
    return weights, lse[:, 0], slope


def _softmax_gradient(
    seen: np.ndarray, weights: np.ndarray, dweights: np.ndarray, dlse: np.ndarray
) -> np.ndarray:
    """dscores: ∂p_ij/∂s_il = p_ij (δ_jl − p_il), and ∂lse_i/∂s_ij = p_ij."""
    mean = (weights * dweights).sum(axis=1, keepdims=True)
    return np.where(seen, weights * (dweights - mean + dlse[:, None]), 0)


# The bookkeeping


class _Head(NamedTuple):
    """What one key head takes part in. Its rows are its query heads' queries, head after head."""

    q: np.ndarray  # (rows, D)
    k: np.ndarray  # (Sk, D)
    v: np.ndarray  # (Sk, Dv)
    bias: np.ndarray  # (rows, Sk)
    seen: np.ndarray  # (rows, Sk), boolean


def _queries(problem: Problem) -> tuple[int, int, int]:
    return problem.batch, problem.q_heads, problem.q_length


def _stack(problem: Problem) -> tuple[int, int, int]:
    """The same queries, by the key head that they read."""
    return problem.batch, problem.kv_heads, problem.group * problem.q_length


def _heads(problem: Problem, operands: Operands) -> Iterator[tuple[tuple[int, int], _Head]]:
    """Each (b, key head) and what it takes part in."""
    batch, kv_heads, rows = _stack(problem)
    q = _float64(operands.q).reshape(batch, kv_heads, rows, problem.head_dim)
    k, v = _float64(operands.k), _float64(operands.v)
    bias = np.zeros((1, 1, 1, 1)) if operands.bias is None else _float64(operands.bias)
    seen = _visible(problem, operands)

    # (B, Hkv, group, Sq, Sk), without memory of their own: one head's part is copied at a time.
    grouped = (batch, kv_heads, problem.group, problem.q_length, problem.kv_length)
    bias = np.broadcast_to(bias, (*_queries(problem), problem.kv_length)).reshape(grouped)
    seen = np.broadcast_to(seen, (*_queries(problem), problem.kv_length)).reshape(grouped)
    for at in np.ndindex(batch, kv_heads):
        matrix = (rows, problem.kv_length)
        yield at, _Head(q[at], k[at], v[at], bias[at].reshape(matrix), seen[at].reshape(matrix))


def _visible(problem: Problem, operands: Operands) -> np.ndarray:
    rows, columns = np.arange(problem.q_length), np.arange(problem.kv_length)
    seen = visible(problem, operands, rows, columns)
    return np.ones((1, 1, 1, 1), bool) if seen is None else seen


def _float64(x: Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _sum_over_broadcast(dscores: np.ndarray, bias: Array) -> np.ndarray:
    """Sums over the axes along which the bias was broadcast."""
    axes = tuple(axis for axis, size in enumerate(bias.shape) if size == 1)
    return dscores.sum(axis=axes, keepdims=True)
