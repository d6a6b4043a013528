"""The caller's functions, asked about pairs of a query and a key: as NumPy has them, for the oracle.

JAX computes them, for JAX is what they are written in: number by number, apart from the tiles and axes
that backends ask them about. In float64 they are what they were traced to be there.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from heedful.call.functions import Program
from heedful.call.operands import Operands
from heedful.compiled import compiled


class Pairs(NamedTuple):
    """Some queries of one head, and all keys.

    Attributes:
        b, h: the numbers of batch row and query head.
        rows: of the queries.
        shape: (rows, Sk).
        floats, words: what the functions close over.
    """

    b: int
    h: int
    rows: slice
    shape: tuple[int, int]
    floats: np.ndarray | None
    words: np.ndarray | None

    @classmethod
    def of(
        cls, operands: Operands, queries: tuple[int, int, slice], shape: tuple[int, int]
    ) -> "Pairs":
        return cls(*queries, shape, operands.floats, operands.words)

    def shown(self, mask: Program) -> np.ndarray:
        """Which keys it shows to them, (rows, Sk)."""
        every = np.arange(self.shape[0] * self.shape[1])
        found = self._ask(_values, mask, every) if len(every) else np.zeros(0, bool)
        return found.reshape(self.shape)

    def modified(
        self, function: Program, seen: np.ndarray, scores: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The scores as it makes them, and its slope at each, in their dtype.

        Of pairs that are not seen it is asked nothing: their scores stay, and their slope is 0.
        """
        found, slopes = scores.copy(), np.zeros_like(scores)
        if seen.any():
            pairs = _seen_pairs(seen)
            found.flat[pairs], slopes.flat[pairs] = self._ask(
                _values_and_slopes, function, pairs, scores.flat[pairs]
            )
        return found, slopes

    def pulled_back(
        self, function: Program, seen: np.ndarray, scores: np.ndarray, d_scores: np.ndarray
    ) -> Any:
        """The gradient of `floats`, from that of the modified scores."""
        if not seen.any():
            return 0
        pairs = _seen_pairs(seen)
        once = np.arange(len(pairs)) < seen.sum()
        shares = np.where(once, d_scores.flat[pairs], 0)
        return self._ask(_pulled_back, function, pairs, shares, scores.flat[pairs])

    def _ask(
        self, function: Callable[..., Any], program: Program, pairs: np.ndarray, *asked: np.ndarray
    ) -> Any:
        """A function below, of what is asked of each pair and of its place."""
        wide = bool(asked) and asked[0].dtype == np.float64
        program = program.wide if wide and program.wide else program
        floats = self.floats if self.floats is None or not wide else self.floats.astype(np.float64)
        i, j = np.divmod(pairs, self.shape[1])
        places = np.broadcast_arrays(self.b, self.h, i + self.rows.start, j)
        numbers = [*asked, *(x.astype(np.int32) for x in places)]
        x64 = nullcontext() if not wide else jax.enable_x64(True)
        with x64, jax.ensure_compile_time_eval():
            return jax.tree.map(
                np.asarray, function(program, len(pairs), floats, self.words, *numbers)
            )


def _seen_pairs(seen: np.ndarray) -> np.ndarray:
    """The numbers of those pairs, from the start again until they are as many as all: of one shape."""
    return np.resize(np.flatnonzero(seen), seen.size)


def _of_pair(program: Program, floats: Any, words: Any) -> Callable[..., Any]:
    return partial(program.of_numbers, [x[0] for x in program.closed_over(floats, words)])


# Compiled for each program and number of pairs.


@compiled(static=2)
def _values(program: Program, _count: int, floats: Any, words: Any, *numbers: Any) -> Any:
    return jax.vmap(_of_pair(program, floats, words))(*numbers)


@compiled(static=2)
def _values_and_slopes(
    program: Program, _count: int, floats: Any, words: Any, *numbers: Any
) -> Any:
    return jax.vmap(jax.value_and_grad(_of_pair(program, floats, words)))(*numbers)


@compiled(static=2)
def _pulled_back(
    program: Program, _count: int, floats: Any, words: Any, shares: Any, *numbers: Any
) -> Any:
    def of(floats: Any) -> Any:
        return jax.vmap(_of_pair(program, floats, words))(*numbers)

    return jax.vjp(of, floats)[1](shares)[0]
