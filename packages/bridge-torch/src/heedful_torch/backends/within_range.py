"""Masks whose numbers overflow where a kernel makes powers of 2 of scores: it multiplies by log₂ e."""

import torch
from torch import Tensor

LARGEST = 2.0**125  # of a mask; times log₂ e it is far from overflowing


def within_range(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """The mask without numbers that overflow when the kernel multiplies scores by log₂ e.

    finfo.min does, to -inf, and where a row holds nothing else out is NaN (pytorch#110213), or LSE is
    -inf. Nothing changes by it: beside a number so large q · k is lost, and what is less than it, by a
    rounding at least, weighs nothing. So the latter becomes -inf, and the number itself `LARGEST`.

    Returns:
        the mask; and what is largest in each row, (B, Hq, Sq) with each axis full or 1: the LSE where it
        is over `LARGEST`. None for float16, in which nothing is.
    """
    if torch.finfo(mask.dtype).max < LARGEST:
        return mask, None
    top = mask.amax(-1, keepdim=True)
    beyond = top.abs() > LARGEST
    weightless = (mask < top) & (beyond | (mask < -LARGEST))
    within = torch.where(beyond, top.clamp(-LARGEST, LARGEST), mask)
    return torch.where(weightless, -torch.inf, within), top.squeeze(-1)
