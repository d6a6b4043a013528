"""Where a tensor is wrong: in words, and as a map of its error.

A kernel's author knows his loops: that all that is wrong lies in one head, in the last tile, or behind
the row where the window begins to hide keys, tells him more than a number does. What counts as wrong is
a row beyond the limit of the worst row, so that rounding elsewhere blurs nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from rich.text import Text

from heedful import Operands, Problem
from heedful.oracle import places

TILES = (128, 64, 32, 16)  # what most kernels' tiles are, or are made of
LINES, CELLS = 16, 48  # of a map, at most
SHADES = (
    " ·░▒▓█"  # from nothing to the largest error: of a thousandth, a hundredth, a tenth, a third
)
STYLES = ("", "blue", "cyan", "yellow", "red", "bold red")

# By name, the row at which something begins, for each batch row.
Edges = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class HeatMap:
    """The error of a tensor, coarsely.

    Attributes:
        lines: what a line of `cells` is: "heads", one of each batch row, or "rows" of one head.
        first_line: the first of each line, and where the last one ends: 0, 1, 2 for two lines.
        columns: what a cell within a line is: "rows", or "columns", numbers along D.
        first_column: the same for the cells of a line.
        heads: of a batch row, where lines are heads; line n is head n % heads of batch row n // heads.
        cells: RMS of the error, relative to the tensor's RMS; None where a number is not finite.
    """

    lines: str
    first_line: tuple[int, ...]
    columns: str
    first_column: tuple[int, ...]
    heads: int
    cells: tuple[tuple[float | None, ...], ...]

    @property
    def largest(self) -> float:
        """The largest cell."""
        return max((x for line in self.cells for x in line if x is not None), default=0.0)

    @property
    def even(self) -> bool:
        """Whether the error is about as large everywhere, so that there is nothing to see."""
        return all(x is not None and 10 * x > self.largest for line in self.cells for x in line)

    def shade(self, cell: float | None) -> int:
        """How dark a cell is, an index of `SHADES`."""
        if cell is None:
            return len(SHADES) - 1
        share = cell / self.largest if self.largest else 0.0
        return sum(share > least for least in (0.0, 1e-3, 1e-2, 0.1, 0.3))

    def __rich__(self) -> Text:
        labels = [self.label(n) for n in range(len(self.cells))]
        width = max(map(len, labels))
        text = Text(f"  {self._caption()}\n", no_wrap=True)
        for label, line in zip(labels, self.cells, strict=True):
            text.append(f"  {label:>{width}} │")
            for cell in line:
                shade = self.shade(cell)
                text.append("!" if cell is None else SHADES[shade], STYLES[shade])
            text.append("│\n")
        text.rstrip()
        return text

    def __str__(self) -> str:
        return self.__rich__().plain

    def label(self, line: int) -> str:
        """What a line is."""
        first, behind = self.first_line[line : line + 2]
        if self.lines == "heads" and behind == first + 1:
            return f"b {first // self.heads} h {first % self.heads}"
        return f"{self.lines} {_span(first, behind)}"

    def _caption(self) -> str:
        each = self.first_column[1] - self.first_column[0]
        of_each = f"{self.columns}, {each} a cell" if each > 1 else self.columns
        not_finite = any(x is None for line in self.cells for x in line)
        mark = "; ! is not finite" if not_finite else ""
        return f"{self.lines} by {of_each}; █ is an error of {self.largest:.2g}{mark}"


class Location(NamedTuple):
    """Where a tensor is wrong."""

    words: str
    heat: HeatMap


def locate(
    got: np.ndarray,
    want: np.ndarray,
    size: float,
    rows: np.ndarray,
    limit: float,
    edges: Edges = MappingProxyType({}),
) -> Location:
    """Where a tensor of (B, H, rows, columns) is off.

    Args:
        got, want: of which the error is the difference.
        size: what an error is relative to.
        rows: (B, H, rows), each row's error.
        limit: of a row's: what is beyond it is wrong.
        edges: where something begins among the rows.
    """
    worst = np.unravel_index(rows.argmax(), rows.shape)
    error = np.abs(got - want)
    column = f", column {error[worst].argmax()}" if error.shape[-1] > 1 else ""
    first = int(worst[-1]) // TILES[0] * TILES[0]
    tile = f"rows {_span(first, min(first + TILES[0], rows.shape[-1]))}"
    extent = _extent(rows > limit, error, limit * size, edges)
    heat = heat_map(error / size, rows > limit)
    return Location(f"worst at {place(worst)}{column}, in the tile of {tile}; {extent}", heat)


def place(row: Sequence[int | np.intp]) -> str:
    """The name of a row."""
    b, h, number = (int(i) for i in row)
    return f"(b {b}, h {h}, row {number})"


# In words


def _extent(wrong: np.ndarray, error: np.ndarray, limit: float, edges: Edges) -> str:
    """What the wrong rows, boolean (B, H, rows), have in common."""
    if not wrong.any():
        return "spread over all of it: no row by itself is beyond the limit"
    found = [_heads(wrong), _rows(wrong, edges), _columns(error[wrong] > limit)]
    said = ", ".join(filter(None, found))
    return f"wrong only {said}" if said else "wrong in every row"


def _heads(wrong: np.ndarray) -> str:
    by_head = np.any(wrong, -1)
    rows, heads = np.flatnonzero(by_head.any(1)), np.flatnonzero(by_head.any(0))
    b, h = by_head.shape
    if by_head.all():
        return ""
    if len(rows) == len(heads) == 1:
        return f"in head {heads[0]}" + (f" of batch row {rows[0]}" if b > 1 else "")
    of_rows = f"batch {_numbers('row', rows)}" if len(rows) < b else ""
    of_heads = _numbers("head", heads) if len(heads) < h else ""
    if of_rows or of_heads:
        return f"in {' of '.join(filter(None, (of_heads, of_rows)))}"
    return f"in {by_head.sum()} of {by_head.size} heads"


def _rows(wrong: np.ndarray, edges: Edges) -> str:
    of_batch = np.any(wrong, 1)
    rows = np.flatnonzero(of_batch.any(0))
    length = wrong.shape[-1]
    if length == 1:
        return ""
    if edge := _at_an_edge(of_batch, edges):
        return edge
    if len(rows) == length:
        return ""
    if len(rows) == 1:
        return f"in row {rows[0]}" + _of_a_tile(int(rows[0]))
    first, behind = int(rows[0]), int(rows[-1]) + 1
    if len(rows) == behind - first:
        return f"in rows {_span(first, behind)}{_whole_tiles(first, behind, length)}"
    for tile in TILES:
        for which, at in (("first", 0), ("last", tile - 1)):
            every = np.arange(at, length, tile)
            if len(every) > 1 and np.array_equal(rows, every):
                return f"in the {which} row of each tile of {tile}"
    return f"in {len(rows)} of {length} rows"


def _at_an_edge(of_batch: np.ndarray, edges: Edges) -> str:
    """That wrong rows begin or end where something else does, in each batch row that has any."""
    length = of_batch.shape[-1]
    ranges = {b: np.flatnonzero(rows) for b, rows in enumerate(of_batch) if rows.any()}
    if any(len(x) != x[-1] - x[0] + 1 for x in ranges.values()):
        return ""
    for name, edge in edges.items():
        # One row that begins where an edge is may be chance; so may what is at either end.
        if all(x[0] == edge[b] > 0 and x[-1] == length - 1 for b, x in ranges.items()):
            return f"from row {_listed(x[0] for x in ranges.values())} on, where {name}"
        if all(x[-1] + 1 == edge[b] < length and x[0] == 0 for b, x in ranges.items()):
            return f"up to row {_listed(x[-1] for x in ranges.values())}, behind which {name}"
    return ""


def _whole_tiles(first: int, behind: int, length: int) -> str:
    for tile in TILES:
        if first % tile or not (behind % tile == 0 or behind == length):
            continue
        if behind - first > tile:
            return f", from a multiple of {tile} on" if behind == length else ""
        return f", the last, partial tile of {tile}" if behind % tile else f", one tile of {tile}"
    return ""


def _of_a_tile(row: int) -> str:
    for tile in TILES:
        if row and row % tile == 0:
            return f", the first of a tile of {tile}"
        if row % tile == tile - 1:
            return f", the last of a tile of {tile}"
    return ""


def _columns(wrong: np.ndarray) -> str:
    """Of the wrong rows, which numbers are off, boolean (wrong rows, columns)."""
    width = wrong.shape[-1]
    columns = np.flatnonzero(wrong.any(0))
    if not len(columns) or len(columns) == width:
        return ""
    first, behind = int(columns[0]), int(columns[-1]) + 1
    if len(columns) != behind - first or behind - first > width / 2:
        return ""
    return f"in column{'s' if behind - first > 1 else ''} {_span(first, behind)}"


def _span(first: int, behind: int) -> str:
    return str(first) if behind == first + 1 else f"{first}-{behind - 1}"


def _numbers(what: str, numbers: np.ndarray) -> str:
    if len(numbers) > 4:
        return f"{len(numbers)} {what}s"
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _listed(numbers: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, numbers)))


# As a map


def heat_map(error: np.ndarray, wrong: np.ndarray) -> HeatMap:
    """The map of an error (B, H, rows, columns): of one head where it alone is wrong, else of all."""
    b, h, _, width = error.shape
    by_head = wrong.any(-1)
    one = by_head.sum() == 1 or b * h == 1
    if one and width > 1:
        across = error[np.unravel_index(by_head.argmax(), by_head.shape)]
        names = "rows", "columns"
    else:
        across = np.sqrt((error**2).mean(-1)).reshape(b * h, -1)
        names = "heads", "rows"
    lines, columns = (
        _starts(n, most) for n, most in zip(across.shape, (LINES, CELLS), strict=True)
    )
    cells = tuple(
        tuple(_cell(across[top:bottom, left:right]) for left, right in pairwise(columns))
        for top, bottom in pairwise(lines)
    )
    return HeatMap(names[0], lines, names[1], columns, h, cells)


def _starts(length: int, most: int) -> tuple[int, ...]:
    """Where cells begin, each of the same power of two, and where the last ends."""
    each = 1 << max(0, math.ceil(math.log2(length / most)))
    return (*range(0, length, each), length)


def _cell(error: np.ndarray) -> float | None:
    if not np.isfinite(error).all():
        return None
    return float(f"{np.sqrt((error**2).mean()):.3g}")


# What begins where


def edges(problem: Problem, operands: Operands) -> tuple[Edges, Edges]:
    """Among queries and keys the first row from which something holds, (B,) each, by what it is."""
    offset = np.array(
        [int(places(problem, operands, (b, 0, slice(0, 1)))[0][0, 0]) for b in range(problem.batch)]
    )
    left, right = problem.band
    queries: dict[str, np.ndarray] = {}
    keys: dict[str, np.ndarray] = {}
    shown = "causal shows" if problem.causal else "the window shows"
    if right is not None:
        queries[f"{shown} a key at all"] = -offset - right
        queries[f"{shown} the last key too"] = problem.kv_length - 1 - offset - right
        keys[f"{'causal' if problem.causal else 'the window'} begins to hide keys"] = (
            offset + right + 1
        )
        keys[f"no query sees as far, by {'causal' if problem.causal else 'window'}"] = (
            problem.q_length + offset + right
        )
    if left is not None:
        queries["the window begins to hide keys on its left"] = left - offset + 1
        queries["the window has left all keys behind"] = problem.kv_length + left - offset
        keys["the window shows a key to the first query"] = offset - left
        keys["the window shows a key to the last query"] = problem.q_length - 1 + offset - left
    if operands.q_lengths is not None:
        queries["q_lengths end"] = np.asarray(operands.q_lengths)
    if operands.kv_lengths is not None:
        keys["kv_lengths end"] = np.asarray(operands.kv_lengths)
    for ids, axis, found in (
        (operands.q_segment_ids, 2, queries),
        (operands.kv_segment_ids, 3, keys),
    ):
        if ids is not None:
            flat = np.moveaxis(np.asarray(ids), axis, -1).reshape(len(ids), -1)
            other = flat != flat[:, :1]
            second = np.where(other.any(-1), other.argmax(-1), flat.shape[-1])
            found["the second segment begins"] = np.broadcast_to(second, problem.batch)
    return queries, keys
