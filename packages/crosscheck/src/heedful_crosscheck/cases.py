"""What the backends are run on: named and hard cases, combinations, real activations, anyone's own file.

A case is made once, in float64, and rounded once to the dtype under test; the oracle sees the rounded
numbers. The named cases show one thing each. Every distinct shape and option costs each JAX backend a
compilation, so that most of them have one shape, with lengths that are no multiple of any tile. What
they lack, every two things at once, the rows of the table have (`combinations`).
"""

import fnmatch
import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from heedful_crosscheck import combinations, files
from heedful_crosscheck.factors import AXES, FACTORS, FUNCTIONS, OPTIONS, Row
from heedful_crosscheck.files import InputError
from heedful_crosscheck.hard import HARD
from heedful_crosscheck.recipes import USUAL as MANY_KEYS
from heedful_crosscheck.recipes import (
    ArrayOption,
    Arrays,
    FarLogits,
    Given,
    Integers,
    Maker,
    Normal,
    RandomMask,
    RandomNumbers,
    Sizes,
    key_padding,
    mask_with_empty_rows,
    normal,
)


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

    @property
    def arrays(self) -> Arrays:
        """The options that are arrays."""
        return {name: x for name, x in self.options.items() if isinstance(x, np.ndarray)}

    @property
    def fingerprint(self) -> str:
        """A hash of all arrays, their shapes and dtypes, and the other options."""
        digest = hashlib.sha256()
        arrays = {"q": self.q, "k": self.k, "v": self.v, **self.arrays}
        for name, x in sorted(arrays.items()):
            digest.update(f"{name} {x.dtype} {x.shape} ".encode())
            digest.update(np.ascontiguousarray(x).tobytes())
        others = {name: _said(x) for name, x in self.options.items() if name not in arrays}
        digest.update(repr(sorted(others.items())).encode())
        return digest.hexdigest()


