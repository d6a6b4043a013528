"""Memory over length: causal flash attention, forward and backward, on one long sequence.

    python benchmarks/longseq.py [LENGTH]        131072 by default

Prints the peak memory of the process at three lengths, each in a process of its own: if memory is
linear, each doubling adds twice what the one before added. A sample of rows of the longest output is
checked against float64.
"""

import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import heedful

HEAD_DIM = 64
SAMPLE = 16
TOLERANCE = 1e-5


def peak_mib() -> float:
    """The most memory this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def check(q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array) -> float:
    """Relative RMS error of a sample of rows, against float64."""
    length = q.shape[0]
    rows = np.linspace(0, length - 1, SAMPLE).astype(int)
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q[rows], k, v))
    s = q64 @ k64.T * HEAD_DIM**-0.5
    s[np.arange(length)[None, :] > rows[:, None]] = -np.inf
    exact_lse = np.log(np.exp(s).sum(axis=-1))
    exact = np.exp(s - exact_lse[:, None]) @ v64
    error = float(np.sqrt(np.mean((out[rows] - exact) ** 2) / np.mean(exact**2)))
    lse_error = float(np.sqrt(np.mean((lse[rows] - exact_lse) ** 2) / np.mean(exact_lse**2)))
    worst = max(error, lse_error)
    if not worst < TOLERANCE:
        raise SystemExit(f"relative RMS error {worst:.1e}, above {TOLERANCE:.0e}")
    return worst


def one(length: int) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (jax.random.normal(key, (length, HEAD_DIM)) for key in keys)
    base = peak_mib()
    begin = time.perf_counter()
    out, lse = jax.block_until_ready(heedful.causal_flash_attention(q, k, v))
    forward, forward_peak = time.perf_counter() - begin, peak_mib()
    error = check(q, k, v, out, lse)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.vdot(heedful.causal_flash_attention(q, k, v)[0], cotangent)

    begin = time.perf_counter()
    gradients = jax.block_until_ready(jax.grad(loss, (0, 1, 2))(q, k, v))
    backward = time.perf_counter() - begin
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)
    print(
        f"{length:>7} × {HEAD_DIM}: peak {forward_peak:6.0f} MiB forward, {peak_mib():6.0f} MiB with "
        f"gradients ({base:.0f} MiB before); {forward:.1f} s forward, {backward:.1f} s with gradients; "
        f"error {error:.1e}; a score matrix would be {length**2 * 4 / 2**20:,.0f} MiB",
        flush=True,
    )


def main() -> None:
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 131072
    for n in (length // 4, length // 2, length):
        subprocess.run([sys.executable, __file__, str(n), "--one"], check=True)


if __name__ == "__main__":
    if sys.argv[2:] == ["--one"]:
        one(int(sys.argv[1]))
    else:
        main()
