"""flash-attn's functions of dense sequences, each a call of `heedful.attention`.

Which backend computes is said from outside, by `heedful.use_backend` or HEEDFUL_BACKEND: no argument of
flash-attn's says it. No argument is ignored: what no backend can do is refused.
"""

from typing import Any

from torch import Tensor

import heedful
from heedful import dispatch
from heedful.call import Call
from heedful_torch import module_call
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
from heedful_torch.function import outside_compilation


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (OPEN, OPEN),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """Attention as flash-attn's function of this name means it.

    Query i stands at p_i = i + Sk − Sq among the keys, in causal, window and ALiBi alike. Beyond what
    flash-attn takes, float32, float64 and values of a head size of their own are left to the backend.

    Args:
        q: queries, (B, Sq, Hq, D).
        k: keys, (B, Sk, Hkv, D), Hq a multiple of Hkv.
        v: values, (B, Sk, Hkv, D).
        dropout_p: the probability, below 1, with which a softmax weight is dropped; the others are
            multiplied by 1 / (1 − dropout_p). Which ones, `heedful.dropout_mask` says of a seed that is
            drawn at each call from torch's default generator of CPU: `torch.manual_seed` repeats it, and
            so does `torch.utils.checkpoint`. torch.compile breaks its graph to draw it.
        softmax_scale: factor of the scores, D^-½ by default.
        causal: whether a query sees no key beyond p_i.
        window_size: (left, right), how many keys each side of p_i it sees, a pair or a tensor of two; −1
            is an open side.
        softcap: c of c·tanh(s/c); none where it is not positive.
        alibi_slopes: float32, (Hq,) or (B, Hq): slope · |p_i − j| is taken off the scores.
        deterministic: whether a backend is refused that does not claim that its gradients are the same,
            bit for bit, each time; torch.compile breaks its graph to ask.
        return_attn_probs: whether to return the log-sum-exp too.

    Returns:
        out (B, Sq, Hq, D); with `return_attn_probs` (out, softmax_lse, S_dmask). softmax_lse, of shape
        (B, Hq, Sq), float32 (float64 for float64), is that of the scores above, differentiable, and −inf
        where a query sees no key. (flash-attn drops its gradient, gives +inf or 0 there, and, by the
        source of its CUDA kernels, slope · p_i more in a causal call with slopes.) It is that of all
        weights, dropped or not. S_dmask, which in flash-attn shows what was dropped, is None, always.

    Raises:
        TypeError, ValueError: an argument is none of those above; says what came and how to mend it.
        Refusal: no backend that was asked can honour the call; says every reason.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, "(B, S, H, D)")
    check_dropout_p(dropout_p)
    options: dict[str, Any] = {
        "causal": causal,
        "window": window(window_size),
        "softcap": capped_at(softcap),
        "scale": softmax_scale,
        "alibi_slopes": slopes(alibi_slopes, q),
        "layout": "bshd",
        "return_lse": return_attn_probs,
    }
    if deterministic:
        asked = {**options, "dropout_rate": dropout_p, "dropout_seed": 0}  # any seed
        _refuse_what_is_not_deterministic(q, k, v, asked)
    results = module_call.attention(q, k, v, dropout_p, options)
    return (*results, None) if return_attn_probs else results


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (OPEN, OPEN),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_func` of keys and values in one tensor, `kv` (B, Sk, 2, Hkv, D).

    A backend of JAX copies its slices, and a `CopyWarning` says so.
    """
    k, v = unpacked("kv", kv, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (OPEN, OPEN),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_func` of queries, keys and values in one tensor, `qkv` (B, S, 3, H, D).

    A backend of JAX copies its slices, and a `CopyWarning` says so.
    """
    q, k, v = unpacked("qkv", qkv, 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


@outside_compilation
def _refuse_what_is_not_deterministic(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> None:
    chosen = dispatch.would_choose(Call.of(q, k, v, **options).problem)
    if not getattr(chosen, "deterministic", False):
        why = "does not claim that its gradients are the same, bit for bit, each time"
        raise heedful.Refusal(
            f"{chosen.name} {why}, which deterministic=True asks for. Leave it out, or choose another "
            'backend around the call: with heedful.use_backend("jax:flash").',
            {chosen.name: (why,)},
        )