def _said(x: Any) -> Any:
    """A function by its name, which is the same in every process."""
    return f"{x.__module__}.{x.__qualname__}" if callable(x) else x


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call that all backends are run on: data, which a worker process can be handed.

    Attributes:
        name, group: what `--cases` selects by, and the rows of the report.
        why: what it is there for, in a sentence.
        make: from random numbers to float64 q, k, v (B, H, S, D) and array options.
        options: all others, as they are passed; arrays among them are rounded as those of `make` are.
        dtype: the only one that it is for; None where it is for any.
        usual: where it is for any, the ones that it is asked in unless somebody says otherwise.
        rank: of q, k and v as the backend gets them; below 4, B (and H) must be 1.
        wide_bias: whether floating options have the accumulator's dtype instead of q's.
        return_lse: whether LSE is asked for, of backends that have one.
        second: whether second derivatives are judged, of backends that have them.
        caller: the framework of the arrays; None for the backend's own, so that no bridge is crossed.
        memory: how arrays of two axes and more lie in memory, a name of `layouts.LAYOUTS`; "expanded":
            mask and bias are full, by axes of stride 0.
        row: of the table of combinations, where the case is one.
        cotangents: "out" (B, Hq, Sq, Dv) and "lse" (B, Hq, Sq), float64; those left out are drawn.
    """

    name: str
    group: str
    make: Maker
    why: str = ""
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
    cotangents: Arrays = field(default_factory=dict)

    @property
    def description(self) -> str:
        """What is asked, and why; of a combination, its values."""
        return self.why if self.row is None else combinations.description(self.row)

    def inputs(self, seed: int, dtype: str) -> Inputs:
        """The arrays for a seed, rounded to a dtype.

        Raises:
            InputError: a number is too large for the dtype.
        """
        arrays = self.make(self.random(seed))
        scores = (*arrays["q"].shape[:3], arrays["k"].shape[2])
        q, k, v = (self._as_called(self._round(n, arrays.pop(n), dtype)) for n in "qkv")
        return Inputs(q, k, v, self.given(arrays, scores, dtype))

    def given(
        self, arrays: Arrays, scores: tuple[int, int, int, int], dtype: str
    ) -> dict[str, Any]:
        """All options as the call has them, of arrays of `make` over (B, Hq, Sq, Sk)."""
        made = {
            n: self._option_as_called(n, self._round(n, x, dtype), scores)
            for n, x in arrays.items()
        }
        own = {
            n: self._round(n, x, dtype) if isinstance(x, np.ndarray) else x
            for n, x in self.options.items()
        }
        return {**own, **made}

    def cotangent(self, of: str, drawn: np.ndarray, dtype: str) -> np.ndarray:
        """That of "out" or "lse" in a dtype: its own, or else the one that was drawn.

        Raises:
            InputError: a number is too large for the dtype.
        """
        return self._round(f"{of}_cotangent", self.cotangents.get(of, drawn), dtype)

    def random(self, seed: int, purpose: str = "inputs") -> np.random.Generator:
        """Random numbers that depend on seed, case and purpose, not on what else is run."""
        return np.random.default_rng([seed, zlib.crc32(f"{self.name}/{purpose}".encode())])

    def _round(self, name: str, x: np.ndarray, dtype: str) -> np.ndarray:
        if x.dtype.kind != "f":
            return x
        option = name not in "qkv" and not name.endswith("_cotangent")
        if option and self.wide_bias and dtype != "float64":
            dtype = "float32"
        with np.errstate(over="ignore"):  # said below, in words
            rounded = x.astype(dtype)
        # A bias of −inf is the contract's; a finite one that became so is not what was asked.
        finite = np.isfinite(rounded.astype(np.float64)) | (np.isneginf(x) & option)
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
        if AXES.get(name, "").endswith("h"):  # a number for each head, of all rows or of each
            x = x.reshape(-1, scores[1])
            return x[0] if len(x) == 1 else x.reshape(*lead, -1)
        if AXES.get(name, "").startswith("b") and x.ndim:  # a number for each row, or several
            return x.reshape(*(lead or (1,) * (x.ndim == 1)), *x.shape[1:])
        if x.ndim == 4 and self.memory == "expanded":
            x = np.broadcast_to(x, scores)
        if x.ndim == 4:  # over the scores
            whole = len(x) == scores[0]
            x = x.reshape(*(lead if whole else (1,) * len(lead)), *x.shape[1:])
            for axis in range(len(lead)) if self.rank > 4 and self.memory != "expanded" else ():
                first = x.take([0], axis)
                x = first if (x == first).all() else x  # what repeats along one of them has it as 1
        return x

    def _lead(self, batch: int) -> tuple[int, ...]:
        """The axes before H, S and D: as many as the rank leaves, the last ones the largest."""
        if self.rank < 5:
            return (batch,)[: max(self.rank - 3, 0)]
        return (2, batch // 2) if batch % 3 == 0 else (1, batch)


# The named cases

MANY_QUERIES = Sizes(q_length=133, kv_length=70)
# Crosses several tiles of every kernel here, queries and keys both, with a partial tile at the end.
LONG = Sizes(batch=1, q_heads=3, kv_heads=1, q_length=1031, kv_length=1300)

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

# Why the named cases are there, by group; each name says which of it.
WHY = {
    "positions": "where queries stand among the keys: where causal, windows and offsets count from",
    "masks": "masks of every shape, and where they meet causal",
    "lengths": "rows of their own lengths, behind which stand NaN and infinity",
    "empty rows": "queries that see no key give 0, -inf and no gradient",
    "heads": "which key head a query head reads, and head sizes that no vector load fits",
    "scores": "what is done to a logit, and in which order",
    "shapes": "one key, one query, several tiles with a part of one at the end",
    "bridge": "arrays of one framework, a kernel of another",
}

# Group, case, and what a `Case` of that name is made of.
NAMED: dict[str, dict[str, dict[str, Any]]] = {
    "positions": {
        "full": {"make": normal()},
        "full-out-only": {"make": normal(), "return_lse": False},
        "causal": {"make": normal(), "options": CAUSAL},
        "top-left": {"make": normal(), "options": TOP_LEFT},
        "offset": {"make": normal(), "options": {**CAUSAL, "q_offset": 11}},
        "offset-each": {"make": normal(q_offset=Integers((5, 40))), "options": CAUSAL},
        "window": {"make": normal(), "options": {"window": (9, 4)}},
        "window-causal": {"make": normal(), "options": {**CAUSAL, "window": (20, None)}},
    },
    "masks": {
        "mask": {"make": normal(mask=RandomMask("bhqk"))},
        "mask-shared": {"make": normal(mask=RandomMask("qk"))},
        "key-padding": {"make": normal(mask=key_padding)},
        "mask-causal": {"make": normal(mask=RandomMask("bhqk")), "options": CAUSAL},
    },
    "lengths": {
        "kv-lengths": {"make": normal(kv_lengths=Integers((133, 57)))},
        "lengths": {"make": normal(q_lengths=Integers((70, 33)), kv_lengths=Integers((91, 133)))},
        "lengths-causal": {
            "make": normal(q_lengths=Integers((41, 70)), kv_lengths=Integers((133, 99))),
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
        "kv-length-zero": {"make": normal(kv_lengths=Integers((0, 133)))},
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
        "bias": {"make": normal(bias=RandomNumbers("bhqk"))},
        "bias-wide": {
            "make": normal(bias=RandomNumbers("hk")),
            "options": CAUSAL,
            "wide_bias": True,
        },
        "softcap-bias": {
            "make": normal(GROUPED, bias=RandomNumbers("hqk")),
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
        "long-mask": {"make": normal(LONG, mask=RandomMask("qk"))},
    },
    "bridge": {
        f"from-{caller}{suffix}": {"caller": caller, **parts}
        for caller in ("numpy", "jax", "torch")
        for suffix, parts in (
            ("", {"make": normal()}),
            (
                "-masked",
                {
                    "make": normal(mask=key_padding, bias=RandomNumbers("hqk")),
                    "options": CAUSAL,
                },
            ),
        )
    },
}


def named() -> tuple[Case, ...]:
    """The cases that show one thing each."""
    return tuple(
        Case(
            name=name,
            group=group,
            why=WHY[group],
            second=name in SECOND,
            usual=NAMED_DTYPES,
            **parts,
        )
        for group, cases in NAMED.items()
        for name, parts in cases.items()
    )


# The combinations


def of_row(row: Row) -> dict[str, Any]:
    """What the `Case` of a row of the table is made of."""
    meant = {name: FACTORS[name][value] for name, value in row.items()}
    asked: dict[str, Any] = {}
    for name in OPTIONS:
        if isinstance(meant[name], Mapping):  # a factor of several options
            asked |= meant[name]
        elif meant[name] is not None:
            asked[name] = meant[name]
    arrays = {n: made for n, made in asked.items() if callable(made) and n not in FUNCTIONS}
    options = {name: x for name, x in asked.items() if name not in arrays}
    return {
        "make": _with_logits(row["logits"], options.get("scale"), _sizes(meant), arrays),
        "options": options,
        "dtype": row["dtype"],
        "rank": meant["rank"],
        "wide_bias": row["bias_dtype"] == "accumulator",
        "return_lse": meant["return_lse"],
        "caller": meant["caller"],
        "memory": row["memory"],
        "row": row,
    }


def _sizes(meant: Mapping[str, Any]) -> Sizes:
    (q_heads, kv_heads), (q_length, kv_length) = meant["heads"], meant["lengths"]
    d = meant["head_dim"]
    value_dim = {"same": d, "smaller": d // 2, "larger": d + 16}[meant["value_dim"]]
    return Sizes(meant["batch"], q_heads, kv_heads, q_length, kv_length, d, value_dim)


def _with_logits(
    logits: str, scale: float | None, sizes: Sizes, arrays: Mapping[str, ArrayOption]
) -> Maker:
    """Logits of size 1 whatever the scale is, or of size 8, or all near `HARD` or its negative."""
    default = sizes.head_dim**-0.5
    scale = default if scale is None else scale
    times = default / abs(scale) if scale else 1.0
    if logits in ("above", "below"):
        return FarLogits(Normal(sizes, times, arrays), scale, logits == "above")
    return Normal(sizes, times * (8 if logits == "large" else 1), arrays)


COMBINATIONS = "combinations"  # their group


@cache
def combined() -> tuple[Case, ...]:
    """A case for each row of the table, those first that add most."""
    return tuple(
        Case(name=f"combination-{number:03}", group=COMBINATIONS, **of_row(row))
        for number, row in enumerate(combinations.table(), 1)
    )


def hard() -> tuple[Case, ...]:
    """The cases that hurt."""
    return tuple(
        Case(name=name, group=group, **{"usual": NAMED_DTYPES} | parts)
        for group, cases in HARD.items()
        for name, parts in cases.items()
    )


# Real transformers, by the names of their files, and what of them is here.
ACTIVATIONS = {
    "minilm": "a BERT's q, k and v: sharp heads, broad heads, outliers, real padding",
    "smollm2": "a Llama's q, k and v: causal, rotated, three heads to a key head, sinks at token 0",
}


def activations() -> tuple[Case, ...]:
    """What real transformers compute from text."""
    found: list[Case] = []
    for group, why in ACTIVATIONS.items():
        packaged = resources.files(__package__) / "activations" / f"{group}.safetensors"
        with resources.as_file(packaged) as path:
            found += [replace(case, why=why) for case in load(path, group)]
    return tuple(found)


def everything() -> tuple[Case, ...]:
    """What `heedful crosscheck` runs when nothing is selected."""
    return named() + hard() + combined() + activations()


QUICK = 40  # combinations


def quick() -> tuple[Case, ...]:
    """A selection that has every value of every factor, most pairs, and real activations."""
    return combined()[:QUICK] + select(["full", "minilm-layer0"], named() + activations())


def full(cases: Iterable[Case]) -> tuple[Case, ...]:
    """The cases in every dtype; combinations in those in which they are possible."""
    return tuple(replace(case, dtype=None, usual=_dtypes_of(case)) for case in cases)


def _dtypes_of(case: Case) -> tuple[str, ...]:
    dtypes = tuple(FACTORS["dtype"])
    if case.row is None:
        return dtypes
    return tuple(d for d in dtypes if combinations.is_possible({**case.row, "dtype": d}))


def share_of_pairs(cases: Iterable[Case]) -> str:
    """How much of the table some cases are, in words: "40 of 177 combinations, …"."""
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
    """The cases of a safetensors file, as `files` describes it and `save` writes it.

    Raises:
        InputError: the file cannot be read, or what is in it is no such case.
    """
    return tuple(
        Case(
            name=name,
            group=group,
            make=Given(saved.arrays),
            options={n: x for n, x in saved.options.items() if n != "return_lse"},
            wide_bias=saved.wide,
            return_lse=saved.options.get("return_lse", True),
            cotangents=saved.cotangents,
        )
        for name, saved in files.read(path).items()
    )
