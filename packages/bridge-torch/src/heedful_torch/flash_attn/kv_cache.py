"""flash-attn's function of a cache: what is new is written in place, then `heedful.attention` called."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import heedful
from heedful import dispatch
from heedful.call import Call
from heedful.call.arrays import is_concrete_on_cpu
from heedful_torch.flash_attn.arguments import OPEN, capped_at, check_rank, slopes, window


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
    window_size: Sequence[int] = (OPEN, OPEN),
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
        cache_leftpad: None; padding on the left is not honoured yet.
        block_table: (B, blocks), the pages that hold a row's tokens, in order.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        rotary_interleaved: whether numbers 2n and 2n + 1 are rotated together, or n and n + R / 2.
        num_splits: 0, or 1: among how many processors flash-attn divides the keys of a row; no backend
            here is told to divide them.
        return_softmax_lse: whether to return the log-sum-exp too.

    Returns:
        out (B, Sq, Hq, D), or (out, softmax_lse), (B, Hq, Sq), float32, −inf where a row holds nothing.

    Raises:
        NotImplementedError: gradients, `cache_leftpad` or more splits are asked for.
        TypeError, ValueError: an argument is none of those above; says what came and how to mend it.
        Refusal: no backend that was asked can honour the call; says every reason.
    """
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    tensors = {name: x for name, x in given.items() if x is not None}
    for name, x in tensors.items():
        check_rank(name, x, "(B, S, H, D)")
    _refuse_what_is_not_there(tensors, cache_leftpad, num_splits)
    room = k_cache.shape[1] * (block_table.shape[1] if block_table is not None else 1)
    new = 0 if k is None else k.shape[1]
    if (k is None) != (v is None):
        raise ValueError("k and v are appended together. Got one without the other.")
    before = _lengths(cache_seqlens, q, room, new, appends=k is not None)
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError(
            "a block table says which pages are a row's, so cache_batch_idx says nothing. Got both. "
            "Pass block_table[cache_batch_idx]."
        )
    band = window(window_size)
    moving = causal or band is not None
    if rotary_cos is not None or rotary_sin is not None:
        _check_rotary(rotary_cos, rotary_sin, q, room, new, moving)
    options: dict[str, Any] = {
        "kv_lengths": before + new,
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
    _check_rows(k_cache, before + new, cache_batch_idx, block_table)
    like = (_like_rows(x, q.shape[0], cache_batch_idx, block_table) for x in (k_cache, v_cache))
    dispatch.choose(Call.of(q, *like, **options).problem)
    with torch.no_grad():
        if k is not None and v is not None:
            if rotary_cos is not None and rotary_sin is not None:
                k = _rotated(k, before, rotary_cos, rotary_sin, rotary_interleaved, moving=True)
                q = _rotated(q, before, rotary_cos, rotary_sin, rotary_interleaved, moving=moving)
            places = before[:, None] + torch.arange(new, device=q.device)
            for cache, x in ((k_cache, k), (v_cache, v)):
                _append(cache, x, places, cache_batch_idx, block_table)
        keys, values = (
            _rows(x, q.shape[0], cache_batch_idx, block_table) for x in (k_cache, v_cache)
        )
        results: Tensor | tuple[Tensor, Tensor] = heedful.attention(q, keys, values, **options)
    return results


def _refuse_what_is_not_there(
    tensors: dict[str, Tensor], cache_leftpad: Tensor | None, num_splits: int
) -> None:
    moving = [name for name, x in tensors.items() if x.requires_grad]
    if moving and torch.is_grad_enabled():
        raise NotImplementedError(
            f"flash_attn_with_kvcache has no gradients. Got {', '.join(moving)} that require them. "
            "Call it within torch.no_grad(), or call flash_attn_func."
        )
    if cache_leftpad is not None:
        raise NotImplementedError(
            "heedful has no cache_leftpad yet: it must be None. Got a tensor. "
            "Move each row's tokens to its beginning."
        )
    if num_splits not in (0, 1):
        raise NotImplementedError(
            f"num_splits must be 0 or 1: no backend can be told to divide keys. Got {num_splits}."
        )


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
    if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cache_seqlens must be an int, or int32 of shape (B,) = {tuple(q.shape[:1])}. "
            f"Got {lengths.dtype} of shape {tuple(lengths.shape)}."
        )
    if lengths.numel() and is_concrete_on_cpu(lengths):
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high + new > room:
            raise ValueError(
                f"cache_seqlens must lie between 0 and {room - new}: there is room for {room} tokens, "
                f"and {new} are new. Got {low if low < 0 else high}."
            )
    return lengths.int()


