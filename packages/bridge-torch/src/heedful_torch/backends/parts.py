"""The part of each batch row that attends, for kernels that are told lengths.

Where lengths are given, each batch row has a matrix of scores of its own, from the first of its queries
that sees a key to the last, and from the first of its keys that is seen to the last. Within this part
each query sees a key and each key is seen; what is outside is not read.

The band of causal and a window lies about the lower right corner of each part as it would lie about that
of the arrays: the last query of a part stands at its last key, or as far from it in all rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful_torch.backends.score_mask import Span


class Part(NamedTuple):
    """Of one batch row.

    Attributes:
        q_begin, q_end: its queries, or none.
        k_begin, k_end: its keys; none where there are no queries.
    """

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int


def parts_of(problem: Problem, operands: Operands, place: Span) -> Tensor:
    """Each row's `Part`, (B, 1, 4), int32: the last axis is its fields.

    Args:
        problem: with lengths.
        operands: its arrays.
        place: what position says, such that the parts align (`Kernel.aligns`). They are counted in it.
    """
    q_end = _within(problem, operands.q_lengths, operands, place.rows)
    k_end = _within(problem, operands.kv_lengths, operands, place.columns)
    corner = len(place.columns) - len(place.rows)
    if place.hides == "band":  # behind the key that its last query reaches, a row sees none
        k_end = (q_end + corner).clamp(min=0)
    shift = k_end - q_end - corner
    first = torch.zeros_like(q_end)
    q_begin = first if place.above is None else (-place.above - shift).clamp(min=0)
    q_begin = torch.where(k_end > 0, q_begin.minimum(q_end), q_end)
    k_begin = first if place.below is None else (q_begin + place.below + shift).clamp(min=0)
    k_begin = torch.where(q_begin < q_end, k_begin, k_end)
    return torch.stack([q_begin, q_end, k_begin, k_end], -1).unsqueeze(1)


def _within(problem: Problem, lengths: Tensor | None, operands: Operands, cut: range) -> Tensor:
    """(B,), of each row where its queries or keys end, counted in what was cut off of them."""
    if lengths is None:
        return torch.full((problem.batch,), len(cut), dtype=torch.int32, device=operands.q.device)
    return (lengths - cut.start).clamp(0, len(cut))


def queries_within(parts: Tensor, q_length: int) -> Tensor:
    """Which queries are in the parts, (B, 1, Sq), boolean."""
    i = torch.arange(q_length, device=parts.device)
    return (i >= parts[..., 0:1]) & (i < parts[..., 1:2])


def keys_within(parts: Tensor, kv_length: int) -> Tensor:
    """Which keys are in the parts, (B, 1, Sk), boolean."""
    j = torch.arange(kv_length, device=parts.device)
    return (j >= parts[..., 2:3]) & (j < parts[..., 3:4])


Band = tuple[int | None, int | None, int | None]  # below, above and diagonal, as in `How`


def part_of_row(
    parts: Tensor | None, b: int, q_length: int, kv_length: int, band: Band
) -> tuple[Part, Band]:
    """A row's part, and the band there: i counts from the first query of all, j from the part's key."""
    if parts is None:
        return Part(0, q_length, 0, kv_length), band
    part = Part(*parts[b, 0].tolist())
    shift = part.k_end - part.q_end - (kv_length - q_length) - part.k_begin
    below, above, diagonal = (None if x is None else x + shift for x in band)
    return part, (below, above, diagonal)
