"""The contract, as a test class that every backend runs.

A backend's test is a subclass that names it and says whose arrays call it:

    class TestFlash(Contract):
        backend = "jax:flash"
        caller = JaxCaller()
        accepts = EVERYTHING

Each case of the table below is either refused, with the same reasons from `explain` and from the call,
or computed, and then out, lse and every gradient are compared with `reference.attention`. Groups of
cases listed in `accepts` may not be refused. Keys that no query sees hold NaN and inf in every case.

The environment variable HEEDFUL_REQUIRE_BACKENDS, names separated by commas, says which backends a run
is about: a torch backend not named is left out, one named that cannot run here fails. Without it, a
backend that cannot run here is skipped, and the skip says why; one that `needs_gpu` runs by `-m gpu`.
"""

import os
from dataclasses import dataclass, field
from functools import cache

import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import heedful
import reference
from callers import DTYPES, JaxCaller

# The largest error, relative to the largest entry of the reference and at least 1 (inputs are standard
# normal). What honest rounding gives; the crosscheck judges more finely, against plain attention.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}

_required = os.environ.get("HEEDFUL_REQUIRE_BACKENDS")
REQUIRED = None if _required is None else {name.strip() for name in _required.split(",")}


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape)


def hidden(*shape):
    """A mask that hides three keys in ten, differently in each place."""
    return np.random.default_rng(shape).random(shape) < 0.7


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: sizes, dtype, and the options as they are passed, arrays among them as NumPy's."""

    group: str
    name: str
    dtype: str = "float32"
    B: int | tuple[int, ...] = 2  # a tuple: several leading axes; () for rank 3
    Hq: int | None = 2  # None for rank 2
    Hkv: int = 2
    Sq: int = 5
    Sk: int = 7
    D: int = 8
    Dv: int = 8
    options: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.group}: {self.name}"

    def operands(self):
        """q, k, v and their cotangents' shapes, standard normal in the case's dtype and layout."""

        def shape(heads, length, size):
            if self.Hq is None:
                return (length, size)
            pair = (length, heads) if self.options.get("layout") == "bshd" else (heads, length)
            return (*((self.B,) if isinstance(self.B, int) else self.B), *pair, size)

        rng = np.random.default_rng(42)
        q, k, v, out_cotangent = (
            rng.standard_normal(shape(*sizes)).astype(DTYPES[self.dtype])
            for sizes in (
                (self.Hq, self.Sq, self.D),
                (self.Hkv, self.Sk, self.D),
                (self.Hkv, self.Sk, self.Dv),
                (self.Hq, self.Sq, self.Dv),
            )
        )
        return q, k, v, out_cotangent

    def lse_cotangent(self):
        batch = (self.B,) if isinstance(self.B, int) else self.B
        shape = (self.Sq,) if self.Hq is None else (*batch, self.Hq, self.Sq)
        accumulator = "float64" if self.dtype == "float64" else "float32"
        return np.random.default_rng(43).standard_normal(shape).astype(accumulator)


def case(group, name, dtype="float32", B=2, Hq=2, Hkv=2, Sq=5, Sk=7, D=8, Dv=8, **options):
    for option in ("bias", "sinks"):
        if option in options and options[option].dtype == np.float64:
            options[option] = options[option].astype(DTYPES[dtype])
    sizes = {"B": B, "Hq": Hq, "Hkv": Hkv, "Sq": Sq, "Sk": Sk, "D": D, "Dv": Dv}
    return Case(group=group, name=name, dtype=dtype, **sizes, options=options)


def lengths(*values):
    return np.array(values, np.int32)


def segments(of_queries, of_keys):
    ids = {"q_segment_ids": of_queries, "kv_segment_ids": of_keys}
    return {name: np.array(x, np.int32) for name, x in ids.items()}


def _cases_of(dtype):
    """What every other dtype goes through; even sizes, which kernels of the half ones ask for."""
    sizes = {"dtype": dtype, "Sq": 6, "Sk": 8}
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
    case("float32 bias", "in float16", "float16", bias=normal(2, 1, 5, 7).astype(np.float32)),
    case("float32 bias", "in bfloat16", "bfloat16", bias=normal(2, 1, 5, 7).astype(np.float32)),
]

