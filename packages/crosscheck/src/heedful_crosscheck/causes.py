"""Convention errors: attention as somebody may have understood it, each an entry of `CAUSES`.

An entry is another question, or another reading of the same one: what is asked is altered and put to
whoever answers, the oracle or the yardstick, so that nobody who is judged has a part in it. Whether
a wrong answer agrees by the standards of such a question, `explanation` finds out.

Entries see arrays in canonical form, NumPy's. Where an array must stand in a form that a question has no
option for, it is written into one that it has: what is added before softcap, into q and k.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from heedful import Operands, Problem, oracle
from heedful_crosscheck.yardstick import Arithmetic, Tensors, attend


class Posed(NamedTuple):
    """What is asked, and what gradients are of.

    Attributes:
        problem, operands: the call; `operands.q_offset` is given.
        out_cotangent, lse_cotangent: (B, Hq, Sq, Dv) and (B, Hq, Sq).
    """

    problem: Problem
    operands: Operands
    out_cotangent: np.ndarray
    lse_cotangent: np.ndarray

    def where(self, **facts: Any) -> "Posed":
        """The same with another problem."""
        return self._replace(problem=replace(self.problem, **facts))

    def of(self, **arrays: Any) -> "Posed":
        """The same with other arrays."""
        return self._replace(operands=self.operands._replace(**arrays))

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """How many queries and keys of each batch row are real, (B,)."""
        p, x = self.problem, self.operands
        return tuple(  # type: ignore[return-value]  # of two
            np.full(p.batch, whole) if real is None else np.asarray(real)
            for whole, real in ((p.q_length, x.q_lengths), (p.kv_length, x.kv_lengths))
        )

    @property
    def offset(self) -> np.ndarray:
        """Where the first query stands, (B,)."""
        return np.broadcast_to(np.asarray(self.operands.q_offset), self.problem.batch)


# Of a question its tensors: out and lse, and dq and so on where gradients are asked for.
Answering = Callable[[Posed], Tensors]


@dataclass(frozen=True)
class Cause:
    """One way to understand it otherwise.

    Attributes:
        words: what makes the answer agree, behind "agrees"; {positional} is what goes by positions.
        answer: of one who understands it so; None where that is no other question.
        backward: whether out and LSE are what they are.
    """

    words: str
    answer: Callable[[Answering, Posed], Tensors | None]
    backward: bool = False

    def said(self, problem: Problem) -> str:
        """The words for a problem."""
        given = {
            "causal": problem.causal,
            "the window": problem.window is not None,
            "ALiBi": problem.alibi_shape is not None,
        }
        return self.words.format(positional=" and ".join(n for n, there in given.items() if there))


def asked(words: str, alter: Callable[[Posed], Posed | None]) -> Cause:
    """An altered question."""

    def answer(answering: Answering, posed: Posed) -> Tensors | None:
        altered = alter(posed)
        return None if altered is None else answering(altered)

    return Cause(words, answer)


def read(words: str, alter: Callable[[Posed, Tensors], Tensors | None]) -> Cause:
    """The same question, whose gradients come otherwise."""
    return Cause(words, lambda answering, posed: alter(posed, answering(posed)), backward=True)


# Positions


def _aligned(place: Callable[[Posed], Any]) -> Callable[[Posed], Posed | None]:
    def alter(posed: Posed) -> Posed | None:
        offset = np.broadcast_to(place(posed), posed.problem.batch)
        same = np.array_equal(offset, posed.offset)
        return None if same or not posed.problem.positional else posed.of(q_offset=offset)

    return alter


def _unless_given(place: Callable[[Posed], Any]) -> Callable[[Posed], Posed | None]:
    """An alignment that a call has where it gives no offset."""
    align = _aligned(place)
    return lambda posed: None if posed.problem.q_offset_given else align(posed)


def _at_its_end(posed: Posed) -> Any:
    return posed.problem.kv_length - posed.problem.q_length


def _at_real_end(posed: Posed) -> Any:
    real_queries, real_keys = posed.lengths
    return real_keys - real_queries


def _at_whole_end(posed: Posed) -> Any:
    """The same where there are lengths, which play no part in it."""
    x = posed.operands
    lengths = x.q_lengths is not None or x.kv_lengths is not None
    return _at_its_end(posed) if lengths else posed.offset


def _default_place(posed: Posed) -> Any:
    return _at_real_end(posed) if posed.problem.q_offset_given else posed.offset


def _one_off(by: int) -> Callable[[Posed], Posed | None]:
    def alter(posed: Posed) -> Posed | None:
        alone = posed.problem.causal and posed.problem.window is None
        if not alone or posed.problem.alibi_shape is not None:
            return None
        return posed.of(q_offset=posed.offset + by)

    return alter


def _uncausal(posed: Posed) -> Posed | None:
    return posed.where(causal=False) if posed.problem.causal else None


def _causal_unasked(posed: Posed) -> Posed | None:
    return None if posed.problem.causal else posed.where(causal=True)


def _top_left_unasked(posed: Posed) -> Posed | None:
    if posed.problem.positional or not posed.offset.any():
        return None
    return posed.where(causal=True).of(q_offset=np.zeros(1, np.int64))


Side = int | None


def _window(change: Callable[[Side, Side], tuple[Side, Side] | None]) -> Callable[[Posed], Any]:
    """The window's sides, the right one None where causal closes it."""

    def alter(posed: Posed) -> Posed | None:
        if posed.problem.window is None:
            return None
        left, right = posed.problem.window
        causal = posed.problem.causal
        sides = left, None if causal else right
        changed = change(*sides)
        if changed is not None:
            ignored = changed == (None, None) or (causal and changed[0] is None)
            if changed == sides or ignored or min(x for x in (*changed, 0) if x is not None) < 0:
                return None
        return posed.where(window=changed)

    return alter


