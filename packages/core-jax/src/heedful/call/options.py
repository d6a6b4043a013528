"""The options of an attention call: of each, in one entry, its check, its name elsewhere, its array.

An entry reads what the caller passed into attributes of the `Problem`, whose docstring says what each
option means, and says whether a problem asks for it at all: that is a feature, which a backend takes or
does not.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from heedful.call.arrays import Array, accumulator_of, dtype_of, is_concrete_on_cpu, shape_of
from heedful.call.checks import (
    as_float,
    broadcasts,
    check_floating,
    check_integers,
    is_integral,
    is_real,
    shown,
)
from heedful.call.form import Form
from heedful.call.functions import BlockMask, Program, TorchFunction, packed, traced

if TYPE_CHECKING:
    from heedful.call.problem import Problem

FAR = 2**29  # more than any length; sums of three such numbers still fit an int32


class Known(NamedTuple):
    """What is known of a call when an option is read.

    Attributes:
        form: of the caller's arrays.
        framework, dtype: of q, k and v.
        given: all options that the caller passed.
        fields: the attributes of the problem that have been read so far, sizes among them.
        closed_over: arrays that functions among the options close over, by option.
    """

    form: Form
    framework: str
    dtype: str
    given: Mapping[str, Any]
    fields: dict[str, Any]
    closed_over: dict[str, tuple[Array, ...]]

    @property
    def accumulator(self) -> str:
        return accumulator_of(self.dtype)

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """(B, Hq, Sq, Sk)."""
        batch, heads, rows, columns = (
            self.fields[name] for name in ("batch", "q_heads", "q_length", "kv_length")
        )
        return batch, heads, rows, columns


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: of the argument; of the feature; and of the operand, where it is an array.
        default: what is passed where the caller says nothing.
        read: (value, known) → attributes of the problem.
        asked: (problem) → whether it asks for this beyond plain attention.
        operand: (array, form, problem) → the array in canonical form; None for what is no array.
        number: whether it may be a number in place of an array.
        differentiable: whether it has a gradient.
        elsewhere: what the same thing is called elsewhere, and how to say it here.
    """

    name: str
    default: Any
    read: Callable[[Any, Known], Mapping[str, Any]]
    asked: "Callable[[Problem], bool]"
    operand: "Callable[[Array, Form, Problem], Array] | None" = None
    number: bool = False
    differentiable: bool = False
    elsewhere: Mapping[str, str] = field(default_factory=dict)


# Masks and biases


def _read_mask(mask: Array | None, known: Known) -> dict[str, Any]:
    if mask is None:
        return {}
    if dtype_of(mask) != "bool":
        raise TypeError(
            "mask must be boolean, True = visible. "
            f"Got {dtype_of(mask)}. An additive float mask is bias=; for 0/1 use mask != 0."
        )
    return {"mask_shape": _mask_shape(mask, known)}


def _mask_shape(mask: Array, known: Known) -> tuple[int, ...]:
    """Canonical shape of a mask, which for rank-4 input may also be the key-padding form (B, Sk)."""
    shape = shape_of(mask)
    batch, _, q_length, kv_length = known.scores
    key_padding = len(known.form.lead) == 1 and shape == (batch, kv_length)
    if not key_padding:
        return _score_shape("mask", mask, known)
    if batch > 1 and batch == q_length:
        raise ValueError(
            f"mask of shape {shape} could be (B, Sk) or (Sq, Sk), since B = Sq = {batch}. Say which: "
            "mask[:, None, None, :] for (B, Sk), mask[None, None] for (Sq, Sk)."
        )
    return (batch, 1, 1, kv_length)


def _read_bias(bias: Array | None, known: Known) -> dict[str, Any]:
    if bias is None:
        return {}
    check_floating("bias", bias, known.dtype, if_bool="A boolean mask is mask=.")
    return {"bias_shape": _score_shape("bias", bias, known), "bias_dtype": dtype_of(bias)}