# Other ways to say what is said above, all one to a backend: `Problem` resolves them.
FORMS = [
    case("layout", "bshd", layout="bshd"),
    case("layout", "bshd, grouped, one query", layout="bshd", Hq=4, Sq=1),
    case("layout", "rank 2", Hq=None),
    case("layout", "rank 2, bshd", Hq=None, layout="bshd"),
    case("layout", "rank 3", B=()),
    case("layout", "rank 3, bshd", B=(), layout="bshd"),
    case("layout", "rank 5", B=(2, 3)),
    case("layout", "rank 5, bshd", B=(2, 3), layout="bshd"),
    case("layout", "rank 2, mask and bias", Hq=None, mask=hidden(7), bias=normal(5, 7)),
    case(
        "layout",
        "rank 5, mask and bias",
        B=(2, 3),
        mask=hidden(2, 3, 1, 1, 7),
        bias=normal(2, 5, 7),
    ),
    case(
        "layout",
        "rank 5, each leading axis by itself",
        B=(2, 3),
        mask=hidden(2, 3, 1, 1, 7),
        bias=normal(2, 1, 2, 5, 7),
        causal=True,
        kv_lengths=np.array([[7], [4]]),
    ),
    case("layout", "rank 2, segments", Hq=None, **segments([0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1])),
    case(
        "layout",
        "rank 5, segments",
        B=(2, 3),
        **segments([[[0, 0, 1, 1, 1]], [[1] * 5]], [0, 1, 1, 1, 0, 1, 1]),
    ),
    case("layout", "rank 5, lengths", B=(2, 3), kv_lengths=np.array([[1, 2, 3], [7, 5, 0]])),
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

EVERYTHING = frozenset(case.group for case in CASES + FORMS) | {"lse"}

# For a crossing between frameworks, whose own rules are about arrays, not about options.
ONE_OF_EACH_GROUP = list({case.group: case for case in reversed(CASES + FORMS)}.values())[::-1]


@st.composite
def combinations(draw):
    """Any options together, over few sizes, since each combination of both is compiled anew."""
    sizes = draw(
        st.sampled_from(
            [
                {"Sq": 5, "Sk": 5},
                {"Hq": 4, "Sq": 5, "Sk": 8},
                {"Hq": 4, "Hkv": 1, "Sq": 7, "Sk": 3},
                {"Sq": 1, "Sk": 6, "Dv": 16},
            ]
        )
    )
    B, Hq, Sq, Sk = 2, sizes.get("Hq", 2), sizes["Sq"], sizes["Sk"]
    side = st.none() | st.integers(0, 3)
    offset = st.integers(-3, 9)

    def shape():
        return tuple(draw(st.sampled_from([1, n])) for n in (B, Hq, Sq, Sk))

    maybe = {
        "causal": lambda: draw(st.sampled_from([True, "top_left"])),
        "window": lambda: draw(st.tuples(side, side)),
        "q_offset": lambda: draw(offset | st.builds(lengths, offset, offset)),
        "q_lengths": lambda: lengths(*(draw(st.integers(0, Sq)) for _ in range(B))),
        "kv_lengths": lambda: lengths(*(draw(st.integers(0, Sk)) for _ in range(B))),
        "mask": lambda: hidden(*shape()),
        "sinks": lambda: normal(Hq),
        "segments": lambda: draw(st.integers(1, 3)),
        "bias": lambda: normal(*shape()),
        "scale": lambda: draw(st.sampled_from([0.25, 2.0])),
        "softcap": lambda: draw(st.sampled_from([0.5, 20.0])),
        "layout": lambda: "bshd",
    }
    chosen = draw(st.sets(st.sampled_from(sorted(maybe)), max_size=6))
    options = {name: maybe[name]() for name in sorted(chosen)}
    if most := options.pop("segments", None):
        ids = ([[n % (most + 1) for n in range(length)]] * B for length in (Sq, Sk))
        options |= segments(*ids)
    return case("random", "", **sizes, **reference.without_idle_offset(options))


class Contract:
    """Subclass it with the three names below."""

    backend: str
    caller = JaxCaller()
    accepts: frozenset[str] | set[str] = (
        EVERYTHING  # groups of which no case may be refused, and "lse"
    )
    cases = CASES + FORMS

    def __init_subclass__(cls, examples=10, needs_gpu=False):
        cls.test_any_combination = settings(max_examples=examples, phases=[Phase.generate])(
            given(combination=combinations())(_any_combination)
        )
        required = cls.backend in (REQUIRED or ())
        cls.__test__ = required or REQUIRED is None or not cls.backend.startswith("torch:")
        if needs_gpu and not required:
            cls.pytestmark = [pytest.mark.gpu]

    @pytest.fixture(autouse=True)
    def runs_here(self):
        if why := why_unable(self.caller, self.backend):
            if self.backend in (REQUIRED or ()):
                pytest.fail(f"{self.backend} is required and cannot run here: {why}")
            # It runs in a session of its own, which names it in REQUIRED.
            pytest.skip(f"{self.backend} cannot run here: {why}")

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=str)

    def test_agrees_or_refuses(self, case):
        agrees_or_refuses(self.caller, self.backend, self.accepts, case)