def _moved(side: Side, by: int) -> Side:
    return None if side is None else side + by


# Lengths, segments, masks


def _without(*names: str) -> Callable[[Posed], Posed | None]:
    def alter(posed: Posed) -> Posed | None:
        if any(getattr(posed.operands, name) is None for name in names):
            return None
        return posed.of(**dict.fromkeys(names))

    return alter


def _placed_without(*names: str) -> Callable[[Posed], Posed | None]:
    """Lengths that are ignored where the queries stand, too."""

    def alter(posed: Posed) -> Posed | None:
        altered = _without(*names)(posed)
        if altered is None or not posed.problem.positional or posed.problem.q_offset_given:
            return None
        offset = _at_real_end(altered)
        if np.array_equal(offset, posed.offset) or not np.array_equal(
            posed.offset, _at_real_end(posed)
        ):
            return None
        return altered.of(q_offset=offset)

    return alter


def _lengths(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Posed], Any]:
    def alter(posed: Posed) -> Posed | None:
        real = getattr(posed.operands, name)
        if real is None:
            return None
        longest = posed.problem.q_length if name == "q_lengths" else posed.problem.kv_length
        changed = np.clip(change(np.asarray(real)), 0, longest)
        return None if (changed == real).all() else posed.of(**{name: changed})

    return alter


def _mask(change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Posed], Posed | None]:
    def alter(posed: Posed) -> Posed | None:
        if posed.operands.mask is None:
            return None
        mask = np.asarray(posed.operands.mask)
        changed = change(mask)
        return None if changed is None or np.array_equal(changed, mask) else posed.of(mask=changed)

    return alter


def _transposed(mask: np.ndarray) -> np.ndarray | None:
    square = mask.shape[2] == mask.shape[3] > 1
    return mask.swapaxes(2, 3) if square else None


def _empty_rows_average(answering: Answering, posed: Posed) -> Tensors | None:
    """Scores of −1e9 in place of hidden ones: of a row that is hidden all weigh alike."""
    p, x = posed.problem, posed.operands
    seen = np.stack(
        [
            [oracle.sees(p, x, (b, h, slice(0, p.q_length))) for h in range(p.q_heads)]
            for b in range(p.batch)
        ]
    )
    empty = ~seen.any(-1, keepdims=True)
    if not empty.any() or not p.kv_length or x.alibi_slopes is not None:
        return None
    bias = np.where(empty, -1e9, 0.0 if x.bias is None else x.bias)
    altered = posed.of(
        q=np.where(empty, 0, x.q), mask=seen | empty, bias=bias, q_lengths=None, kv_lengths=None,
        q_segment_ids=None, kv_segment_ids=None,
    )  # fmt: skip
    found = answering(altered.where(causal=False, window=None))
    if "dq" in found:
        found["dq"] = np.where(empty, 0, found["dq"])
        d_bias = np.where(empty, 0, found.pop("dbias"))
        if x.bias is not None:
            found["dbias"] = _sum_to(d_bias, x.bias.shape)
    return found


