"""Sequences of any lengths, packed one behind the other: flash-attn's varlen, without padding.

Packed, they are one batch row whose segments are the sequences: a query sees keys of its own segment,
and only tiles of the same sequence are visited. To be aligned bottom-right in each of them, each query
has an offset: row r of sequence n is at the packed key r + cu_seqlens_k[n + 1] − cu_seqlens_q[n + 1],
its last query at its last key. Causal, window and ALiBi then count as they always do.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from heedful import dispatch
from heedful.call import Call
from heedful.call.arrays import Array, framework_of, is_concrete_on_cpu, shape_of
from heedful.call.checks import check_integers, framework_of_all
from heedful.call.operands import Operands
from heedful.compiled import compiled
from heedful.explicit_mesh import spread_like_its_arrays
from heedful.repeats import once

OFFSETS = "offset of each query"  # the name of an array that no option is


def flash_attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    causal: bool | Literal["top_left"] = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    dropout_rate: float | None = None,
    dropout_seed: int | Array | None = None,
) -> tuple[Array, Array]:
    """Attention within each of many sequences, packed one behind the other; by the JAX flash core.

    What `flash_attn_varlen_func` of flash-attn (2.1 and later) computes. Sequence n has the queries
    cu_seqlens_q[n] … cu_seqlens_q[n + 1] − 1 and the keys cu_seqlens_k[n] … cu_seqlens_k[n + 1] − 1, and
    is attended by itself, in the contract of `heedful.Problem`: its last query is aligned with its last
    key. Time and memory are those of the sequences, not of a matrix over all tokens: nothing is padded,
    and no maximal length is asked for. Lengths are values: no new ones compile anew.

    Args:
        q: queries, (total_q, Hq, D). A JAX or NumPy array of float64, float32, float16 or bfloat16.
        k: keys, (total_k, Hkv, D), Hq a multiple of Hkv; framework, dtype and device of q.
        v: values, (total_k, Hkv, Dv).
        cu_seqlens_q: (sequences + 1,) integers, where each sequence's queries begin, then where the last
            ones end. From 0 on, never falling; a sequence may have none.
        cu_seqlens_k: (sequences + 1,) integers, the same of keys.
        causal: False, True (a sequence's last query sees its last key) or "top_left" (its query i sees
            its keys ≤ i).
        window: (left, right): how many keys each side of its own place a query sees, None for open.
        scale: factor of the scores, D^-½ by default.
        softcap: c of c·tanh(s/c).
        sinks: (Hq,), a logit for each query head that takes weight and gives nothing; differentiable.
        alibi_slopes: (Hq,), of each query head the slope m of ALiBi, or (sequences, Hq), for each
            sequence its own; differentiable.
        dropout_rate, dropout_seed: as in `heedful.attention`, of one batch row: `heedful.dropout_mask`
            says of b = 0, and of i and j as q and k count them, which weights are kept.

    Returns:
        out (total_q, Hq, Dv) and lse (Hq, total_q), float32 (float64 for float64), natural log, as
        flash-attn has it. Queries of a sequence without keys, and those behind the last sequence, see
        nothing: out 0, lse −inf (the sink, where there is one), no gradient.

    Raises:
        TypeError, ValueError: the call breaks the contract. Wrong numbers in cu_seqlens_q and
            cu_seqlens_k are told where they can be read: on a CPU, outside of a trace.
        Refusal: the flash core cannot honour the call; says why.
    """
    call = packed(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        dropout_rate=dropout_rate,
        dropout_seed=dropout_seed,
    )
    backend = dispatch.choose(call.problem, "jax:flash")

    def compute(arrays: Mapping[str, Array]) -> Any:
        operands = operands_of(call._replace(arrays=arrays))
        return call.restore(*dispatch.run(backend, *once(backend, call.problem, operands)))

    out, lse = spread_like_its_arrays(compute, call)
    return out, lse


def packed(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    alibi_slopes: Array | None = None,
    **options: Any,
) -> Call:
    """The call of one row that packed sequences are; `OFFSETS` among its arrays where they matter."""
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if framework_of(q) == "torch":
        raise TypeError(
            "flash_attention_varlen takes JAX and NumPy arrays. Got torch tensors. "
            "heedful_torch.flash_attn.flash_attn_varlen_func takes them."
        )
    totals = q.shape[0], k.shape[0]
    top_left = isinstance(options["causal"], str)
    if isinstance(q, np.ndarray):
        rows = _rows(*totals, top_left, cu_seqlens_q, cu_seqlens_k, np)
    else:
        sequences = shape_of(cu_seqlens_q)
        rows = _rows_in_jax(*totals, top_left, sequences, cu_seqlens_q, cu_seqlens_k)
    of_sequences = None
    if len(getattr(alibi_slopes, "shape", ())) == 2:
        of_sequences = _slopes_of_sequences(q, alibi_slopes, cu_seqlens_q)
        alibi_slopes = of_sequences[0]
    options |= {"layout": "bshd", "return_lse": True, "alibi_slopes": alibi_slopes}
    call = Call.of(q, k, v, **options, **rows.options)
    if not call.problem.positional:
        return call
    # What would place all queries alike gives way to each one's own.
    problem = replace(call.problem, q_offset=None)
    arrays = {**call.arrays, OFFSETS: rows.offsets}
    if of_sequences is not None:
        problem = replace(problem, alibi_shape=(1, problem.q_heads, problem.q_length, 1))
        arrays["alibi_slopes"] = of_sequences[rows.options["q_segment_ids"]].T
    return call._replace(problem=problem, arrays=arrays)


def operands_of(call: Call) -> Operands:
    """The arrays of a packed call, as `jax:flash` and `jax:plain` see them."""
    operands = call.operands
    if (offsets := call.arrays.get(OFFSETS)) is None:
        return operands
    return operands._replace(q_offset=offsets[None, None, :, None])


class Rows(NamedTuple):
    """What cumulated lengths say of each row, int32.

    Attributes:
        options: of `heedful.attention`: which sequence each token is of, and how many tokens are of any.
        offsets: (total_q,), of each query its place among the packed keys less its row.
    """

    options: dict[str, Array]
    offsets: Array


def _rows(
    q_total: int, kv_total: int, top_left: bool, cu_q: Array, cu_kv: Array, numpy: Any
) -> Rows:
    """By `numpy`, which is NumPy or jax.numpy."""
    cu_q, cu_kv = cu_q.astype("int32"), cu_kv.astype("int32")

    def sequence_of(cu: Array, total: int) -> Array:
        """How many sequences have ended at each row or before, among them those of no tokens."""
        rows = numpy.arange(total, dtype="int32")
        return numpy.searchsorted(cu[1:], rows, side="right").astype("int32")

    q_sequences, kv_sequences = sequence_of(cu_q, q_total), sequence_of(cu_kv, kv_total)
    shifts = cu_kv - cu_q
    # Of what is aligned, the beginnings or the ends; tokens of no sequence see nothing from anywhere.
    shifts = shifts if top_left else numpy.roll(shifts, -1)
    options = {
        "q_segment_ids": q_sequences,
        "kv_segment_ids": kv_sequences,
        "q_lengths": cu_q[-1:],
        "kv_lengths": cu_kv[-1:],
    }
    return Rows(options, shifts[q_sequences])


def _slopes_of_sequences(q: Array, slopes: Array, cu_q: Array) -> Array:
    """ALiBi's of each sequence, and a row more for tokens of none, (sequences + 1, Hq)."""
    framework_of_all({"q": q, "alibi_slopes": slopes})
    (sequences, heads), expected = shape_of(slopes), shape_of(cu_q)[0] - 1
    if sequences != expected:
        raise ValueError(
            "alibi_slopes of two axes must be (sequences, Hq), as many rows as cu_seqlens_q names "
            f"sequences, {expected}. Got {(sequences, heads)}. Of all alike they are (Hq,)."
        )
    numpy: Any = np if isinstance(q, np.ndarray) else jnp
    return numpy.concatenate([slopes, numpy.zeros((1, heads), slopes.dtype)])


