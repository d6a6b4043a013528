"""Cases that hurt: where honest arithmetic loses digits, and dishonest arithmetic all of them.

Most have one small shape, so that each backend compiles few programs: what differs are the numbers. The
lengths have shapes of their own, and one dtype each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from heedful_crosscheck.recipes import Arrays, Normal, Sizes, along, normal

SMALL = Sizes(2, 2, 2, 21, 37, 16, 16)  # D^-½ = 1/4 has a root without rounding

_usual = normal(SMALL)


# Numbers


@dataclass(frozen=True)
class Outliers:
    """N(0, 1) plus, with probability 0.001, N(0, size²)."""

    size: float

    def __call__(self, random: np.random.Generator) -> Arrays:
        return {
            n: x + self.size * random.standard_normal(x.shape) * (random.random(x.shape) < 0.001)
            for n, x in _usual(random).items()
        }


@dataclass(frozen=True)
class Times:
    """Standard normal q, k and v, times a factor each."""

    q: float = 1.0
    k: float = 1.0
    v: float = 1.0

    def __call__(self, random: np.random.Generator) -> Arrays:
        return {n: x * getattr(self, n) for n, x in _usual(random).items()}


def outlier_channels(random: np.random.Generator) -> Arrays:
    """Two of the channels of k twenty times as large, and never of the other sign; one of v."""
    made = _usual(random)
    made["k"][..., :2] = 20 * np.abs(made["k"][..., :2])
    made["v"][..., 0] *= 20
    return made


def near_ties(random: np.random.Generator) -> Arrays:
    """Every key has a twin that is off by a part in 64, with values of its own."""
    made = _usual(random)
    q, k = 4 * made["q"], made["k"]
    k[:, :, 1::2] = k[:, :, :-1:2] + random.standard_normal(k[:, :, 1::2].shape) / 64
    return made | {"q": q}


def one_hot(random: np.random.Generator) -> Arrays:
    """Keys of signs, and queries 200 times one of them: its logit is 100 above all others, or more."""
    made = _usual(random)
    *_, keys, d = made["k"].shape
    signs = random.choice(2**d, keys, replace=False)[:, None] >> np.arange(d) & 1
    k = 2.0 * signs - 1
    q = 200 * k[random.integers(keys, size=made["q"].shape[:3])]
    return made | {"q": q, "k": np.broadcast_to(k, made["k"].shape).copy()}


def peaked(random: np.random.Generator) -> Arrays:
    """Uniform between -9 and 9."""
    return {n: random.uniform(-9, 9, x.shape) for n, x in _usual(random).items()}


def exact_logits_near_4096(random: np.random.Generator) -> Arrays:
    """Whole numbers, so that no logit is rounded."""
    made = _usual(random)
    q, k = (np.round(4 * made[n]) for n in "qk")
    q[..., 0], k[..., 0] = 256, 64
    return made | {"q": q, "k": k}


def uniform(random: np.random.Generator) -> Arrays:
    """Queries of 0."""
    made = _usual(random)
    return made | {"q": np.zeros_like(made["q"])}


def constants(random: np.random.Generator) -> Arrays:
    """0.5 everywhere."""
    return {n: np.full_like(x, 0.5) for n, x in _usual(random).items()}


def denormals(random: np.random.Generator) -> Arrays:
    """A tenth of all numbers below the normal ones of float32 and bfloat16."""
    return {
        n: np.where(random.random(x.shape) < 0.1, 1e-39 * x, x) for n, x in _usual(random).items()
    }


def values_that_cancel(random: np.random.Generator) -> Arrays:
    """All near 20."""
    made = _usual(random)
    return made | {"v": 20 + made["v"]}


def keys_that_cancel(random: np.random.Generator) -> Arrays:
    """All near 3."""
    made = _usual(random)
    return made | {"k": 3 + 0.3 * made["k"]}


def two_keys_far_apart(random: np.random.Generator) -> Arrays:
    """dq is −3.35e-4: a part in 3000 of the terms whose difference it is."""
    return {
        n: np.array(x).reshape(1, 1, -1, 1)
        for n, x in (("q", 8.0), ("k", [1.0, 0.0]), ("v", [1.0, 2.0]))
    }


# Masks


@dataclass(frozen=True)
class Padded:
    """(1, 1, Sq, Sk), 0, and a number at every key of the last five queries, as padding is written.

    Attributes:
        value: the number.
        keys_too: whether it stands at the last nine keys of all queries, too.
    """

    value: float
    keys_too: bool = False

    def __call__(self, random: np.random.Generator, sizes: Sizes) -> np.ndarray:
        bias = np.zeros(along("qk", sizes))
        bias[:, :, -5:] = self.value
        if self.keys_too:
            bias[..., -9:] = self.value
        return bias


@dataclass(frozen=True)
class FewKeys:
    """Of each query, one to so many keys, anywhere."""

    most: int

    def __call__(self, random: np.random.Generator, sizes: Sizes) -> np.ndarray:
        *queries, keys = sizes.scores
        rank = random.permuted(np.broadcast_to(np.arange(keys), sizes.scores), axis=-1)
        return rank < random.integers(1, self.most + 1, (*queries, 1))


def everything_hidden(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """-1e9 everywhere."""
    return np.full(along("qk", sizes), -1e9)


def every_other_hidden(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """Every other key, from all, and every other query."""
    mask = np.zeros(sizes.scores, bool)
    mask[:, :, ::2, ::2] = True
    return mask


def minus_infinite_bias(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """A third of the scores, every fifth query, the last keys: without weight, though seen."""
    shape = along("qk", sizes)
    bias = np.where(random.random(shape) < 0.3, -np.inf, random.standard_normal(shape))
    bias[:, :, ::5], bias[..., -7:] = -np.inf, -np.inf
    return bias


def far_and_padded(random: np.random.Generator) -> Arrays:
    """Products of single numbers, which fuse with the bias's sum in some kernels, and in some do not."""
    made = Normal(Sizes(1, 1, 1, 200, 300, 1, 1))(random)
    for n in "qk":
        made[n] = 10 * (1 + 0.01 * made[n])
    return made | {"bias": np.full((1, 1, 200, 300), -3e4)}