def _score_shape(name: str, x: Array, known: Known) -> tuple[int, ...]:
    """The canonical rank-4 shape of an array broadcastable to (*lead, Hq, Sq, Sk)."""
    lead, scores = known.form.lead, known.scores
    full = (*(lead or (1,)), *scores[1:])
    given = shape_of(x)
    if not broadcasts(given, full):
        axes = "B, " if len(full) == 4 else "".join(f"B{n}, " for n in range(1, len(full) - 2))
        forms = f"be broadcastable to ({axes}Hq, Sq, Sk) = {full}"
        if name == "mask" and len(lead) == 1:
            forms += f", or be (B, Sk) = {(scores[0], scores[3])}"
        raise ValueError(f"{name} must {forms}. Got {given}. Each axis is full or 1.")
    padded = (1,) * (len(full) - len(given)) + given
    one = all(axis == 1 for axis in padded[:-3])
    return (1 if one else scores[0], *padded[-3:])


def _scores_like_mask(mask: Array, form: Form, problem: "Problem") -> Array:
    assert problem.mask_shape is not None
    return form.scores(mask, problem.mask_shape)


def _scores_like_bias(bias: Array, form: Form, problem: "Problem") -> Array:
    assert problem.bias_shape is not None
    return form.scores(bias, problem.bias_shape)


# Lengths


def _reads_lengths(name: str) -> Callable[[Any, Known], dict[str, Any]]:
    def read(x: Array | None, known: Known) -> dict[str, Any]:
        if x is None:
            return {}
        check_integers(name, x)
        lead = known.form.lead
        if not broadcasts(shape_of(x), lead or (1,)):
            raise ValueError(
                f"{name} must have one length for each batch row, shape {_rows(lead)}. "
                f"Got {shape_of(x)}. Pass one number for each sequence of the batch."
            )
        return {name: True}

    return read


def _rows(lead: tuple[int, ...]) -> str:
    if len(lead) < 2:
        return f"(B,) = {lead or (1,)}"
    return (
        f"({', '.join(f'B{n}' for n, _ in enumerate(lead, start=1))}) = {lead}, each axis full or 1"
    )


def _lengths_of_queries(x: Array, form: Form, problem: "Problem") -> Array:
    _check_length_values("q_lengths", x, problem.q_length, "Sq")
    return form.rows(x)


def _lengths_of_keys(x: Array, form: Form, problem: "Problem") -> Array:
    _check_length_values("kv_lengths", x, problem.kv_length, "Sk")
    return form.rows(x)


def _check_length_values(name: str, lengths: Array, longest: int, axis: str) -> None:
    if 0 in lengths.shape or not is_concrete_on_cpu(lengths):
        return
    # Of a JAX array too: within a trace, its own min() would be traced.
    values = np.asarray(lengths)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > longest:
        raise ValueError(
            f"{name} must lie between 0 and {axis} = {longest}. Got {low if low < 0 else high}. "
            "A length counts the tokens of a row that are real."
        )


# Segments


def _reads_segment_ids(
    name: str, other: str, length: str
) -> Callable[[Any, Known], dict[str, Any]]:
    def read(x: Array | None, known: Known) -> dict[str, Any]:
        if (x is None) != (known.given.get(other) is None):
            raise ValueError(
                "q_segment_ids and kv_segment_ids go together: a query sees the keys of its own "
                f"segment. Got {name if x is not None else other} alone. For self attention pass one "
                "array as both."
            )
        if x is None:
            return {}
        check_integers(name, x)
        full = (*known.form.lead, known.fields[length])
        if not broadcasts(shape_of(x), full):
            raise ValueError(
                f"{name} must have one number for each token, shape {full}, each axis full or 1. "
                f"Got {shape_of(x)}."
            )
        return {name: True}

    return read


def _segment_ids_of_queries(x: Array, form: Form, problem: "Problem") -> Array:
    _check_segment_ids("q_segment_ids", x)
    return form.tokens(x, problem.q_length)[:, None, :, None]


