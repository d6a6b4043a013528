"""Attention and its gradients in float64 NumPy: the judge of every backend, written to be read.

One query head at a time, and of its queries so many at once as their scores make a matrix of bounded
size: memory grows with Sq + Sk. Everything in between is the contract (the docstring of
`heedful.Problem`) on plain matrices: a row for each query i, a column for each key j.

Two rules run through it. What a query does not see takes no part in its arithmetic at all, not even
as zero times NaN. And a NaN or an infinity that a query does see spreads as floating point has it,
silently: that is the caller's arithmetic, nothing to warn of here.

It shares no rule with what it judges: which keys are seen it says in its own words.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.pairs import Pairs

FEATURES = frozenset(
    {
        "mask",
        "bias",
        "causal",
        "window",
        "q_offset",
        "q_lengths",
        "kv_lengths",
        "q_segment_ids",
        "kv_segment_ids",
        "scale",
        "softcap",
        "sinks",
        "alibi_slopes",
        "dropout_rate",
        "dropout_seed",
        "score_mod",
        "mask_mod",
        "return_lse",
        "grouped_heads",
        "value_dim",
    }
)

SCORES_AT_ONCE = 2**19  # 4 MiB in float64, and ten or so such matrices are alive at a time

_silently = np.errstate(invalid="ignore", over="ignore")


@_silently
def forward(problem: Problem, operands: Operands) -> tuple[np.ndarray, np.ndarray]:
    """out and lse.

    Args:
        problem: what is asked.
        operands: NumPy arrays of any float dtype, in canonical form; converted to float64 first.

    Returns:
        out (B, Hq, Sq, Dv) and lse (B, Hq, Sq), both float64.
    """
    queries = (problem.batch, problem.q_heads, problem.q_length)
    out, lse = np.zeros((*queries, problem.value_dim)), np.zeros(queries)
    for part in parts(problem, operands, np.float64):
        weights, lse[part.queries], *_ = _softmax(problem, part)
        out[part.queries] = _sum_over_seen(weights * part.kept, part.seen, part.v)
    return out, lse


@_silently
def gradients(
    problem: Problem, operands: Operands, out_cotangent: Array, lse_cotangent: Array
) -> Operands:
    """The gradients of Σ out ∘ out_cotangent + Σ lse ∘ lse_cotangent.

    Args:
        problem: what is asked.
        operands: NumPy arrays of any float dtype, in canonical form; converted to float64 first.
        out_cotangent: (B, Hq, Sq, Dv), floating.
        lse_cotangent: (B, Hq, Sq), floating.

    Returns:
        those of all operands that have one, float64, each of its operand's shape.
    """
    dout, dlse = (np.asarray(x).astype(np.float64) for x in (out_cotangent, lse_cotangent))
    found = Operands(**{name: np.zeros(x.shape) for name, x in operands.differentiable.items()})

    for part in parts(problem, operands, np.float64):
        weights, _, slope, of_sink, capped = _softmax(problem, part)
        left = weights * part.kept
        found.v[part.keys] += _sum_over_seen(left.T, part.seen.T, dout[part.queries])
        dweights = np.where(part.seen, dout[part.queries] @ part.v.T * part.kept, 0)
        dscores = _softmax_gradient(part.seen, weights, dweights, dlse[part.queries])
        if found.sinks is not None:  # the sink's weight, as any other, but of a value of 0
            mean = (weights * dweights).sum(axis=1)
            found.sinks[0, part.queries[1]] += (of_sink * (dlse[part.queries] - mean)).sum()
        pull_back_added(part, dscores, found.given)
        if found.floats is not None:
            found.floats[...] += part.pairs.pulled_back(
                problem.score_mod, part.seen, capped, dscores
            )
        dproduct = np.where(part.seen, problem.scale * slope * dscores, 0)
        found.q[part.queries] = _sum_over_seen(dproduct, part.seen, part.k)
        found.k[part.keys] += _sum_over_seen(dproduct.T, part.seen.T, part.q)
    return found


# The algebra, on matrices


def _sum_over_seen(weights: np.ndarray, seen: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Row i is Σ_j weights_ij x_j over the j that it sees, whatever the other x_j hold."""
    finite = np.isfinite(x)
    total = weights @ np.where(finite, x, 0)
    for j in np.flatnonzero(~finite.all(axis=1) & seen.any(axis=0)):
        rest = weights[:, [j]] * np.where(finite[j], 0, x[j])
        total += np.where(seen[:, [j]], rest, 0)
    return total