# Lengths: one less and one more than what is a tile's size somewhere, as queries or as keys

BESIDE_TILES = ((15, 257), (255, 17), (33, 127), (129, 31), (63, 65), (65, 63), (16, 32))


def _lengths() -> Iterator[tuple[str, dict[str, Any]]]:
    """Causal or not, in float32 or bfloat16, in turn: a shape is one program, not four."""
    for number, (queries, keys) in enumerate(BESIDE_TILES):
        yield (
            f"tiles-{queries}x{keys}",
            {
                "make": normal(Sizes(1, 2, 1, queries, keys, 8, 8)),
                "options": {"causal": True} if number % 2 else {},
                "usual": ("bfloat16",) if number // 2 % 2 else ("float32",),
                "why": "lengths about 16, 32, 64, 128, 256: the last tile is nearly full, or empty",
            },
        )


# Group, case, and what a `Case` of that name is made of.
HARD: dict[str, dict[str, dict[str, Any]]] = {
    "hard numbers": {
        "outliers": {
            "make": Outliers(10.0),
            "why": "the FlashAttention-3 paper's distribution, N(0, 1) + N(0, 100) · Bernoulli(0.001)",
        },
        "large-outliers": {
            "make": Outliers(100.0),
            "why": "the same with N(0, 10000): a row's one outlier takes all weight",
        },
        "outlier-channels": {
            "make": outlier_channels,
            "why": "a few channels are as large as all others together, as in trained models' keys",
        },
        "near-ties": {
            "make": near_ties,
            "why": "the two best keys differ by what bfloat16 rounds: weight moves between their values",
        },
        "one-hot": {
            "make": one_hot,
            "why": "one key has all weight, and every gradient of the scores cancels wholly",
        },
        "peaked": {
            "make": peaked,
            "why": "rows that see few keys: dq and dk are small differences, which a rounded out loses",
        },
        "logits-near-4096": {
            "make": exact_logits_near_4096,
            "why": "where float32 has 11 bits left behind the point: exp(s - lse) sums to 1.0002",
        },
        "logits-of-hundreds": {
            "make": Times(q=10, k=10),
            "why": "the best key has nearly all weight, and dq is made of what it lacks",
        },
        "uniform": {"make": uniform, "why": "all logits are 0: dk is 0, and weights are equal"},
        "constants": {
            "make": constants,
            "why": "every row and key alike: but for LSE's, all of dq and dk cancels",
        },
        "huge-values": {"make": Times(v=1e30), "why": "squares of out overflow in float32"},
        "tiny-values": {"make": Times(v=1e-30), "why": "squares of out are 0 in float32"},
        "huge-queries": {
            "make": Times(q=1e15, k=1e-15),
            "why": "scores are usual, and the scales of dq and dk 1e30 apart",
        },
        "denormals": {
            "make": denormals,
            "why": "some processors and kernels take these numbers for 0, none may take them for NaN",
        },
        "values-that-cancel": {
            "make": values_that_cancel,
            "why": "out is near 20 in every row: delta cancels all but a hundredth of dO · V",
        },
        "keys-that-cancel": {
            "make": keys_that_cancel,
            "why": "keys have most in common: of dq a tenth of its terms is left",
        },
        "one-query-of-one-key": {
            "make": normal(SMALL._replace(q_length=1, kv_length=1)),
            "usual": ("float32",),
            "why": "the weight is 1 whatever q is: of dq and dk LSE's part alone is left",
        },
        "two-keys-far-apart": {
            "make": two_keys_far_apart,
            "options": {"scale": 1.0},
            "usual": ("bfloat16",),
            "why": "dq is a part in 3000 of its terms: half precision's rounded out loses all of it",
        },
    },
    "hard masks": {
        "padded": {
            "make": normal(SMALL, bias=Padded(-1e9, keys_too=True)),
            "why": "a bias of -1e9 as padding: beside it float32 holds no logit, and LSE loses log n",
        },
        # The least of bfloat16, which float32 holds too; float32's own is beyond bfloat16.
        "padded-to-the-end": {
            "make": normal(SMALL, bias=Padded(-3.3895e38)),
            "why": "finfo.min of bfloat16 at every key of a row: what is added to it overflows",
        },
        "padded-to-float32s-end": {
            "make": normal(SMALL, bias=Padded(float(np.finfo(np.float32).min))),
            "usual": ("float32",),
            "why": "finfo.min at every key of a row: times log2(e), as kernels have it, it is -inf",
        },
        "padded-to-float16s-end": {
            "make": normal(SMALL, bias=Padded(float(np.finfo(np.float16).min))),
            "usual": ("float16",),
            "why": "finfo.min of float16, beside which float32 has 8 bits left behind the point",
        },
        "padded-by-1e4": {
            "make": normal(SMALL, bias=Padded(-1e4, keys_too=True)),
            "why": "padding that does not swallow the logits: hidden rows are no mean of V",
        },
        "everything-hidden": {
            "make": normal(SMALL, bias=everything_hidden),
            "why": "-1e9 at every key of every row: all weights are alike, and none is 0",
        },
        "minus-infinite-bias": {
            "make": normal(SMALL, bias=minus_infinite_bias),
            "why": "-inf takes weight without hiding: whole rows of it, and whole keys",
        },
        "far-and-padded": {
            "make": far_and_padded,
            "dtype": "float64",
            "why": "the oracle's own scores are off by 2e-12 beside -30000, and plain attention's alike",
        },
        "one-key-each": {"make": normal(SMALL, mask=FewKeys(1)), "why": "every weight is 1"},
        "two-keys-each": {
            "make": normal(SMALL, mask=FewKeys(2)),
            "why": "rows of one and two keys: gradients that cancel beside some that do not",
        },
        "three-keys-each": {
            "make": normal(SMALL, mask=FewKeys(3)),
            "why": "so few weights that an error of exp is not averaged",
        },
        "every-other-hidden": {
            "make": normal(SMALL, mask=every_other_hidden),
            "why": "keys that nobody sees, NaN and inf, stand between all that are seen",
        },
    },
    "hard lengths": {
        **dict(_lengths()),
        "1x2048": {
            "make": normal(Sizes(1, 2, 1, 1, 2048, 8, 8)),
            "usual": ("bfloat16",),
            "why": "one query and many keys: kernels split the keys, or have one row of a tile",
        },
        "2048x1": {
            "make": normal(Sizes(1, 2, 1, 2048, 1, 8, 8)),
            "usual": ("float32",),
            "why": "one key: out is its value everywhere, and dk of out alone is 0",
        },
        "head-size-1": {
            "make": normal(SMALL._replace(head_dim=1, value_dim=1)),
            "usual": ("float32",),
            "why": "products that are no sums, and rows that no vector load fits",
        },
        "head-size-256": {
            "make": normal(SMALL._replace(batch=1, head_dim=256, value_dim=256)),
            "usual": ("bfloat16",),
            "why": "the largest of most kernels, whose tiles are smaller there",
        },
        "no-queries": {
            "make": normal(SMALL._replace(q_length=0)),
            "usual": ("float32",),
            "why": "nothing asks: out is empty, and dk and dv are 0",
        },
        "no-keys": {
            "make": normal(SMALL._replace(kv_length=0)),
            "usual": ("float32",),
            "why": "nobody answers: every row is an empty one",
        },
        "no-rows": {
            "make": normal(SMALL._replace(batch=0)),
            "usual": ("float32",),
            "why": "a batch of none, as the last of a data set may be",
        },
    },
    "hard views": {
        f"views-{memory}": {
            "make": normal(SMALL, bias=Padded(-1e9, keys_too=True)),
            "memory": memory,
            "why": f"q, k, v and bias are no packed arrays, but {memory}; what lies between is NaN",
        }
        for memory in ("transposed", "columns", "strided", "sliced")
    },
}