def _check_rotary(
    cos: Tensor | None, sin: Tensor | None, q: Tensor, room: int, new: int, moving: bool
) -> None:
    if cos is None or sin is None:
        raise ValueError("rotary_cos and rotary_sin go together. Got one without the other.")
    if new < (q.shape[1] if moving else 1):
        raise ValueError(
            "rotary_cos and rotary_sin rotate new keys, and query i by the place of new key i, so there "
            f"must be k and v of as many tokens as q. Got {new} and {q.shape[1]}. Keys in a cache are "
            "rotated already: rotate q before the call."
        )
    fits = cos.ndim == 2 and cos.shape[0] >= room and 2 * cos.shape[1] <= q.shape[-1]
    if cos.shape != sin.shape or not fits:
        raise ValueError(
            "rotary_cos and rotary_sin must both be (positions, R / 2), of no fewer positions than "
            f"there is room, {room}, and R at most D = {q.shape[-1]}. "
            f"Got {tuple(cos.shape)} and {tuple(sin.shape)}."
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


def _check_rows(
    cache: Tensor, lengths: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None
) -> None:
    """Raises ValueError for a row or a page that is none, where it can be read: −1 would be the last."""
    name, numbers = "cache_batch_idx", cache_batch_idx
    if block_table is not None:
        name, numbers = "block_table", block_table
    if numbers is None or not (is_concrete_on_cpu(numbers) and is_concrete_on_cpu(lengths)):
        return
    if block_table is not None and block_table.shape[:1] == lengths.shape:
        blocks = torch.arange(block_table.shape[1])
        numbers = block_table[blocks * cache.shape[1] < lengths[:, None]]
    wrong = numbers[(numbers < 0) | (numbers >= len(cache))]
    if len(wrong):
        raise ValueError(
            f"{name} must hold numbers from 0 to {len(cache) - 1} for what is attended to. "
            f"Got {int(wrong[0])}."
        )


def _append(
    cache: Tensor,
    x: Tensor,
    places: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Writes new tokens (B, Snew, Hkv, D) to their (B, Snew) places."""
    if block_table is not None:
        size = cache.shape[1]
        rows, places = block_table.long().gather(1, (places // size).long()), places % size
    elif cache_batch_idx is not None:
        rows = cache_batch_idx.long()[:, None]
    else:
        rows = torch.arange(len(x), device=x.device)[:, None]
    cache[rows, places.long()] = x


def _like_rows(
    cache: Tensor, batch: int, cache_batch_idx: Tensor | None, block_table: Tensor | None
) -> Tensor:
    """What has the shape, dtype and device of `_rows`, and no data of them."""
    rows, room = min(batch, len(cache)), cache.shape[1]
    if block_table is not None:
        rows, room = len(block_table), block_table.shape[1] * room
    elif cache_batch_idx is not None:
        rows = len(cache_batch_idx)
    return cache.new_empty(()).expand(rows, room, *cache.shape[2:])


def _rows(
    cache: Tensor, batch: int, cache_batch_idx: Tensor | None, block_table: Tensor | None
) -> Tensor:
    """The rows of the batch (B, room, Hkv, D): a view where they are the cache's first ones."""
    if block_table is not None:
        # What names no page stands behind a row's tokens, where nobody looks.
        pages = block_table.long().clamp(0, len(cache) - 1)
        return cache[pages].flatten(1, 2)
    return cache[:batch] if cache_batch_idx is None else cache[cache_batch_idx.long()]