@compiled(static=4)
def _rows_in_jax(
    q_total: int, kv_total: int, top_left: bool, _shape: tuple[int, ...], cu_q: Array, cu_kv: Array
) -> Rows:
    return _rows(q_total, kv_total, top_left, cu_q, cu_kv, jnp)


# Checks of what is packed; the others are those of any call


def check_packed(q: Array, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array) -> None:
    """Raises TypeError or ValueError for what is not packed, of any framework."""
    cumulated = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    arrays = {"q": q, "k": k, "v": v, **cumulated}
    framework_of_all(arrays)
    shapes = {name: shape_of(x) for name, x in arrays.items()}
    if any(len(shapes[name]) != 3 for name in "qkv"):
        raise ValueError(
            "q, k and v must be packed: (tokens of all sequences, heads, head size). Got "
            f"{', '.join(f'{name} {shapes[name]}' for name in 'qkv')}. "
            "A batch of sequences of one length is heedful.attention's."
        )
    for name, x in cumulated.items():
        check_integers(name, x)
    if len({shapes[name] for name in cumulated}) > 1 or any(
        len(shapes[name]) != 1 or 0 in shapes[name] for name in cumulated
    ):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must both be of shape (sequences + 1,). Got "
            f"{shapes['cu_seqlens_q']} and {shapes['cu_seqlens_k']}. "
            "Of lengths it is numpy.cumsum([0, *lengths])."
        )
    _check_values("cu_seqlens_q", cu_seqlens_q, "q", shapes["q"][0])
    _check_values("cu_seqlens_k", cu_seqlens_k, "k", shapes["k"][0])


def _check_values(name: str, cumulated: Array, of: str, total: int) -> None:
    if not is_concrete_on_cpu(cumulated):
        return
    values = np.asarray(cumulated)
    if values[0] != 0:
        raise ValueError(
            f"{name} must begin with 0. Got {values[0]}. Of lengths it is numpy.cumsum([0, *lengths])."
        )
    falls = np.flatnonzero(values[1:] < values[:-1])
    if len(falls):
        n = int(falls[0])
        raise ValueError(
            f"{name} must not fall. Got {values[n + 1]} behind {values[n]}, at [{n + 1}]. "
            "It is where each sequence ends, not how long it is."
        )
    if values[-1] > total:
        raise ValueError(
            f"{name} must end within {of}, which has {total} tokens. Got {values[-1]}. "
            f"Pass {of} of all sequences."
        )
