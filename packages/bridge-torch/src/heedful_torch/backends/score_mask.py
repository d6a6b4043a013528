"""Visibility and bias, for kernels that know an additive mask and the flag `is_causal`, no more.

Each part is done as early as it is known:

- What position alone rules out is known from the problem, before any array: `span_of` cuts it off. A
  sliding window over a long cache costs the window, and a causal call never touches keys of the
  future.
- There too it is known whether the rest is nothing, or what a kernel's own arguments say, a causal
  diagonal or a window: then no mask is made.
- Everything else becomes one additive mask: 0, or bias and ALiBi, where a key is seen, -inf where
  not. It has an axis only where a condition has one (padding alone is (B, 1, 1, Sk)), but causal,
  windows, full masks and ALiBi bring (Sq, Sk): that is memory, and the price of these kernels.

No kernel is ever shown an empty row, since each makes something else of one: 0, NaN, the mean of V.
The mask lets a query that sees nothing attend to everything, and its answer is thrown away. What
stands in such a query, and in keys and values that nobody sees, is put to zero first: a kernel
multiplies it by a probability of zero, and 0 · NaN is NaN. Every step is a select, which lets no
NaN through, forward or backward.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.rules.place import Place
from heedful.rules.scores import added, adding, distance
from heedful.rules.visibility import hiding, of_key_heads, visible


class Span(NamedTuple):
    """What position says before any array is read.

    Attributes:
        rows: the queries that may see a key.
        columns: the keys that may be seen.
        hides: what position still hides between those: "nothing"; a "band", the keys j < i + below and
            j > i + above; "by lengths", a band that ends, for each batch row, at the last query and key
            that its lengths leave; or "by rows", what only an array of offsets says.
        below, above: of a band, i and j counting from the first of `rows` and `columns`; None: nothing
            is hidden on that side. By lengths, of a row whose lengths are the arrays'.
    """

    rows: range
    columns: range
    hides: Literal["nothing", "band", "by lengths", "by rows"]
    below: int | None = None
    above: int | None = None

    def corner(self, problem: Problem) -> int | None:
        """p_i − i, i and j counting as in `below`; None where offsets of the batch differ."""
        if self.hides == "by lengths":
            return len(self.columns) - len(self.rows)
        if problem.q_offset is None:
            return None
        return problem.q_offset + self.rows.start - self.columns.start


def span_of(problem: Problem) -> Span:
    """Cuts off the queries that see nothing and the keys that nobody sees, by position alone."""
    rows, columns = range(problem.q_length), range(problem.kv_length)
    if not problem.positional:
        return Span(rows, columns, "nothing")
    left, right = problem.band
    if problem.q_offset is None and problem.q_offset_given:
        return Span(rows, columns, "by rows")
    if problem.q_offset is None:
        corner = len(columns) - len(rows)
        below, above = (
            None if left is None else corner - left,
            None if right is None else corner + right,
        )
        return Span(rows, columns, "by lengths", below, above)
    offset = problem.q_offset
    # Query i reaches from key i + offset - left to key i + offset + right.
    first = 0 if right is None else max(0, -offset - right)
    end = len(rows) if left is None else max(0, len(columns) - offset + left)
    rows = rows[first:end]
    if not rows:
        return Span(rows, columns[:0], "nothing")
    first = 0 if left is None else max(0, rows[0] + offset - left)
    end = len(columns) if right is None else max(0, rows[-1] + offset + right + 1)
    columns = columns[first:end]

    offset += rows.start - columns.start
    below = None if left is None or len(rows) - 1 + offset - left <= 0 else offset - left
    above = None if right is None or offset + right >= len(columns) - 1 else offset + right
    return Span(rows, columns, "nothing" if below is above is None else "band", below, above)


def additive_shape(problem: Problem, span: Span) -> tuple[int, ...]:
    """The shape of `score_mask`'s additive mask, from the problem alone."""
    differing = list(hiding(problem).values())
    differing += adding(problem).values()
    if span.hides != "nothing":
        batch = problem.batch if problem.q_offset is None else 1
        differing.append((batch, 1, problem.q_length, problem.kv_length))
    full = (problem.batch, problem.q_heads, len(span.rows), len(span.columns))
    return tuple(
        n if any(shape[axis] != 1 for shape in differing) else 1 for axis, n in enumerate(full)
    )


class ScoreMask(NamedTuple):
    """Bias and visibility over the rows and columns of a span.

    Attributes:
        additive: added to the scores, each axis full or 1 of (B, Hq, rows, columns), contiguous,
            differentiable in what it is made of. For a query that sees nothing it hides nothing.
        sees: whether a query sees any key, each axis full or 1 of (B, Hq, rows, 1).
        seen: whether a key is seen by any query, each axis full or 1 of (B, Hkv, columns, 1).
    """

    additive: Tensor
    sees: Tensor
    seen: Tensor


def score_mask(problem: Problem, operands: Operands, span: Span, dtype: torch.dtype) -> ScoreMask:
    """The mask of a problem, in `dtype`. A bias of -inf hides a key as a mask does."""
    if span.hides == "nothing":  # what position hid is cut off: what is left needs no axes for it
        problem = dataclasses.replace(problem, causal=False, window=None)
    operands = operands._replace(**{n: _cut(x, span) for n, x in operands.over_scores.items()})
    count_up = functools.partial(torch.arange, device=operands.q.device)
    rows = count_up(span.rows.start, span.rows.stop)
    columns = count_up(span.columns.start, span.columns.stop)
    place = Place.whole(problem, count_up)._replace(rows=rows, columns=columns)
    visibility = visible(problem, operands, place)
    if visibility is None:
        visibility = rows.new_ones(1, 1, 1, 1, dtype=torch.bool)
    nothing = bias = rows.new_zeros((), dtype=dtype)
    if adding(problem):
        bias = added(operands, distance(problem, operands, place), nothing)
        visibility = visibility & (bias.detach() != -torch.inf)
    if not span.columns:
        visibility = visibility[..., :0]  # of no keys, none is seen

    sees = visibility.any(-1, keepdim=True)
    seen = of_key_heads(problem, visibility.any(-2)).unsqueeze(-1)
    additive = torch.where(visibility, bias, torch.where(sees, -torch.inf, nothing))
    # The select keeps the layout of a transposed mask, and kernels read rows.
    return ScoreMask(additive.contiguous(), sees, seen)


def _cut(x: Tensor, span: Span) -> Tensor:
    if x.shape[2] > 1:
        x = x[:, :, span.rows.start : span.rows.stop]
    return x[..., span.columns.start : span.columns.stop] if x.shape[3] > 1 else x
