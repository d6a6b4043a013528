"""Rows of a batch packed one behind the other, as flash-attn's varlen functions read them.

Those cannot read padded rows in place: they are told where each sequence ends, and there the next one
begins. So the queries and keys that attend are gathered in front, those that do not behind them, where
no sequence is: how long the arrays are depends on no value, and nothing waits for the lengths. What is
packed is copied: q, k and v going forward, and with dout and out again going back.
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Packing(NamedTuple):
    """Of a batch of B rows, of S queries or keys each.

    Attributes:
        rows, places: (B · S,), of what is packed the batch row and the place in it.
        back: (B · S,), of each place of each row where it is packed.
        cumulated: (B + 1,), int32, where each row's begin, then where the last one's end.
    """

    rows: Tensor
    places: Tensor
    back: Tensor
    cumulated: Tensor

    @classmethod
    def of(cls, within: Tensor) -> Self:
        """That takes, of each row, what is within: (B, S), boolean."""
        order = torch.argsort((~within).flatten().to(torch.uint8), stable=True)
        cumulated = F.pad(within.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        length = within.shape[1]
        return cls(order // length, order % length, torch.argsort(order), cumulated)

    def pack(self, x: Tensor) -> Tensor:
        """(B, H, S, …) → (B · S, H, …)."""
        return x[self.rows, :, self.places]

    def unpack(self, x: Tensor) -> Tensor:
        """(B · S, H, …) → (B, H, S, …)."""
        batch = len(self.cumulated) - 1
        return x[self.back].view(batch, -1, *x.shape[1:]).transpose(1, 2)
