"""What rounding alone does: plain attention in the same dtype, which backends are measured against.

How large an honest error is depends on the case: large logits and gradients that cancel lose digits
that a broad softmax keeps. So the judge computes each case again, as well as honest arithmetic in that
dtype can: products accumulate in float32 (float64 for float64) and so is all between them; rounded is
what the contract lets a kernel round, which is the operands of a product and the results. The backward
pass divides by the sum of its own exponentials and takes delta = rowsum(dO ∘ O) before O is rounded:
no kernel's weakness is in it, so that none is excused by it.

`best` gives such orders of operations, all of them honest; the largest error counts. `lossy` gives
others, which lose what kernels of the flash family and half precision's own autodiff must lose: they
tell what is `lossy` from what is wrong, and set no limit of agreement.

It is written in NumPy, apart from every backend, so that no backend sets its own limit. From products
to scores it goes by `heedful.rules`; visibility and the cut into parts it has from the oracle. Why
neither hides a fault, `tolerance` says.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from heedful import Operands, Problem
from heedful.oracle import Part, modified, parts, pull_back_added
from heedful.rules.scores import added, capped

Tensors = dict[str, np.ndarray]
Scaled = Literal["q", "product", "both"]


@dataclass(frozen=True)
class Arithmetic:
    """One order of operations, and what it rounds to q's dtype besides operands and results.

    Attributes:
        scaled: what scale is multiplied to: "q", the "product" q kᵀ, or "both" q and k, its root each.
        weights: whether those of P·V are rounded before or after they are divided by their sum.
        rounded: what the backward pass takes rounded: "out" before delta, "d_weights" = dO·Vᵀ (as
            autodiff does where P has q's dtype), "lse" in place of a row's maximum and sum (and
            exponentials to 20 bits), or "nothing".
        shaken: whether scores and delta are put where another order of adding may put them. Two orders
            are a sample, which may be lucky in the one row that matters, and float64's are the oracle's.
    """

    scaled: Scaled
    weights: Literal["exponentials", "probabilities"]
    rounded: Literal["nothing", "out", "d_weights", "lse"] = "nothing"
    shaken: bool = False


def best(dtype: str) -> tuple[Arithmetic, ...]:
    """Honest arithmetic: three orders of operations, the last of them shaken.

    In half precision too: a processor's own product of bfloat16 adds in an order of its own, which shows
    in logits of thousands.
    """
    return (
        Arithmetic("product", "exponentials"),
        Arithmetic("q", "probabilities"),
        Arithmetic("product", "exponentials", shaken=True),
    )


UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # the most that one rounding takes


def lossy(dtype: str) -> tuple[Arithmetic, ...]:
    """What kernels lose that honest arithmetic keeps, in a dtype.

    In half precision delta of a rounded out, as flash kernels take it, and a rounded dO·Vᵀ, as autodiff
    of a rounded P does: peaked rows lose the small differences that their dq and dk are made of. In
    float32 what exp(s − lse) loses, where one number is kept for a row's maximum and its sum, and the
    root of scale, which torch's math kernel multiplies to q and to k: large logits lose digits by both.
    Kernels also take exponentials to 20 bits (torch's on a CPU), which shows where gradients cancel.
    """
    if dtype in ("float16", "bfloat16"):
        return (
            Arithmetic("product", "exponentials", rounded="out"),
            Arithmetic("product", "exponentials", rounded="out", shaken=True),
            Arithmetic("q", "probabilities", rounded="d_weights"),
        )
    return (Arithmetic("both", "exponentials", rounded="lse"),)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # its values tell what overflows
def attend(
    arithmetic: Arithmetic,
    problem: Problem,
    operands: Operands,
    out_cotangent: np.ndarray,
    lse_cotangent: np.ndarray,
) -> Tensors:
    """out, lse, and of each differentiable operand its gradient, dq and so on, of its shape.

    Args:
        arithmetic: how.
        problem: what is asked.
        operands: its arrays, NumPy.
        out_cotangent: (B, Hq, Sq, Dv), of q's dtype.
        lse_cotangent: (B, Hq, Sq), zeros where nobody asks for LSE.
    """
    wide = np.dtype(problem.accumulator).type
    queries = out_cotangent.shape[:3]
    shapes = {"out": out_cotangent.shape, "lse": queries}
    shapes |= {f"d{n}": x.shape for n, x in operands.differentiable.items()}
    tensors = {name: np.zeros(shape, wide) for name, shape in shapes.items()}
    for part in parts(problem, operands, wide):
        d_out, d_lse = (x[part.queries].astype(wide) for x in (out_cotangent, lse_cotangent))
        _attend_part(arithmetic, problem, part, d_out, d_lse, tensors)
    rounded = {f"d{n}": x.dtype for n, x in operands.differentiable.items()}
    rounded |= {"out": operands.q.dtype, "lse": np.dtype(wide)}
    return {n: x.astype(rounded[n]) for n, x in tensors.items()}


def _attend_part(
    arithmetic: Arithmetic,
    problem: Problem,
    part: Part,
    d_out: np.ndarray,
    d_lse: np.ndarray,
    tensors: Tensors,
) -> None:
    """Some queries' share of every tensor, written or added."""
    wide = d_out.dtype.type
    scale = wide(problem.scale)
    q, k, v = part.q, part.k, part.v

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(problem.dtype).astype(wide)

    product = _product(arithmetic.scaled, problem, part.q, part.k)
    if arithmetic.shaken:
        product = product + _alternating(product.shape) * _unsure(problem, part, product)
    scores, slope = _scores(product, problem, part)
    if arithmetic.shaken and problem.softcap is not None:  # XLA's tanh is off by two units
        capped = np.minimum(np.abs(product), wide(problem.softcap))
        scores = scores + _alternating(scores.shape) * 2 * np.spacing(capped)
    largest = scores.max(-1, keepdims=True, initial=part.sink)
    largest = np.where(largest == -np.inf, wide(0), largest)
    exp = _exp_to_20_bits if arithmetic.rounded == "lse" else np.exp
    exponentials = exp(scores - largest)
    of_sink = exp(part.sink - largest)
    total = exponentials.sum(-1, keepdims=True) + of_sink
    divisor = np.where(total == 0, wide(1), total)  # an empty row has no exponentials
    weights = exponentials / divisor

    if arithmetic.weights == "exponentials":
        out = rounded(exponentials * part.kept) @ v / divisor
    else:
        out = rounded(weights * part.kept) @ v
    tensors["out"][part.queries] = out
    lse = np.log(total) + largest
    tensors["lse"][part.queries] = lse[:, 0]

    if arithmetic.rounded == "lse":
        sign = np.where(np.arange(len(q)) % 2, 1, -1)[:, None]
        weights = weights * (1 + sign * _lost_by_lse(problem, part, largest)).astype(wide)
    d_weights = d_out @ v.T * part.kept
    if arithmetic.rounded == "d_weights":
        d_weights = rounded(d_weights)
    if arithmetic.weights == "exponentials":
        delta = (d_out * (rounded(out) if arithmetic.rounded == "out" else out)).sum(-1)
    else:  # the same sum the other way round: probabilities that were rounded do not add up to 1
        delta = (weights * d_weights).sum(-1)
    if arithmetic.shaken:
        terms = np.abs(d_out * out)
        spread = np.spacing(terms.sum(-1)) / 2
        if arithmetic.rounded == "out":
            spread += np.sqrt((terms**2).sum(-1)) * UNIT_ROUNDOFF[problem.dtype]
        delta = delta + _alternating(delta.shape) * spread
    d_scores = weights * (d_weights - (delta - d_lse)[:, None])
    pull_back_added(part, d_scores, {n.removeprefix("d"): x for n, x in tensors.items()})
    if "dsinks" in tensors:
        d_sink = (of_sink / divisor)[:, 0] * (d_lse - delta)
        tensors["dsinks"][0, part.queries[1]] += d_sink.sum()
    d_product = rounded(d_scores * slope)
    tensors["dq"][part.queries] = d_product @ k * scale
    tensors["dk"][part.keys] += d_product.T @ q * scale
    tensors["dv"][part.keys] += rounded(weights * part.kept).T @ d_out


def _lost_by_lse(problem: Problem, part: Part, largest: np.ndarray) -> np.ndarray:
    """How far from 1 exp(s − lse) may add up to in each row, (rows, 1).

    Two units of the largest score, or of what it is a sum of: lse is rounded, and s computed anew, in
    another order. No sample of that, which may be lucky in the one row that matters.
    """
    terms = np.linalg.norm(part.q, axis=-1) * np.linalg.norm(part.k, axis=-1).max(initial=0)
    sizes = np.maximum(np.abs(largest), abs(problem.scale) * terms[:, None])
    return 2 * np.finfo(part.q.dtype).eps * np.maximum(sizes, 1)


def _unsure(problem: Problem, part: Part, product: np.ndarray) -> np.ndarray:
    """How far scale · q kᵀ is off in some other order, for each row, (rows, 1).

    In float32 four times what it is off in this one, RMS over the row, since a plain loop over D rounds
    so much more often: of numbers that float32 adds without rounding that is nothing, and excuses nobody
    who loses their digits. In float64, where there is nothing better to compare with, half a unit of the
    largest score, or of the bias beside it.
    """
    if product.dtype == np.float64:
        beside = np.zeros_like(product) if part.bias is None else np.abs(part.bias)
        sizes = np.maximum(np.abs(product), np.where(np.isfinite(beside), beside, 0))
        sizes = np.where(part.seen, sizes, 0)
        return np.spacing(sizes.max(-1, keepdims=True, initial=0)) / 2
    exact = _product("product", problem, part.q.astype(np.float64), part.k.astype(np.float64))
    off = ((product - exact) ** 2).sum(-1, keepdims=True) / max(exact.shape[-1], 1)
    return 4 * np.sqrt(off).astype(np.float32)


def _alternating(shape: tuple[int, ...]) -> np.ndarray:
    """1 and −1 in turn, along every axis."""
    return 1 - 2 * (np.indices(shape).sum(0) % 2).astype(np.float32)


def _exp_to_20_bits(x: np.ndarray) -> np.ndarray:
    """exp, rounded to 20 bits where float32 has 24 (Veltkamp's splitting); all of float64's."""
    exact = np.exp(x)
    if exact.dtype == np.float64:
        return exact
    scaled = exact * np.float32(2**4 + 1)
    return scaled - (scaled - exact)


def _product(scaled: Scaled, problem: Problem, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """scale · q kᵀ, (rows, Sk)."""
    scale = q.dtype.type(problem.scale)
    match scaled:
        case "q":
            return (q * scale) @ k.T
        case "product":
            return q @ k.T * scale
        case "both":
            root = np.sqrt(np.abs(scale))
            return (q * root) @ (k * np.copysign(root, scale)).T


def _scores(product: np.ndarray, problem: Problem, part: Part) -> tuple[np.ndarray, Any]:
    """The scores, −inf where nothing is seen, and their slope by the product; (rows, Sk)."""
    scores, slope = capped(problem, product)
    scores, bend = modified(problem, part, scores)
    slope = bend if slope is None else slope * bend
    scores = added(part.added, part.distance, scores)
    return np.where(part.seen, scores, -np.inf), slope