def _segment_ids_of_keys(x: Array, form: Form, problem: "Problem") -> Array:
    _check_segment_ids("kv_segment_ids", x)
    return form.tokens(x, problem.kv_length)[:, None, None, :]


def _check_segment_ids(name: str, ids: Array) -> None:
    if 0 in ids.shape or not is_concrete_on_cpu(ids):
        return
    values = np.asarray(ids)
    if not -(2**31) <= int(values.min()) <= int(values.max()) < 2**31:
        raise ValueError(
            f"{name} must fit an int32. Got numbers from {values.min()} to {values.max()}. "
            "Number the segments from 0."
        )


# Position


def _read_causal(causal: Any, known: Known) -> dict[str, Any]:
    top_left = isinstance(causal, str) and causal == "top_left"
    if not (isinstance(causal, bool | np.bool_) or top_left):
        raise ValueError(
            'causal must be False, True (bottom-right) or "top_left". '
            f"Got {shown(causal)}. For any other alignment pass causal=True and q_offset=."
        )
    # Which alignment is the business of q_offset, which is read next and may say otherwise.
    return {"causal": bool(causal)} | ({"q_offset": 0} if top_left else {})


def _read_window(window: Any, known: Known) -> dict[str, Any]:
    if window is None:
        return {}
    if not (isinstance(window, Sequence) and len(window) == 2):
        raise ValueError(
            f"window must be a pair (left, right). Got {shown(window)}. "
            "Write (w, 0) to see w keys back, (w, w) for both sides, None for an open side."
        )
    for side in window:
        if side is not None and not (is_integral(side) and side >= 0):
            raise ValueError(
                f"window must hold integers of at least 0, or None. Got {shown(tuple(window))}. "
                "An open side is None here, not -1."
            )
    # A side as long as two FARs is open, wherever the offset puts the query.
    left, right = (None if side is None or side >= 2 * FAR else int(side) for side in window)
    return {} if left is None and right is None else {"window": (left, right)}


def _read_alibi_slopes(slopes: Array | None, known: Known) -> dict[str, Any]:
    if slopes is None:
        return {}
    check_floating("alibi_slopes", slopes, known.dtype)
    lead, heads = known.form.lead, known.fields["q_heads"]
    if shape_of(slopes) not in ((heads,), (*lead, heads)):
        forms = " or ".join(dict.fromkeys((f"(Hq,) = {(heads,)}", f"(B, Hq) = {(*lead, heads)}")))
        raise ValueError(
            f"alibi_slopes must be one slope for each query head, {forms}. Got {shape_of(slopes)}."
        )
    rows = math.prod(shape_of(slopes)[:-1])
    return {"alibi_shape": (rows, heads, 1, 1)}


def _slopes_of_heads(slopes: Array, form: Form, problem: "Problem") -> Array:
    return slopes.reshape(problem.alibi_shape)


def _read_q_offset(q_offset: Any, known: Known) -> dict[str, Any]:
    fields = known.fields
    positional = fields["causal"] or "window" in fields or "alibi_shape" in fields
    if q_offset is not None:
        _check_offset(q_offset, known.form.lead, positional)
        number = int(q_offset) if isinstance(q_offset, numbers.Integral) else None
        return {"q_offset": number, "q_offset_given": True}
    if not positional:
        return {"q_offset": 0}  # positions play no part: equal problems compare equal
    if "q_offset" in fields:  # top-left
        return {}
    if any(known.given.get(name) is not None for name in ("q_lengths", "kv_lengths")):
        return {"q_offset": None}
    return {"q_offset": fields["kv_length"] - fields["q_length"]}


def _is_another_alignment(problem: "Problem") -> bool:
    """Whether queries stand elsewhere than by default, which is what the lengths say."""
    if not problem.positional or problem.q_offset is None:
        return False
    padded = problem.q_lengths or problem.kv_lengths
    return padded or problem.q_offset != problem.kv_length - problem.q_length


