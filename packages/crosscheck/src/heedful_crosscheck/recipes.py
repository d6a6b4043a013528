"""How the arrays of a case are made of random numbers.

Recipes are data, and none is a closure: equal ones make equal arrays, and a worker process can be handed
one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]
Maker = Callable[[np.random.Generator], Arrays]


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


USUAL = Sizes()

ArrayOption = Callable[[np.random.Generator, Sizes], np.ndarray]


# q, k and v


@dataclass(frozen=True)
class Normal:
    """Standard normal q, k and v, q times a factor, and array options made after them.

    Attributes:
        sizes: of all.
        queries_times: the factor.
        options: recipes by option.
    """

    sizes: Sizes = USUAL
    queries_times: float = 1.0
    options: Mapping[str, ArrayOption] = field(default_factory=dict)

    def __call__(self, random: np.random.Generator) -> Arrays:
        b, hq, hkv, sq, sk, d, dv = self.sizes
        arrays = {
            "q": random.standard_normal((b, hq, sq, d)) * self.queries_times,
            "k": random.standard_normal((b, hkv, sk, d)),
            "v": random.standard_normal((b, hkv, sk, dv)),
        }
        return arrays | {n: make(random, self.sizes) for n, make in self.options.items()}


def normal(sizes: Sizes = USUAL, *, queries_times: float = 1.0, **options: ArrayOption) -> Normal:
    """`Normal`, its options by keyword."""
    return Normal(sizes, queries_times, options)


HARD = 100.0  # a logit whose exponential float32 does not hold, nor, below 0, that of its negative


@dataclass(frozen=True)
class FarLogits:
    """`Normal` with all logits near `HARD`, or its negative.

    Attributes:
        usual: what is moved there.
        scale: of the call, not 0.
        above: whether they are positive.
    """

    usual: Normal
    scale: float
    above: bool

    def __call__(self, random: np.random.Generator) -> Arrays:
        made = self.usual(random)
        # The first numbers of q and k, nearly constant, are what puts them there.
        q, k = made["q"][..., 0], made["k"][..., 0]
        far = (HARD / abs(self.scale)) ** 0.5
        sign = 1 if self.above == (self.scale > 0) else -1
        q[...] = sign * far * (1 + 0.05 * random.standard_normal(q.shape))
        k[...] = far * (1 + 0.01 * random.standard_normal(k.shape))
        return made


@dataclass(frozen=True, eq=False)
class Given:
    """The same arrays at any seed: those of a file."""

    arrays: Arrays

    def __call__(self, random: np.random.Generator) -> Arrays:
        return dict(self.arrays)


# Options that are functions, which JAX, torch and NumPy read alike


def bent(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Scores that level off, less for keys that are far away, differently for each row and head."""
    away = (h + b + 1) * abs(q_idx - kv_idx)
    if hasattr(
        score, "new_full"
    ):  # of torch; FlexAttention traces this with a dtype that it does not keep
        slope = score.new_full((), 0.02)
    else:
        slope, away = 0.02, away.astype(score.dtype)
    return score / (1 + score * score / 64) ** 0.5 - slope * away


def striped(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Two keys of three, others for each query, head and batch row."""
    return (q_idx + kv_idx + h + b) % 3 != 1


# Options over the scores: the named axes of "bhqk" are full, the others 1


def along(axes: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape."""
    return tuple(
        full if axis in axes else 1 for axis, full in zip("bhqk", sizes.scores, strict=True)
    )


@dataclass(frozen=True)
class RandomMask:
    """True with probability 0.7; the first query sees the first key, so that one is there to judge."""

    axes: str

    def __call__(self, random: np.random.Generator, sizes: Sizes) -> np.ndarray:
        mask = random.random(along(self.axes, sizes)) < 0.7
        mask[:, :, 0, 0] = True
        return mask


@dataclass(frozen=True)
class RandomNumbers:
    """Standard normal, times a factor."""

    axes: str
    times: float = 1.0

    def __call__(self, random: np.random.Generator, sizes: Sizes) -> np.ndarray:
        return random.standard_normal(along(self.axes, sizes)) * self.times


@dataclass(frozen=True)
class Repeated:
    """A recipe whose batch rows are repeated: which of its rows each row is."""

    rows: tuple[int, ...]
    of: ArrayOption

    def __call__(self, random: np.random.Generator, sizes: Sizes) -> np.ndarray:
        return self.of(random, sizes)[list(self.rows)]


def outer(option: ArrayOption) -> Repeated:
    """The same for all that differ in the second leading axis alone, of (2, 3)."""
    return Repeated((0, 0, 0, 3, 3, 3), option)


def inner(option: ArrayOption) -> Repeated:
    """The same for all that differ in the first leading axis alone, of (2, 3)."""
    return Repeated((0, 1, 2, 0, 1, 2), option)


def key_padding(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """(B, Sk): each row's keys are real up to a length of its own, the first row's all."""
    real = np.linspace(sizes.kv_length, sizes.kv_length // 2, sizes.batch).astype(int)
    return np.arange(sizes.kv_length) < real[:, None]


def mask_with_empty_rows(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """Every third query sees nothing, and nobody sees any of the last 20 keys, or of the last third."""
    mask = RandomMask("bhqk")(random, sizes)
    mask[:, :, 1::3] = False
    mask[..., sizes.kv_length - min(20, sizes.kv_length // 3) :] = False
    return mask


def hiding_bias(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """(B, 1, 1, Sk), −inf with probability 0.3, which hides a key as a mask does."""
    bias = random.standard_normal(along("bk", sizes))
    hidden = random.random(bias.shape) < 0.3
    hidden[..., 0] = False
    return np.where(hidden, -np.inf, bias)


def floor_bias(random: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """(B, 1, Sq, Sk), 0 and −30000, as additive masks are; every fifth query has −30000 everywhere."""
    hidden = random.random(along("bqk", sizes)) < 0.3
    hidden[:, :, ::5] = True
    return np.where(hidden, -3e4, 0.0)


# Options of integers


@dataclass(frozen=True)
class Integers:
    """The same at any seed, of the batch's first rows; one number, of no axis, where `values` is one."""

    values: tuple[int, ...] | int

    def __call__(self, random: np.random.Generator, sizes: Sizes) -> np.ndarray:
        values = self.values if isinstance(self.values, int) else self.values[: sizes.batch]
        return np.array(values, np.int32)


@dataclass(frozen=True)
class Real:
    """Lengths (B,): of each batch row, which part of an axis of "bhqk" is real."""

    parts: tuple[float, ...]
    axis: str

    def __call__(self, random: np.random.Generator, sizes: Sizes) -> np.ndarray:
        longest = sizes.scores["bhqk".index(self.axis)]
        return np.ceil(np.array(self.parts[: sizes.batch]) * longest).astype(np.int32)


@dataclass(frozen=True)
class Segments:
    """(B, S) segment ids along an axis of "bhqk", as many segments for queries as for keys.

    Attributes:
        axis: whose.
        mixed: whether they come in any order; else one after the other, as sequences are packed.
    """

    axis: str
    mixed: bool = False

    def __call__(self, random: np.random.Generator, sizes: Sizes) -> np.ndarray:
        length = sizes.scores["bhqk".index(self.axis)]
        rows = np.arange(sizes.batch)[:, None]
        packed = np.arange(length) * (2 + rows % 3) // length  # 2, 3 or 4 of them in a row
        ids = random.permuted(packed, axis=1) if self.mixed else packed
        return ids.astype(np.int32)
