"""What flash-attn 2 is called by: the functions that its public `flash_attn_func` is made of.

Where lengths are given, `flash_attn_varlen_func`. Not by these ones themselves, whose derivatives drop
the cotangent of the LSE that they return: what they are made of lets the contract around a kernel mend
that. A test shows that out and gradients are the same, bit for bit.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from heedful_torch.backends.flash_attn import window
from heedful_torch.backends.flash_attn.packed import Packing
from heedful_torch.backends.kernel import Arguments, How, Results
from heedful_torch.backends.parts import keys_within, queries_within

NO_DROPOUT = 0.0
NO_PROBABILITIES = False


def forward(asked: Arguments) -> Results:
    """out and lse of (B, H, S, D) tensors."""
    from flash_attn import flash_attn_interface  # type: ignore[import-not-found]  # an extra

    if asked.parts is not None:
        return _forward_packed(asked)
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

    if asked.parts is not None:
        return _backward_packed(dout, asked, results)
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


class _Packed(NamedTuple):
    """A call of packed sequences, a sequence for each row's part.

    Attributes:
        queries, keys: how they are packed.
        arrays: q, k, v.
        ends: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k.
        told: as `_told` has it.
    """

    queries: Packing
    keys: Packing
    arrays: tuple[Tensor, ...]
    ends: tuple[Tensor, Tensor, int, int]
    told: tuple[Any, ...]

    @classmethod
    def of(cls, asked: Arguments) -> "_Packed":
        q, k, v, _, parts, how = asked
        assert parts is not None
        q_length, kv_length = q.shape[2], k.shape[2]
        queries = Packing.of(queries_within(parts, q_length).squeeze(1))
        keys = Packing.of(keys_within(parts, kv_length).squeeze(1))
        # Told of a longest one of 1 query, the CUDA kernels take each sequence for exactly one.
        longest = max(2, q_length), kv_length
        return cls(
            queries,
            keys,
            (queries.pack(q), keys.pack(k), keys.pack(v)),
            (queries.cumulated, keys.cumulated, *longest),
            _told(how, q.transpose(1, 2), k.transpose(1, 2)),
        )


def _forward_packed(asked: Arguments) -> Results:
    from flash_attn import flash_attn_interface

    packed = _Packed.of(asked)
    out, lse, _, _ = flash_attn_interface._flash_attn_varlen_forward(
        *packed.arrays,
        *packed.ends,
        NO_DROPOUT,
        *packed.told,
        alibi_slopes=_slopes(asked),
        zero_tensors=True,  # else rows of no sequence are memory that nobody wrote
    )
    return Results(packed.queries.unpack(out), packed.queries.unpack(lse.T))


def _backward_packed(
    dout: Tensor, asked: Arguments, results: Results
) -> tuple[Tensor, Tensor, Tensor, None]:
    from flash_attn import flash_attn_interface

    packed = _Packed.of(asked)
    assert results.lse is not None
    dout, out, lse = map(packed.queries.pack, (dout, results.out, results.lse))
    gradients = tuple(map(torch.empty_like, packed.arrays))
    flash_attn_interface._flash_attn_varlen_backward(
        dout,
        *packed.arrays,
        *(out, lse.T.contiguous()),
        *gradients,
        *packed.ends,
        NO_DROPOUT,
        *packed.told,
        alibi_slopes=_slopes(asked),
        deterministic=False,
        zero_tensors=True,
    )
    dq, dk, dv = gradients
    return packed.queries.unpack(dq), packed.keys.unpack(dk), packed.keys.unpack(dv), None


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
