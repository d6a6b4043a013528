"""The caller's rank, layout and leading axes: the only place that knows them."""

import math
from dataclasses import dataclass

from heedful.call.arrays import Array, as_int32, broadcast_to

LAYOUTS = ("bhsd", "bshd")


@dataclass(frozen=True)
class Form:
    """How a caller's arrays are laid out, and the way to canonical (B, H, S, D) and back.

    All of it is views, where strides allow. Calls that differ in form alone are the same `Problem`.

    Attributes:
        rank: of q, k and v.
        layout: of q, k, v and out: "bhsd" or "bshd".
        lead: the leading axes, of which B is the product; () for rank 2 and 3.
    """

    rank: int
    layout: str
    lead: tuple[int, ...]

    @property
    def batch(self) -> int:
        return math.prod(self.lead)

    @property
    def heads_last(self) -> bool:
        """Whether the heads stand behind the sequence."""
        return self.layout == "bshd" and self.rank > 2

    @property
    def tokens_axis(self) -> int:
        """Where the sequence stands in q, k and v."""
        return self.rank - (3 if self.heads_last else 2)

    def heads(self, x: Array) -> Array:
        """q, k or v: (*lead, H, S, D), (*lead, S, H, D) or (S, D) → (B, H, S, D)."""
        if self.rank == 2:
            return x.reshape(1, 1, *x.shape)
        if self.heads_last:
            x = x.swapaxes(-3, -2)
        return x if self.rank == 4 else x.reshape(self.batch, *x.shape[-3:])

    def scores(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Something broadcastable to (*lead, Hq, Sq, Sk), or of (B, Sk) → its canonical shape.

        Where it has some of several leading axes and not the others, those are materialised.
        """
        if shape[0] != 1 and math.prod(x.shape[:-3]) != shape[0] and x.shape != shape[::3]:
            x = broadcast_to(x, (*self.lead, *shape[1:]))
        return x.reshape(shape)

    def rows(self, x: Array, or_one: bool = False) -> Array:
        """Integers broadcastable to the leading axes → int32 (B,), or (1,) where one may stand for all.

        In the narrow or unsigned types that they may come in, their differences would wrap.
        """
        if not (or_one and math.prod(x.shape) == 1):
            x = broadcast_to(x, self.lead or (1,))
        return as_int32(x.reshape(-1))

    def tokens(self, x: Array, length: int) -> Array:
        """Integers broadcastable to (*lead, length) → int32 (B, length)."""
        return as_int32(broadcast_to(x, (*self.lead, length)).reshape(self.batch, length))

    def out(self, x: Array) -> Array:
        """(B, Hq, Sq, Dv) → what the caller gets."""
        if self.rank == 2:
            return x.reshape(x.shape[-2:])
        if self.rank != 4:
            x = x.reshape(*self.lead, *x.shape[-3:])
        return x.swapaxes(-3, -2) if self.heads_last else x

    def lse(self, x: Array) -> Array:
        """(B, Hq, Sq) → what the caller gets, in either layout."""
        if self.rank == 4:
            return x
        return x.reshape(*self.lead, *x.shape[(2 if self.rank == 2 else 1) :])
