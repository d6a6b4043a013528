"""flash-attn's arguments, checked, as heedful's options."""

from collections.abc import Sequence

import torch
from torch import Tensor

OPEN = -1  # a side of a window

Results = Tensor | tuple[Tensor, Tensor, None]
Window = Sequence[int] | Tensor  # (left, right)


def check_rank(name: str, x: Tensor, axes: str) -> None:
    """Raises ValueError for a tensor that has not these axes."""
    if x.ndim != axes.count(",") + 1:
        raise ValueError(
            f"{name} must be {axes}. Got shape {tuple(x.shape)}. "
            "Other ranks are for heedful.attention, packed sequences for flash_attn_varlen_func."
        )


def unpacked(name: str, x: Tensor, parts: int, tokens: str = "B, S") -> tuple[Tensor, ...]:
    """Views of what is stacked behind the axes of tokens."""
    axes = f"({tokens}, {parts}, H, D)"
    axis = tokens.count(",") + 1
    if x.ndim != axis + 3 or x.shape[axis] != parts:
        raise ValueError(
            f"{name} must be {axes}. Got shape {tuple(x.shape)}. "
            f"Stack the {parts} tensors ({tokens}, H, D) with torch.stack(..., dim={axis})."
        )
    return x.unbind(axis)


def window(window_size: Window) -> tuple[int | None, int | None] | None:
    """An open side is −1 there, and None here."""
    if isinstance(window_size, Tensor):  # flash-attn's own tests draw it
        window_size = window_size.tolist()
    if not (isinstance(window_size, Sequence) and len(window_size) == 2):
        raise ValueError(
            f"window_size must be a pair (left, right). Got {window_size!r}. "
            "For no window pass (-1, -1)."
        )
    for side in window_size:
        if side is None or side < OPEN:
            raise ValueError(
                f"window_size must hold integers of at least -1. Got {tuple(window_size)}. "
                "An open side is -1."
            )
    left, right = (None if side == OPEN else side for side in window_size)
    return None if left is None and right is None else (left, right)


def slopes(alibi_slopes: Tensor | None, q: Tensor) -> Tensor | None:
    """ALiBi's, which are float32 there, beside q of any dtype."""
    if alibi_slopes is None:
        return None
    if alibi_slopes.dtype != torch.float32:
        raise TypeError(
            f"alibi_slopes must be float32, whatever q is. Got {alibi_slopes.dtype}. "
            "Pass alibi_slopes.float()."
        )
    # float64, which flash-attn does not have, takes the same numbers.
    return alibi_slopes.double() if q.dtype == torch.float64 else alibi_slopes


def capped_at(softcap: float) -> float | None:
    """None where it is not positive, which there is none."""
    return None if softcap <= 0 else softcap


def check_dropout_p(dropout_p: float) -> None:
    """Raises ValueError for what is no probability below 1."""
    if not 0 <= dropout_p < 1:
        raise ValueError(
            f"dropout_p must lie between 0 and 1, without 1. Got {dropout_p}. "
            "It is the probability that a weight is dropped, not that it is kept."
        )
