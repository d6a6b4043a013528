"""flash-attn's function of a cache: what is new is written in place, then `heedful.attention` called."""

from typing import Any

import torch
from torch import Tensor

import heedful
from heedful import dispatch
from heedful.call import Call
from heedful.call.arrays import is_concrete_on_cpu
from heedful_torch.flash_attn.arguments import (
    OPEN,
    Window,
    capped_at,
    check_rank,
    slopes,
    window,
)
from heedful_torch.flash_attn.rows import append, check_rows, check_table, like_rows, rows


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (OPEN, OPEN),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache, to which new keys and values are appended first, in place.

    As flash-attn's function of this name means it. Row b holds cache_seqlens[b] tokens and then the new
    ones, and its queries are the last of all these. Without gradients, as there. Pages, and rows that
    `cache_batch_idx` picks, are gathered into one tensor of all their room at each call;
    `heedful.decode`, for JAX arrays, gathers no more than a chunk at a time.

    Args:
        q: queries, (B, Sq, Hq, D).
        k_cache: keys, (rows, room, Hkv, D); with a block table (pages, page size, Hkv, D), of any size.
        v_cache: values, likewise.
        k: new keys, (B, Snew, Hkv, D), written to places cache_seqlens[b] … of row b.
        v: new values, (B, Snew, Hkv, D).
        rotary_cos, rotary_sin: (positions, R / 2), of q's dtype, no fewer positions than there is room.
            The first R numbers of a new key are rotated by its place, those of query i by
            cache_seqlens[b] + i with causal or a window, else by cache_seqlens[b].
        cache_seqlens: how many tokens each row holds without the new ones, an int or (B,); by default,
            and only without k and v, all of the room.
        cache_batch_idx: (B,), which row of the caches each row of q is; not with a block table.
        cache_leftpad: (B,), how many of each row's tokens are padding, in front, which nobody sees. They
            are counted in cache_seqlens and keep their places. With a block table too, which flash-attn
            refuses.
        block_table: (B, blocks), the pages that hold a row's tokens, in order.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        rotary_interleaved: whether numbers 2n and 2n + 1 are rotated together, or n and n + R / 2.
        num_splits: into how many parts flash-attn divides a row's keys for its processors, 0 to let it
            choose. The answer is the same; here it is checked, and no backend is told.
        return_softmax_lse: whether to return the log-sum-exp too.

    Returns:
        out (B, Sq, Hq, D), or (out, softmax_lse), (B, Hq, Sq), float32, −inf where a row holds nothing.

    Raises:
        NotImplementedError: gradients are asked for.
        TypeError, ValueError: an argument is none of those above; says what came and how to mend it.
        Refusal: no backend that was asked can honour the call; says every reason.
    """
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    tensors = {name: x for name, x in given.items() if x is not None}
    for name, x in tensors.items():
        check_rank(name, x, "(B, S, H, D)")
    _refuse_gradients(tensors)
    if not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(
            f"num_splits must be an integer of at least 0. Got {num_splits!r}. 0 leaves the choice open."
        )
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError(
                "a block table says which pages are a row's, so cache_batch_idx says nothing. Got both. "
                "Pass block_table[cache_batch_idx]."
            )
        check_table(block_table, q.shape[0])
    room = k_cache.shape[1] * (block_table.shape[1] if block_table is not None else 1)
    new = 0 if k is None else k.shape[1]
    if (k is None) != (v is None):
        raise ValueError("k and v are appended together. Got one without the other.")
    before = _lengths(cache_seqlens, q, room, new, appends=k is not None)
    mask = None
    if cache_leftpad is not None:
        mask = _behind_the_padding(cache_leftpad, before + new, room)
    band = window(window_size)
    moving = causal or band is not None
    if rotary_cos is not None or rotary_sin is not None:
        _check_rotary(rotary_cos, rotary_sin, q, k, before, room, moving)
    options: dict[str, Any] = {
        "kv_lengths": before + new,
        "mask": mask,
        "causal": causal,
        "window": band,
        "softcap": capped_at(softcap),
        "scale": softmax_scale,
        "alibi_slopes": slopes(alibi_slopes, q),
        "layout": "bshd",
        "return_lse": return_softmax_lse,
    }
    # All that can be refused is, before anything is written.
    for name, cache, added in (("k", k_cache, k), ("v", v_cache, v)):
        if added is not None:
            _check_new(name, cache, added, q.shape[0], new)
    check_rows(k_cache, before + new, cache_batch_idx, block_table)
    like = (like_rows(x, q.shape[0], cache_batch_idx, block_table) for x in (k_cache, v_cache))
    dispatch.would_choose(Call.of(q, *like, **options).problem)
    with torch.no_grad():
        if k is not None and v is not None:
            if rotary_cos is not None and rotary_sin is not None:
                k = _rotated(k, before, rotary_cos, rotary_sin, rotary_interleaved, moving=True)
                q = _rotated(q, before, rotary_cos, rotary_sin, rotary_interleaved, moving=moving)
            places = before[:, None] + torch.arange(new, device=q.device)
            for cache, x in ((k_cache, k), (v_cache, v)):
                append(cache, x, places, cache_batch_idx, block_table)
        keys, values = (
            rows(x, q.shape[0], cache_batch_idx, block_table) for x in (k_cache, v_cache)
        )
        results: Tensor | tuple[Tensor, Tensor] = heedful.attention(q, keys, values, **options)
    return results


def _refuse_gradients(tensors: dict[str, Tensor]) -> None:
    moving = [name for name, x in tensors.items() if x.requires_grad]
    if moving and torch.is_grad_enabled():
        raise NotImplementedError(
            f"flash_attn_with_kvcache has no gradients. Got {', '.join(moving)} that require them. "
            "Call it within torch.no_grad(), or call flash_attn_func."
        )


def _behind_the_padding(cache_leftpad: Tensor, lengths: Tensor, room: int) -> Tensor:
    """Which places of a row are no padding on the left, (B, 1, 1, room)."""
    _check_of_rows("cache_leftpad", cache_leftpad, lengths)
    if is_concrete_on_cpu(cache_leftpad) and is_concrete_on_cpu(lengths):
        wrong = (cache_leftpad < 0) | (cache_leftpad > lengths)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"cache_leftpad must lie between 0 and what each row holds with the new tokens. Got "
                f"{int(cache_leftpad[row])} for row {row}, which holds {int(lengths[row])}."
            )
    places = torch.arange(room, device=cache_leftpad.device)
    return (places >= cache_leftpad[:, None])[:, None, None]


def _lengths(
    cache_seqlens: int | Tensor | None, q: Tensor, room: int, new: int, *, appends: bool
) -> Tensor:
    """How many tokens each row holds before the call, (B,) int32."""
    if cache_seqlens is None:
        if appends:
            raise ValueError(
                "to append k and v takes cache_seqlens, which says behind which tokens. Got None. "
                "Pass 0 for an empty cache."
            )
        cache_seqlens = room
    if isinstance(cache_seqlens, int):
        lengths = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    else:
        lengths = cache_seqlens
    _check_of_rows("cache_seqlens", lengths, q, "an int, or ")
    if lengths.numel() and is_concrete_on_cpu(lengths):
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high + new > room:
            raise ValueError(
                f"cache_seqlens must lie between 0 and {room - new}: there is room for {room} tokens, "
                f"and {new} are new. Got {low if low < 0 else high}."
            )
    return lengths.int()


def _check_of_rows(name: str, x: Tensor, like: Tensor, otherwise: str = "") -> None:
    if x.shape != like.shape[:1] or x.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be {otherwise}int32 of shape (B,) = {tuple(like.shape[:1])}. "
            f"Got {x.dtype} of shape {tuple(x.shape)}."
        )


def _check_rotary(
    cos: Tensor | None,
    sin: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    before: Tensor,
    room: int,
    moving: bool,
) -> None:
    if cos is None or sin is None:
        raise ValueError("rotary_cos and rotary_sin go together. Got one without the other.")
    if k is None:
        raise ValueError(
            "rotary_cos and rotary_sin rotate what is appended, and queries with it. Got no k and v. "
            "Keys in a cache are rotated already: rotate q before the call."
        )
    fits = cos.ndim == 2 and cos.shape[0] >= room and 2 * cos.shape[1] <= q.shape[-1]
    if cos.shape != sin.shape or not fits:
        raise ValueError(
            "rotary_cos and rotary_sin must both be (positions, R / 2), of no fewer positions than "
            f"there is room, {room}, and R at most D = {q.shape[-1]}. "
            f"Got {tuple(cos.shape)} and {tuple(sin.shape)}."
        )
    if before.numel() and is_concrete_on_cpu(before):
        last = int(before.max()) + (q.shape[1] if moving else 1)
        if last > cos.shape[0]:
            raise ValueError(
                "rotary_cos and rotary_sin must have a position for each query, which are counted from "
                f"cache_seqlens on: {last}. Got {cos.shape[0]}."
            )
    if not cos.dtype == sin.dtype == q.dtype:
        raise TypeError(
            f"rotary_cos and rotary_sin must have q's dtype, {q.dtype}. "
            f"Got {cos.dtype} and {sin.dtype}."
        )


def _rotated(
    x: Tensor, before: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, moving: bool
) -> Tensor:
    """Rotary embeddings (Su et al. 2021) of (B, S, H, D), from place `before` on, or all at that one."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = torch.arange(x.shape[1], device=x.device) * moving
    places = before[:, None] + steps
    cos, sin = (table[places][:, :, None].to(wide) for table in (cos, sin))
    size = 2 * cos.shape[-1]
    turning = x[..., :size].to(wide)
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    turned = a * cos - b * sin, b * cos + a * sin
    both = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([both.to(x.dtype), x[..., size:]], -1)


def _check_new(name: str, cache: Tensor, x: Tensor, batch: int, new: int) -> None:
    expected = (batch, new, *cache.shape[2:])
    if x.shape != expected or x.dtype != cache.dtype:
        raise ValueError(
            f"{name} must fit its cache, {expected} of {cache.dtype}. "
            f"Got {tuple(x.shape)} of {x.dtype}."
        )
