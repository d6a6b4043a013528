"""The case that is asked, and its right answer in float64: a few lines, and none of heedful's."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from answers import Answer, rounded
from numpy import ndarray

BATCH, HEADS, HEAD_DIM = 2, 4, 32
SQUARE, WIDE, TALL = (128, 128), (128, 256), (256, 128)  # Sq, Sk; splash wants multiples of 128


@dataclass(frozen=True)
class Case:
    """q, k, v and the cotangents of out and LSE, (B, H, S, D) and (B, H, S)."""

    q: ndarray
    k: ndarray
    v: ndarray
    dout: ndarray
    dlse: ndarray

    @classmethod
    def of(cls, lengths: tuple[int, int], kv_heads: int = HEADS) -> "Case":
        """Standard normal, and what float32 holds."""
        queries = BATCH, HEADS, lengths[0], HEAD_DIM
        keys = BATCH, kv_heads, lengths[1], HEAD_DIM
        normal = np.random.default_rng(0).standard_normal
        return cls(*map(normal, (queries, keys, keys, queries, queries[:3]))).rounded("float32")

    def rounded(self, dtype: str) -> "Case":
        return Case(*(rounded(x, dtype) for x in vars(self).values()))


def reference(
    case: Case,
    scale: float = HEAD_DIM**-0.5,
    seen: Any = True,
    softcap: float | None = None,
    bias: Any = 0.0,
    bias_first: bool = False,
    sinks: ndarray | None = None,
    through_lse: bool = False,
) -> Answer:
    """Out, LSE and the gradients in float64; a row that sees nothing has none."""
    q, k, v, dout, dlse = vars(case).values()
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat(group, axis=1) for x in (k, v))
    s = scale * q @ k.mT + (bias if bias_first else 0.0)
    tanh = np.tanh(s / softcap) if softcap else np.zeros_like(s)
    s = (softcap * tanh if softcap else s) + (0.0 if bias_first else bias)
    sink = np.full(HEADS, -np.inf) if sinks is None else sinks
    sink = np.broadcast_to(sink[:, None, None], (*s.shape[:3], 1))
    logits = np.concatenate([np.where(seen, s, -np.inf), sink], axis=-1)
    top = logits.max(-1, keepdims=True)
    exponentials = np.exp(logits - np.where(top > -np.inf, top, 0.0))
    total = exponentials.sum(-1, keepdims=True)
    p = exponentials[..., :-1] / np.where(total > 0, total, 1.0)
    out = p @ v
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    dp = dout @ v.mT - (dout * out).sum(-1, keepdims=True) + through_lse * dlse[..., None]
    ds = scale * p * dp * (1 - tanh**2)
    dk, dv = (x.reshape(BATCH, -1, group, *x.shape[2:]).sum(2) for x in (ds.mT @ q, p.mT @ dout))
    return Answer(out, lse, (ds @ k, dk, dv))
