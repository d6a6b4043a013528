"""Second derivatives, of the backends that have them: H u for a random direction u.

With G the gradients of Σ out·c + Σ lse·e, a backend is asked for the gradient of Σ G·u, which is the
product of the Hessian with u: every second derivative takes part in it. A gradient penalty is this.

What is right comes from central differences of the oracle's analytic gradients along u, in float64, by
the five-point rule: its error is of the order of the step's fourth power, 1e-12 here, and it knows
nothing of how anybody derives a gradient a second time.

A backend says that it has none by raising `NotImplementedError`, or what its framework raises of a
function that cannot be derived again; that is noted, not failed. One that returns numbers is judged. A
gradient that is cut off from its inputs counts as a second derivative of 0, which is what its user gets.
"""

import re
from typing import Any

import numpy as np

from heedful import oracle
from heedful_crosscheck.location import locate
from heedful_crosscheck.question import Question
from heedful_crosscheck.tolerance import Errors, Judgement, measure, row_errors
from heedful_crosscheck.yardstick import Tensors

STEP = 1e-3

# Of rms; four times as much in the worst row, a quarter in the projection. Twice in a row every product
# and sum of the backward pass is rounded; honest backends show a tenth in the cases here (3.5e-7 in
# float32, 3e-3 in bfloat16; projections of 8e-8 and 1.7e-4).
LIMIT = {"float64": 1e-9, "float32": 4e-6, "float16": 3e-3, "bfloat16": 2e-2}
WORST_ROW_TIMES, PROJECTION_TIMES = 4, 0.25

# What frameworks say of a gradient that cannot be derived again: ours, JAX's of callbacks and of what
# has derivatives in one direction, torch's of functions and of operators. In callbacks another
# exception carries the words of the first.
REFUSAL = re.compile(
    r"NotImplementedError:|has no second derivatives|(do|does) not support JVP|once_differentiable"
    r"|does\s+not\s+support\s+reverse-mode\s+autodiff"
    r"|derivative for '?[\w:]+'? is not implemented"
)


def directions(question: Question) -> Tensors:
    """A standard normal direction for q, k and v, canonical, and for other operands as called."""
    random = question.case.random(0, "direction")
    shaped = {
        name: x if name in "qkv" else question.inputs.options[name]
        for name, x in question.operands.differentiable.items()
    }
    return {n: random.standard_normal(a.shape).astype(a.dtype) for n, a in shaped.items()}


def right(question: Question, direction: Tensors, with_lse: bool) -> Tensors:
    """H u by five-point differences of the oracle's gradients, float64, canonical: d2q and so on."""
    e = question.lse_cotangent if with_lse else np.zeros_like(question.lse_cotangent)
    direction = {
        name: u if name in "qkv" else question.over_scores(name, u) for name, u in direction.items()
    }
    sums: dict[str, Any] = dict.fromkeys(direction, 0.0)
    for steps, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        moved = {
            n: getattr(question.operands, n).astype(np.float64)
            + steps * STEP * u.astype(np.float64)
            for n, u in direction.items()
        }
        found = oracle.gradients(
            question.problem, question.operands._replace(**moved), question.out_cotangent, e
        )
        for name in sums:
            sums[name] = sums[name] + weight * getattr(found, name)
    return {f"d2{n}": question.as_came(n, x) / (12 * STEP) for n, x in sums.items()}


def judge_second(question: Question, got: Tensors, want: Tensors) -> dict[str, Judgement]:
    """Judges a backend's second derivatives, canonical, each by itself."""
    hidden = {n: question.hidden[n.replace("d2", "d")] for n in want}
    return {n: _judged(n, got[n], x, question.dtype, hidden[n]) for n, x in want.items()}


def _judged(
    name: str, got: np.ndarray, want: np.ndarray, dtype: str, hidden: np.ndarray
) -> Judgement:
    got = np.asarray(got, np.float64)
    nothing = Errors(0.0, 0.0, 0.0)
    limit = LIMIT[dtype]
    limits = Errors(limit, WORST_ROW_TIMES * limit, PROJECTION_TIMES * limit)
    if not np.isfinite(got).all():
        infinite = Errors(np.inf, np.inf, np.inf)
        return Judgement(
            infinite, nothing, limits, (f"{name}, a second derivative, is not finite",)
        )
    want = np.where(hidden, 0, want)
    size = float(np.sqrt((want**2).mean())) or 1.0
    errors, _ = measure(got, want, size)
    over = [
        f"{measured} {error:.2g} over {most:.2g}"
        for measured, error, most in zip(
            ("rms", "worst row", "projection"), errors, limits, strict=True
        )
        if error > most
    ]
    if not over:
        return Judgement(errors, nothing, limits)
    where, heat = locate(got, want, size, row_errors(got, want, size), limits.worst_row)
    fault = f"{name}, a second derivative, is wrong: {', '.join(over)}; {where}"
    return Judgement(errors, nothing, limits, (fault,), heat=heat)


def is_refusal(error: BaseException) -> bool:
    """Whether an exception says that there is no second derivative."""
    return isinstance(error, NotImplementedError) or (
        isinstance(error, Exception) and REFUSAL.search(str(error)) is not None
    )