# What is added to scores


def _first_of(name: str, axis: int) -> Callable[[Answering, Posed], Tensors | None]:
    """An array of which the first head or batch row is read for all."""

    def answer(answering: Answering, posed: Posed) -> Tensors | None:
        x = getattr(posed.operands, name)
        if x is None or x.shape[axis] < 2:
            return None
        first = np.broadcast_to(np.take(x, [0], axis), x.shape)
        found = answering(posed.of(**{name: first}))
        if f"d{name}" in found:
            total = np.zeros(x.shape)
            total[(slice(None),) * axis + (slice(1),)] = found[f"d{name}"].sum(axis, keepdims=True)
            found[f"d{name}"] = total
        return found

    return answer


def _times(name: str, factor: Callable[[Problem], float]) -> Callable[[Answering, Posed], Any]:
    """An array that is multiplied by a number."""

    def answer(answering: Answering, posed: Posed) -> Tensors | None:
        x, times = getattr(posed.operands, name), factor(posed.problem)
        if x is None or times == 1 or not math.isfinite(times):
            return None
        found = answering(posed.of(**{name: np.asarray(x).astype(np.float64) * times}))
        return _scaled(found, {f"d{name}": times})

    return answer


def _alibi(distance: Callable[[Any, Any, Any], Any]) -> Callable[[Answering, Posed], Any]:
    """ALiBi of another distance, of p_i, i and j, written into the bias."""

    def answer(answering: Answering, posed: Posed) -> Tensors | None:
        p, x = posed.problem, posed.operands
        if x.alibi_slopes is None:
            return None
        i, j = np.ogrid[: p.q_length, : p.kv_length]
        place = i + posed.offset[:, None, None, None]
        away = np.asarray(distance(place, i, j) + 0 * (place + j), np.float64)
        if np.array_equal(away, abs(place - j)):
            return None
        bias = -np.asarray(x.alibi_slopes).astype(np.float64) * away
        if x.bias is not None:
            bias = bias + np.asarray(x.bias).astype(np.float64)
        bias = np.broadcast_to(bias, (p.batch, p.q_heads, p.q_length, p.kv_length))
        found = answering(posed.of(bias=bias, alibi_slopes=None))
        if "dbias" in found:
            d_bias = found.pop("dbias")
            found["dalibi_slopes"] = _sum_to(-away * d_bias, x.alibi_slopes.shape)
            if x.bias is not None:
                found["dbias"] = _sum_to(d_bias, x.bias.shape)
        return found

    return answer


def _bias_within_softcap(answering: Answering, posed: Posed) -> Tensors | None:
    """softcap · tanh((s + bias) / softcap)."""
    p, bias = posed.problem, posed.operands.bias
    if p.softcap is None or bias is None or p.scale == 0:
        return None
    bias = np.asarray(bias).astype(np.float64)
    if not np.isfinite(bias).all():
        return None
    apart = posed.where(kv_heads=p.q_heads).of(**_of_query_heads(posed, _usual_heads(p)))
    found = answering(_with_bias_in_qk(apart, bias))
    if "dk" in found:
        d = p.head_dim
        found["dbias"] = _sum_to(found["dk"][..., d:].swapaxes(2, 3), bias.shape)
        found |= {"dq": found["dq"][..., :d], "dk": found["dk"][..., :d]}
    return _of_key_heads(found, _usual_heads(p), p.kv_heads)


def _with_bias_in_qk(posed: Posed, bias: np.ndarray) -> Posed:
    """A bias that is part of scale · q kᵀ, by columns of q and k of their own."""
    q, k = (np.asarray(x).astype(np.float64) for x in posed.operands[:2])
    shape = (*q.shape[:3], k.shape[2])
    unit = np.broadcast_to(np.eye(q.shape[2]) / posed.problem.scale, (*q.shape[:3], q.shape[2]))
    added = np.broadcast_to(bias, shape).swapaxes(2, 3)
    return posed.of(q=np.concatenate([q, unit], -1), k=np.concatenate([k, added], -1), bias=None)


