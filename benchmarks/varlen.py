"""Time of packed sequences: as many tokens in more and more sequences, causal self-attention.

    python benchmarks/varlen.py [TOKENS]        16384 by default

Prints the time of `heedful.flash_attention_varlen`, forward and with gradients, beside Σ Sq·Sk: with n
sequences of one length both should fall as 1/n until a sequence is no longer than a tile. The last line
is of unequal lengths. A sample of rows of each output is checked against float64.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import heedful

HEADS, HEAD_DIM = 4, 64
ROUNDS = 3
SAMPLE = 16
TOLERANCE = 1e-5


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """The median over the rounds, compiled before."""
    jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def error(qkv: tuple[Any, ...], ends: np.ndarray, out: Any) -> float:
    """Relative RMS error of a sample of rows, against float64."""
    q, k, v, out = (np.asarray(x, np.float64) for x in (*qkv, out))
    rows = np.linspace(0, len(q) - 1, SAMPLE).astype(int)
    exact = []
    for row in rows:
        begin = ends[np.searchsorted(ends, row, side="right") - 1]
        s = np.einsum("hd,jhd->hj", q[row], k[begin : row + 1]) * HEAD_DIM**-0.5
        p = np.exp(s - s.max(axis=1, keepdims=True))
        exact.append(np.einsum("hj,jhd->hd", p / p.sum(axis=1, keepdims=True), v[begin : row + 1]))
    worst = float(np.sqrt(np.mean((out[rows] - exact) ** 2) / np.mean(np.square(exact))))
    if not worst < TOLERANCE:
        raise SystemExit(f"relative RMS error {worst:.1e}, above {TOLERANCE:.0e}")
    return worst


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 16384
    keys = jax.random.split(jax.random.key(0), 4)
    *qkv, cotangent = (jax.random.normal(key, (tokens, HEADS, HEAD_DIM)) for key in keys)

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, ends: jax.Array) -> jax.Array:
        return heedful.flash_attention_varlen(q, k, v, ends, ends, causal=True)[0]

    @jax.jit
    def gradients(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *x: jnp.vdot(attend(*x), cotangent), (0, 1, 2))(*arguments)

    def line(name: str, ends: np.ndarray) -> None:
        pairs = int(np.square(np.diff(ends)).sum())
        forward = seconds(attend, *qkv, ends)
        backward = seconds(gradients, *qkv, ends)
        worst = error(tuple(qkv), ends, attend(*qkv, ends))
        print(
            f"{name:>16}: Σ Sq·Sk {pairs / tokens**2:6.4f} · {tokens}²; {forward * 1e3:6.0f} ms, "
            f"{backward * 1e3:6.0f} ms with gradients; error {worst:.1e}",
            flush=True,
        )

    for n in (1, 2, 4, 8, 16, 32, 64):
        line(f"{n} sequences", np.linspace(0, tokens, n + 1).astype(np.int32))
    cuts = np.sort(np.random.default_rng(0).integers(0, tokens + 1, 31))
    line("32 of any length", np.array([0, *cuts, tokens], np.int32))


if __name__ == "__main__":
    main()
