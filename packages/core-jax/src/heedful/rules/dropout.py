"""Which weights dropout keeps: the function that `heedful.dropout_mask` documents.

It is of the seed and of where a weight stands, and of nothing else, so that any tile of any size, in any
order and in any framework, finds the same bits. Words are taken as int32, whose sums wrap in NumPy, JAX
and torch alike, and the text has operators alone.

It costs about 130 integer operations a score, in the forward pass and in each derivative.
"""

import math

import jax.numpy as jnp

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.rules.place import Place

FEATURES = frozenset({"dropout_rate", "dropout_seed"})

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
PARITY = 0x1BD11BDA


def threefry(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two random words for each counter, int32; key and counter are int32 and broadcast."""
    first, second = key
    schedule = (first, second, first ^ second ^ PARITY)
    x, y = counter[0] + first, counter[1] + second
    for group in range(5):
        for distance in ROTATIONS[group % 2]:
            x = x + y
            y = x ^ _rotated(y, distance)
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + (group + 1)
    return x, y


def _rotated(x: Array, distance: int) -> Array:
    # To the right a negative number's sign would come after it.
    return (x << distance) | ((x >> (32 - distance)) & ((1 << distance) - 1))


def keeps(rate: float, seed: Array, b: Array, h: Array, i: Array, j: Array) -> Array:
    """Which weights are kept, boolean; int32 arrays that broadcast."""
    word, _ = threefry(threefry((seed, seed ^ seed), (b, h)), (i, j))
    least = min(math.ceil(rate * 2**32), 2**32 - 1)
    # From the unsigned word to the signed one in which it is compared: the sign bit turns over.
    return (word ^ -(2**31)) >= least - 2**31


def kept(problem: Problem, operands: Operands, place: Place) -> Array | None:
    """Which weights of a tile are kept, boolean (b, h, rows, columns); None without dropout."""
    if operands.dropout_seed is None:
        return None
    return keeps(
        problem.dropout_rate,
        operands.dropout_seed[:, None, None, None],
        place.b,
        place.h,
        place.i,
        place.j,
    )


def thinned(problem: Problem, kept: Array | None, weights: Array) -> Array:
    """What dropout leaves of a tile of weights, or of their cotangents: 1 / (1 − rate) of the kept ones.

    The sum over a row, and with it lse, is of all weights, those that are dropped too.
    """
    if kept is None:
        return weights
    return jnp.where(kept.reshape(weights.shape), weights / (1 - problem.dropout_rate), 0)