def _softcap(change: Callable[[Problem, float], dict[str, Any]]) -> Callable[[Posed], Any]:
    def alter(posed: Posed) -> Posed | None:
        cap = posed.problem.softcap
        return None if cap is None else posed.where(**change(posed.problem, cap))

    return alter


def _slope_of_softcap_dropped(answering: Answering, posed: Posed) -> Tensors | None:
    """dq and dk as if the scores were not capped: what capping takes away stands in a bias."""
    p, x = posed.problem, posed.operands
    if p.softcap is None:
        return None
    k = _of_query_heads(posed, _usual_heads(p))["k"]
    q, k = np.asarray(x.q).astype(np.float64), k.astype(np.float64)
    product = p.scale * np.einsum("bhid,bhjd->bhij", q, k)
    taken = p.softcap * np.tanh(product / p.softcap) - product
    bias = taken if x.bias is None else taken + np.asarray(x.bias).astype(np.float64)
    found = answering(posed.where(softcap=None).of(bias=bias))
    if "dbias" in found:
        d_bias = found.pop("dbias")
        if x.bias is not None:
            found["dbias"] = _sum_to(d_bias, x.bias.shape)
    return found


# Scale


SCALES: dict[str, Callable[[Problem], float]] = {
    "with a scale of 1": lambda p: 1.0,
    "with a scale of D^-½, whatever is asked": lambda p: p.head_dim**-0.5,
    "with a scale of D^-1": lambda p: 1 / p.head_dim,
    "with a scale of Dv^-½": lambda p: p.value_dim**-0.5,
    "with the scale applied twice": lambda p: p.scale * abs(p.scale),
    "with D^-½ beside the scale": lambda p: p.scale * p.head_dim**-0.5,
    "with the scale's root": lambda p: math.copysign(abs(p.scale) ** 0.5, p.scale),
    "with twice the scale": lambda p: 2 * p.scale,
    "with half the scale": lambda p: p.scale / 2,
    "with the scale's sign lost": lambda p: abs(p.scale),
    "with 1/scale for the scale": lambda p: 1 / p.scale if p.scale else 0.0,
}


def _scale(name: str) -> Cause:
    """Of those that come to the same number the first."""

    def alter(posed: Posed) -> Posed | None:
        p = posed.problem
        found = SCALES[name](p)
        names = list(SCALES)
        before = [SCALES[other](p) for other in names[: names.index(name)]]
        new = all(not math.isclose(found, other) for other in (p.scale, *before))
        return posed.where(scale=found) if new and math.isfinite(found) else None

    return asked(name, alter)


# Heads, and what q, k and v are


def _usual_heads(p: Problem) -> np.ndarray:
    """Of each query head its key head."""
    return np.arange(p.q_heads) // p.group


def _of_query_heads(posed: Posed, which: np.ndarray) -> dict[str, np.ndarray]:
    """k and v once for each query head."""
    return {n: np.asarray(getattr(posed.operands, n))[:, which] for n in "kv"}


def _of_key_heads(found: Tensors, which: np.ndarray, kv_heads: int) -> Tensors:
    """dk and dv of each query head → of the key heads that these read."""
    for name in ("dk", "dv"):
        if name in found:
            of_queries = found[name]
            total = np.zeros((len(of_queries), kv_heads, *of_queries.shape[2:]), of_queries.dtype)
            for h, key_head in enumerate(which):
                total[:, key_head] += of_queries[:, h]
            found[name] = total
    return found


def _heads(read_by: Callable[[Problem], np.ndarray]) -> Callable[[Answering, Posed], Any]:
    """Other key heads for the query heads."""

    def answer(answering: Answering, posed: Posed) -> Tensors | None:
        p, which = posed.problem, read_by(posed.problem)
        if np.array_equal(which, _usual_heads(p)):
            return None
        found = answering(posed.where(kv_heads=p.q_heads).of(**_of_query_heads(posed, which)))
        return _of_key_heads(found, which, p.kv_heads)

    return answer


