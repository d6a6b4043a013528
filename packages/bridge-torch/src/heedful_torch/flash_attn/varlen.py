"""flash-attn's functions of packed sequences, each a call of `heedful.flash_attention_varlen`.

That takes JAX's arrays, and the bridge carries torch's there and the gradients back: the JAX flash core
computes, whatever `heedful.use_backend` says. No argument is ignored: what it cannot do is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from torch import Tensor

import heedful
from heedful.call.arrays import is_concrete_on_cpu
from heedful.varlen import check_packed
from heedful_torch.autograd import jax_in_torch
from heedful_torch.flash_attn.arguments import OPEN, Results, capped_at, slopes, unpacked, window
from heedful_torch.function import outside_compilation


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
    window_size: Sequence[int] = (OPEN, OPEN),
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
        k: keys, (total_k, Hkv, D), Hq a multiple of Hkv.
        v: values, (total_k, Hkv, D).
        cu_seqlens_q: (sequences + 1,) integers, where each sequence's queries begin, and where the last
            ones end.
        cu_seqlens_k: (sequences + 1,) integers, the same of keys.
        max_seqlen_q, max_seqlen_k: no sequence is longer, which is checked on a CPU and serves nothing
            else: nothing is padded.
        dropout_p: 0.0; there is no dropout of packed sequences yet.
        softmax_scale, causal, window_size, softcap: as in `flash_attn_func`.
        alibi_slopes: float32, (Hq,), the same in all sequences.
        deterministic: True or False: gradients are the same, bit for bit, each time.
        return_attn_probs: whether to return the log-sum-exp too.
        block_table: None; pages are `flash_attn_with_kvcache`'s.

    Returns:
        out (total_q, Hq, D); with `return_attn_probs` (out, softmax_lse, S_dmask). softmax_lse,
        (Hq, total_q), float32 (float64 for float64), is differentiable, and −inf where a query sees no
        key. S_dmask is None.

    Raises:
        NotImplementedError: dropout, a block table or slopes for each sequence are asked for.
        TypeError, ValueError: an argument is none of those above; says what came and how to mend it.
        Refusal: the flash core cannot honour the call; says why.
    """
    if dropout_p != 0:
        raise NotImplementedError(
            f"heedful has no dropout of packed sequences yet: dropout_p must be 0.0. Got {dropout_p}. "
            "Pad them (bert_padding.pad_input), and call flash_attn_func, which has."
        )
    if block_table is not None:
        raise NotImplementedError(
            "flash_attn_varlen_func takes no pages: block_table must be None. Got a tensor. "
            "flash_attn_with_kvcache takes them, a batch row for each sequence."
        )
    if alibi_slopes is not None and alibi_slopes.ndim == 2:
        raise NotImplementedError(
            "alibi_slopes must be (Hq,), the same in all sequences. "
            f"Got {tuple(alibi_slopes.shape)}, for each sequence its own."
        )
    call = _Varlen(causal, window(window_size), softmax_scale, capped_at(softcap))
    longest = max_seqlen_q, max_seqlen_k
    out, lse = _computed(
        call, longest, q, k, v, cu_seqlens_q, cu_seqlens_k, slopes(alibi_slopes, q)
    )
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
    window_size: Sequence[int] = (OPEN, OPEN),
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
    window_size: Sequence[int] = (OPEN, OPEN),
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

    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        *of_tokens, slopes = arrays if len(arrays) == 6 else (*arrays, None)
        options: dict[str, Any] = {
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
        }
        return heedful.flash_attention_varlen(*of_tokens, **options, alibi_slopes=slopes)


@outside_compilation
def _computed(
    call: _Varlen,
    longest: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    slopes: Tensor | None,
) -> tuple[Tensor, ...]:
    # JAX, which traces, is shown no values.
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    for name, cumulated, most in zip("qk", (cu_seqlens_q, cu_seqlens_k), longest, strict=True):
        _check_longest(name, cumulated, most)
    tensors = q, k, v, cu_seqlens_q.int(), cu_seqlens_k.int()
    return jax_in_torch(call, copy=None)(*tensors, *(() if slopes is None else (slopes,)))


def _check_longest(name: str, cumulated: Tensor, most: int) -> None:
    if len(cumulated) > 1 and is_concrete_on_cpu(cumulated):
        longest = int(cumulated.diff().max())
        if longest > most:
            raise ValueError(
                f"max_seqlen_{name} must be no less than the longest sequence of cu_seqlens_{name}, of "
                f"{longest} tokens. Got {most}."
            )
