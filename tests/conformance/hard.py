"""Inputs on which honest arithmetic loses digits, and dishonest arithmetic all of them.

Of one small shape, so that each backend compiles few programs: what differs are the numbers.
"""

import numpy as np

from heedful_crosscheck import Case

B, H, SQ, SK, D = 2, 2, 21, 37, 16  # D^-½ = 1/4 has a root without rounding


def normal(random, **changed):
    shapes = {"q": (B, H, SQ, D), "k": (B, H, SK, D), "v": (B, H, SK, D)}
    return {n: random.standard_normal(shape) for n, shape in shapes.items()} | changed


def hard(name, make, **options):
    return Case(name=name, group="hard", make=make, options=options)


def padded(value, keys_too):
    """Queries whose every key is hidden by a finite bias, as Hugging Face writes padding."""

    def make(random):
        bias = np.zeros((1, 1, SQ, SK))
        bias[:, :, -5:] = value
        if keys_too:
            bias[..., -9:] = value
        return normal(random, bias=bias)

    return make


def peaked(random):
    return {n: random.uniform(-9, 9, x.shape) for n, x in normal(random).items()}


def exact_logits_near_4096(random):
    q, k = (np.round(4 * random.standard_normal(s)) for s in ((B, H, SQ, D), (B, H, SK, D)))
    q[..., 0], k[..., 0] = 256, 64
    return normal(random, q=q, k=k)


def large_logits(random):
    q, k = (60 * x for x in (normal(random)["q"], normal(random)["k"]))
    return normal(random, q=q, k=k)


def few_keys(most):
    def make(random):
        rank = random.permuted(np.broadcast_to(np.arange(SK), (B, H, SQ, SK)), axis=-1)
        return normal(random, mask=rank < random.integers(1, most + 1, (B, H, SQ, 1)))

    return make


def uniform(random):
    return normal(random, q=np.zeros((B, H, SQ, D)))


def outliers(size):
    """N(0, 1) plus, with probability 0.001, N(0, size²)."""

    def make(random):
        return {
            n: x + size * random.standard_normal(x.shape) * (random.random(x.shape) < 0.001)
            for n, x in normal(random).items()
        }

    return make


def minus_infinite_bias(random):
    """A third of the scores, every fifth query, the last keys: without weight, though seen."""
    bias = np.where(random.random((1, 1, SQ, SK)) < 0.3, -np.inf, random.standard_normal((SQ, SK)))
    bias[:, :, ::5], bias[..., -7:] = -np.inf, -np.inf
    return normal(random, bias=bias)


def values_that_cancel(random):
    return normal(random, v=20 + random.standard_normal((B, H, SK, D)))


def keys_that_cancel(random):
    return normal(random, k=3 + 0.3 * random.standard_normal((B, H, SK, D)))


def one_far_query(random):
    """Four numbers of LSE, all near 100: a yardstick is a sample of four, and may be lucky."""
    made = {n: random.standard_normal((1, 4, s, 256)) for n, s in (("q", 1), ("k", SK), ("v", SK))}
    for n in "qk":
        made[n][..., 0] = 40 * (1 + 0.01 * random.standard_normal(made[n].shape[:-1]))
    return made


def far_and_padded(random):
    """Products of single numbers, which fuse with the bias's sum in some kernels, and in some do not."""
    made = {
        n: random.standard_normal((1, 1, s, 1)) for n, s in (("q", 200), ("k", 300), ("v", 300))
    }
    for n in "qk":
        made[n] = 10 * (1 + 0.01 * made[n])
    return made | {"bias": np.full((1, 1, 200, 300), -3e4)}


def one_query_of_one_key(random):
    """Only what flows back through LSE is not cancelled, and of the rest its rounding is left."""
    return normal(random, q=random.standard_normal((B, H, 1, D))) | {
        n: random.standard_normal((B, H, 1, D)) for n in "kv"
    }


def two_keys_far_apart(random):
    """dq is −3.35e-4: a part in 3000 of the terms whose difference it is."""
    return {
        n: np.array(x).reshape(1, 1, -1, 1)
        for n, x in (("q", 8.0), ("k", [1.0, 0.0]), ("v", [1.0, 2.0]))
    }


PADDED = hard("padded", padded(-1e9, keys_too=True))
# The least of bfloat16, which float32 holds too; float32's own is beyond bfloat16.
PADDED_TO_THE_END = hard("padded-to-the-end", padded(-3.3895e38, keys_too=False))
FAR_AND_PADDED = hard("far-and-padded", far_and_padded)
PEAKED = hard("peaked", peaked)
FAR_APART = hard("two-keys-far-apart", two_keys_far_apart, scale=1.0)

HARD = (
    PADDED,
    PADDED_TO_THE_END,
    PEAKED,
    hard("padded-by-1e4", padded(-1e4, keys_too=True)),
    hard("everything-hidden", lambda random: normal(random, bias=np.full((1, 1, SQ, SK), -1e9))),
    hard("logits-near-4096", exact_logits_near_4096),
    hard("large-logits", large_logits),
    hard("one-key-each", few_keys(1)),
    hard("two-keys-each", few_keys(2)),
    hard("three-keys-each", few_keys(3)),
    hard("uniform", uniform),
    hard("outliers", outliers(10.0)),
    hard("large-outliers", outliers(100.0)),
    hard("minus-infinite-bias", minus_infinite_bias),
    hard("one-far-query", one_far_query),
    hard("one-query-of-one-key", one_query_of_one_key),
    hard("values-that-cancel", values_that_cancel),
    hard("keys-that-cancel", keys_that_cancel),
)