def _group_gradient(
    part: Callable[[np.ndarray], np.ndarray], *names: str
) -> Callable[[Answering, Posed], Any]:
    """dk or dv of a key head made otherwise of those of its query heads, (B, Hkv, group, Sk, ·)."""

    def answer(answering: Answering, posed: Posed) -> Tensors | None:
        p = posed.problem
        if p.group == 1:
            return None
        which = _usual_heads(p)
        found = answering(posed.where(kv_heads=p.q_heads).of(**_of_query_heads(posed, which)))
        made = {}
        for name in names:
            if name in found:
                b, _, *rest = found[name].shape
                made[name] = part(found[name].reshape(b, p.kv_heads, p.group, *rest))
        return _of_key_heads(found, which, p.kv_heads) | made

    return answer


def _exchanged(one: str, other: str) -> Callable[[Answering, Posed], Tensors | None]:
    """Two of q, k and v, of one shape."""

    def answer(answering: Answering, posed: Posed) -> Tensors | None:
        x, y = getattr(posed.operands, one), getattr(posed.operands, other)
        if x.shape != y.shape:
            return None
        found = answering(posed.of(**{one: y, other: x}))
        if f"d{one}" in found:
            found |= {f"d{one}": found[f"d{other}"], f"d{other}": found[f"d{one}"]}
        return found

    return answer


def _layout_turned(answering: Answering, posed: Posed) -> Tensors | None:
    """Heads read as positions and positions as heads, of q, k, v alone."""
    p, x = posed.problem, posed.operands
    others = x.given.keys() - {"q", "k", "v", "q_offset"}
    if others or p.q_length != p.kv_length or p.group != 1:
        return None
    turned = {n: np.swapaxes(getattr(x, n), 1, 2) for n in "qkv"}
    altered = posed.where(
        q_heads=p.q_length, kv_heads=p.kv_length, q_length=p.q_heads, kv_length=p.kv_heads
    ).of(**turned, q_offset=np.zeros(1, np.int64))
    found = answering(
        altered._replace(
            out_cotangent=posed.out_cotangent.swapaxes(1, 2),
            lse_cotangent=posed.lse_cotangent.swapaxes(1, 2),
        )
    )
    return {n: y.swapaxes(1, 2) for n, y in found.items()}


# Dropout


def _undropped(posed: Posed) -> Posed | None:
    p = posed.problem
    return posed.where(dropout_rate=0.0).of(dropout_seed=None) if p.dropout_rate else None


def _not_made_up_for(answering: Answering, posed: Posed) -> Tensors | None:
    """Weights that are kept are not divided by the share that is."""
    rate = posed.problem.dropout_rate
    if not rate:
        return None
    kept = 1 - rate
    found = answering(posed._replace(out_cotangent=posed.out_cotangent.astype(np.float64) * kept))
    return _scaled(found, {"out": kept})


# LSE


def _lse_as(
    words: str,
    change: Callable[[np.ndarray], np.ndarray],
    slope: Callable[[np.ndarray], np.ndarray | float],
) -> Cause:
    """A function of LSE in its place, and its derivative."""

    def answer(answering: Answering, posed: Posed) -> Tensors:
        with np.errstate(over="ignore", invalid="ignore"):
            if posed.lse_cotangent.any():
                nothing = np.zeros_like(posed.lse_cotangent)
                lse = answering(posed._replace(lse_cotangent=nothing))["lse"]
                through = np.nan_to_num(slope(np.where(np.isfinite(lse), lse, 0)))
                posed = posed._replace(lse_cotangent=posed.lse_cotangent * through)
            found = answering(posed)
            return found | {"lse": change(found["lse"])}

    return Cause(words, answer)


def _lse_without_its_largest(answering: Answering, posed: Posed) -> Tensors | None:
    """log Σ exp(s − max s), which is minus the log of the largest weight: out, where V is one-hot."""
    p, x = posed.problem, posed.operands
    if p.dropout_rate or p.kv_length > 1024 or p.sinks:
        return None
    found = answering(posed)
    one_hot = np.broadcast_to(np.eye(p.kv_length), (*x.k.shape[:3], p.kv_length))
    zeros = np.zeros((*posed.lse_cotangent.shape, p.kv_length))
    weights = oracle.forward(replace(p, value_dim=p.kv_length), x._replace(v=one_hot))[0]
    assert weights.shape == zeros.shape
    with np.errstate(divide="ignore"):
        shifted = -np.log(weights.max(-1, initial=0))
    return found | {"lse": np.where(np.isneginf(found["lse"]), -np.inf, shifted)}