def _check_offset(q_offset: Any, lead: tuple[int, ...], positional: bool) -> None:
    if not positional:
        raise ValueError(
            "q_offset places the queries for causal, window and ALiBi, and this call has none of them. "
            f"Got {shown(q_offset) if isinstance(q_offset, numbers.Number) else 'an array'}. "
            "Leave it out, or pass causal=, window= or alibi_slopes= too: no option is ignored."
        )
    if is_integral(q_offset):
        return _check_offset_range(int(q_offset))
    if isinstance(q_offset, numbers.Number) or not dtype_of(q_offset).startswith("int"):
        kind = dtype_of(q_offset) if hasattr(q_offset, "dtype") else shown(q_offset)
        raise TypeError(
            f"q_offset must be an integer or a signed integer array. Got {kind}. "
            "Cast it to int32: it counts keys."
        )
    if not broadcasts(shape_of(q_offset), lead or (1,)):
        raise ValueError(
            f"q_offset must be one integer, or one for each batch row: {_rows(lead)}. "
            f"Got {shape_of(q_offset)}. It is the place of the first query among the keys."
        )


def _offsets(q_offset: Array, form: Form, problem: "Problem") -> Array:
    if is_concrete_on_cpu(q_offset):
        for value in np.asarray(q_offset).flat:
            _check_offset_range(int(value))
    return form.rows(q_offset, or_one=True)


def _check_offset_range(q_offset: int) -> None:
    if abs(q_offset) > FAR:
        raise ValueError(
            f"q_offset must lie between -2**29 and 2**29. Got {shown(q_offset)}. "
            "It counts keys: it is the place of the first query among them."
        )


# Scores


def _read_scale(scale: Any, known: Known) -> dict[str, Any]:
    if scale is None:
        return {"scale": default_scale(known.fields["head_dim"])}
    if not is_real(scale):
        raise TypeError(
            f"scale must be a Python number. Got {shown(scale)}. "
            "To learn it, multiply q by it instead."
        )
    limits, value = np.finfo(known.accumulator), as_float(scale)
    largest, smallest = float(limits.max), float(limits.tiny)
    if not abs(value) <= largest:
        raise ValueError(
            f"scale must be finite, in {known.accumulator} too. Got {shown(scale)}. "
            "For the default, D**-0.5, pass None."
        )
    if abs(value) < smallest and scale != 0:  # processors take such a number for 0
        raise ValueError(
            f"scale must be 0, or at least {smallest:.2g}, the smallest normal {known.accumulator}. "
            f"Got {shown(scale)}. Scale q, or pass 0."
        )
    return {"scale": value}


def default_scale(head_dim: int) -> float:
    """D^-½."""
    return head_dim**-0.5


def _read_score_mod(function: Any, known: Known) -> dict[str, Any]:
    return (
        {} if function is None else _read_function("score_mod", function, known, known.accumulator)
    )


def _read_mask_mod(function: Any, known: Known) -> dict[str, Any]:
    if function is None:
        return {}
    read = _read_function("mask_mod", function, known, None)
    if isinstance(function, BlockMask):
        _check_blocks(function, known)
        known.closed_over["blocks"] = (function.blocks,)
        read["block_size"] = function.size
    return read


def _read_function(name: str, function: Any, known: Known, of_score: str | None) -> dict[str, Any]:
    if known.framework == "torch":
        if not callable(function):
            raise TypeError(
                f"{name} must be a function of torch tensors. Got {shown(function)}. "
                "Of a block mask pass the function that it is of."
            )
        return {name: TorchFunction(name, function)}
    before = [
        slot
        for program in known.fields.values()
        if isinstance(program, Program)
        for slot in program.slots
    ]
    program, closed = traced(name, function, of_score, known.framework, before)
    known.closed_over[name] = closed
    return {name: program}


def _check_blocks(mask: BlockMask, known: Known) -> None:
    batch, heads, *lengths = known.scores
    if mask.lengths != tuple(lengths) or not broadcasts(mask.blocks.shape[:2], (batch, heads)):
        made = (*mask.blocks.shape[:2], *mask.lengths)
        raise ValueError(
            f"a block mask must be made for the call's (B or 1, Hq or 1, Sq, Sk) = {known.scores}. "
            f"Got one for {made}. Make one for these sizes by heedful.block_mask."
        )


