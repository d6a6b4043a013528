"""Sums over tiles, whose derivatives of every order and mode are sums over tiles.

A function of a tile reads what the tile has of some arrays and gives parts, which are summed into other
arrays. Both are of three kinds, along the queries, along the keys and over the scores. Of such a sum

    the tangent     sums the tangents of the function
    the transpose   reads where it summed, and sums where it read

so with one primitive and these two rules no derivative keeps anything of a tile. Each makes its tiles
anew, visits those that somebody sees, and takes the memory of the arrays that it reads and sums.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching

from heedful.call.arrays import Array
from heedful.call.problem import Problem
from heedful.flash.primitive import fold, like, primitive
from heedful.flash.scores import (
    Numbered,
    Tile,
    add_cut,
    cut_scores,
    keys_of,
    of_seen,
    queries_of,
    tile_at,
    unfold_keys,
    unfold_queries,
    widen,
)
from heedful.flash.tiles import (
    Tiles,
    count,
    count_up,
    cut,
    over_heads,
    queries_met,
    start,
    tile_sizes,
    visit,
)

Along = Literal["queries", "keys", "scores", "nothing"]
BROADCAST = ("scores", "nothing")  # whose arrays may have one batch row for all


class Sum(NamedTuple):
    """What is summed into, whatever the sizes of the problem.

    Attributes:
        along: the queries, (B, Hq, Sq, ...), the keys, (B, Hkv, Sk, ...), over the scores, or nothing:
            what functions close over, (B or 1, 1, ·).
        rest: the sizes that follow; over the scores, which of the four axes are full and not 1; along
            nothing, whether the first is, and the size of the last.
        dtype: of the result; it is summed in the accumulator's.
    """

    along: Along
    rest: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, along: Along, x: Any) -> "Sum":
        """What is summed into an array like this one."""
        rest = x.shape[3:]
        if along == "scores":
            rest = tuple(n != 1 for n in x.shape)
        if along == "nothing":
            rest = x.shape[0] != 1, x.shape[2]
        return cls(along, rest, str(x.dtype))

    def shape(self, problem: Problem) -> tuple[int, ...]:
        """Of the result."""
        if self.along == "keys":
            return problem.batch, problem.kv_heads, problem.kv_length, *self.rest
        if self.along == "nothing":
            each, size = self.rest
            return problem.batch if each else 1, 1, size
        of_queries = problem.batch, problem.q_heads, problem.q_length
        if self.along == "queries":
            return *of_queries, *self.rest
        axes = zip((*of_queries, problem.kv_length), self.rest, strict=True)
        return tuple(n if full else 1 for n, full in axes)


class Function(Protocol):
    """What it reads of a tile, folded as in `scores.py` and widened, → the parts of the sums.

    It is hashable, and equal to what computes the same: what is compiled is kept by it. A query and a
    key that `tile.see` hides from one another add 0 to every part.
    """

    def __call__(
        self, problem: Problem, tiles: Tiles, tile: Tile, *read: Array
    ) -> Sequence[Array]: ...


@dataclass(frozen=True)
class Tangent:
    """The tangent of a function: reads what that reads, then tangents of what moves of it."""

    of: Function
    moving: tuple[int, ...]

    def __call__(self, problem: Problem, tiles: Tiles, tile: Tile, *read: Array) -> Sequence[Array]:
        at, tangents = read[: -len(self.moving)], read[-len(self.moving) :]
        of_moving = partial(_of_moving, self, (problem, tiles, tile), at)
        return jax.jvp(of_moving, tuple(at[n] for n in self.moving), tuple(tangents))[1]


@dataclass(frozen=True)
class Cotangent:
    """The transpose of `Tangent`: reads what the function reads, then cotangents of its parts."""

    of: Function
    moving: tuple[int, ...]
    reads: int

    def __call__(self, problem: Problem, tiles: Tiles, tile: Tile, *read: Array) -> Sequence[Array]:
        at, cotangents = read[: self.reads], read[self.reads :]
        of_moving = partial(_of_moving, self, (problem, tiles, tile), at)
        parts, pull_back = jax.vjp(of_moving, *(at[n] for n in self.moving))
        return pull_back([ct.astype(x.dtype) for ct, x in zip(cotangents, parts, strict=True)])


def _of_moving(
    derived: Tangent | Cotangent, where: tuple[Any, ...], at: Sequence[Array], *moved: Array
) -> list[Array]:
    """The function, of what moves alone."""
    every = dict(enumerate(at)) | dict(zip(derived.moving, moved, strict=True))
    return list(derived.of(*where, *every.values()))


def lying(
    queries: Iterable[Array], keys: Iterable[Array], added: Iterable[Array]
) -> list[tuple[Along, Array]]:
    """Arrays, and how each of them lies."""
    of: dict[Along, Iterable[Array]] = {"queries": queries, "keys": keys}
    found = [(along, x) for along, arrays in of.items() for x in arrays]
    return found + [("scores" if x.ndim == 4 else "nothing", x) for x in added]


def sum_over_tiles(
    problem: Problem,
    tiles: Tiles | None,
    function: Function,
    given: Numbered,
    read: Sequence[tuple[Along, Array]],
    into: Sequence[Sum],
) -> list[Array]:
    """The sums of a function of a tile over all tiles that somebody sees.

    Args:
        problem: what is asked.
        tiles: the sizes; None: `tile_sizes` chooses them.
        function: of a tile.
        given: what says where a tile stands and what is seen in it; it stands still in derivatives.
        read: what the function reads, and how it lies (see `lying`).
        into: what its parts are summed into.
    """
    given = given._replace(operands=given.operands._replace(q=None, k=None, v=None))
    leaves, tree = jax.tree.flatten(lax.stop_gradient(given))
    return sum_p.bind(
        *leaves,
        *(x for _, x in read),
        problem=problem,
        tree=tree,
        tiles=tiles,
        function=function,
        read=tuple(along for along, _ in read),
        into=tuple(into),
    )


def _sum_over_tiles(
    *flat: Array,
    problem: Problem,
    tree: Any,
    tiles: Tiles | None,
    function: Function,
    read: tuple[Along, ...],
    into: tuple[Sum, ...],
) -> list[Array]:
    tiles = tiles or tile_sizes(problem)

    def head_tile(arrays: Any, totals: list[Array]) -> tuple[tuple[()], list[Array]]:
        given, arrays = arrays

        def key_tile(totals: list[Array], j: Array) -> tuple[list[Array], None]:
            def step(i: Array, totals: list[Array], masked: bool) -> list[Array]:
                tile = tile_at(problem, tiles, given, i, j, masked)
                at = problem, tiles, i, j
                cuts = [_cut(along, x, *at) for along, x in zip(read, arrays, strict=True)]
                parts = of_seen(problem, tile, tuple(function(problem, tiles, tile, *cuts)))
                each = zip(into, totals, parts, strict=True)
                return [_add(s.along, total, part, *at) for s, total, part in each]

            begin = start(j, problem.kv_length, tiles.keys)
            return visit(queries_met(problem, given.operands, tiles, begin), step, totals), None

        key_tiles = count_up(count(problem.kv_length, tiles.keys))
        return (), lax.scan(key_tile, totals, key_tiles)[0]

    arrays = jax.tree.unflatten(tree, flat[: tree.num_leaves]), flat[tree.num_leaves :]
    totals = [jnp.zeros(s.shape(problem), problem.accumulator) for s in into]
    _, totals = over_heads(problem, tiles, head_tile, arrays, totals)
    return [x.astype(s.dtype) for s, x in zip(into, totals, strict=True)]


def _cut(along: Along, x: Array, problem: Problem, tiles: Tiles, i: Array, j: Array) -> Array:
    """What tile (i, j) has of an array."""
    if along in BROADCAST:
        return cut_scores(problem, tiles, x, i, j).astype(problem.accumulator)
    of, index = (queries_of, i) if along == "queries" else (keys_of, j)
    return widen(problem, of(problem, tiles, x, index))


def _add(
    along: Along, total: Array, part: Array, problem: Problem, tiles: Tiles, i: Array, j: Array
) -> Array:
    """Adds what tile (i, j) gives."""
    part = part.astype(total.dtype)
    if along in BROADCAST:
        return add_cut(problem, tiles, total, part, i, j)
    if along == "queries":
        part, begin = (
            unfold_queries(problem, tiles, part),
            start(i, problem.q_length, tiles.queries),
        )
    else:
        part, begin = unfold_keys(tiles, part), start(j, problem.kv_length, tiles.keys)
    part = cut(total, 2, begin, part.shape[2]) + part
    return lax.dynamic_update_slice_in_dim(total, part, begin, 2)


def _results(*avals: Any, problem: Problem, into: tuple[Sum, ...], **_: Any) -> list[Any]:
    return [like(avals[-1], s.shape(problem), s.dtype) for s in into]


PARAMS = ("problem", "tree", "tiles", "function", "read", "into")
sum_p = primitive("heedful_sum_over_tiles", _sum_over_tiles, _results, *PARAMS)


def _jvp(
    primals: Sequence[Array],
    tangents: Sequence[Any],
    *,
    tree: Any,
    function: Function,
    read: tuple[Along, ...],
    **params: Any,
) -> tuple[list[Array], list[Array]]:
    found = sum_p.bind(*primals, tree=tree, function=function, read=read, **params)
    along = tangents[tree.num_leaves :]
    moving = tuple(n for n, t in enumerate(along) if not isinstance(t, ad.Zero))
    found_dot = sum_p.bind(
        *primals,
        *(along[n] for n in moving),
        tree=tree,
        function=Tangent(function, moving),
        read=read + tuple(read[n] for n in moving),
        **params,
    )
    return found, found_dot


def _transpose(
    cotangents: Sequence[Any],
    *flat: Any,
    tree: Any,
    function: Function,
    read: tuple[Along, ...],
    into: tuple[Sum, ...],
    **params: Any,
) -> list[Array | None]:
    assert isinstance(function, Tangent)  # nothing else is asked to be linear
    reads = len(read) - len(function.moving)
    fixed, tangents = flat[: -len(function.moving)], flat[-len(function.moving) :]
    asked = [n for n, t in enumerate(tangents) if ad.is_undefined_primal(t)]
    moving = tuple(function.moving[n] for n in asked)
    gradients = sum_p.bind(
        *fixed,
        *map(ad.instantiate_zeros, cotangents),
        tree=tree,
        function=Cotangent(function.of, moving, reads),
        read=read[:reads] + tuple(s.along for s in into),
        into=tuple(Sum.of(read[reads + n], tangents[n].aval) for n in asked),
        **params,
    )
    found: list[Array | None] = [None] * len(flat)
    for n, gradient in zip(asked, gradients, strict=True):
        found[len(fixed) + n] = gradient
    return found


def _vmap(
    args: Sequence[Array],
    axes: Sequence[int | None],
    *,
    problem: Problem,
    tree: Any,
    read: tuple[Along, ...],
    into: tuple[Sum, ...],
    **params: Any,
) -> tuple[list[Array], list[int]]:
    """The new axis is folded into the batch."""
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    # What broadcasts may be shared by all of the new axis; a sum that broadcasts could not.
    shared = all(s.along not in BROADCAST for s in into)
    whole = [False] * tree.num_leaves + [along not in BROADCAST or not shared for along in read]
    each = [s._replace(rest=(True, *s.rest[1:])) if s.along in BROADCAST else s for s in into]
    results = sum_p.bind(
        *(fold(x, a, size, problem.batch, w) for x, a, w in zip(args, axes, whole, strict=True)),
        problem=replace(problem, batch=size * problem.batch),
        tree=tree,
        read=read,
        into=tuple(each),
        **params,
    )
    results = [x.reshape(size, problem.batch, *x.shape[1:]) for x in results]
    for n, s in enumerate(into):
        if s.along in BROADCAST and not s.rest[0]:
            results[n] = results[n].sum(axis=1, keepdims=True)
    return results, [0] * len(results)


ad.primitive_jvps[sum_p] = _jvp
ad.primitive_transposes[sum_p] = _transpose
batching.primitive_batchers[sum_p] = _vmap
