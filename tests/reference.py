"""Attention and its gradients in float64, one query row at a time: what the tests compare with.

Written from the contract's text alone and sharing no line with heedful: softmax runs over the keys
that the query sees and no others, so nothing that stands in a key nobody sees can reach a result.
"""

import math

import numpy as np
from jax.extend.random import threefry_2x32


def attention(q, k, v, out_cotangent=None, lse_cotangent=None, **options):
    """out, lse and the cotangents of q, k, v, bias, sinks and alibi_slopes (None without), in float64.

    Takes the arrays and options of `heedful.attention` as NumPy arrays, in any layout and rank.
    Without cotangents those of out and lse are zero.
    """
    layout = options.pop("layout", "bhsd")
    shape, lead = q.shape, q.shape[:-3]
    q, k, v = (_bhsd(x, layout) for x in (q, k, v))
    out_cotangent = None if out_cotangent is None else _bhsd(out_cotangent, layout)
    batch, q_heads, q_length, _ = q.shape
    if lse_cotangent is not None:
        lse_cotangent = lse_cotangent.reshape(batch, q_heads, q_length)
    options.pop("return_lse", None)
    out, lse, dq, dk, dv, *of_options = _canonical(
        q, k, v, out_cotangent, lse_cotangent, lead, **options
    )

    def like_caller(x):
        x = x.swapaxes(1, 2) if layout == "bshd" and len(shape) > 2 else x
        return x.reshape(*lead, *x.shape[1:]) if len(shape) > 2 else x[0, 0]

    lse = lse.reshape(*lead, *lse.shape[1:]) if len(shape) > 2 else lse[0, 0]
    return like_caller(out), lse, like_caller(dq), like_caller(dk), like_caller(dv), *of_options


def _bhsd(x, layout):
    x = np.asarray(x, np.float64)
    if x.ndim == 2:
        return x[None, None]
    x = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    return x.swapaxes(1, 2) if layout == "bshd" else x


def _canonical(
    q,
    k,
    v,
    out_cotangent,
    lse_cotangent,
    lead,
    *,
    mask=None,
    bias=None,
    causal=False,
    window=None,
    q_offset=None,
    q_lengths=None,
    kv_lengths=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    scale=None,
    softcap=None,
    sinks=None,
    alibi_slopes=None,
    dropout_rate=0.0,
    dropout_seed=0,
    score_mod=None,
    mask_mod=None,
):
    batch, q_heads, q_length, head_dim = q.shape
    _, kv_heads, kv_length, value_dim = v.shape
    scores = (batch, q_heads, q_length, kv_length)
    scale = head_dim**-0.5 if scale is None else scale
    rows = tuple(lead) or (1,)
    q_lengths, kv_lengths = (
        np.broadcast_to(length if given is None else given, rows).reshape(batch)
        for given, length in ((q_lengths, q_length), (kv_lengths, kv_length))
    )
    if q_offset is None:
        q_offset = 0 if isinstance(causal, str) else kv_lengths.astype(int) - q_lengths
    q_offset = np.broadcast_to(q_offset, batch)
    left, right = window or (None, None)
    seeds = np.broadcast_to(dropout_seed, rows).reshape(batch)
    mask = np.True_ if mask is None else mask
    if mask.shape == (batch, kv_length) and len(lead) == 1:
        mask = mask[:, None, None, :]
    mask = _whole(mask, scores, lead)
    bias_shape = None if bias is None else bias.shape
    bias = _whole(np.zeros(()) if bias is None else bias, scores, lead)

    j = np.arange(kv_length)
    if q_segment_ids is not None:
        q_segment_ids = np.broadcast_to(q_segment_ids, (*lead, q_length)).reshape(batch, q_length)
        kv_segment_ids = np.broadcast_to(kv_segment_ids, (*lead, kv_length)).reshape(batch, -1)

    def sees(b, h, i):
        p = i + q_offset[b]
        return (
            (j <= p if causal else True)
            & (True if left is None else p - left <= j)
            & (True if right is None else j <= p + right)
            & (i < q_lengths[b])
            & (j < kv_lengths[b])
            & mask[b, h, i]
            & (True if q_segment_ids is None else q_segment_ids[b, i] == kv_segment_ids[b])
            & (bias[b, h, i] > -np.inf)
            & (True if mask_mod is None else np.array([bool(mask_mod(b, h, i, n)) for n in j]))
        )

    out, lse = np.zeros((*q.shape[:3], value_dim)), np.full(q.shape[:3], -np.inf)
    dsinks = np.zeros(q_heads)
    slopes = np.zeros(q_heads) if alibi_slopes is None else np.asarray(alibi_slopes, np.float64)
    each_row = slopes.ndim > 1
    slopes = np.broadcast_to(slopes.reshape(-1, q_heads), (batch, q_heads))
    dslopes = np.zeros((batch, q_heads))
    dq, dk, dv, dbias = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape), np.zeros(scores)
    for b, h, i in np.ndindex(q.shape[:3]):
        (keys,) = np.nonzero(sees(b, h, i))
        dlse = 0.0 if lse_cotangent is None else lse_cotangent[b, h, i]
        sink = -np.inf if sinks is None else float(sinks[h])
        if keys.size == 0:
            lse[b, h, i] = sink
            dsinks[h] += dlse if sink > -np.inf else 0.0
            continue
        g = h // (q_heads // kv_heads)
        raw = scale * k[b, g, keys] @ q[b, h, i]
        capped = raw if softcap is None else softcap * np.tanh(raw / softcap)
        away = np.abs(i + q_offset[b] - keys)
        modified, bend = _modified(score_mod, capped, b, h, i, keys)
        s = modified + bias[b, h, i, keys] - slopes[b, h] * away
        # The sink is one more logit, whose value is 0.
        logits = np.append(s, sink)
        exponentials = np.exp(logits - logits.max())
        lse[b, h, i] = logits.max() + np.log(exponentials.sum())
        # Beside a bias of 1e30 an lse has lost this sum.
        *p, of_sink = exponentials / exponentials.sum()
        p = np.array(p)
        spared = _spared_by_dropout(dropout_rate, seeds[b], b, h, i, keys)
        out[b, h, i] = (spared * p) @ v[b, g, keys]

        do = np.zeros(value_dim) if out_cotangent is None else out_cotangent[b, h, i]
        # With v_j as dropout spares it, out_i = Σ p_j v_j and lse_i = log Σ exp s_j give
        # ds_j = p_j (do·v_j − do·out_i + dlse).
        ds = p * (spared * (v[b, g, keys] @ do) - out[b, h, i] @ do + dlse)
        draw = ds * bend if softcap is None else ds * bend * (1 - (capped / softcap) ** 2)
        dq[b, h, i] = scale * draw @ k[b, g, keys]
        dk[b, g, keys] += scale * np.outer(draw, q[b, h, i])
        dv[b, g, keys] += np.outer(spared * p, do)
        dbias[b, h, i, keys] = ds
        dslopes[b, h] -= ds @ away
        dsinks[h] += of_sink * (dlse - out[b, h, i] @ do)
    dbias = _summed(dbias, bias_shape, lead)
    if alibi_slopes is not None:
        dslopes = (dslopes if each_row else dslopes.sum(0)).reshape(np.shape(alibi_slopes))
    of_options = {"bias": dbias, "sinks": dsinks, "alibi_slopes": dslopes}
    given = {"bias": bias_shape, "sinks": sinks, "alibi_slopes": alibi_slopes}
    return out, lse, dq, dk, dv, *(None if given[n] is None else x for n, x in of_options.items())


