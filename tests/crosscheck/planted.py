"""Attention in a page, with one thing wrong with it."""

import jax
import jax.numpy as jnp
import numpy as np


@np.errstate(divide="ignore", invalid="ignore")
def attend(
    wrong, q, k, v, causal=False, window=None, mask=None, bias=None, scale=None, softcap=None,
    q_lengths=None, kv_lengths=None, q_segment_ids=None, kv_segment_ids=None, sinks=None,
    alibi_slopes=None, q_offset=None,
):  # fmt: skip
    """(B, H, S, D) → out and LSE, with `wrong` of the words below."""
    xp = jnp if isinstance(q, jax.Array) else np
    if wrong == "q and k":
        q, k = k, q
    b, h, n, d = q.shape
    m, hkv = k.shape[2], k.shape[1]
    heads = {"h % Hkv": np.arange(h) % hkv, "head 0": 0 * np.arange(h)}
    which = heads.get(wrong, np.arange(h) // (h // hkv))
    k, v = k[:, which], v[:, which]
    scale = d**-0.5 if scale is None else scale
    dv = v.shape[3]
    scale = {
        "scale 1": 1.0,
        "1/D": 1 / d,
        "Dv": dv**-0.5,
        "default": d**-0.5,
        "twice": scale**2,
    }.get(wrong, scale)
    s = q @ k.swapaxes(2, 3)
    if softcap is not None and wrong == "softcap before scale":
        s = softcap * xp.tanh(s / softcap) * scale
    else:
        s = s * scale
    if bias is not None and wrong == "softcap after bias":
        s, bias = s + bias, None
    if softcap is not None and wrong not in ("softcap ignored", "softcap before scale"):
        times = 1 if wrong == "tanh alone" else softcap
        s = times * xp.tanh(s / softcap)
    if bias is not None and wrong != "bias ignored":
        s = s + bias * {"bias scaled": scale, "bias subtracted": -1}.get(wrong, 1)
    i, j = np.ogrid[:n, :m]
    real_q = n if q_lengths is None else np.asarray(q_lengths)[:, None, None, None]
    real_k = m if kv_lengths is None else np.asarray(kv_lengths)[:, None, None, None]
    offset = real_k - real_q
    if q_offset is not None and wrong != "offset ignored":
        offset = q_offset if np.ndim(q_offset) == 0 else np.asarray(q_offset)[:, None, None, None]
    p = i + {"top-left": 0 * offset, "one back": offset - 1, "whole": m - n}.get(wrong, offset)
    if alibi_slopes is not None and wrong != "alibi ignored":
        slopes = alibi_slopes.reshape(-1, h, 1, 1) * (-1 if wrong == "alibi's sign" else 1)
        distance = {"signed": p - j, "|i − j|": abs(i - j)}.get(wrong, abs(p - j))
        s = s - slopes * distance.astype(np.float32)
    sees = np.ones((b, h, n, m), bool)
    if (causal and wrong != "causal ignored") or wrong == "causal unasked":
        sees = sees & (j <= p)
    left, right = window or (None, None)
    if wrong == "sides swapped":
        left, right = right, left
    left = None if left is None else left + {"wider": 1, "narrower": -1}.get(wrong, 0)
    if left is not None and wrong != "window ignored":
        sees = sees & (p - j <= left)
    if right is not None and wrong != "window ignored":
        sees = sees & (j - p <= right)
    if q_lengths is not None and wrong != "q_lengths ignored":
        sees = sees & (i < real_q)
    if kv_lengths is not None and wrong != "kv_lengths ignored":
        sees = sees & (j < real_k)
    if q_segment_ids is not None and wrong != "segments ignored":
        sees = sees & (q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :])
    if mask is not None and wrong != "mask ignored":
        sees = sees & (~mask if wrong == "mask inverted" else mask)
    of_masked = -1e9 if wrong == "-1e9" else -np.inf
    s = xp.where(sees, s, of_masked)
    if xp is np:
        top = s.max(-1, keepdims=True, initial=-1e30)
    else:
        top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
    w = xp.exp(s - top)
    total = w.sum(-1, keepdims=True)
    if sinks is not None and wrong != "sinks ignored":
        total = total + xp.exp(sinks[:, None, None] - top)
    weights = xp.where(total > 0, w / xp.where(total > 0, total, 1), 0)
    out = weights @ v
    lse = (top + xp.log(total))[..., 0]
    lse = {
        "base 2": lse / np.log(2), "of the sum": total[..., 0] * xp.exp(top[..., 0]),
        "less the largest": lse - top[..., 0],
    }.get(wrong, lse)  # fmt: skip
    if wrong == "unscaled lse":
        lse = xp.log(xp.exp(s / scale).sum(-1))
    return out.astype(np.float32), lse.astype(np.float32)


TAKES = [
    "causal", "window", "mask", "bias", "scale", "softcap", "q_lengths", "kv_lengths", "segments",
    "sinks", "alibi_slopes", "q_offset", "gqa", "value_dim",
]  # fmt: skip
