"""Which keys a query sees, asked pair by pair: the contract's text, sharing no line with heedful."""

import numpy as np


def visible_by_definition(
    batch,
    q_heads,
    q_length,
    kv_length,
    *,
    causal=False,
    window=None,
    q_offset=None,
    q_lengths=None,
    kv_lengths=None,
    mask=None,
    q_segment_ids=None,
    kv_segment_ids=None,
):
    """Boolean (B, Hq, Sq, Sk); the options as of `heedful.attention`, a mask of rank 4."""
    answer = np.zeros((batch, q_heads, q_length, kv_length), bool)
    for b in range(batch):
        real_queries = q_length if q_lengths is None else int(q_lengths[b])
        real_keys = kv_length if kv_lengths is None else int(kv_lengths[b])
        if q_offset is not None:
            offset = int(q_offset) if np.ndim(q_offset) == 0 else int(q_offset[b])
        elif causal == "top_left":
            offset = 0
        else:
            offset = real_keys - real_queries
        for h in range(q_heads):
            for i in range(q_length):
                for j in range(kv_length):
                    answer[b, h, i, j] = (
                        i < real_queries
                        and j < real_keys
                        and (not causal or j <= i + offset)
                        and (window is None or window[0] is None or j >= i + offset - window[0])
                        and (window is None or window[1] is None or j <= i + offset + window[1])
                        and (q_segment_ids is None or q_segment_ids[b, i] == kv_segment_ids[b, j])
                        and (mask is None or _at(mask, b, h, i, j))
                    )
    return answer


def _at(x, *index):
    """x[index], where an axis of size 1 stands for every index."""
    return x[tuple(0 if size == 1 else n for size, n in zip(x.shape, index, strict=True))]
