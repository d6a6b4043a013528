"""What rounding alone does: plain attention in the same dtype, which every backend is measured against.

How large an honest error is depends on the case: softmax over large logits and gradients that cancel
lose digits that a broad softmax keeps. So the judge computes the case a second time, with the score
matrix materialised, rounding wherever the contract lets a kernel round: the operands of a product and
its result have the dtype of q, products accumulate in float32, and so does all between them.

It is written in NumPy, apart from every backend, so that no backend sets its own limit.
"""

import numpy as np
from heedful import Operands, Problem
from heedful.visibility import visible

Tensors = dict[str, np.ndarray]


def plain(
    problem: Problem, operands: Operands, out_cotangent: np.ndarray, lse_cotangent: np.ndarray
) -> Tensors:
    """out, lse, dq, dk, dv, and dbias where there is a bias, shaped like the operands.

    Args:
        problem: what is asked.
        operands: its arrays, NumPy.
        out_cotangent: (B, Hq, Sq, Dv), of q's dtype.
        lse_cotangent: (B, Hq, Sq), zeros where nobody asks for LSE.
    """
    wide = problem.accumulator

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(problem.dtype).astype(wide)

    def per_query_head(x: np.ndarray) -> np.ndarray:
        return np.repeat(x.astype(wide), problem.group, axis=1)

    def per_key_head(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], problem.kv_heads, problem.group, *x.shape[2:]).sum(2)

    q, d_out = operands.q.astype(wide), out_cotangent.astype(wide)
    seen = seen_keys(problem, operands)
    # A hidden key may hold anything; nobody sees it, so it is nothing.
    k, v = per_query_head(operands.k), per_query_head(operands.v)

    scores = q @ k.mT * np.asarray(problem.scale, wide)
    slope = np.ones((), wide)
    if problem.softcap is not None:
        capped = np.tanh(scores / np.asarray(problem.softcap, wide))
        scores, slope = capped * np.asarray(problem.softcap, wide), 1 - capped**2
    if operands.bias is not None:
        scores = scores + operands.bias.astype(wide)
    scores = np.where(seen, scores, -np.inf).astype(wide)

    largest = scores.max(-1, keepdims=True, initial=-np.inf)
    shift = np.where(np.isfinite(largest), largest, 0)
    weights = np.exp(scores - shift)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):  # an empty row: log 0 is its lse
        lse = (np.log(total) + shift)[..., 0]
    total = np.where(total > 0, total, 1)
    out = rounded(rounded(weights) @ v / total)

    weights = weights / total
    d_weights = d_out @ v.mT
    delta = (d_out * out).sum(-1) - lse_cotangent.astype(wide)
    d_scores = weights * (d_weights - delta[..., None])
    dbias = None if operands.bias is None else sum_to(d_scores, operands.bias.shape)
    d_scores = rounded(d_scores * slope * np.asarray(problem.scale, wide))
    tensors = {
        "out": out,
        "lse": lse,
        "dq": rounded(d_scores @ k),
        "dk": rounded(per_key_head(d_scores.mT @ q)),
        "dv": rounded(per_key_head(rounded(weights).mT @ d_out)),
    }
    return tensors if dbias is None else tensors | {"dbias": dbias.astype(operands.bias.dtype)}


def seen_keys(problem: Problem, operands: Operands) -> np.ndarray:
    """Which keys each query sees, boolean (B, Hq, Sq, Sk)."""
    rows, columns = np.arange(problem.q_length), np.arange(problem.kv_length)
    seen = visible(problem, operands, rows, columns)
    shape = (problem.batch, problem.q_heads, problem.q_length, problem.kv_length)
    return np.broadcast_to(np.True_ if seen is None else seen, shape)


def sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums x over the axes along which an array of the shape was broadcast."""
    axes = tuple(axis for axis, (full, kept) in enumerate(zip(x.shape, shape)) if kept != full)
    return x.sum(axes, keepdims=True)
