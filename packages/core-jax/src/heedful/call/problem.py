"""What an attention call asks for: the contract's home."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np

from heedful.call.arrays import accumulator_of
from heedful.call.operands import Operands
from heedful.call.options import NUMBERS, OPTIONS


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What one attention call asks for: shapes, dtypes and options, no array data. Hashable.

    Calls in other layouts and ranks that are the same attention are the same problem.

    This docstring is the home of the contract. B batch, Hq and Hkv heads, Sq and Sk lengths, D head
    size, Dv value head size; Hq is a multiple of Hkv, and query head h reads key head h // (Hq/Hkv).

        s_ij  = scale · q_i · k_j                    scale defaults to D^-½
        s_ij  = softcap · tanh(s_ij / softcap)       where softcap is given
        s_ij  = score_mod(s_ij, b, h, i, j)          after softcap
        s_ij  = s_ij + bias_ij                       after that
        s_ij  = s_ij − alibi_slopes_h · |p_i − j|    (ALiBi, Press et al. 2022, about any position)
        p_ij  = exp(s_ij − lse_i)                    over the keys j that query i sees
        out_i = Σ_j p_ij v_j                         with dropout: Σ_j p_ij d_ij v_j
        lse_i = log Σ_j exp(s_ij)                    natural log, over the keys seen; with sinks the
                                                     sink's exp(sinks[h]) is part of the sum

    Position: query i stands at p_i = i + q_offset. By default q_offset = kv_length − q_length: the
    last query is aligned with the last key ("bottom-right"), per batch row where lengths are given.
    `causal="top_left"` means q_offset = 0. An explicit q_offset wins over both; without causal, a
    window or ALiBi it would change nothing, and is refused.

    Visibility: query i sees key j when all of these say so:
        causal                     j ≤ p_i
        window=(left, right)       p_i − left ≤ j ≤ p_i + right, a side that is None is open
        q_lengths, kv_lengths      i < q_lengths[b], j < kv_lengths[b]
        q_segment_ids,             q_segment_ids[b, i] = kv_segment_ids[b, j]
        kv_segment_ids
        mask                       True; broadcastable to (B, Hq, Sq, Sk), or, beside q of rank 4,
                                   (B, Sk) for keys alone
        mask_mod                   mask_mod(b, h, i, j) is True

    Functions: score_mod and mask_mod are called once, with numbers that stand for the score and for the
    places of batch row, query head, query and key, counted from 0, and are then part of what is
    computed, as FlexAttention has them. JAX and NumPy callers write them in JAX, torch's in torch. They
    may close over arrays; of those that score_mod closes over, floating ones have gradients. What is
    hidden is not asked of score_mod.

    Leading axes: q of rank 5 and more has several batch axes, and B is their product. Mask, bias,
    lengths and q_offset broadcast over each of them by itself: beside q (B, N, H, S, D) a mask may be
    (B, N, 1, 1, Sk), a bias (B, 1, H, Sq, Sk) and lengths (B, 1).

    A query that sees no key gives out 0, lse −inf and no gradient, whatever stands in K and V; with
    sinks its lse is the sink, whose gradient is lse's. So does one whose every visible key has a bias of
    −inf, if K and V are finite there.

    Dropout: d_ij is 1 / (1 − dropout_rate) or, with that probability, 0; which of them is a function of
    dropout_seed and of b, h, i and j, the numbers of batch row, query head, query and key, that
    `heedful.dropout_mask` documents. So it is the same for every backend, framework and tile size. It
    changes neither lse nor what is visible: a weight is multiplied by 0, and a NaN in V stays one.

    Precision: products accumulate in float32 (float64 for float64); out has q's dtype, lse is float32
    (float64) of shape (B, Hq, Sq) in either layout. out and lse are both differentiable in q, k, v,
    bias, sinks and alibi_slopes.

    Compilation: a problem is what JAX backends compile for. New values of arrays, lengths among them,
    and of q_offset and dropout_seed, numbers or arrays, never compile anew. A new scale, softcap, window
    or dropout_rate does:
    they are constants of a model rather than values of a call, the first two are folded into each
    tile's arithmetic, and the window says which tiles there are. So does another text of score_mod or
    mask_mod; new values of what they close over do not. (On a GPU, a JAX call of a torch
    backend compiles anew for a new number q_offset too: torch would have to wait for the value.)

    Attributes:
        framework: whose arrays the caller passed: "numpy", "jax" or "torch".
        platform: where they lie: "cpu", "gpu" or "tpu" (under a JAX trace: JAX's default).
        dtype: of q, k, v and out.
        batch, q_heads, kv_heads, q_length, kv_length, head_dim, value_dim: B, Hq, Hkv, Sq, Sk, D, Dv.
        scale, softcap: of the scores.
        score_mod, mask_mod: a `Program` or a `TorchFunction` of `heedful.call.functions`.
        block_size: of the blocks of which is known beforehand what mask_mod hides.
        causal: whether j ≤ p_i is asked; which alignment is q_offset's business.
        window: (left, right), or None.
        q_offset: the offset where it is one number known beforehand; None where it comes from the
            operand `q_offset` or from the lengths. 0 where nothing asks for positions.
        q_offset_given: whether the caller gave it; a number `compiled` makes an operand.
        mask_shape, bias_shape, alibi_shape: of the operands in canonical form, or None.
        bias_dtype: of bias, or None.
        q_lengths, kv_lengths, q_segment_ids, kv_segment_ids: whether they are given.
        sinks: whether they are given.
        dropout_rate: the probability that a weight is dropped.
        dropout_seed: where it is one number known beforehand; None where it comes from the operand.
        return_lse: whether lse is asked for.
    """

    framework: str
    platform: str
    dtype: str
    batch: int
    q_heads: int
    kv_heads: int
    q_length: int
    kv_length: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float | None = None
    score_mod: Any = None
    mask_mod: Any = None
    block_size: int | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    q_offset: int | None = 0
    q_offset_given: bool = False
    mask_shape: tuple[int, ...] | None = None
    bias_shape: tuple[int, ...] | None = None
    bias_dtype: str | None = None
    alibi_shape: tuple[int, ...] | None = None
    q_lengths: bool = False
    kv_lengths: bool = False
    q_segment_ids: bool = False
    kv_segment_ids: bool = False
    sinks: bool = False
    dropout_rate: float = 0.0
    dropout_seed: int | None = None
    return_lse: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one key head: Hq / Hkv."""
        return self.q_heads // self.kv_heads

    @property
    def score_count(self) -> int:
        """How many scores there are, B · Hq · Sq · Sk: what materialised attention holds."""
        return self.batch * self.q_heads * self.q_length * self.kv_length

    @property
    def band(self) -> tuple[int | None, int | None]:
        """(left, right): p_i − left ≤ j ≤ p_i + right is what causal and window ask together."""
        left, right = self.window or (None, None)
        return left, 0 if self.causal else right

    @property
    def positional(self) -> bool:
        """Whether the place of a query matters at all: causal, a window or ALiBi."""
        return self.alibi_shape is not None or self.band != (None, None)

    @property
    def functions(self) -> dict[str, Any]:
        """The options that are functions, by name."""
        given = {"score_mod": self.score_mod, "mask_mod": self.mask_mod}
        return {name: x for name, x in given.items() if x is not None}

    @property
    def accumulator(self) -> str:
        """The dtype that products accumulate in, which is also the dtype of lse."""
        return accumulator_of(self.dtype)

    @property
    def of_shapes(self) -> dict[str, str]:
        """What the shapes ask for beyond plain attention, and the sizes that ask for it."""
        found = {}
        if self.group != 1:
            found["grouped_heads"] = f"{self.q_heads} query heads on {self.kv_heads} key heads"
        if self.value_dim != self.head_dim:
            found["value_dim"] = f"Dv = {self.value_dim}, D = {self.head_dim}"
        return found

    @property
    def features(self) -> frozenset[str]:
        """All that is asked beyond plain attention: names of options, and what `of_shapes` names."""
        return _features(self)

    @property
    def compiled(self) -> Self:
        """This problem as JAX compiles it: without the numbers that `as_operand` makes operands."""
        nothing: dict[str, Any] = dict.fromkeys(self._numbers)
        return replace(self, **nothing) if nothing else self

    def as_operand(self, operands: Operands) -> Operands:
        """The operands of `compiled`: the caller's own numbers are values, and none compiles anew.

        They are NumPy arrays, which are plain arguments to JAX and on no device.
        """
        if not self._numbers:
            return operands
        return operands._replace(
            **{name: np.array([x], np.int32) for name, x in self._numbers.items()}
        )

    def as_number(self, operands: Operands) -> tuple[Self, Operands]:
        """Undoes `compiled` and `as_operand`, for a backend that reads values and compiles nothing.

        It waits for the operands, so those should lie in the host's memory.
        """
        found: dict[str, Any] = {}
        for name in NUMBERS:
            x = getattr(operands, name)
            if x is not None and x.shape == (1,):
                found[name] = int(x[0])
        if not found:
            return self, operands
        return replace(self, **found), operands._replace(**dict.fromkeys(found))

    @property
    def _numbers(self) -> dict[str, int]:
        """The options that the caller gave as numbers and that may be arrays."""
        given = {"q_offset": self.q_offset if self.q_offset_given else None}
        given["dropout_seed"] = self.dropout_seed
        return {name: x for name, x in given.items() if x is not None}


@lru_cache(128)  # every option is asked, and every call of one problem asks for them
def _features(problem: Problem) -> frozenset[str]:
    asked = [option.name for option in OPTIONS if option.asked(problem)]
    return frozenset([*asked, *problem.of_shapes])
