"""The arrays of one call, as every backend sees them."""

from typing import NamedTuple

from heedful.call.arrays import Array


class Operands(NamedTuple):
    """The arrays of one call in canonical form, all of one framework; a JAX pytree.

    Attributes:
        q: (B, Hq, Sq, D).
        k: (B, Hkv, Sk, D).
        v: (B, Hkv, Sk, Dv).
        mask: boolean, rank 4, each axis full or 1 of (B, Hq, Sq, Sk); True = visible.
        bias: floating, rank 4, each axis full or 1 of (B, Hq, Sq, Sk).
        q_lengths: int32, (B,).
        kv_lengths: int32, (B,).
        q_offset: int32, (B,) or (1,); only where the problem holds no number.
    """

    q: Array
    k: Array
    v: Array
    mask: Array | None = None
    bias: Array | None = None
    q_lengths: Array | None = None
    kv_lengths: Array | None = None
    q_offset: Array | None = None
