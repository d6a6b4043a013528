"""flash-attn's functions of packed sequences, each a call of `heedful.flash_attention_varlen`.

That takes JAX's arrays, and the bridge carries torch's there and the gradients back: the JAX flash core
computes, whatever `heedful.use_backend` says. No argument is ignored: what it cannot do is refused.
"""

from dataclasses import dataclass
from typing import Any

import jax
import torch
from torch import Tensor

import heedful
from heedful.call.arrays import is_concrete_on_cpu
from heedful.varlen import check_packed
from heedful_torch.autograd import jax_in_torch
from heedful_torch.flash_attn.arguments import (
    OPEN,
    Results,
    Window,
    capped_at,
    check_dropout_p,
    check_rank,
    slopes,
    unpacked,
    window,
)
from heedful_torch.flash_attn.rows import check_rows, check_table, packed
from heedful_torch.function import outside_compilation
from heedful_torch.module_call import drawn_seed


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (OPEN, OPEN),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Results:
    """Attention within each of many sequences, packed one behind the other, as flash-attn means it.

    Sequence n has the queries cu_seqlens_q[n] … cu_seqlens_q[n + 1] − 1 and the keys likewise; its last
    query is aligned with its last key. Lengths are values: no new ones compile anew.

    Args:
        q: queries, (total_q, Hq, D).
        k: keys, (total_k, Hkv, D), Hq a multiple of Hkv; with a block table (pages, page size, Hkv, D),
            pages of any size.
        v: values, likewise.
        cu_seqlens_q: (sequences + 1,) integers, where each sequence's queries begin, and where the last
            ones end.
        cu_seqlens_k: (sequences + 1,) integers, the same of keys.
        max_seqlen_q, max_seqlen_k: no sequence is longer, which is checked on a CPU and serves nothing
            else: nothing is padded.
        dropout_p: as in `flash_attn_func`, but for which weights `heedful.dropout_mask` is asked: see
            `heedful.flash_attention_varlen`.
        softmax_scale, causal, window_size, softcap: as in `flash_attn_func`.
        alibi_slopes: float32, (Hq,), or (sequences, Hq), in each sequence its own.
        deterministic: True or False: gradients are the same, bit for bit, each time.
        return_attn_probs: whether to return the log-sum-exp too.
        block_table: (sequences, blocks), the pages that hold a sequence's keys and values, in order. All
            their room is gathered into one tensor at each call. Differentiable, which it is not there.

    Returns:
        out (total_q, Hq, D); with `return_attn_probs` (out, softmax_lse, S_dmask). softmax_lse,
        (Hq, total_q), float32 (float64 for float64), is differentiable, and −inf where a query sees no
        key. S_dmask is None.

    Raises:
        TypeError, ValueError: an argument is none of those above; says what came and how to mend it.
        Refusal: the flash core cannot honour the call; says why.
    """
    check_dropout_p(dropout_p)
    call = _Varlen(
        causal=causal,
        window=window(window_size),
        scale=softmax_scale,
        softcap=capped_at(softcap),
        dropout_rate=dropout_p,
        with_slopes=alibi_slopes is not None,
    )
    longest = max_seqlen_q, max_seqlen_k
    cumulated = cu_seqlens_q, cu_seqlens_k
    out, lse = _computed(call, longest, q, k, v, cumulated, slopes(alibi_slopes, q), block_table)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (OPEN, OPEN),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_varlen_func` of keys and values in one tensor, `kv` (total_k, 2, Hkv, D).

    Its slices are copied, and a `CopyWarning` says so.
    """
    k, v = unpacked("kv", kv, 2, "total_k")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (OPEN, OPEN),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_varlen_func` of queries, keys and values in one tensor, `qkv` (total, 3, H, D).

    Its slices are copied, and a `CopyWarning` says so.
    """
    q, k, v = unpacked("qkv", qkv, 3, "total")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@dataclass(frozen=True)
class _Varlen:
    """`heedful.flash_attention_varlen` with its options, as a function of its arrays.

    Equal ones are equal functions, which JAX compiles once.
    """

    causal: bool
    window: tuple[int | None, int | None] | None
    scale: float | None
    softcap: float | None
    dropout_rate: float
    with_slopes: bool

    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        of_tokens, rest = arrays[:5], list(arrays[5:])
        options: dict[str, Any] = {
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
        }
        if self.with_slopes:
            options["alibi_slopes"] = rest.pop(0)
        if self.dropout_rate:
            options |= {"dropout_rate": self.dropout_rate, "dropout_seed": rest.pop(0)}
        return heedful.flash_attention_varlen(*of_tokens, **options)


# Compiled, the draw of a seed would be another one.
@outside_compilation
def _computed(
    call: _Varlen,
    longest: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cumulated: tuple[Tensor, Tensor],
    slopes: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Tensor, ...]:
    if block_table is not None:
        k, v = _off_pages(k, v, block_table, cumulated[1])
    # JAX, which traces, is shown no values.
    check_packed(q, k, v, *cumulated)
    for name, cu_seqlens, most in zip("qk", cumulated, longest, strict=True):
        _check_longest(name, cu_seqlens, most)
    tensors = [q, k, v, *(x.int() for x in cumulated)]
    if slopes is not None:
        tensors.append(slopes)
    if call.dropout_rate:
        tensors.append(torch.tensor(drawn_seed(q), dtype=torch.int32, device=q.device))
    return jax_in_torch(call, copy=None)(*tensors)


def _off_pages(
    k: Tensor, v: Tensor, block_table: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor]:
    """Packed keys and values."""
    for name, pages in (("k", k), ("v", v)):
        check_rank(name, pages, "(pages, page size, H, D)")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(
            "k and v must have as many pages of the same size. "
            f"Got {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if cu_seqlens_k.ndim != 1:
        raise ValueError(
            f"cu_seqlens_k must be of shape (sequences + 1,). Got {tuple(cu_seqlens_k.shape)}."
        )
    check_table(block_table, len(cu_seqlens_k) - 1)
    lengths, room = cu_seqlens_k.diff(), block_table.shape[1] * k.shape[1]
    if len(lengths) and is_concrete_on_cpu(lengths) and (longest := int(lengths.max())) > room:
        raise ValueError(
            f"no sequence of cu_seqlens_k must be longer than its pages have room for, {room} tokens. "
            f"Got {longest}. Give block_table more blocks."
        )
    check_rows(k, lengths, None, block_table)
    return packed(k, block_table, cu_seqlens_k), packed(v, block_table, cu_seqlens_k)


def _check_longest(name: str, cumulated: Tensor, most: int) -> None:
    if len(cumulated) > 1 and is_concrete_on_cpu(cumulated):
        longest = int(cumulated.diff().max())
        if longest > most:
            raise ValueError(
                f"max_seqlen_{name} must be no less than the longest sequence of cu_seqlens_{name}, of "
                f"{longest} tokens. Got {most}."
            )