# Gradients


def _of_cotangents(
    change: Callable[[Posed, Tensors], Posed | None],
) -> Callable[[Answering, Posed], Tensors | None]:
    """The gradients of other cotangents; of the question and its tensors."""

    def answer(answering: Answering, posed: Posed) -> Tensors | None:
        altered = change(posed, answering(posed))
        return None if altered is None else answering(altered)

    return answer


def _lse_dropped(posed: Posed, found: Tensors) -> Posed | None:
    some = posed.lse_cotangent.any()
    return posed._replace(lse_cotangent=np.zeros_like(posed.lse_cotangent)) if some else None


def _out_dropped(posed: Posed, found: Tensors) -> Posed:
    return posed._replace(out_cotangent=np.zeros_like(posed.out_cotangent))


def _delta_dropped(posed: Posed, found: Tensors) -> Posed | None:
    """dS = P ∘ dP: as if LSE's cotangent were larger by delta."""
    if posed.operands.sinks is not None:
        return None
    delta = (posed.out_cotangent.astype(np.float64) * found["out"]).sum(-1)
    return posed._replace(lse_cotangent=posed.lse_cotangent + delta)


def _gradient_dropped(*names: str) -> Callable[[Posed, Tensors], Tensors | None]:
    def alter(posed: Posed, found: Tensors) -> Tensors | None:
        if any(getattr(posed.operands, name) is None for name in names):
            return None
        return found | {f"d{n}": 0 * found[f"d{n}"] for n in names if f"d{n}" in found}

    return alter


def _gradients_times(factor: Callable[[Problem], float], *names: str) -> Any:
    def alter(posed: Posed, found: Tensors) -> Tensors | None:
        times = factor(posed.problem)
        if times == 1 or not math.isfinite(times):
            return None
        return _scaled(found, dict.fromkeys(names, times))

    return alter


def _unscaled(p: Problem) -> float:
    return 1 / p.scale if p.scale else 1.0


# Tensors


def _scaled(found: Tensors, factors: dict[str, float]) -> Tensors:
    """Some of the tensors times a number, as far as they are there."""
    return found | {name: found[name] * x for name, x in factors.items() if name in found}


