"""The contract's cases: each option by itself, in every form in which it may come, over tiny sizes.

An option added tomorrow gets a line here; every backend's test then runs it.
"""

from typing import Any

import numpy as np

from heedful_crosscheck.cases import Case
from heedful_crosscheck.recipes import Normal, Sizes, bent, striped


def normal(*shape: int) -> np.ndarray:
    """Standard normal, the same for the same shape."""
    return np.random.default_rng(shape).standard_normal(shape)


def hidden(*shape: int) -> np.ndarray:
    """A mask that hides three keys in ten, differently in each place."""
    return np.random.default_rng(shape).random(shape) < 0.7


def lengths(*values: int) -> np.ndarray:
    """One number for each batch row."""
    return np.array(values, np.int32)


def segments(of_queries: Any, of_keys: Any) -> dict[str, Any]:
    """Both segment options."""
    ids = {"q_segment_ids": of_queries, "kv_segment_ids": of_keys}
    return {name: np.array(x, np.int32) for name, x in ids.items()}


def case(
    group: str,
    name: str,
    dtype: str = "float32",
    rank: int = 4,
    wide: bool = False,
    B: int = 2,
    Hq: int = 2,
    Hkv: int = 2,
    Sq: int = 5,
    Sk: int = 7,
    D: int = 8,
    Dv: int = 8,
    **options: Any,
) -> Case:
    """One call: dtype, rank and sizes, and the options as they are passed, arrays among them.

    `wide`: floating options have the accumulator's dtype.
    """
    return Case(
        name=f"{group}: {name}",
        group=group,
        make=Normal(Sizes(B, Hq, Hkv, Sq, Sk, D, Dv)),
        options=options,
        dtype=dtype,
        rank=rank,
        wide_bias=wide,
    )


def _cases_of(dtype: str) -> list[Case]:
    """What every other dtype goes through; even sizes, which kernels of the half ones ask for."""
    sizes: dict[str, Any] = {"dtype": dtype, "Sq": 6, "Sk": 8}
    return [
        case(dtype, "cross attention", **sizes),
        case(dtype, "causal, empty rows", dtype, Sq=10, Sk=4, causal=True),
        case(dtype, "grouped heads", **sizes, Hq=4, kv_lengths=lengths(8, 3)),
        case(dtype, "bias", **sizes, bias=normal(1, 2, 6, 8)),
        case(dtype, "mask", **sizes, mask=hidden(2, 1, 6, 8)),
    ]


