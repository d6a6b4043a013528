"""What the rows of P sum to when a backward kernel makes them of a rounded LSE.

A backward kernel of the flash family is given the scores' LSE, and makes P̃ = exp(S − lse) of it (Dao et
al. 2022, Algorithm 4, keep m and l instead). The LSE is rounded to its dtype, and what is large absorbs
the rest: beside a bias of -1e9, log l is lost whole, each key's P̃ is 1, and a row sums to the number
of its keys; beside logits near 4096 a row's sum is off by 2⁻¹³. All gradients are linear in the row of
P, so a row's dO and dlse, divided by what P̃ sums to, give what P would have given.

The sums are of the scores as the kernel rounds them. To shift the bias to 0 instead would be wrong: what
q · k has lost beside a bias of finfo.min is lost in float64 too, and must not come back.
"""

import torch
from torch import Tensor

from heedful_torch.backends.parts import keys_within, part_of_row, queries_within

# Half a unit in the last place of an lse is lost: at most 2⁻²⁰ of P here in float32, 2⁻⁴⁹ in float64 …
HARMLESS = 16.0
# … and 2⁻¹⁴ in half precision, whose own roundings are 2⁻¹² and 2⁻⁹.
HARMLESS_IN_HALF = 1024.0
HARMLESS_REACH = 32.0  # of ‖q‖ ‖k‖, whose products add up to much less


def row_sums(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    parts: Tensor | None,
    scale: float,
    softcap: float | None,
    below: int | None,
    above: int | None,
    diagonal: int | None,
    lse: Tensor,
    widened: bool,
) -> Tensor:
    """Σ_j exp(s_ij − lse_i), (B, Hq, Sq) in lse's dtype; exactly 1 where the rounding is harmless.

    A row costs its scores once more, a tile at a time, and only where its LSE is large. On a GPU this
    waits for the LSE; and the kernels there, which work to base 2, round it once more: beside logits of
    1e5 that is half a percent of P, which nobody here can see. Not run.

    Args:
        q, k: (B, Hq, Sq, D), (B, Hkv, Sk, D).
        mask: added to the scores, each axis full or 1 of (B, Hq, Sq, Sk); or slopes of ALiBi; or None.
        parts: (B, 1, 4), of each row the queries and keys that attend, about whose corner the band lies;
            1 for all other queries; None: all attend.
        scale: of the scores.
        softcap: c of c·tanh(s/c), or None.
        below, above: keys j < i + below and j > i + above are hidden; None: none is.
        diagonal: mask · |i + diagonal − j| is taken off the scores; None: mask is added.
        lse: (B, Hq, Sq), as the kernel is given it.
        widened: whether q and k have more columns than the forward pass saw, of zeros. Their products
            may then add up in another order, and the rounding is that of ‖q‖ ‖k‖.
    """
    sums: Tensor = torch.ops.heedful.row_sums.default(
        q, k, mask, parts, scale, softcap, below, above, diagonal, lse, widened
    )
    return sums


# An operator, so that torch.compile need not look into what depends on data. Defined by hand:
# `torch.library.custom_op` adds 8 µs to each call.
torch.library.define(
    "heedful::row_sums",
    "(Tensor q, Tensor k, Tensor? mask, Tensor? parts, float scale, float? softcap, int? below,"
    " int? above, int? diagonal, Tensor lse, bool widened) -> Tensor",
)


@torch.library.impl("heedful::row_sums", "CompositeExplicitAutograd")
def _(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    parts: Tensor | None,
    scale: float,
    softcap: float | None,
    below: int | None,
    above: int | None,
    diagonal: int | None,
    lse: Tensor,
    widened: bool,
) -> Tensor:
    sums = torch.ones_like(lse, memory_format=torch.contiguous_format)
    limit = HARMLESS if q.dtype == lse.dtype else HARMLESS_IN_HALF
    large = lse.abs() > limit
    if widened and q.dtype == lse.dtype:
        lengths = k.norm(dim=-1)
        if parts is not None:  # what is outside may be NaN
            lengths = torch.where(keys_within(parts, k.shape[2]), lengths, 0)
        large |= abs(scale) * q.norm(dim=-1) * lengths.amax() > HARMLESS_REACH
    if parts is not None:
        large &= queries_within(parts, q.shape[2])
    if not large.any():
        return sums
    large &= lse.isfinite()
    group, height = q.shape[1] // k.shape[1], _tile_height(q)
    for b, h in large.any(-1).nonzero().tolist():
        bias = None if mask is None else mask[min(b, len(mask) - 1), min(h, mask.shape[1] - 1)]
        part, band = part_of_row(parts, b, q.shape[2], k.shape[2], (below, above, diagonal))
        key = k[b, h // group, part.k_begin : part.k_end]
        for start in range(part.q_begin, part.q_end, height):
            rows = slice(start, min(start + height, part.q_end))
            if large[b, h, rows].any():
                tile = _sums_of(q[b, h], key, bias, rows, (scale, softcap, *band), lse[b, h])
                sums[b, h, rows] = torch.where(large[b, h, rows], tile, sums[b, h, rows])
    return sums


@torch.library.register_fake("heedful::row_sums")  # type: ignore[untyped-decorator]  # torch's own
def _(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    parts: Tensor | None,
    scale: float,
    softcap: float | None,
    below: int | None,
    above: int | None,
    diagonal: int | None,
    lse: Tensor,
    widened: bool,
) -> Tensor:
    return torch.empty_like(lse, memory_format=torch.contiguous_format)


# The tiles are those of the CPU kernel's backward pass: a product of another size may add up in another
# order, and beside a bias of 1e4 a single key's P̃ was off by 1e-3. (Elsewhere they are few and large.)
WIDTH = 512


def _tile_height(q: Tensor) -> int:
    if q.device.type != "cpu" or q.shape[2] >= 768:
        return 256
    return 64 if q.shape[2] >= 192 else 32


def _sums_of(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    rows: slice,
    how: tuple[float, float | None, int | None, int | None, int | None],
    lse: Tensor,
) -> Tensor:
    """Of some rows of one head, tile by tile along the keys."""
    query, lse = q[rows].to(lse.dtype), lse[rows]
    scale, softcap, below, above, diagonal = how
    if bias is not None and len(bias) > 1:
        bias = bias[rows]
    sums = torch.zeros_like(lse)
    for start in range(0, len(k), WIDTH):
        key = k[start : start + WIDTH].to(lse.dtype)
        scores = (query @ key.mT).mul_(scale)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        i = torch.arange(rows.start, rows.start + len(query), device=q.device)[:, None]
        j = torch.arange(start, start + len(key), device=q.device)
        if diagonal is not None:
            assert bias is not None
            scores -= bias * (i + diagonal - j).abs()
        elif bias is not None:
            scores += bias if bias.shape[1] == 1 else bias[:, start : start + WIDTH]
        p = scores.sub_(lse[:, None]).exp_()
        if below is not None:
            p.masked_fill_(j < i + below, 0)
        if above is not None:
            p.masked_fill_(j > i + above, 0)
        sums += p.sum(-1)
    return sums