def _read_softcap(softcap: Any, known: Known) -> dict[str, Any]:
    """A softcap c such that in the accumulator s/c does not overflow, and c·tanh(s/c) is s at most.

    Beyond eps/tiny, s/c falls below the normal numbers for scores that count, and c·0 is 0; below
    tiny/eps, s/c is infinite for scores that come about.
    """
    if softcap is None:
        return {}
    if not is_real(softcap):
        raise TypeError(
            f"softcap must be a Python number. Got {shown(softcap)}. For no softcap pass None."
        )
    value = as_float(softcap)
    if not 0 < value < math.inf:
        raise ValueError(
            f"softcap must be positive and finite. Got {shown(softcap)}. For no softcap pass None."
        )
    limits = np.finfo(known.accumulator)
    largest = float(limits.eps) / float(limits.tiny)
    if not 1 / largest <= value <= largest:
        raise ValueError(
            f"softcap must lie between {1 / largest:.2g} and {largest:.2g}, so that {known.accumulator} "
            f"can divide by it. Got {shown(softcap)}. For no softcap pass None."
        )
    return {"softcap": value}


# Softmax


def _read_sinks(sinks: Array | None, known: Known) -> dict[str, Any]:
    if sinks is None:
        return {}
    check_floating("sinks", sinks, known.dtype)
    heads = known.fields["q_heads"]
    if shape_of(sinks) != (heads,):
        raise ValueError(
            f"sinks must be one logit for each query head, shape (Hq,) = {(heads,)}. "
            f"Got {shape_of(sinks)}."
        )
    return {"sinks": True}


def _sinks_of_heads(sinks: Array, form: Form, problem: "Problem") -> Array:
    return sinks[None, :, None, None]


# Dropout


def _read_dropout_rate(rate: Any, known: Known) -> dict[str, Any]:
    seed = known.given.get("dropout_seed")
    if rate is None:
        if seed is not None:
            raise ValueError(
                "dropout_seed goes with dropout_rate, and this call has none. Pass the rate too, 0.0 "
                "where nothing is to be dropped: no option is ignored."
            )
        return {}
    check_dropout_rate(rate)
    if rate > 0 and seed is None:
        raise ValueError(
            f"dropout_rate={shown(rate)} needs dropout_seed, an integer that says which weights are "
            "dropped. Pass a new one in each step and layer; for no dropout pass dropout_rate=0.0."
        )
    return {"dropout_rate": float(rate)}


def check_dropout_rate(rate: Any) -> None:
    """Raises TypeError or ValueError for what is no probability below 1."""
    if not is_real(rate):
        raise TypeError(
            f"dropout_rate must be a Python number. Got {shown(rate)}. For no dropout pass None or 0.0."
        )
    if not 0 <= rate < 1:
        raise ValueError(
            f"dropout_rate must lie between 0 and 1, without 1. Got {shown(rate)}. "
            "It is the probability that a weight is dropped."
        )


def _read_dropout_seed(seed: Any, known: Known) -> dict[str, Any]:
    if seed is None:
        return {}
    if is_integral(seed):
        _check_seed(int(seed))
        # Without dropout the seed plays no part: equal problems compare equal.
        return {"dropout_seed": int(seed)} if known.fields["dropout_rate"] else {}
    if isinstance(seed, numbers.Number):
        raise TypeError(
            f"dropout_seed must be an integer or an integer array. Got {shown(seed)}. "
            "Of a key of jax.random take jax.random.randint(key, (), 0, 2**31 - 1)."
        )
    check_integers("dropout_seed", seed)
    lead = known.form.lead
    if not broadcasts(shape_of(seed), lead or (1,)):
        raise ValueError(
            f"dropout_seed must be one integer, or one for each batch row: {_rows(lead)}. "
            f"Got {shape_of(seed)}. One is enough: batch rows differ in what they drop."
        )
    return {}


