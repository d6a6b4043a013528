"""From scale · q kᵀ to scores: softcap, score_mod, then what is added, bias and ALiBi.

For JAX and NumPy, but score_mod, which is JAX's.

What is added is written with operators alone, for torch too.

The softcap's slope, 1 − tanh², is a difference of two numbers next to 1: at three times the cap it has
lost five of seven digits. The same number as 4 e^(−2|x|) / (1 + e^(−2|x|))² loses none, and JAX is told
so for every order of derivative.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from heedful.call.arrays import Array, cast_like
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.rules.place import Place
from heedful.rules.visibility import places

ADDED = frozenset({"bias", "alibi_slopes"})
FEATURES = ADDED | {"scale", "softcap", "score_mod"}


def capped(problem: Problem, scores: Array) -> tuple[Array, Array | None]:
    """softcap · tanh(scores / softcap), and its slope; the scores and None where there is no softcap."""
    if problem.softcap is None:
        return scores, None
    cap = scores.dtype.type(problem.softcap)
    ratio = scores / cap
    if isinstance(scores, np.ndarray):
        return cap * np.tanh(ratio), _slope_of_tanh(ratio, np)
    return cap * tanh(ratio), slope(ratio)


def modified(
    problem: Problem, operands: Operands, place: Place, see: Array | None, scores: Array
) -> Array:
    """What score_mod makes of a tile of capped scores; in JAX.

    Where nothing is seen it is not asked: it may have no finite value there, nor a finite derivative, of
    which 0 times would be NaN. Those places stand in for one that is seen.
    """
    if problem.score_mod is None or 0 in scores.shape:
        return scores
    at: tuple[Array, ...] = (place.b, place.h, place.i, place.j)
    if see is not None:
        first = jnp.unravel_index(see.argmax(), see.shape)
        at = tuple(jnp.where(see, x, _at(x, first)) for x in at)
    return problem.score_mod(operands.floats, operands.words, scores, *at)


def modified_with_slope(
    problem: Problem, operands: Operands, place: Place, see: Array | None, scores: Array
) -> tuple[Array, Array | None]:
    """`modified`, and its slope at each score; None where that is 1."""
    if problem.score_mod is None:
        return scores, None
    modify = partial(modified, problem, operands, place, see)
    found: tuple[Array, Array] = jax.jvp(modify, (scores,), (jnp.ones_like(scores),))
    return found


def _at(x: Array, index: Sequence[Array]) -> Array:
    """The number at a place, along axes that are full or 1."""
    return x[tuple(0 if n == 1 else i for n, i in zip(x.shape, index, strict=True))]


def adding(problem: Problem) -> dict[str, tuple[int, ...]]:
    """What is added to the scores, by option; each axis full or 1 of (B, Hq, Sq, Sk)."""
    found = {}
    if problem.bias_shape is not None:
        found["bias"] = problem.bias_shape
    if problem.alibi_shape is not None:
        rows = problem.alibi_shape[0] if problem.q_offset is not None else problem.batch
        found["alibi_slopes"] = (rows, problem.q_heads, problem.q_length, problem.kv_length)
    return found


def distance(problem: Problem, operands: Operands, place: Place) -> Array | None:
    """|p_i − j| of a tile, integers, (b or 1, 1, rows, columns); None where no option asks."""
    if operands.alibi_slopes is None:
        return None
    return abs(places(problem, operands, place) - place.j)


def added(operands: Operands, distance: Array | None, scores: Array) -> Array:
    """The scores, capped, and all that is added to them.

    Args:
        operands: those over the scores cut to the tile, so that they broadcast beside it.
        distance: of the tile.
        scores: of the tile; the answer has its dtype.
    """
    if operands.bias is not None:
        scores = scores + cast_like(operands.bias, scores)
    if operands.alibi_slopes is not None:
        assert distance is not None
        scores = scores - cast_like(operands.alibi_slopes, scores) * cast_like(distance, scores)
    return scores


@jax.custom_jvp
def tanh(x: Array) -> Array:
    """The hyperbolic tangent, whose derivative is `slope`."""
    return jnp.tanh(x)


@jax.custom_jvp
def slope(x: Array) -> Array:
    """The derivative of tanh: 1 / cosh(x)²."""
    return _slope_of_tanh(x, jnp)


def _slope_of_tanh(x: Array, numpy: Any) -> Array:
    decay = numpy.exp(-2 * abs(x))
    return 4 * decay / (1 + decay) ** 2


tanh.defjvps(lambda x_dot, _, x: x_dot * slope(x))
slope.defjvps(lambda x_dot, found, x: -2 * x_dot * found * tanh(x))
