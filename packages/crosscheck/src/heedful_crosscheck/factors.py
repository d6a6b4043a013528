"""What an attention call can vary in: the factors, their values, and what goes with what.

Sizes, dtypes, callers and memory layouts are factors as options are. An option added tomorrow gets its
factor here, and with it cases beside everything else (`combinations`) and in the contract's test.
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

from heedful_crosscheck.recipes import (
    Integers,
    RandomMask,
    RandomNumbers,
    Real,
    Segments,
    bent,
    floor_bias,
    hiding_bias,
    inner,
    key_padding,
    mask_with_empty_rows,
    outer,
    striped,
)

Row = Mapping[str, str]  # a value of each factor
Choice = dict[str, tuple[str, ...]]  # of some factors, some values

# Of each batch row, which part of a sequence is real.
SOME, ZERO = (0.7, 1.0, 0.35, 0.9, 0.5, 0.2), (0.8, 0.0, 1.0, 0.4, 0.0, 0.6)


def _pairs(by: str, *pairs: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {f"{a}{by}{b}": (a, b) for a, b in pairs}


def _numbers(*numbers: int) -> dict[str, int]:
    return {str(n): n for n in numbers}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


# Of each factor its values and what they mean, the plainest first, which a description leaves out. A
# factor with an option's name is that option; None: it is not passed; a recipe makes an array.
FACTORS: dict[str, dict[str, Any]] = {
    "lengths": _pairs(
        "x", (70, 133), (70, 70), (133, 70), (64, 64), (128, 128), (256, 256), (64, 192), (3, 5),
        (1, 1), (1, 133), (1, 4160), (33, 2100), (2100, 33), (1031, 1300),
    ),
    "head_dim": _numbers(32, 1, 20, 64, 128, 256),
    "value_dim": _same("same", "smaller", "larger"),
    "heads": _pairs("/", (4, 4), (1, 1), (4, 2), (6, 2), (8, 1), (16, 2)),
    "batch": _numbers(2, 1, 6),
    "dtype": _same("float32", "bfloat16", "float16", "float64"),
    "caller": {"own": None, "jax": "jax", "torch": "torch", "numpy": "numpy"},
    "return_lse": {"yes": True, "no": False},
    "rank": _numbers(4, 2, 3, 5),
    "layout": {"bhsd": None, "bshd": "bshd"},
    "memory": _same("packed", "transposed", "columns", "strided", "sliced", "expanded"),
    "causal": {"no": None, "yes": True, "top_left": "top_left"},
    "window": {
        "none": None, "left": (9, None), "both": (9, 4), "right": (None, 4), "self": (0, 0),
    },
    "q_offset": {
        "default": None, "11": 11, "-5": -5, "scalar": Integers(7),
        # before, among and behind the keys
        "each": Integers((3, -20, 40, 0, 11, 90)),
    },
    "q_lengths": {"none": None, "some": Real(SOME, "q"), "zero": Real(ZERO, "q")},
    "kv_lengths": {"none": None, "some": Real(SOME, "k"), "zero": Real(ZERO, "k")},
    "mask": {
        "none": None,
        "padding": key_padding,
        "full": RandomMask("bhqk"),
        "shared": RandomMask("qk"),
        "heads": RandomMask("hk"),
        "batch": RandomMask("bk"),
        "outer": outer(RandomMask("bk")),
        "queries": RandomMask("bq"),
        "head-rows": RandomMask("hqk"),
        "empty-rows": mask_with_empty_rows,
    },
    "bias": {
        "none": None,
        "full": RandomNumbers("bhqk"),
        "shared": RandomNumbers("qk"),
        "heads": RandomNumbers("hk"),
        "batch": RandomNumbers("bk"),
        "inner": inner(RandomNumbers("bhqk")),
        "rows": RandomNumbers("bq"),
        "hiding": hiding_bias,
        "floor": floor_bias,
    },
    "segments": {
        "none": None,
        "packed": {"q_segment_ids": Segments("q"), "kv_segment_ids": Segments("k")},
        "mixed": {"q_segment_ids": Segments("q", True), "kv_segment_ids": Segments("k", True)},
    },
    "bias_dtype": _same("q's", "accumulator"),
    "sinks": {"none": None, "usual": RandomNumbers("h"), "large": RandomNumbers("h", 3.0)},
    "alibi_slopes": {
        "none": None, "heads": RandomNumbers("h", 0.1), "batch": RandomNumbers("bh", 0.1),
    },
    "dropout": {
        "none": None,
        "0.2": {"dropout_rate": 0.2, "dropout_seed": 5},
        "seeds": {"dropout_rate": 0.6, "dropout_seed": Integers((7, 0, 2**31 - 1, 3, 12345, 1))},
    },
    "scale": {"default": None, "0.3": 0.3, "-0.2": -0.2, "0": 0.0},
    "softcap": {"none": None, "1.5": 1.5, "30": 30.0},
    # They close over nothing: the oracle is given arrays that are options.
    "score_mod": {"none": None, "bent": bent},
    "mask_mod": {"none": None, "striped": striped},
    "logits": _same("usual", "large", "above", "below"),
}  # fmt: skip

# The options among them.
OPTIONS = (
    "layout", "causal", "window", "q_offset", "q_lengths", "kv_lengths", "mask", "bias", "segments",
    "sinks", "alibi_slopes", "dropout", "scale", "softcap", "score_mod", "mask_mod",
)  # fmt: skip

# The functions among these, which are passed as they are.
FUNCTIONS = ("score_mod", "mask_mod")

# Which axes of (B, Hq, Sq, Sk) an array option has; of one that is not here, all, each full or 1.
AXES = {
    "q_offset": "b", "q_lengths": "b", "kv_lengths": "b",
    "q_segment_ids": "bq", "kv_segment_ids": "bk", "sinks": "h", "alibi_slopes": "bh",
    "dropout_seed": "b",
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
    ("causal", "window", "q_offset"),
    ("q_lengths", "kv_lengths", "q_offset"),
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
        {"q_offset": _but("q_offset", "default")},
        {
            "causal": ("yes",),
            "window": _but("window", "none"),
            "alibi_slopes": _but("alibi_slopes", "none"),
        },
        "an offset places queries for causal, a window or ALiBi",
    ),
    Rule(
        {"q_offset": _but("q_offset", "default")},
        {"causal": ("no", "yes")},
        "top_left is an offset",
    ),
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
        {"q_offset": _but("q_offset", "-5")},
        "so few queries would all stand before the first key",
    ),
    Rule(
        {"lengths": ("1x1", "3x5", "2100x33", "1x4160")},
        {"q_offset": ("default",)},
        "so few keys are soon behind all queries, and so few queries behind all keys",
    ),
    Rule(
        {"mask": ("empty-rows",)},
        {"window": _but("window", "self")},
        "one query sees itself, and the last keys are hidden",
    ),
    Rule(
        {"mask": ("empty-rows",)},
        {"lengths": _but("lengths", "1x1", "1x133", "1x4160"), "window": ("none", "right")},
        "one query stands at the last keys",
    ),
    Rule(
        {"window": ("self",)},
        {"lengths": _but("lengths", "1x1", "1x133", "1x4160")},
        "one query that may see one key soon sees none",
    ),
    Rule(
        {"segments": ("packed", "mixed")},
        {"lengths": _but("lengths", "1x1", "1x133", "1x4160")},
        "one query of one segment is soon behind its keys",
    ),
    Rule(
        {"dropout": ("0.2", "seeds")},
        {"lengths": _but("lengths", "1x1", "3x5"), "window": _but("window", "self")},
        "of few keys all may be dropped",
    ),
    Rule(
        {"sinks": ("usual", "large")},
        {"logits": _but("logits", "below")},
        "beside a sink nothing is left of keys whose logits are near -100",
    ),
    Rule(
        {"sinks": ("usual", "large")},
        {
            "bias": _but("bias", "floor"),
            "lengths": _but("lengths", "1x1", "1x133", "1x4160"),
        },
        "beside a sink nothing is left of the first query's keys, which are all at -30000",
    ),
    Rule(
        {"lengths": ("1x1", "1x133", "1x4160")},
        {"heads": _but("heads", "1/1"), "head_dim": _but("head_dim", "1")},
        "one query, one head, one number: where that happens to cancel, all digits are lost",
    ),
    Rule(
        {"bias": ("floor",)},
        {"lengths": _but("lengths", "1x1", "1x133", "1x4160")},
        "the first query's keys are all at -30000, where float32 has three digits left of a logit",
    ),
    Rule(
        {"alibi_slopes": _but("alibi_slopes", "none")},
        {"heads": _but("heads", "1/1")},
        "the gradient of one slope alone is one number, which may cancel",
    ),
    Rule(
        {"alibi_slopes": _but("alibi_slopes", "none")},
        {"lengths": _but("lengths", "2100x33", "1x1", "1x133", "1x4160")},
        "distances of 2000 that all keys have in common cancel, and half precision loses the rest; "
        "those of one query may cancel too",
    ),
    Rule(
        {"sinks": ("usual", "large")},
        {"logits": _but("logits", "above"), "softcap": ("30",), "dtype": ("float64",)},
        "beside keys whose logits are near 100 nothing is left of a sink",
    ),
    Rule(
        {"bias": ("rows",)},
        {"sinks": ("none",), "dtype": ("float32", "float64")},
        "what a row's scores have in common changes its sink's weight alone: half precision loses that",
    ),
    Rule(
        {"score_mod": ("bent",), "mask_mod": ("striped",)},
        {"caller": _but("caller", "torch")},
        "functions do not cross from torch to who could be asked",
    ),
    Rule(
        {"mask_mod": ("striped",)},
        {
            "lengths": _but("lengths", "1x1", "3x5", "1x133", "1x4160"),
            "window": _but("window", "self"),
        },
        "one query that may see one key soon sees none",
    ),
    Rule({"lengths": LONG}, {"batch": ("1", "2")}, "time and memory"),
    Rule({"lengths": ("1031x1300",)}, {"heads": ("1/1", "4/2")}, "time and memory"),
    Rule({"lengths": ("1031x1300",)}, {"head_dim": _but("head_dim", "256")}, "time and memory"),
    Rule({"caller": ("numpy",)}, {"return_lse": ("yes",)}, "one view at a time"),
)