def _seeds(seed: Array, form: Form, problem: "Problem") -> Array | None:
    if is_concrete_on_cpu(seed):
        for value in np.asarray(seed).flat:
            _check_seed(int(value))
    return form.rows(seed, or_one=True) if problem.dropout_rate else None


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise ValueError(
            f"dropout_seed must lie between 0 and 2**31 - 1. Got {shown(seed)}. "
            "Of a longer one take it modulo 2**31."
        )


# What is returned, and how


def _read_return_lse(return_lse: Any, known: Known) -> dict[str, Any]:
    if not isinstance(return_lse, bool | np.bool_):
        raise TypeError(
            f"return_lse must be True or False. Got {shown(return_lse)}. "
            "It decides what is returned, so it cannot be an array."
        )
    return {"return_lse": bool(return_lse)}


OPTIONS = (  # in the order in which they are read
    Option(
        "mask",
        default=None,
        read=_read_mask,
        asked=lambda problem: problem.mask_shape is not None,
        operand=_scores_like_mask,
        elsewhere={
            "attn_mask": "mask= for a boolean mask, bias= for a float one",
            "key_padding_mask": "mask= of shape (B, Sk), True = visible",
        },
    ),
    Option(
        "bias",
        default=None,
        read=_read_bias,
        asked=lambda problem: problem.bias_shape is not None,
        operand=_scores_like_bias,
        differentiable=True,
        elsewhere={"attn_bias": "bias="},
    ),
    Option(
        "causal",
        default=False,
        read=_read_causal,
        asked=lambda problem: problem.causal,
        elsewhere={
            "is_causal": 'causal="top_left" (SDPA and jax.nn align the diagonal top-left) or causal=True'
        },
    ),
    Option(
        "window",
        default=None,
        read=_read_window,
        asked=lambda problem: problem.window is not None,
        elsewhere={
            "window_size": "window=(left, right), None for an open side",
            "local_window_size": "window=(left, right), None for an open side",
        },
    ),
    Option(
        "alibi_slopes",
        default=None,
        read=_read_alibi_slopes,
        asked=lambda problem: problem.alibi_shape is not None,
        operand=_slopes_of_heads,
        differentiable=True,
    ),
    Option(
        "q_offset",
        default=None,
        read=_read_q_offset,
        asked=lambda problem: problem.q_offset_given or _is_another_alignment(problem),
        operand=_offsets,
        number=True,
    ),
    Option(
        "q_lengths",
        default=None,
        read=_reads_lengths("q_lengths"),
        asked=lambda problem: problem.q_lengths,
        operand=_lengths_of_queries,
        elsewhere={"query_seq_lengths": "q_lengths="},
    ),
    Option(
        "kv_lengths",
        default=None,
        read=_reads_lengths("kv_lengths"),
        asked=lambda problem: problem.kv_lengths,
        operand=_lengths_of_keys,
        elsewhere={"key_value_seq_lengths": "kv_lengths="},
    ),
    Option(
        "q_segment_ids",
        default=None,
        read=_reads_segment_ids("q_segment_ids", "kv_segment_ids", "q_length"),
        asked=lambda problem: problem.q_segment_ids,
        operand=_segment_ids_of_queries,
        elsewhere={"segment_ids": "q_segment_ids= and kv_segment_ids="},
    ),
    Option(
        "kv_segment_ids",
        default=None,
        read=_reads_segment_ids("kv_segment_ids", "q_segment_ids", "kv_length"),
        asked=lambda problem: problem.kv_segment_ids,
        operand=_segment_ids_of_keys,
    ),
    Option(
        "scale",
        default=None,
        read=_read_scale,
        asked=lambda problem: problem.scale != default_scale(problem.head_dim),
        elsewhere={"sm_scale": "scale=", "softmax_scale": "scale="},
    ),
    Option(
        "softcap",
        default=None,
        read=_read_softcap,
        asked=lambda problem: problem.softcap is not None,
        elsewhere={"logits_soft_cap": "softcap="},
    ),
    Option(
        "score_mod",
        default=None,
        read=_read_score_mod,
        asked=lambda problem: problem.score_mod is not None,
    ),
    Option(
        "mask_mod",
        default=None,
        read=_read_mask_mod,
        asked=lambda problem: problem.mask_mod is not None,
        elsewhere={"block_mask": "mask_mod=, a function or what heedful.block_mask makes of one"},
    ),
    Option(
        "sinks",
        default=None,
        read=_read_sinks,
        asked=lambda problem: problem.sinks,
        operand=_sinks_of_heads,
        differentiable=True,
        elsewhere={"s_aux": "sinks=", "sink": "sinks=", "learnable_sink": "sinks="},
    ),
    Option(
        "dropout_rate",
        default=None,
        read=_read_dropout_rate,
        asked=lambda problem: problem.dropout_rate > 0,
        elsewhere={
            "dropout_p": "dropout_rate= with dropout_seed=",
            "dropout": "dropout_rate= with dropout_seed=",
            "dropout_rng": "dropout_seed=, an integer, with dropout_rate=",
        },
    ),
    Option(
        "dropout_seed",
        default=None,
        read=_read_dropout_seed,
        asked=lambda problem: problem.dropout_rate > 0,
        operand=_seeds,
        number=True,
    ),
    Option(
        "layout",
        default="bhsd",
        read=lambda _, known: {},  # it is the form's
        asked=lambda problem: False,
    ),
    Option(
        "return_lse",
        default=False,
        read=_read_return_lse,
        asked=lambda problem: problem.return_lse,
        elsewhere={
            "return_attn_probs": "return_lse=True",
            "return_residual": "return_lse=True",
        },
    ),
)