def _any_combination(self, combination):
    agrees_or_refuses(self.caller, self.backend, self.accepts, combination)


@cache
def why_unable(caller, backend):
    """Why the backend refuses the plainest call in every dtype; None where it takes one."""
    reasons = ()
    for dtype in ("float32", "bfloat16", "float16"):
        q, k, v, _ = case("basic", "plainest", dtype, Sq=8, Sk=8).operands()
        reasons = reasons_of(backend, *map(caller.array, (q, k, v)))
        if not reasons:
            return None
    return "; ".join(reasons)


def reasons_of(backend, q, k, v, **options):
    explanation = heedful.explain(q, k, v, **options)
    return next(v.reasons for v in explanation.verdicts if v.name == backend)


def agrees_or_refuses(caller, backend, accepts, case):
    with jax.enable_x64(case.dtype == "float64"):
        q, k, v, out_cotangent = case.operands()
        lse_cotangent = case.lse_cotangent() if "lse" in accepts else None
        expected = reference.attention(q, k, v, out_cotangent, lse_cotangent, **case.options)
        if not np.isinf(
            np.asarray(case.options.get("bias", 0), np.float64)
        ).any():  # which hides a key, but not its NaN
            k, v = poison(k, v, unseen=(expected[4] == 0).all(axis=-1))
        arrays = {
            name: caller.array(x) for name, x in case.options.items() if isinstance(x, np.ndarray)
        }
        options = {**case.options, **arrays, "return_lse": "lse" in accepts}
        primals = {"q": caller.array(q), "k": caller.array(k), "v": caller.array(v)}

        if reasons := reasons_of(backend, **primals, **options):
            assert case.group not in accepts, reasons
            with pytest.raises(heedful.Refusal) as refusal:
                heedful.attention(**primals, **options, backend=backend)
            assert refusal.value.reasons == {backend: reasons}
            return

        for name in ("bias", "sinks"):
            if name in arrays:
                primals[name] = arrays.pop(name)
        plain = {
            name: x for name, x in options.items() if name not in arrays and name not in primals
        }

        def call(primals, constants):
            result = heedful.attention(**primals, **constants, **plain, backend=backend)
            return result if isinstance(result, tuple) else (result,)

        cotangents = tuple(caller.array(x) for x in (out_cotangent, lse_cotangent) if x is not None)
        results, gradients = caller.pull_back(call, primals, arrays, cotangents)
        accumulator = "float64" if case.dtype == "float64" else "float32"
        dtypes = [case.dtype, accumulator][: len(results)]
        assert [caller.dtype(x) for x in results] == dtypes
        got = dict(zip(("out", "lse"), results, strict=False))
        if gradients is not None:
            for name, x in primals.items():
                assert caller.dtype(gradients[name]) == caller.dtype(x)
                got["d" + name] = gradients[name]
        compare(case.dtype, {name: caller.float64(x) for name, x in got.items()}, expected)


def poison(k, v, unseen):
    """K and V with NaN and inf where no query sees them; neither may come through."""
    k, v = k.copy(), v.copy()
    k[unseen], v[unseen] = np.nan, np.nan
    k[unseen, ..., ::2], v[unseen, ..., ::3] = np.inf, -np.inf
    return k, v


def compare(dtype, got, expected):
    expected = dict(zip(("out", "lse", "dq", "dk", "dv", "dbias", "dsinks"), expected, strict=True))
    nothing_seen = {
        "out": (expected["out"] == 0).all(axis=-1),
        "dq": (expected["out"] == 0).all(axis=-1),
        "dk": (expected["dv"] == 0).all(axis=-1),
        "dv": (expected["dv"] == 0).all(axis=-1),
    }
    for name, x in got.items():
        truth = expected[name]
        assert x.shape == truth.shape, name
        if name in nothing_seen:
            assert (x[nothing_seen[name]] == 0).all(), f"{name} where nothing is seen"
        if name == "lse":
            np.testing.assert_array_equal(np.isneginf(x), np.isneginf(truth), "lse of empty rows")
            x, truth = (np.where(np.isneginf(y), 0, y) for y in (x, truth))
        bound = TOLERANCE[dtype] * max(1, np.abs(truth).max(initial=0))
        assert np.abs(x - truth).max(initial=0) <= bound, (
            f"{name}: {np.abs(x - truth).max()} > {bound}"
        )