def without_idle_offset(options):
    """The options without a q_offset that neither causal nor a window has a use for: it is refused."""
    positional = options.get("causal") or (options.get("window") or (None, None)) != (None, None)
    positional = positional or options.get("alibi_slopes") is not None
    return {name: x for name, x in options.items() if positional or name != "q_offset"}


def _modified(score_mod, scores, b, h, i, keys):
    """The function of each score, and its derivative: the imaginary part, a tiny step aside."""
    if score_mod is None:
        return scores, 1.0
    place = np.int32(b), np.int32(h), np.int32(i)
    each = zip(scores + 1e-30j, keys.astype(np.int32), strict=True)
    found = np.array([score_mod(s, *place, j) for s, j in each])
    return found.real, found.imag / 1e-30


def _spared_by_dropout(rate, seed, b, h, i, keys):
    """0 for a weight that is dropped, 1 / (1 − rate) for others; by JAX's own cipher."""
    if not rate:
        return 1.0
    key = threefry_2x32(np.array([seed, 0], np.uint32), np.array([b, h], np.uint32))
    counters = np.concatenate([np.full(len(keys), i), keys]).astype(np.uint32)
    words = np.asarray(threefry_2x32(key, counters))[: len(keys)]
    return np.where(words >= rate * 2.0**32, 1 / (1 - rate), 0)


def _whole(x, scores, lead):
    """An array that broadcasts to (*lead, Hq, Sq, Sk), as (B, Hq, Sq, Sk)."""
    return np.broadcast_to(x, (tuple(lead) or (1,)) + scores[1:]).reshape(scores)


def _summed(dbias, shape, lead):
    """The cotangent of a bias of that shape, which was broadcast: the sum over what it stood for."""
    if shape is None:
        return None
    dbias = dbias.reshape((tuple(lead) or (1,)) + dbias.shape[1:])
    dbias = dbias.sum(axis=tuple(range(dbias.ndim - len(shape))))
    stretched = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return dbias.sum(axis=stretched, keepdims=True)