# What has gradients: of each call, those that are there.
DIFFERENTIABLE = (
    *("q", "k", "v", "floats"),
    *(option.name for option in OPTIONS if option.differentiable),
)

# What may be a number in place of an array.
NUMBERS = tuple(option.name for option in OPTIONS if option.number)

_BY_NAME = {option.name: option for option in OPTIONS}
_ELSEWHERE = {name: here for option in OPTIONS for name, here in option.elsewhere.items()} | {
    "enable_gqa": "not needed: grouped heads need no switch"
}


def check_names(options: Mapping[str, Any]) -> None:
    """Raises TypeError for an option that is none, and says what it is here where that is known."""
    for name in options:
        if name not in _BY_NAME:
            here = _ELSEWHERE.get(name)
            raise TypeError(
                f"unknown option {name!r}. "
                + (f"Here it is {here}." if here else f"The options are {', '.join(_BY_NAME)}.")
            )


def arrays_among(options: Mapping[str, Any]) -> dict[str, Array]:
    """The options that are arrays, or ought to be."""
    return {
        name: given
        for name, given in options.items()
        if given is not None
        and (option := _BY_NAME[name]).operand is not None
        and not (option.number and isinstance(given, numbers.Number))
    }


def read(known: Known) -> dict[str, Any]:
    """The attributes of the problem: those that are known, and those that the options say."""
    for option in OPTIONS:
        known.fields.update(option.read(known.given.get(option.name, option.default), known))
    return known.fields


def canonical(arrays: Mapping[str, Array], form: Form, problem: "Problem") -> dict[str, Array]:
    """Those of the arrays that are options, or that these close over, in canonical form."""
    found = {
        option.name: option.operand(arrays[option.name], form, problem)
        for option in OPTIONS
        if option.operand is not None and option.name in arrays
    }
    functions = {name: x for name, x in problem.functions.items() if name in arrays}
    closed_over = [x for name in functions for x in arrays[name]]
    found |= packed(tuple(functions.values()), closed_over, problem.framework)
    if "blocks" in arrays:
        (blocks,) = arrays["blocks"]
        found["blocks"] = np.asarray(blocks) if problem.framework == "numpy" else blocks
    return found
