"""The rows of keys and values that a call attends to: a cache's own, picked ones, or made of pages."""

import torch
from torch import Tensor

from heedful.call.arrays import is_concrete_on_cpu


def check_table(block_table: Tensor, rows: int) -> None:
    """Raises ValueError for what is no block table of so many rows."""
    integers = block_table.dtype in (torch.int32, torch.int64)
    if block_table.ndim != 2 or len(block_table) != rows or not integers:
        raise ValueError(
            f"block_table must be int32 of shape (rows, blocks), {rows} rows here. "
            f"Got {block_table.dtype} of shape {tuple(block_table.shape)}. "
            "It says which pages hold a row's tokens, in their order."
        )


def check_rows(
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


def append(
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


def like_rows(
    cache: Tensor, batch: int, cache_batch_idx: Tensor | None, block_table: Tensor | None
) -> Tensor:
    """What has the shape, dtype and device of `rows`, and no data of them."""
    rows, room = min(batch, len(cache)), cache.shape[1]
    if block_table is not None:
        rows, room = len(block_table), block_table.shape[1] * room
    elif cache_batch_idx is not None:
        rows = len(cache_batch_idx)
    return cache.new_empty(()).expand(rows, room, *cache.shape[2:])


def rows(
    cache: Tensor, batch: int, cache_batch_idx: Tensor | None, block_table: Tensor | None
) -> Tensor:
    """The rows of the batch (B, room, Hkv, D): a view where they are the cache's first ones."""
    if block_table is not None:
        # What names no page stands behind a row's tokens, where nobody looks.
        pages = block_table.long().clamp(0, len(cache) - 1)
        return cache[pages].flatten(1, 2)
    return cache[:batch] if cache_batch_idx is None else cache[cache_batch_idx.long()]


def packed(pages: Tensor, block_table: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The tokens of all sequences one behind the other, then anything: (rows · room, Hkv, D).

    As many as there is room for, whatever the lengths are: with another shape for each step JAX would
    compile for each.
    """
    size, blocks = pages.shape[1], block_table.shape[1]
    tokens = torch.arange(block_table.numel() * size, device=pages.device)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    row = row.clamp(max=len(block_table) - 1)
    place = tokens - cu_seqlens[row]
    page = block_table[row, (place // size).clamp(max=blocks - 1)].long().clamp(0, len(pages) - 1)
    return pages[page, place % size]
