"""Where a tile stands in the score matrix."""

from collections.abc import Callable
from typing import NamedTuple, Self

from heedful.call.arrays import Array
from heedful.call.problem import Problem


class Place(NamedTuple):
    """The numbers of a tile's batch rows, query heads, queries and keys, integers.

    They are the caller's own: under `jax.vmap`, whose axis becomes part of the batch, each member counts
    its rows from 0, and so does each device all rows and heads of a sharded call.

    Attributes:
        batch, heads, rows, columns: (b,), (h,), (rows,) and (columns,), where a tile of scores is
            (b, h, rows, columns).
    """

    batch: Array
    heads: Array
    rows: Array
    columns: Array

    @classmethod
    def whole(cls, problem: Problem, count_up: Callable[[int], Array]) -> Self:
        """All of the score matrix; `count_up` makes 0 … n − 1 in the framework that computes."""
        return cls(
            count_up(problem.batch),
            count_up(problem.q_heads),
            count_up(problem.q_length),
            count_up(problem.kv_length),
        )

    @property
    def b(self) -> Array:
        """The batch rows' numbers, (b, 1, 1, 1)."""
        return self.batch[:, None, None, None]

    @property
    def h(self) -> Array:
        """The query heads' numbers, (1, h, 1, 1)."""
        return self.heads[None, :, None, None]

    @property
    def i(self) -> Array:
        """The queries' numbers, (1, 1, rows, 1)."""
        return self.rows[None, None, :, None]

    @property
    def j(self) -> Array:
        """The keys' numbers, (1, 1, 1, columns)."""
        return self.columns[None, None, None, :]