def _sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Summed over the axes that the shape has as 1."""
    axes = tuple(
        n for n, (of_x, size) in enumerate(zip(x.shape, shape, strict=True)) if size < of_x
    )
    return x.sum(axes, keepdims=True)


GROUPED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "averaged over a group's query heads, not summed": lambda x: x.mean(2),
    "of a group's first query head, not summed": lambda x: x[:, :, 0],
    "of a group's last query head, not summed": lambda x: x[:, :, -1],
}

CAUSES: tuple[Cause, ...] = (
    asked("once {positional} is aligned top-left", _aligned(lambda posed: 0)),
    asked("once {positional} is aligned bottom-right", _unless_given(_at_real_end)),
    asked(
        "once {positional} is aligned bottom-right, lengths aside",
        _unless_given(_at_whole_end),
    ),
    asked("if q_offset is ignored", _aligned(_default_place)),
    asked("with the q_offset of batch row 0 for all", _aligned(lambda posed: posed.offset[:1])),
    asked("with q_offset's sign turned", _aligned(lambda posed: -posed.offset)),
    asked("if causal hides a query's own key", _one_off(-1)),
    asked("if causal shows one key too many", _one_off(1)),
    asked("if causal is ignored", _uncausal),
    asked("if it is causal unasked", _causal_unasked),
    asked("if it is causal unasked, top-left", _top_left_unasked),
    asked("if the window is ignored", _window(lambda left, right: None)),
    asked("with the window's sides swapped", _window(lambda left, right: (right, left))),
    asked(
        "with a window one wider on its left", _window(lambda left, right: (_moved(left, 1), right))
    ),
    asked(
        "with a window one narrower on its left",
        _window(lambda left, right: (_moved(left, -1), right)),
    ),
    asked(
        "with a window one wider on its right",
        _window(lambda left, right: (left, _moved(right, 1))),
    ),
    asked(
        "with a window one narrower on its right",
        _window(lambda left, right: (left, _moved(right, -1))),
    ),
    asked("if the window's left side is open", _window(lambda left, right: (None, right))),
    asked("if the window's right side is open", _window(lambda left, right: (left, None))),
    asked("if q_lengths are ignored", _without("q_lengths")),
    asked("if q_lengths are ignored, in positions too", _placed_without("q_lengths")),
    asked("if kv_lengths are ignored", _without("kv_lengths")),
    asked("if kv_lengths are ignored, in positions too", _placed_without("kv_lengths")),
    asked("if all lengths are ignored", _without("q_lengths", "kv_lengths")),
    asked(
        "if all lengths are ignored, in positions too", _placed_without("q_lengths", "kv_lengths")
    ),
    asked("with kv_lengths one longer", _lengths("kv_lengths", lambda real: real + 1)),
    asked("with kv_lengths one shorter", _lengths("kv_lengths", lambda real: real - 1)),
    asked(
        "with the kv_lengths of batch row 0 for all",
        _lengths("kv_lengths", lambda real: 0 * real + real[:1]),
    ),
    asked("if segments are ignored", _without("q_segment_ids", "kv_segment_ids")),
    asked("if the mask is ignored", _without("mask")),
    asked("with the mask inverted", _mask(np.logical_not)),
    asked("with the mask transposed", _mask(_transposed)),
    asked("with the mask of head 0 for all", _mask(lambda mask: mask[:, :1])),
    asked("with the mask of batch row 0 for all", _mask(lambda mask: mask[:1])),
    Cause("if a query that sees nothing averages all of V", _empty_rows_average),
    asked("if the bias is ignored", _without("bias")),
    Cause("with the bias scaled as the product is", _times("bias", lambda p: p.scale)),
    Cause("with the bias subtracted", _times("bias", lambda p: -1.0)),
    Cause("with the bias of head 0 for all", _first_of("bias", 1)),
    Cause("with the bias of batch row 0 for all", _first_of("bias", 0)),
    Cause("with softcap after bias", _bias_within_softcap),
    asked("if softcap is ignored", _softcap(lambda p, cap: {"softcap": None})),
    asked(
        "with softcap before scale",
        _softcap(lambda p, cap: {"softcap": cap * abs(p.scale)} if p.scale else {}),
    ),
    asked(
        "with tanh(s / softcap), not multiplied by softcap again",
        _softcap(lambda p, cap: {"scale": p.scale / cap, "softcap": 1.0}),
    ),
    asked("with the softcap of 1", _softcap(lambda p, cap: {"softcap": 1.0})),
    Cause("if softcap's slope is left out of the backward pass", _slope_of_softcap_dropped, True),
    asked("if the sinks are ignored", _without("sinks")),
    Cause("with the sink of head 0 for all", _first_of("sinks", 1)),
    asked("if ALiBi is ignored", _without("alibi_slopes")),
    Cause("with ALiBi's slopes of the other sign", _times("alibi_slopes", lambda p: -1.0)),
    Cause("with ALiBi's distance signed, p_i − j", _alibi(lambda place, i, j: place - j)),
    Cause("with ALiBi's distance |i − j|, top-left", _alibi(lambda place, i, j: abs(i - j))),
    Cause("with ALiBi adding slope · j", _alibi(lambda place, i, j: -j)),
    *map(_scale, SCALES),
    Cause("with heads mapped h % Hkv", _heads(lambda p: np.arange(p.q_heads) % p.kv_heads)),
    Cause("with key head 0 for all query heads", _heads(lambda p: np.zeros(p.q_heads, int))),
    Cause("with q and k exchanged", _exchanged("q", "k")),
    Cause("with k and v exchanged", _exchanged("k", "v")),
    Cause("with heads and positions exchanged, (B, S, H, D) read as (B, H, S, D)", _layout_turned),
    asked("if dropout is ignored", _undropped),
    Cause("if what is dropped is not made up for by 1 / (1 − rate)", _not_made_up_for),
    _lse_as(
        "once LSE is read in base 2", lambda lse: lse / math.log(2), lambda lse: 1 / math.log(2)
    ),
    _lse_as(
        "once LSE is read in base 10", lambda lse: lse / math.log(10), lambda lse: 1 / math.log(10)
    ),
    _lse_as(
        "if the natural LSE is converted from base 2",
        lambda lse: lse * math.log(2),
        lambda lse: math.log(2),
    ),
    _lse_as("if LSE is the sum itself, without a logarithm", np.exp, np.exp),
    _lse_as(
        "if LSE is 0 where nothing is seen",
        lambda lse: np.where(np.isneginf(lse), 0, lse),
        lambda lse: 1.0,
    ),
    _lse_as("with LSE's sign turned", np.negative, lambda lse: -1.0),
    Cause("if LSE is of scores less their largest", _lse_without_its_largest),
    Cause("if the gradient of LSE is dropped", _of_cotangents(_lse_dropped), True),
    Cause("if the gradient of out is dropped", _of_cotangents(_out_dropped), True),
    Cause(
        "if delta, rowsum(dO ∘ O), is left out of the backward pass",
        _of_cotangents(_delta_dropped),
        True,
    ),
    *(
        Cause(
            f"with {' and '.join(names)} {how}",
            _group_gradient(part, *names),
            True,
        )
        for names in (("dk", "dv"), ("dk",), ("dv",))
        for how, part in GROUPED.items()
    ),
    read("if no gradient comes back to q, k and v", _gradient_dropped("q", "k", "v")),
    *(
        read(f"if no gradient comes back to {n}", _gradient_dropped(n))
        for n in ("q", "k", "v", "bias", "sinks", "alibi_slopes")
    ),
    read("with dq and dk without the scale", _gradients_times(_unscaled, "dq", "dk")),
    read("with dq without the scale", _gradients_times(_unscaled, "dq")),
    read("with dk without the scale", _gradients_times(_unscaled, "dk")),
    read("with dq and dk scaled twice", _gradients_times(lambda p: p.scale, "dq", "dk")),
)


# Digits


@dataclass(frozen=True)
class Loss:
    """Arithmetic that is right, and keeps fewer digits than it might.

    Attributes:
        words: behind "agrees"; {dtype} is q's.
        dtypes: of q, in which it is tried.
        answer: its tensors.
    """

    words: str
    dtypes: tuple[str, ...]
    answer: Callable[[Posed], Tensors]


def _by(rounded: Literal["out", "d_weights", "lse"]) -> Callable[[Posed], Tensors]:
    """The yardstick's arithmetic that loses by what it rounds."""
    arithmetic = Arithmetic("product", "exponentials", rounded)
    return lambda posed: attend(arithmetic, *posed)