CASES = [
    case("basic", "self attention", Sq=7),
    case("basic", "cross attention"),
    case("basic", "more queries than keys", Sq=9),
    case("basic", "one head, one row", B=1, Hq=1, Hkv=1),
    case("basic", "several hundred keys", B=1, Sq=130, Sk=450),
    case("heads", "grouped", Hq=4),
    case("heads", "grouped by three", Hq=6, Hkv=2),
    case("heads", "multi-query", Hq=4, Hkv=1),
    case("heads", "grouped, causal", Hq=4, causal=True),
    case("heads", "grouped, mask a head", Hq=4, mask=hidden(2, 4, 5, 7)),
    case("heads", "grouped, one head sees nothing", Hq=4, mask=np.arange(4)[:, None, None] != 2),
    case("heads", "grouped, one group sees nothing", Hq=4, mask=np.arange(4)[:, None, None] > 1),
    case("heads", "grouped, bias a head", Hq=4, bias=normal(4, 1, 7)),
    case("value size", "wider than D", Dv=24),
    case("value size", "narrower than D", D=24),
    case("value size", "one", Hq=4, Dv=1),
    case("scale", "given", scale=0.1),
    case("scale", "zero", scale=0.0),
    case("scale", "negative", scale=-1.5),
    case("softcap", "tight", softcap=0.7),
    case("softcap", "loose", softcap=30),
    case("softcap", "with scale and causal", softcap=2.0, scale=1.0, causal=True),
    case("softcap", "before bias", softcap=1.0, bias=3 * normal(2, 2, 5, 7)),
    case("bias", "full", bias=normal(2, 2, 5, 7)),
    case("bias", "a head", bias=normal(1, 2, 1, 1)),
    case("bias", "a batch row", bias=normal(2, 1, 1, 1)),
    case("bias", "a query", bias=normal(1, 1, 5, 1)),
    case("bias", "a key", bias=normal(2, 1, 1, 7)),
    case("bias", "one number", bias=normal(1, 1, 1, 1)),
    case("bias", "large", bias=50 * normal(2, 2, 5, 7)),
    case("bias", "with mask", bias=normal(2, 2, 5, 7), mask=hidden(2, 1, 5, 7)),
    case("bias", "with causal", bias=normal(2, 2, 5, 7), causal=True),
    case("infinite bias", "some keys hidden", bias=np.where(hidden(2, 2, 5, 7), 0.5, -np.inf)),
    case("infinite bias", "a query hidden", bias=np.where(np.arange(5) == 3, -np.inf, 0)[:, None]),
    case(
        "infinite bias",
        "the rest masked",
        bias=np.where(np.arange(7) < 4, -np.inf, 1.0),
        mask=np.arange(7) < np.arange(3, 8)[:, None],
    ),
    case("causal", "square", Sq=7, causal=True),
    case("causal", "fewer queries", causal=True),
    case("causal", "more queries: empty rows", Sq=9, Sk=4, causal=True),
    case("causal", "one query", Sq=1, causal=True),
    case("causal", "several hundred", B=1, Sq=300, Sk=290, causal=True),
    case("top left", "more queries", Sq=9, Sk=4, causal="top_left"),
    case("q_offset", "one number", causal=True, q_offset=1),
    case("q_offset", "negative: empty rows", causal=True, q_offset=-2),
    case("q_offset", "past all keys", causal=True, q_offset=30),
    case("q_offset array", "a batch row", causal=True, q_offset=lengths(3, -1)),
    case("q_offset array", "with a window", window=(2, 1), q_offset=lengths(3, 0)),
    case("window", "both sides", Sq=7, window=(2, 1)),
    case("window", "itself alone", Sq=7, window=(0, 0)),
    case("window", "left alone", Sq=7, window=(2, None)),
    case("window", "right alone", Sq=7, window=(None, 1)),
    case("window", "fewer queries", window=(1, 1)),
    case("window", "more queries: empty rows", Sq=12, Sk=4, window=(1, 0)),
    case("window", "wider than all", window=(50, 50)),
    case("window", "causal", Sq=7, causal=True, window=(2, None)),
    case("window", "causal, top left", causal="top_left", window=(2, 0)),
    case("window", "with an offset", window=(2, 1), q_offset=-3),
    case("window", "several hundred", B=1, Sq=300, Sk=310, window=(40, 7)),
    case("mask", "full", mask=hidden(2, 2, 5, 7)),
    case("mask", "a batch row", mask=hidden(2, 1, 5, 7)),
    case("mask", "keys", mask=hidden(2, 1, 1, 7)),
    case("mask", "queries", mask=hidden(2, 1, 5, 1)),
    case("mask", "causal", mask=hidden(2, 2, 5, 7), causal=True),
    case("mask", "all hidden", mask=np.zeros((1, 1, 1, 1), bool)),
    case("mask", "some rows hidden", mask=np.arange(5)[:, None] % 2 == 0),
    case("lengths", "keys", kv_lengths=lengths(7, 3)),
    case("lengths", "queries", q_lengths=lengths(5, 2)),
    case("lengths", "both", q_lengths=lengths(4, 5), kv_lengths=lengths(3, 7)),
    case("lengths", "none", q_lengths=lengths(0, 5), kv_lengths=lengths(7, 0)),
    case("lengths", "several hundred", Sq=150, Sk=300, kv_lengths=lengths(299, 130)),
    case("lengths, causal", "keys", causal=True, kv_lengths=lengths(7, 3)),
    case("lengths, causal", "queries", causal=True, q_lengths=lengths(5, 2)),
    case("lengths, causal", "both", causal=True, q_lengths=lengths(4, 5), kv_lengths=lengths(7, 3)),
    case("lengths, causal", "top left", causal="top_left", kv_lengths=lengths(7, 3)),
    case(
        "lengths, causal",
        "window",
        window=(2, 1),
        kv_lengths=lengths(7, 3),
        q_lengths=lengths(5, 1),
    ),
    case("lengths, causal", "one number", causal=True, q_offset=2, kv_lengths=lengths(7, 4)),
    case("sinks", "of each head", Hq=4, sinks=normal(4)),
    case("sinks", "larger than all, and none", sinks=np.array([40.0, -np.inf])),
    case("sinks", "empty rows", Sq=9, Sk=4, causal=True, sinks=normal(2)),
    case(
        "sinks",
        "with bias, softcap and mask",
        sinks=normal(2),
        bias=normal(2, 2, 5, 7),
        softcap=1.0,
        mask=hidden(2, 1, 5, 7),
    ),
    case("sinks", "several hundred", B=1, Sq=130, Sk=450, sinks=normal(2)),
    case("sinks", "in bfloat16", "bfloat16", Sq=6, Sk=8, sinks=normal(2)),
    case("sinks", "no keys", Sk=0, sinks=normal(2)),
    case("alibi", "of each head", Hq=4, alibi_slopes=np.array([0.5, 0.25, -0.3, 0.0])),
    case("alibi", "of each row and head", alibi_slopes=normal(2, 2)),
    case("alibi", "causal, grouped", Hq=4, causal=True, alibi_slopes=normal(4)),
    case("alibi", "top left, more queries", Sq=9, Sk=4, causal="top_left", alibi_slopes=normal(2)),
    case("alibi", "with an offset", q_offset=3, alibi_slopes=normal(2)),
    case("alibi", "an offset each", q_offset=lengths(3, -1), alibi_slopes=normal(2, 2)),
    case(
        "alibi",
        "lengths, window and bias",
        q_lengths=lengths(5, 2),
        kv_lengths=lengths(4, 7),
        window=(3, 2),
        bias=normal(2, 2, 5, 7),
        alibi_slopes=normal(2),
    ),
    case("alibi", "several hundred", B=1, Sq=300, Sk=310, alibi_slopes=np.array([0.1, 0.02])),
    case("alibi", "in bfloat16", "bfloat16", Sq=6, Sk=8, alibi_slopes=np.array([0.5, 0.25])),
    case("dropout", "one seed", dropout_rate=0.25, dropout_seed=3),
    case("dropout", "a seed each", dropout_rate=0.5, dropout_seed=lengths(0, 2**31 - 1)),
    case("dropout", "of nothing", dropout_rate=0.0, dropout_seed=3),
    case("dropout", "nearly all", dropout_rate=0.99, dropout_seed=1, Sk=300),
    case(
        "dropout",
        "with all that stands beside it",
        Hq=4,
        dropout_rate=0.3,
        dropout_seed=11,
        causal=True,
        bias=normal(2, 4, 5, 7),
        sinks=normal(4),
        softcap=1.0,
        kv_lengths=lengths(7, 4),
    ),
    case("dropout", "several hundred", B=1, Sq=300, Sk=310, dropout_rate=0.1, dropout_seed=8),
    case("dropout", "in bfloat16", "bfloat16", Sq=6, Sk=8, dropout_rate=0.3, dropout_seed=4),
    case("score_mod", "for each head", Hq=4, score_mod=bent),
    case(
        "score_mod",
        "with all that stands beside it",
        Hq=4,
        score_mod=bent,
        mask_mod=striped,
        causal=True,
        softcap=2.0,
        bias=normal(2, 4, 5, 7),
        alibi_slopes=normal(4),
        mask=hidden(2, 1, 5, 7),
        kv_lengths=lengths(7, 4),
    ),
    case("score_mod", "several hundred", B=1, Sq=300, Sk=310, score_mod=bent),
    case("score_mod", "in bfloat16", "bfloat16", Sq=6, Sk=8, score_mod=bent),
    case("mask_mod", "for each head", Hq=4, mask_mod=striped),
    case("mask_mod", "causal", mask_mod=striped, causal=True),
    case("mask_mod", "several hundred", B=1, Sq=300, Sk=310, mask_mod=striped),
    case("segments", "packed", **segments([[0, 0, 1, 1, 2]] * 2, [[0, 0, 0, 1, 1, 2, 2]] * 2)),
    case(
        "segments", "each row its own", **segments([[0] * 5, [0, 0, 1, 1, 1]], [[0] * 7, [1] * 7])
    ),
    case(
        "segments",
        "mixed, causal",
        causal=True,
        **segments([[1, 0, 1, 2, 0]], [[0, 1, 1, 0, 2, 1, 0]]),
    ),
    case(
        "segments",
        "grouped, mask",
        Hq=4,
        mask=hidden(2, 4, 5, 7),
        **segments([[3, 3, 1, 1, 9]], [[3] * 3 + [1] * 4]),
    ),
    case(
        "segments",
        "several hundred",
        B=1,
        Sq=300,
        Sk=310,
        **segments([np.arange(300) // 70], [np.arange(310) // 70]),
    ),
    case(
        "together",
        "everything",
        Hq=4,
        Dv=16,
        layout="bshd",
        causal=True,
        window=(4, None),
        q_lengths=lengths(5, 4),
        kv_lengths=lengths(6, 7),
        mask=hidden(2, 1, 5, 7),
        bias=normal(1, 4, 5, 7),
        softcap=4.0,
        scale=0.5,
    ),
    case("together", "decoding", Hq=4, Hkv=1, Sq=1, causal=True, kv_lengths=lengths(7, 2)),
    case("sizes", "all one", B=1, Hq=1, Hkv=1, Sq=1, Sk=1, D=1, Dv=1),
    case("sizes", "one key", Sk=1),
    case("sizes", "odd", B=3, Hq=3, Hkv=3, Sq=13, Sk=17, D=5, Dv=5),
    case("sizes", "one key, causal", Sk=1, causal=True),
    case("no rows", "no batch", B=0),
    case("no rows", "no queries", Sq=0, causal=True),
    case("no rows", "no keys", Sk=0),
    case("no rows", "no keys, bias", Sk=0, bias=normal(1, 1, 5, 1)),
    *_cases_of("float64"),
    *_cases_of("float16"),
    *_cases_of("bfloat16"),
    case("float32 bias", "in float16", "float16", wide=True, bias=normal(2, 1, 5, 7)),
    case("float32 bias", "in bfloat16", "bfloat16", wide=True, bias=normal(2, 1, 5, 7)),
]

# Other ways to say what is said above, all one to a backend: `Problem` resolves them.
FORMS = [
    case("layout", "bshd", layout="bshd"),
    case("layout", "bshd, grouped, one query", layout="bshd", Hq=4, Sq=1),
    case("layout", "rank 2", rank=2, B=1, Hq=1, Hkv=1),
    case("layout", "rank 2, bshd", rank=2, B=1, Hq=1, Hkv=1, layout="bshd"),
    case("layout", "rank 3", rank=3, B=1),
    case("layout", "rank 3, bshd", rank=3, B=1, layout="bshd"),
    case("layout", "rank 5", rank=5, B=6),
    case("layout", "rank 5, bshd", rank=5, B=6, layout="bshd"),
    case(
        "layout",
        "rank 2, mask and bias",
        rank=2,
        B=1,
        Hq=1,
        Hkv=1,
        mask=hidden(7),
        bias=normal(5, 7),
    ),
    case(
        "layout",
        "rank 5, mask and bias",
        rank=5,
        B=6,
        mask=hidden(2, 3, 1, 1, 7),
        bias=normal(2, 5, 7),
    ),
    case(
        "layout",
        "rank 5, each leading axis by itself",
        rank=5,
        B=6,
        mask=hidden(2, 3, 1, 1, 7),
        bias=normal(2, 1, 2, 5, 7),
        causal=True,
        kv_lengths=np.array([[7], [4]]),
    ),
    case(
        "layout",
        "rank 2, segments",
        rank=2,
        B=1,
        Hq=1,
        Hkv=1,
        **segments([0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1]),
    ),
    case(
        "layout",
        "rank 5, segments",
        rank=5,
        B=6,
        **segments([[[0, 0, 1, 1, 1]], [[1] * 5]], [0, 1, 1, 1, 0, 1, 1]),
    ),
    case("layout", "rank 5, lengths", rank=5, B=6, kv_lengths=np.array([[1, 2, 3], [7, 5, 0]])),
    case("scale", "one", scale=1),
    case("bias", "rank 3", bias=normal(2, 5, 7)),
    case("bias", "rank 2", bias=normal(5, 7)),
    case("bias", "rank 1", bias=normal(7)),
    case("bias", "rank 0", bias=np.array(0.5)),
    case("top left", "square", Sq=7, causal="top_left"),
    case("top left", "fewer queries", causal="top_left"),
    case("q_offset", "wins over top_left", causal="top_left", q_offset=1),
    case("q_offset array", "of rank 0", causal=True, q_offset=np.array(1, np.int32)),
    case(
        "q_offset array",
        "wins over lengths",
        causal=True,
        q_offset=lengths(3, 0),
        kv_lengths=lengths(7, 4),
    ),
    case("window", "causal closes the right", Sq=7, causal=True, window=(2, 3)),
    case("mask", "keys, (B, Sk)", mask=hidden(2, 7)),
    case("mask", "rank 3", mask=hidden(2, 5, 7)),
    case("mask", "rank 2", mask=hidden(5, 7)),
    case("mask", "rank 1", mask=hidden(7)),
    case("lengths", "int64", kv_lengths=np.array([7, 3])),
]

# All that a backend may accept: the groups, LSE, and to be differentiated.
EVERYTHING = frozenset(case.group for case in CASES + FORMS) | {"lse", "gradients"}

# For a crossing between frameworks, whose own rules are about arrays, not about options.
ONE_OF_EACH_GROUP = list({case.group: case for case in reversed(CASES + FORMS)}.values())[::-1]