def _softmax(
    problem: Problem, part: "Part"
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The weights p_ij, lse_i, ∂s_ij / ∂(scale q_i k_j), the weight of the sink, and capped scores."""
    scores = problem.scale * (part.q @ part.k.T)
    slope = np.ones_like(scores)
    if problem.softcap is not None:
        # Kernels take the slope as 1 − tanh², of which rounding leaves little where tanh is near 1.
        slope = 1 / np.cosh(np.clip(scores / problem.softcap, -300, 300)) ** 2
        scores = problem.softcap * np.tanh(scores / problem.softcap)
    capped = scores
    scores, bend = modified(problem, part, capped)
    slope = slope * bend
    if part.bias is not None:
        scores = _add_bias(scores, part.bias, problem.accumulator)
    if part.slope:
        scores = scores - part.slope * part.distance
    scores = np.where(part.seen, scores, -np.inf)

    highest = scores.max(axis=1, keepdims=True, initial=part.sink)
    highest = np.where(highest == -np.inf, 0, highest)
    exponentials = np.exp(scores - highest)
    of_sink = np.exp(part.sink - highest)
    total = exponentials.sum(axis=1, keepdims=True) + of_sink

    empty = total == 0
    weights = np.where(part.seen, exponentials / np.where(empty, 1, total), 0)
    lse = np.where(empty, -np.inf, highest + np.log(np.where(empty, 1, total)))
    return weights, lse[:, 0], slope, (of_sink / np.where(empty, 1, total))[:, 0], capped


def modified(problem: Problem, part: "Part", scores: np.ndarray) -> tuple[np.ndarray, Any]:
    """A part's capped scores as the caller's function makes them, and its slope there."""
    if problem.score_mod is None:
        return scores, 1
    return part.pairs.modified(problem.score_mod, part.seen, scores)


def _add_bias(scores: np.ndarray, bias: np.ndarray, accumulator: str) -> np.ndarray:
    """scores + bias, and bias alone where the accumulator cannot hold both.

    A query whose every key has a bias of −1e9 weighs them alike: of scores that differ by less than 64
    nothing is left beside it in float32, and by the contract that is where scores are added up.
    """
    both = scores + bias
    return np.where(both.astype(accumulator) == bias.astype(accumulator), bias, both)


def _softmax_gradient(
    seen: np.ndarray, weights: np.ndarray, dweights: np.ndarray, dlse: np.ndarray
) -> np.ndarray:
    """dscores: ∂p_ij/∂s_il = p_ij (δ_jl − p_il), and ∂lse_i/∂s_ij = p_ij."""
    mean = (weights * dweights).sum(axis=1, keepdims=True)
    return np.where(seen, weights * (dweights - mean + dlse[:, None]), 0)


def pull_back_added(part: "Part", dscores: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
    """Adds a part's share to the gradients of what is added to the scores, by name."""
    if "bias" in found:
        add_over_broadcast(found["bias"], part, dscores)
    if "alibi_slopes" in found:
        found["alibi_slopes"][part.slopes] -= (part.distance * dscores).sum()


# The bookkeeping


class Part(NamedTuple):
    """Some queries of one head, and what takes part in their attention; matrices.

    Attributes:
        queries, keys, scores: where these stand in (B, Hq, Sq, ·), in (B, Hkv, Sk, ·) and in bias.
        q, k, v: (rows, D), (Sk, D), (Sk, Dv).
        bias: (rows, Sk), or None.
        slope: the head's of ALiBi, 0 where there is none.
        slopes: where it stands.
        distance: |p_i − j|, (rows, Sk).
        sink: the head's, −inf where there is none.
        kept: what weights are multiplied by, 0 where they are dropped; (rows, Sk), or 1 without dropout.
        seen: (rows, Sk), boolean.
        pairs: for the caller's functions.
    """

    queries: tuple[int, int, slice]
    keys: tuple[int, int]
    scores: tuple[int, int, slice] | None
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None
    slope: Any
    slopes: tuple[int, int, int, int]
    distance: np.ndarray
    sink: Any
    kept: Any
    seen: np.ndarray
    pairs: Pairs

    @property
    def added(self) -> Operands:
        """What is added to its scores, as the rule takes it."""
        return Operands(self.q, self.k, self.v, bias=self.bias, alibi_slopes=self.slope)


def parts(problem: Problem, operands: Operands, dtype: np.typing.DTypeLike) -> Iterator[Part]:
    """Every query once, its whole row of scores with it; arrays in the dtype, float64 or float32."""
    q, k, v = (np.asarray(x).astype(dtype) for x in operands[:3])
    at_once = max(1, SCORES_AT_ONCE // max(1, problem.kv_length))
    for b, h in np.ndindex(problem.batch, problem.q_heads):
        for first in range(0, problem.q_length, at_once):
            queries = b, h, slice(first, min(first + at_once, problem.q_length))
            keys = b, h // problem.group
            matrix = q[queries].shape[0], problem.kv_length
            scores, bias = None, None
            if operands.bias is not None:
                scores = _broadcast_index(operands.bias, queries)
                bias = np.broadcast_to(np.asarray(operands.bias)[scores].astype(dtype), matrix)
            sink = -np.inf if operands.sinks is None else operands.sinks[0, h, 0, 0]
            sink = np.asarray(sink).astype(dtype)[()]
            slope, slopes = np.dtype(dtype).type(0), (0, 0, 0, 0)
            if operands.alibi_slopes is not None:
                slopes = b if len(operands.alibi_slopes) > 1 else 0, h, 0, 0
                slope = np.asarray(operands.alibi_slopes[slopes]).astype(dtype)[()]
            place, key = places(problem, operands, queries)
            yield Part(
                queries,
                keys,
                scores,
                q[queries],
                k[keys],
                v[keys],
                bias,
                slope,
                slopes,
                abs(place - key).astype(dtype),
                sink,
                keeps(problem, operands, queries, np.dtype(dtype).type),
                sees(problem, operands, queries),
                Pairs.of(operands, queries, matrix),
            )


def sees(problem: Problem, operands: Operands, queries: tuple[int, int, slice]) -> np.ndarray:
    """Which keys these queries see, boolean (rows, Sk): the contract's conditions, one after another.

    Others go by `heedful.rules.visibility`. This is the same once more, and shares no line.
    """
    b, _, rows = queries
    query = np.arange(problem.q_length)[rows, None]
    real_queries, real_keys = _real(problem, operands, b)
    place, key = places(problem, operands, queries)
    back, ahead = problem.window or (None, None)

    seen = (query < real_queries) & (key < real_keys)
    if problem.causal:
        seen &= key <= place
    if back is not None:
        seen &= place - key <= back
    if ahead is not None:
        seen &= key - place <= ahead
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        of_queries, of_keys = (
            operands.q_segment_ids[b, 0, rows, 0],
            operands.kv_segment_ids[b, 0, 0],
        )
        seen &= np.equal.outer(of_queries, of_keys)
    if operands.mask is not None:
        seen &= np.asarray(operands.mask)[_broadcast_index(operands.mask, queries)]
    if problem.mask_mod is not None:
        seen = seen & Pairs.of(operands, queries, seen.shape).shown(problem.mask_mod)
    return seen


def keeps(problem: Problem, operands: Operands, queries: tuple[int, int, slice], dtype: Any) -> Any:
    """What dropout multiplies these queries' weights by, (rows, Sk); 1 where there is none.

    Threefry-2x32 once more, in unsigned words, of the key that it makes of the seed, b and h.
    """
    if problem.dropout_rate == 0:
        return dtype(1)
    b, h, rows = queries
    seed: Any = problem.dropout_seed
    if operands.dropout_seed is not None:
        seed = operands.dropout_seed[b if len(operands.dropout_seed) > 1 else 0]
    words = np.array([[seed], [0], [b], [h]]).astype(np.uint32)
    query, key = np.ogrid[rows, : problem.kv_length]
    shape = np.broadcast_shapes(query.shape, key.shape)
    i, j = (np.broadcast_to(x, shape).astype(np.uint32) for x in (query, key))
    word, _ = _threefry(*_threefry(*words), i, j)
    kept = word / 2.0**32 >= problem.dropout_rate
    return np.where(kept, 1 / (1 - problem.dropout_rate), 0).astype(dtype)


def _threefry(k0: Array, k1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """Salmon et al. 2011, §4.1: 20 rounds, and after each four of them the key."""
    keys = [k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA)]
    x0, x1 = x0 + k0, x1 + k1
    for n in range(20):
        bits = np.uint32((13, 15, 26, 6, 17, 29, 16, 24)[n % 8])
        x0 = x0 + x1
        x1 = (x1 << bits | x1 >> np.uint32(32) - bits) ^ x0
        if n % 4 == 3:
            times = n // 4 + 1
            x0 = x0 + keys[times % 3]
            x1 = x1 + keys[(times + 1) % 3] + np.uint32(times)
    return x0, x1


def places(
    problem: Problem, operands: Operands, queries: tuple[int, int, slice]
) -> tuple[np.ndarray, np.ndarray]:
    """Where these queries stand among the keys, (rows, 1), and where the keys do, (1, Sk)."""
    b, _, rows = queries
    query, key = np.ogrid[rows, : problem.kv_length]
    if operands.q_offset is not None:
        return query + int(operands.q_offset[b if len(operands.q_offset) > 1 else 0]), key
    if problem.q_offset is not None:
        return query + problem.q_offset, key
    real_queries, real_keys = _real(problem, operands, b)
    return query + real_keys - real_queries, key


def _real(problem: Problem, operands: Operands, b: int) -> tuple[int, int]:
    """How many queries and keys of a batch row are real."""
    q_lengths, kv_lengths = operands.q_lengths, operands.kv_lengths
    return (
        problem.q_length if q_lengths is None else int(q_lengths[b]),
        problem.kv_length if kv_lengths is None else int(kv_lengths[b]),
    )


def _broadcast_index(x: Array, queries: tuple[int, int, slice]) -> tuple[int, int, slice]:
    """Where these queries' rows stand in an array whose axes are full or 1."""
    b, h, rows = queries
    return (
        b if x.shape[0] > 1 else 0,
        h if x.shape[1] > 1 else 0,
        rows if x.shape[2] > 1 else slice(None),
    )


def add_over_broadcast(total: np.ndarray, part: Part, x: np.ndarray) -> None:
    """Adds a part's (rows, Sk) to an array shaped like bias, summed over the axes it lacks."""
    assert part.scores is not None
    place = total[part.scores]
    for axis, size in enumerate(place.shape):
        if size == 1:
            x = x.sum(axis=axis, keepdims=True)
    place += x
