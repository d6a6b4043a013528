"""The arrays of one call, as every backend sees them."""

from typing import NamedTuple

from heedful.call.arrays import Array
from heedful.call.options import DIFFERENTIABLE


class Operands(NamedTuple):
    """The arrays of one call in canonical form, all of one framework; a JAX pytree.

    Gradients come as the same thing: of each array that has one its gradient, None for the others. All
    but q, k, v and the lengths broadcast beside the scores: rank 4, each axis full or 1 of
    (B, Hq, Sq, Sk).

    Attributes:
        q: (B, Hq, Sq, D).
        k: (B, Hkv, Sk, D).
        v: (B, Hkv, Sk, Dv).
        mask: boolean, over the scores; True = visible.
        bias: floating, over the scores.
        q_lengths: int32, (B,).
        kv_lengths: int32, (B,).
        q_offset: int32, (B,) or (1,); only where the problem holds no number. For `jax:flash` and
            `jax:plain` also (B or 1, 1, Sq, 1), one for each query, which packed sequences need.
        q_segment_ids: int32, (B, 1, Sq, 1).
        kv_segment_ids: int32, (B, 1, 1, Sk).
        sinks: floating, (1, Hq, 1, 1).
        alibi_slopes: floating, (B or 1, Hq, 1, 1); as q_offset also (1, Hq, Sq, 1).
        dropout_seed: int32, (B,) or (1,); only where the problem holds no number.
        floats, words: (1 or B, 1, ·), what the problem's functions close over (see `call.functions`):
            of the accumulator's dtype, and int32.
        blocks: int8, (1 or B, 1 or Hq, ·, ·), of each block of `block_size` queries and keys whether
            nothing of it is seen (0), some (1) or all (2).
    """

    q: Array
    k: Array
    v: Array
    mask: Array | None = None
    bias: Array | None = None
    q_lengths: Array | None = None
    kv_lengths: Array | None = None
    q_offset: Array | None = None
    q_segment_ids: Array | None = None
    kv_segment_ids: Array | None = None
    sinks: Array | None = None
    alibi_slopes: Array | None = None
    dropout_seed: Array | None = None
    floats: Array | None = None
    words: Array | None = None
    blocks: Array | None = None

    @property
    def given(self) -> dict[str, Array]:
        """Those that there are, by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}

    @property
    def differentiable(self) -> dict[str, Array]:
        """Those of them that have gradients, by name."""
        return {name: x for name, x in self.given.items() if name in DIFFERENTIABLE}

    @property
    def over_scores(self) -> dict[str, Array]:
        """Those of them that broadcast beside the scores, by name."""
        beside = ("q", "k", "v", "blocks")
        return {n: x for n, x in self.given.items() if n not in beside and len(x.shape) == 4}

    @property
    def added(self) -> dict[str, Array]:
        """Those beside q, k and v that have gradients, by name."""
        return {n: x for n, x in self.differentiable.items() if n not in "qkv"}
