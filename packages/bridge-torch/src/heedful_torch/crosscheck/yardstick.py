"""What rounding alone does: plain attention in the same dtype, which backends are measured against.

How large an honest error is depends on the case: large logits and gradients that cancel lose digits
that a broad softmax keeps. So the judge computes each case a second time, with the score matrix
materialised, rounding wherever the contract lets a kernel round: the operands and the result of a
product have the dtype of q; products accumulate in float32, and so is all between them. As kernels
do, the backward pass computes the scores again, in its own order, and takes them from LSE.

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
    wide = np.dtype(problem.accumulator).type
    scale = wide(problem.scale)
    q, d_out = operands.q.astype(wide), out_cotangent.astype(wide)
    k, v = (np.repeat(x.astype(wide), problem.group, axis=1) for x in (operands.k, operands.v))
    seen = seen_keys(problem, operands)

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(problem.dtype).astype(wide)

    def scores_and_slope(product: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores, slope = product, np.ones_like(product)
        if problem.softcap is not None:
            tanh = np.tanh(product / wide(problem.softcap))
            scores, slope = tanh * wide(problem.softcap), 1 - tanh**2
        if operands.bias is not None:
            scores = scores + operands.bias.astype(wide)
        return np.where(seen, scores, wide(-np.inf)), slope

    scores, _ = scores_and_slope(q @ k.mT * scale)
    largest = scores.max(-1, keepdims=True, initial=-np.inf)
    largest = np.where(np.isfinite(largest), largest, wide(0))
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):  # an empty row: the logarithm of nothing is its LSE
        lse = np.log(total) + largest
    out = rounded(rounded(weights) @ v / np.where(total > 0, total, wide(1)))

    scores, slope = scores_and_slope((q * scale) @ k.mT)
    weights = np.exp(scores - np.where(np.isfinite(lse), lse, wide(0)))
    delta = (d_out * out).sum(-1, keepdims=True) - lse_cotangent.astype(wide)[..., None]
    d_scores = weights * (d_out @ v.mT - delta)
    d_product = rounded(d_scores * slope)

    def per_key_head(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], problem.kv_heads, problem.group, *x.shape[2:]).sum(2)

    tensors = {
        "out": out,
        "lse": lse[..., 0],
        "dq": rounded(d_product @ k * scale),
        "dk": rounded(per_key_head(d_product.mT @ q) * scale),
        "dv": rounded(per_key_head(rounded(weights).mT @ d_out)),
    }
    if operands.bias is not None:
        tensors["dbias"] = sum_to(d_scores, operands.bias.shape).astype(operands.bias.dtype)
    return tensors


def seen_keys(problem: Problem, operands: Operands) -> np.ndarray:
    """Which keys each query sees, boolean (B, Hq, Sq, Sk)."""
    # A length may come as a narrow or an unsigned integer, in which differences would wrap.
    wide = {
        name: None if (x := getattr(operands, name)) is None else x.astype(np.int64)
        for name in ("q_lengths", "kv_lengths", "q_offset")
    }
    rows, columns = np.arange(problem.q_length), np.arange(problem.kv_length)
    seen = visible(problem, operands._replace(**wide), rows, columns)
    shape = (problem.batch, problem.q_heads, problem.q_length, problem.kv_length)
    return np.broadcast_to(np.True_ if seen is None else seen, shape)


def sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums x over the axes along which an array of the shape was broadcast."""
    axes = tuple(axis for axis, size in enumerate(shape) if size != x.shape[axis])
    return x.sum(axes, keepdims=True)
