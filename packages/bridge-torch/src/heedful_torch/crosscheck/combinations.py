"""What is combined with what: the factors of an attention call, and a table that pairs all their values.

Most of what goes wrong in a kernel needs two things at once: a window and lengths, a head size of 128
and half precision, a causal mask and as many queries as keys; some of it three. So everything that a
call can vary in is a factor here, sizes, dtypes, callers and memory layouts as well as options, and
`combinations.tsv` is a covering array over them: every two values of two factors that are possible
together stand together in at least one row in which everything is judged, and so do every three of the
factors in `TRIPLES`. Rows in which less is judged (no LSE is asked for; the caller is NumPy, which
differentiates nothing) come on top, each such view beside every value.

`packages/bridge-torch/tools/combine.py` makes the table; a test proves that every pair is there.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from itertools import combinations
from typing import NamedTuple

Row = Mapping[str, str]  # a value of each factor
Choice = dict[str, tuple[str, ...]]  # of some factors, some values

# The first value is the plainest, which a description leaves out. What each means, `cases.py` says.
FACTORS: Choice = {
    "lengths": (
        "70x133", "70x70", "133x70", "64x64", "128x128", "256x256", "64x192", "3x5",
        "1x1", "1x133", "1x4160", "33x2100", "2100x33", "1031x1300",
    ),
    "head_dim": ("32", "1", "20", "64", "128", "256"),
    "value_dim": ("same", "smaller", "larger"),
    "heads": ("4/4", "1/1", "4/2", "6/2", "8/1", "16/2"),
    "batch": ("2", "1", "6"),
    "dtype": ("float32", "bfloat16", "float16", "float64"),
    "caller": ("own", "jax", "torch", "numpy"),
    "return_lse": ("yes", "no"),
    "rank": ("4", "2", "3", "5"),
    "layout": ("bhsd", "bshd"),
    "memory": ("packed", "transposed", "columns", "strided", "sliced", "expanded"),
    "causal": ("no", "yes", "top_left"),
    "window": ("none", "left", "both", "right", "self"),
    "offset": ("default", "11", "-5", "scalar", "each"),
    "q_lengths": ("none", "some", "zero"),
    "kv_lengths": ("none", "some", "zero"),
    "mask": (
        "none", "padding", "full", "shared", "heads", "batch", "outer", "queries", "head-rows",
        "empty-rows",
    ),
    "bias": ("none", "full", "shared", "heads", "batch", "inner", "rows", "hiding", "floor"),
    "bias_dtype": ("q's", "accumulator"),
    "scale": ("default", "0.3", "-0.2", "0"),
    "softcap": ("none", "1.5", "30"),
    "logits": ("usual", "large", "above", "below"),
}  # fmt: skip

# Of these any three values stand together too: they cost few rows, and kernels branch on them.
TRIPLES = (
    (
        "dtype", "head_dim", "causal", "window", "layout", "q_lengths", "kv_lengths", "softcap",
    ),
    ("dtype", "causal", "mask"),
    ("dtype", "causal", "bias"),
    ("dtype", "causal", "heads"),
    ("dtype", "head_dim", "value_dim"),
    ("dtype", "layout", "memory"),
    ("dtype", "layout", "rank"),
    ("dtype", "layout", "caller"),
    ("layout", "memory", "rank"),
    ("layout", "heads", "kv_lengths"),
    ("causal", "window", "offset"),
    ("q_lengths", "kv_lengths", "offset"),
)  # fmt: skip

TRIPLED = tuple({names for factors in TRIPLES for names in combinations(factors, 3)})

# In rows with one of these less is judged, so that they prove nothing about any other pair.
VIEWS: Choice = {"caller": ("numpy",), "return_lse": ("no",)}


class Rule(NamedTuple):
    """A row that has one of the values `where` has one of the values of some factor of `must`."""

    where: Choice
    must: Choice
    why: str


def _but(factor: str, *values: str) -> tuple[str, ...]:
    return tuple(value for value in FACTORS[factor] if value not in values)


LONG = ("1x4160", "33x2100", "2100x33", "1031x1300")
RULES = (
    Rule({"rank": ("2",)}, {"heads": ("1/1",)}, "(S, D) has one head"),
    Rule({"rank": ("2", "3")}, {"batch": ("1",)}, "without a batch axis there is one"),
    Rule({"mask": ("padding",)}, {"rank": ("4",)}, "the form (B, Sk) goes with rank 4"),
    Rule({"mask": ("outer",), "bias": ("inner",)}, {"rank": ("5",)}, "one of two leading axes"),
    Rule({"mask": ("outer",), "bias": ("inner",)}, {"batch": ("6",)}, "both of them larger than 1"),
    Rule(
        {"offset": _but("offset", "default")},
        {"causal": ("yes",), "window": _but("window", "none")},
        "an offset places queries for causal or a window",
    ),
    Rule({"offset": _but("offset", "default")}, {"causal": ("no", "yes")}, "top_left is an offset"),
    Rule({"bias_dtype": ("accumulator",)}, {"bias": _but("bias", "none")}, "of which bias?"),
    Rule(
        {"bias_dtype": ("accumulator",)},
        {"dtype": ("bfloat16", "float16")},
        "elsewhere it is q's dtype",
    ),
    Rule(
        {"memory": ("expanded",)},
        {
            "mask": ("shared", "heads", "batch", "outer", "queries", "head-rows"),
            "bias": _but("bias", "none", "full"),
        },
        "something has an axis of 1 to be expanded",
    ),
    Rule(
        {"scale": ("0",)},
        {"logits": ("usual", "large")},
        "no logit is far from 0 with a scale of 0",
    ),
    Rule(
        {"value_dim": ("smaller",)},
        {"head_dim": _but("head_dim", "1")},
        "nothing is smaller than 1",
    ),
    Rule(
        {"logits": ("above", "below")},
        {"softcap": ("none", "30")},
        "a cap of 1.5 flattens logits near 100, and no gradient is left",
    ),
    Rule(
        {"logits": ("above", "below")},
        {"dtype": ("float32", "float64"), "head_dim": _but("head_dim", "1")},
        "keys of one number, all nearly alike: half precision leaves nothing of dq, their differences",
    ),
    Rule(
        {"q_lengths": ("zero",), "kv_lengths": ("zero",)},
        {"batch": ("2", "6")},
        "of one row with nothing in it there is nothing to judge",
    ),
    Rule(
        {"lengths": ("1x1", "3x5", "1x133", "1x4160")},
        {"offset": _but("offset", "-5")},
        "so few queries would all stand before the first key",
    ),
    Rule(
        {"lengths": ("1x1", "3x5", "2100x33", "1x4160")},
        {"offset": ("default",)},
        "so few keys are soon behind all queries, and so few queries behind all keys",
    ),
    Rule(
        {"mask": ("empty-rows",)},
        {"window": _but("window", "self")},
        "one query sees itself, and the last keys are hidden",
    ),
    Rule(
        {"window": ("self",)},
        {"lengths": _but("lengths", "1x1", "1x133", "1x4160")},
        "one query that may see one key soon sees none",
    ),
    Rule({"lengths": LONG}, {"batch": ("1", "2")}, "time and memory"),
    Rule({"lengths": ("1031x1300",)}, {"heads": ("1/1", "4/2")}, "time and memory"),
    Rule({"lengths": ("1031x1300",)}, {"head_dim": _but("head_dim", "256")}, "time and memory"),
    Rule({"caller": ("numpy",)}, {"return_lse": ("yes",)}, "one view at a time"),
)


def is_possible(row: Row) -> bool:
    """Whether a row, or a part of one, breaks no rule; what it does not name breaks none."""
    return all(
        not any(row.get(name) in values for name, values in rule.where.items())
        or any(name not in row or row[name] in values for name, values in rule.must.items())
        for rule in RULES
    )


def judges_everything(row: Row) -> bool:
    """Whether out, LSE and every gradient are looked at in a row."""
    return not any(row[name] in values for name, values in VIEWS.items())


def pairs_of(row: Row) -> Iterable[frozenset[tuple[str, str]]]:
    """Every two values that stand together in a row."""
    return _together(row, combinations(FACTORS, 2))


def triples_of(row: Row) -> Iterable[frozenset[tuple[str, str]]]:
    """Every three values of `TRIPLES` that stand together in a row."""
    return _together(row, TRIPLED)


def _together(
    row: Row, of_names: Iterable[tuple[str, ...]]
) -> Iterable[frozenset[tuple[str, str]]]:
    for names in of_names:
        yield frozenset((name, row[name]) for name in names)


@cache
def table() -> tuple[dict[str, str], ...]:
    """The rows, those first that add most to the ones before them."""
    text = (resources.files(__package__) / "combinations.tsv").read_text()
    heading, *lines = (line.split("\t") for line in text.splitlines())
    return tuple(dict(zip(heading, line, strict=True)) for line in lines)


def pairs(rows: Iterable[Row]) -> int:
    """How many pairs of values stand together in these rows."""
    return len({pair for row in rows for pair in pairs_of(row)})


def description(row: Row) -> str:
    """What is not plain in a row: "70x70, float16, causal yes"."""
    size = f"{row['lengths']}, {row['dtype']}"
    rest = (n for n in FACTORS if n not in ("lengths", "dtype") and row[n] != FACTORS[n][0])
    return ", ".join((size, *(f"{name} {row[name]}" for name in rest)))
