"""What the backends are run on: named cases, combinations, real activations, anyone's own file.

A case is made once, in float64, and rounded once to the dtype under test; the oracle sees the rounded
numbers. The named cases show one thing each. Every distinct shape and option costs each JAX backend a
compilation, so that most of them have one shape, with lengths that are no multiple of any tile. What
they lack, every two things at once, the rows of `combinations.tsv` have.
"""

import fnmatch
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch

from heedful.call import Call  # by way of JAX, also teaches NumPy the name "bfloat16"
from heedful_torch.crosscheck import combinations
from heedful_torch.crosscheck.combinations import Row

Arrays = dict[str, np.ndarray]
Maker = Callable[[np.random.Generator], Arrays]


class InputError(ValueError):
    """A case cannot be made: an unknown name, an unreadable file, numbers that do not fit."""


@dataclass(frozen=True)
class Inputs:
    """The NumPy arrays of one attention call, in the layout and the dtype that the call asks for.

    Attributes:
        q, k, v: as the caller would pass them.
        options: every option but `return_lse`, arrays among them.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call that all backends are run on.

    Attributes:
        name, group: what `--cases` selects by, and the rows of the report.
        make: from random numbers to float64 q, k, v (B, H, S, D) and array options.
        options: the options that are no arrays.
        dtype: the only one that it is for; None where it is for any.
        usual: where it is for any, the ones that it is asked in unless somebody says otherwise.
        rank: of q, k and v as the backend gets them; below 4, B (and H) must be 1.
        wide_bias: whether the bias has the accumulator's dtype instead of q's.
        return_lse: whether LSE is asked for, of backends that have one.
        second: whether second derivatives are judged, of backends that have them.
        caller: the framework of the arrays; None for the backend's own, so that no bridge is crossed.
        memory: how q, k, v, mask and bias lie in memory, of `ask.MEMORY` or "expanded": mask and bias
            are full, by axes of stride 0.
        row: of the table of combinations, where the case is one.
    """

    name: str
    group: str
    make: Maker
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    usual: tuple[str, ...] = ("float32", "bfloat16", "float16")
    rank: int = 4
    wide_bias: bool = False
    return_lse: bool = True
    second: bool = False
    caller: str | None = None
    memory: str = "packed"
    row: Row | None = None

    @property
    def description(self) -> str:
        """What is asked, where the name does not say it."""
        return "" if self.row is None else combinations.description(self.row)

    def inputs(self, seed: int, dtype: str) -> Inputs:
        """The arrays for a seed, rounded to a dtype.

        Raises:
            InputError: a number is too large for the dtype.
        """
        arrays = self.make(self.random(seed))
        rounded = {n: self._round(n, x, dtype) for n, x in arrays.items()}
        scores = (*rounded["q"].shape[:3], rounded["k"].shape[2])
        q, k, v = (self._as_called(rounded.pop(name)) for name in "qkv")
        arrays = {n: self._option_as_called(n, x, scores) for n, x in rounded.items()}
        return Inputs(q, k, v, {**self.options, **arrays})

    def random(self, seed: int, purpose: str = "inputs") -> np.random.Generator:
        """Random numbers that depend on seed, case and purpose, not on what else is run."""
        return np.random.default_rng([seed, zlib.crc32(f"{self.name}/{purpose}".encode())])

    def _round(self, name: str, x: np.ndarray, dtype: str) -> np.ndarray:
        if x.dtype.kind != "f":
            return x
        if name == "bias" and self.wide_bias and dtype != "float64":
            dtype = "float32"
        with np.errstate(over="ignore"):  # said below, in words
            rounded = x.astype(dtype)
        # A bias of −inf is the contract's; a finite one that became so is not what was asked.
        finite = np.isfinite(rounded.astype(np.float64)) | ((name == "bias") & np.isneginf(x))
        if not finite.all():
            raise InputError(
                f"{self.name}: {name} reaches {np.abs(x).max():.3g}, beyond {dtype}. Leave {dtype} out."
            )
        return rounded

    def _as_called(self, x: np.ndarray) -> np.ndarray:
        """(B, H, S, D) → the rank and the layout that the call has."""
        if self.rank == 2:
            return x[0, 0]
        x = x.swapaxes(1, 2) if self.options.get("layout") == "bshd" else x
        return x.reshape(*self._lead(len(x)), *x.shape[1:])

    def _option_as_called(
        self, name: str, x: np.ndarray, scores: tuple[int, int, int, int]
    ) -> np.ndarray:
        """An array option for (B, H, S, D) → the same for the call's leading axes."""
        lead = self._lead(scores[0])
        if x.ndim == 4 and self.memory == "expanded":
            x = np.broadcast_to(x, scores)
        if x.ndim == 4:  # over the scores
            whole = len(x) == scores[0]
            x = x.reshape(*(lead if whole else (1,) * len(lead)), *x.shape[1:])
            for axis in range(len(lead)) if self.rank > 4 and self.memory != "expanded" else ():
                first = x.take([0], axis)
                x = first if (x == first).all() else x  # what repeats along one of them has it as 1
            return x
        return x.reshape(lead or (1,)) if x.ndim == 1 else x  # a number for each row

    def _lead(self, batch: int) -> tuple[int, ...]:
        """The axes before H, S and D: as many as the rank leaves, the last ones the largest."""
        if self.rank < 5:
            return (batch,)[: max(self.rank - 3, 0)]
        return (2, batch // 2) if batch % 3 == 0 else (1, batch)


# The named cases


class Sizes(NamedTuple):
    """B, Hq, Hkv, Sq, Sk, D, Dv; the default is the shape that most cases share."""

    batch: int = 2
    q_heads: int = 4
    kv_heads: int = 4
    q_length: int = 70
    kv_length: int = 133
    head_dim: int = 32
    value_dim: int = 32

    @property
    def scores(self) -> tuple[int, int, int, int]:
        return self.batch, self.q_heads, self.q_length, self.kv_length


MANY_KEYS = Sizes()
MANY_QUERIES = Sizes(q_length=133, kv_length=70)
# Crosses several tiles of every kernel here, queries and keys both, with a partial tile at the end.
LONG = Sizes(batch=1, q_heads=3, kv_heads=1, q_length=1031, kv_length=1300)

ArrayOption = Callable[[np.random.Generator, Sizes], np.ndarray]


def normal(
    sizes: Sizes = MANY_KEYS, *, queries_times: float = 1.0, **array_options: ArrayOption
) -> Maker:
    """Standard normal q, k and v, q times a factor, and array options made after them."""

    def make(random: np.random.Generator) -> Arrays:
        b, hq, hkv, sq, sk, d, dv = sizes
        arrays = {
            "q": random.standard_normal((b, hq, sq, d)) * queries_times,
            "k": random.standard_normal((b, hkv, sk, d)),
            "v": random.standard_normal((b, hkv, sk, dv)),
        }
        return arrays | {name: option(random, sizes) for name, option in array_options.items()}

    return make


def random_mask(*axes: str) -> ArrayOption:
    """True with probability 0.7, full along the named axes of "bhqk" and 1 along the others.

    The first query sees the first key, so that something is there to judge.
    """

    def make(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
        mask = random.random(_along(axes, sizes)) < 0.7
        mask[:, :, 0, 0] = True
        return mask

    return make


def random_bias(*axes: str) -> ArrayOption:
    """Standard normal, full along the named axes of "bhqk" and 1 along the others."""

    def make(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
        return random.standard_normal(_along(axes, sizes))

    return make


def _along(axes: tuple[str, ...], sizes: Sizes) -> tuple[int, ...]:
    return tuple(
        full if axis in axes else 1 for axis, full in zip("bhqk", sizes.scores, strict=True)
    )


def key_padding(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """(B, Sk): each row's keys are real up to a length of its own, the first row's all."""
    real = np.linspace(sizes.kv_length, sizes.kv_length // 2, sizes.batch).astype(int)
    return np.arange(sizes.kv_length) < real[:, None]


FULL_MASK = random_mask("b", "h", "q", "k")


def mask_with_empty_rows(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """Every third query sees nothing, and nobody sees any of the last 20 keys, or of the last third."""
    mask = FULL_MASK(random, sizes)
    mask[:, :, 1::3] = False
    mask[..., sizes.kv_length - min(20, sizes.kv_length // 3) :] = False
    return mask


def integers(*values: int) -> ArrayOption:
    """The same integers at any seed."""
    return lambda random, sizes: np.array(values, np.int32)


CAUSAL, TOP_LEFT = {"causal": True}, {"causal": "top_left"}
GROUPED = MANY_KEYS._replace(kv_heads=2)

# The table has float16 beside everything, and float64: here it would take time and show nothing new.
NAMED_DTYPES = ("float32", "bfloat16")

# Where second derivatives are judged: few, since each costs every JAX backend a long compilation.
SECOND = (
    "full",
    "window-causal",
    "offset-each",
    "mask-causal",
    "lengths-causal",
    "gqa",
    "value-dim",
    "softcap-bias",
    "from-torch",
)

# Group, case, and what a `Case` of that name is made of.
NAMED: dict[str, dict[str, dict[str, Any]]] = {
    "positions": {
        "full": {"make": normal()},
        "full-out-only": {"make": normal(), "return_lse": False},
        "causal": {"make": normal(), "options": CAUSAL},
        "top-left": {"make": normal(), "options": TOP_LEFT},
        "offset": {"make": normal(), "options": {**CAUSAL, "q_offset": 11}},
        "offset-each": {"make": normal(q_offset=integers(5, 40)), "options": CAUSAL},
        "window": {"make": normal(), "options": {"window": (9, 4)}},
        "window-causal": {"make": normal(), "options": {**CAUSAL, "window": (20, None)}},
    },
    "masks": {
        "mask": {"make": normal(mask=FULL_MASK)},
        "mask-shared": {"make": normal(mask=random_mask("q", "k"))},
        "key-padding": {"make": normal(mask=key_padding)},
        "mask-causal": {"make": normal(mask=FULL_MASK), "options": CAUSAL},
    },
    "lengths": {
        "kv-lengths": {"make": normal(kv_lengths=integers(133, 57))},
        "lengths": {"make": normal(q_lengths=integers(70, 33), kv_lengths=integers(91, 133))},
        "lengths-causal": {
            "make": normal(q_lengths=integers(41, 70), kv_lengths=integers(133, 99)),
            "options": CAUSAL,
        },
    },
    "empty rows": {
        "causal-tall": {"make": normal(MANY_QUERIES), "options": CAUSAL},
        "window-tall": {
            "make": normal(MANY_QUERIES),
            "options": {"window": (None, 4), "q_offset": -30},
        },
        "mask-empty": {"make": normal(mask=mask_with_empty_rows)},
        "kv-length-zero": {"make": normal(kv_lengths=integers(0, 133))},
    },
    "heads": {
        "gqa": {"make": normal(GROUPED)},
        "gqa-bshd": {"make": normal(GROUPED), "options": {**CAUSAL, "layout": "bshd"}},
        "mqa-causal": {"make": normal(MANY_KEYS._replace(kv_heads=1)), "options": CAUSAL},
        "head-dim": {"make": normal(MANY_KEYS._replace(head_dim=80, value_dim=80))},
        "value-dim": {"make": normal(MANY_KEYS._replace(value_dim=48))},
    },
    "scores": {
        "scale": {"make": normal(), "options": {"scale": 0.3}},
        "softcap": {"make": normal(), "options": {"softcap": 1.5}},
        "bias": {"make": normal(bias=random_bias("b", "h", "q", "k"))},
        "bias-wide": {
            "make": normal(bias=random_bias("h", "k")),
            "options": CAUSAL,
            "wide_bias": True,
        },
        "softcap-bias": {
            "make": normal(GROUPED, bias=random_bias("h", "q", "k")),
            "options": {**CAUSAL, "softcap": 1.5},
        },
        "large-logits": {"make": normal(queries_times=8.0)},
    },
    "shapes": {
        "tiny": {"make": normal(Sizes(1, 1, 1, 3, 5, 4, 4)), "rank": 2},
        "one-key": {"make": normal(MANY_KEYS._replace(kv_length=1))},
        "decode": {
            "make": normal(GROUPED._replace(q_length=1, kv_length=300)),
            "options": CAUSAL,
        },
        "long": {"make": normal(LONG)},
        "long-causal": {"make": normal(LONG), "options": CAUSAL},
        "long-window": {"make": normal(LONG), "options": {"window": (150, 70), "q_offset": 40}},
        "long-mask": {"make": normal(LONG, mask=random_mask("q", "k"))},
    },
    "bridge": {
        f"from-{caller}{suffix}": {"caller": caller, **parts}
        for caller in ("numpy", "jax", "torch")
        for suffix, parts in (
            ("", {"make": normal()}),
            (
                "-masked",
                {
                    "make": normal(mask=key_padding, bias=random_bias("h", "q", "k")),
                    "options": CAUSAL,
                },
            ),
        )
    },
}


def named() -> tuple[Case, ...]:
    """The cases that show one thing each."""
    return tuple(
        Case(name=name, group=group, second=name in SECOND, usual=NAMED_DTYPES, **parts)
        for group, cases in NAMED.items()
        for name, parts in cases.items()
    )


# The combinations: what the values of the factors mean

HARD = 100.0  # a logit whose exponential float32 does not hold, nor, below 0, that of its negative

WINDOWS = {"left": (9, None), "both": (9, 4), "right": (None, 4), "self": (0, 0)}


def outer(option: ArrayOption) -> ArrayOption:
    """The same for all that differ in the second leading axis alone, of (2, 3)."""
    return lambda random, sizes: option(random, sizes)[[0, 0, 0, 3, 3, 3]]


def inner(option: ArrayOption) -> ArrayOption:
    """The same for all that differ in the first leading axis alone, of (2, 3)."""
    return lambda random, sizes: option(random, sizes)[[0, 1, 2, 0, 1, 2]]


MASKS = {
    "padding": key_padding,
    "full": FULL_MASK,
    "shared": random_mask("q", "k"),
    "heads": random_mask("h", "k"),
    "batch": random_mask("b", "k"),
    "outer": outer(random_mask("b", "k")),
    "queries": random_mask("b", "q"),
    "head-rows": random_mask("h", "q", "k"),
    "empty-rows": mask_with_empty_rows,
}
# Of each batch row, which part of a sequence is real.
REAL = {"some": (0.7, 1.0, 0.35, 0.9, 0.5, 0.2), "zero": (0.8, 0.0, 1.0, 0.4, 0.0, 0.6)}


def hiding_bias(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """(B, 1, 1, Sk), −inf with probability 0.3, which hides a key as a mask does."""
    bias = random.standard_normal(_along(("b", "k"), sizes))
    hidden = random.random(bias.shape) < 0.3
    hidden[..., 0] = False
    return np.where(hidden, -np.inf, bias)


def floor_bias(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """(B, 1, Sq, Sk), 0 and −30000, as additive masks are; every fifth query has −30000 everywhere."""
    hidden = random.random(_along(("b", "q", "k"), sizes)) < 0.3
    hidden[:, :, ::5] = True
    return np.where(hidden, -3e4, 0.0)


BIASES = {
    "full": random_bias("b", "h", "q", "k"),
    "shared": random_bias("q", "k"),
    "heads": random_bias("h", "k"),
    "batch": random_bias("b", "k"),
    "inner": inner(random_bias("b", "h", "q", "k")),
    "rows": random_bias("b", "q"),
    "hiding": hiding_bias,
    "floor": floor_bias,
}


def real(part: str, axis: str) -> ArrayOption:
    """(B,) lengths of an axis of "bhqk", as `REAL` has their parts."""

    def make(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
        longest = sizes.scores["bhqk".index(axis)]
        return np.ceil(np.array(REAL[part][: sizes.batch]) * longest).astype(np.int32)

    return make


def offset_each(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """(B,), before, among and behind the keys."""
    return np.array((3, -20, 40, 0, 11, 90)[: sizes.batch], np.int32)


def of_row(row: Row) -> dict[str, Any]:
    """What the `Case` of a row of the table is made of."""
    options: dict[str, Any] = {}
    arrays: dict[str, ArrayOption] = {}
    if row["causal"] != "no":
        options["causal"] = row["causal"] == "yes" or row["causal"]
    if row["window"] != "none":
        options["window"] = WINDOWS[row["window"]]
    if row["offset"] == "each":
        arrays["q_offset"] = offset_each
    elif row["offset"] == "scalar":
        arrays["q_offset"] = lambda random, sizes: np.array(7, np.int32)
    elif row["offset"] != "default":
        options["q_offset"] = int(row["offset"])
    for name, axis in (("q_lengths", "q"), ("kv_lengths", "k")):
        if row[name] != "none":
            arrays[name] = real(row[name], axis)
    if row["mask"] != "none":
        arrays["mask"] = MASKS[row["mask"]]
    if row["bias"] != "none":
        arrays["bias"] = BIASES[row["bias"]]
    for name in ("scale", "softcap"):
        if row[name] not in ("none", "default"):
            options[name] = float(row[name])
    if row["layout"] != "bhsd":
        options["layout"] = row["layout"]
    return {
        "make": _with_logits(row["logits"], options.get("scale"), sizes_of(row), arrays),
        "options": options,
        "dtype": row["dtype"],
        "rank": int(row["rank"]),
        "wide_bias": row["bias_dtype"] == "accumulator",
        "return_lse": row["return_lse"] == "yes",
        "caller": None if row["caller"] == "own" else row["caller"],
        "memory": row["memory"],
        "row": row,
    }


def sizes_of(row: Row) -> Sizes:
    """B, Hq, Hkv, Sq, Sk, D and Dv of a row."""
    (q_heads, kv_heads), (q_length, kv_length) = (
        map(int, row[name].split(by)) for name, by in (("heads", "/"), ("lengths", "x"))
    )
    d = int(row["head_dim"])
    value_dim = {"same": d, "smaller": d // 2, "larger": d + 16}[row["value_dim"]]
    return Sizes(int(row["batch"]), q_heads, kv_heads, q_length, kv_length, d, value_dim)


def _with_logits(
    logits: str, scale: float | None, sizes: Sizes, arrays: dict[str, ArrayOption]
) -> Maker:
    """Logits of size 1 whatever the scale is, or of size 8, or all near `HARD` or its negative."""
    default = sizes.head_dim**-0.5
    scale = default if scale is None else scale
    usual = normal(sizes, queries_times=default / abs(scale) if scale else 1.0, **arrays)

    def make(random: np.random.Generator) -> Arrays:
        made = usual(random)
        if logits == "large":
            made["q"] *= 8
        if logits in ("above", "below"):
            # The first numbers of q and k, nearly constant, are what puts them there.
            q, k = made["q"][..., 0], made["k"][..., 0]
            far = (HARD / abs(scale)) ** 0.5
            sign = 1 if (logits == "above") == (scale > 0) else -1
            q[...] = sign * far * (1 + 0.05 * random.standard_normal(q.shape))
            k[...] = far * (1 + 0.01 * random.standard_normal(k.shape))
        return made

    return make


@cache
def combined() -> tuple[Case, ...]:
    """A case for each row of the table, those first that add most."""
    return tuple(
        Case(name=f"combination-{number:03}", group="combinations", **of_row(row))
        for number, row in enumerate(combinations.table(), 1)
    )


def activations() -> tuple[Case, ...]:
    """q, k, v and padding of a real transformer: sharp heads, broad heads, outliers, real padding."""
    packaged = resources.files(__package__) / "activations" / "minilm.safetensors"
    with resources.as_file(packaged) as path:
        return load(path, group="minilm")


def everything() -> tuple[Case, ...]:
    """What `heedful crosscheck` runs when nothing is selected."""
    return named() + combined() + activations()


QUICK = 40  # combinations


def quick() -> tuple[Case, ...]:
    """A selection that has every value of every factor, most pairs, and real activations."""
    return combined()[:QUICK] + select(["full", "minilm-layer0"], named() + activations())


def share_of_pairs(cases: Iterable[Case]) -> str:
    """How much of the table some cases are, in words: "40 of 178 combinations, …"."""
    rows, table = [case.row for case in cases if case.row is not None], combinations.table()
    return (
        f"{len(rows)} of {len(table)} combinations, in which {combinations.pairs(rows)} of "
        f"{combinations.pairs(table)} pairs of values stand together"
    )


def select(patterns: Sequence[str], cases: Iterable[Case]) -> tuple[Case, ...]:
    """The cases whose name or group matches one of the patterns, `*` and `?` allowed.

    Raises:
        InputError: a pattern matches nothing.
    """
    cases = tuple(cases)
    for pattern in patterns:
        if not any(_matches(pattern, case) for case in cases):
            groups = ", ".join(dict.fromkeys(c.group for c in cases))
            names = ", ".join(c.name for c in cases)
            raise InputError(f"no case is {pattern!r}. The groups are {groups}; the cases {names}.")
    return tuple(c for c in cases if any(_matches(pattern, c) for pattern in patterns))


def _matches(pattern: str, case: Case) -> bool:
    return fnmatch.fnmatchcase(case.name, pattern) or fnmatch.fnmatchcase(case.group, pattern)


# Files


def load(path: str | Path, group: str = "input") -> tuple[Case, ...]:
    """The cases of a safetensors file.

    A case is the tensors `<case>.q`, `<case>.k`, `<case>.v`, floating, (B, H, S, D), and, where there
    is one, `<case>.mask`, boolean, True = visible, (B, Sk) or broadcastable to (B, Hq, Sq, Sk). A file
    of a single case may call them q, k, v and mask.

    Raises:
        InputError: the file cannot be read, or what is in it is no such case.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    found: dict[str, Arrays] = {}
    for name, tensor in tensors.items():
        case, _, part = name.rpartition(".")
        if part not in ("q", "k", "v", "mask"):
            raise InputError(
                f"{path}: tensors are named <case>.q, <case>.k, <case>.v and <case>.mask, or q, k, v "
                f"and mask. Got {name!r}."
            )
        if not (tensor.dtype == torch.bool if part == "mask" else tensor.is_floating_point()):
            raise InputError(
                f"{path}: q, k and v are floating, mask is boolean. Got {name} of {tensor.dtype}."
            )
        array = tensor.numpy() if part == "mask" else tensor.double().numpy()
        found.setdefault(case or Path(path).stem, {})[part] = array
    if not found:
        raise InputError(f"{path} holds no tensors.")
    return tuple(_loaded_case(path, name, group, arrays) for name, arrays in found.items())


def _loaded_case(path: str | Path, name: str, group: str, arrays: Arrays) -> Case:
    if lacking := [part for part in "qkv" if part not in arrays]:
        raise InputError(f"{path}: case {name} lacks {', '.join(lacking)}. A case is q, k and v.")
    for part in "qkv":
        if arrays[part].ndim != 4:
            raise InputError(
                f"{path}: {part} of case {name} must be (B, H, S, D). Got {arrays[part].shape}."
            )
        if not np.isfinite(arrays[part]).all():
            raise InputError(
                f"{path}: {part} of case {name} must be finite, hidden rows too. Put zeros there: the "
                "crosscheck itself fills K and V that nobody sees with NaN."
            )
    try:
        Call.of(arrays["q"], arrays["k"], arrays["v"], mask=arrays.get("mask"))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: case {name}: {error}") from error
    return Case(name=name, group=group, make=lambda random: dict(arrays))
