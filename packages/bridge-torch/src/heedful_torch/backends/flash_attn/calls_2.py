"""What flash-attn 2 is called by: the two functions that its public `flash_attn_func` is made of.

Not by that one itself, whose derivative drops the cotangent of the LSE that it returns: these let the
contract around a kernel mend that. A test shows that out and gradients are the same, bit for bit.
"""

from typing import Any

import torch
from torch import Tensor

from heedful_torch.backends.flash_attn import window
from heedful_torch.backends.kernel import Arguments, How, Results

NO_DROPOUT = 0.0
NO_PROBABILITIES = False


def forward(asked: Arguments) -> Results:
    """out and lse of (B, H, S, D) tensors."""
    from flash_attn import flash_attn_interface  # type: ignore[import-not-found]  # an extra

    q, k, v = (x.transpose(1, 2) for x in asked[:3])
    out, lse, _, _ = flash_attn_interface._flash_attn_forward(
        q, k, v, NO_DROPOUT, *_told(asked.how, q, k), _slopes(asked), NO_PROBABILITIES
    )
    return Results(out.transpose(1, 2), lse)


def backward(
    dout: Tensor, asked: Arguments, results: Results, mask_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    """dq, dk, dv."""
    from flash_attn import flash_attn_interface

    q, k, v, dout, out = (x.transpose(1, 2) for x in (*asked[:3], dout, results.out))
    gradients = tuple(map(torch.empty_like, (q, k, v)))
    flash_attn_interface._flash_attn_backward(
        dout,
        *(q, k, v, out, results.lse),
        *gradients,
        NO_DROPOUT,
        *_told(asked.how, q, k),
        _slopes(asked),
        deterministic=False,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv, None


def _told(how: How, q: Tensor, k: Tensor) -> tuple[Any, ...]:
    """softmax_scale, causal, window_size_left, window_size_right and softcap, −1 and 0.0 being none."""
    causal, *sides = window(how, q, k)
    left, right = (-1 if side is None else side for side in sides)
    return how.scale, causal, left, right, how.softcap or 0.0


def _slopes(asked: Arguments) -> Tensor | None:
    """ALiBi's, as its Triton kernels want them too: (B, Hq), in rows."""
    if asked.mask is None:
        return None
    return asked.mask.expand(len(asked.q), -1, -1, -1).flatten(1).contiguous()