def _of_rounded(dtype: str) -> Callable[[Posed], Tensors]:
    """Operands of every product rounded to a dtype, and added up in float32."""

    def answer(posed: Posed) -> Tensors:
        coarse = {n: _rounded(getattr(posed.operands, n), dtype) for n in "qkv"}
        altered = posed if dtype == "tf32" else posed.where(dtype=dtype)
        altered = altered.of(**coarse)._replace(out_cotangent=_rounded(posed.out_cotangent, dtype))
        return attend(Arithmetic("product", "exponentials"), *altered)

    return answer


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers that a narrower dtype has; TF32 has 10 bits behind the leading one."""
    if dtype != "tf32":
        return x.astype(dtype).astype(np.float32)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


HALVES = ("float16", "bfloat16")

LOSSES: tuple[Loss, ...] = (
    Loss("within what a delta of an O rounded to {dtype} loses", HALVES, _by("out")),
    Loss("within what dO·Vᵀ rounded to {dtype} loses", HALVES, _by("d_weights")),
    Loss("within what exp(s − lse) of a rounded lse loses", ("float32",), _by("lse")),
    *(
        Loss(
            f"within what products of {dtype} numbers lose",
            ("float32",),
            _of_rounded(dtype.lower()),
        )
        for dtype in ("TF32", "float16", "bfloat16")
    ),
)
