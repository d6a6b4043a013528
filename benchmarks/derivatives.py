"""Memory of derivatives over length: causal flash attention of one head, to the third order.

    python benchmarks/derivatives.py [LENGTH ...]        8192 and 32768 by default

Prints a table in Markdown. Each derivative has, at each length, a process of its own: how much that held
before the compiled derivative ran, how much at most, and what the compiler planned beside inputs and
results. All results are checked against float64: of out, the log-sum-exp and q a sample of rows; k's and
v's whole, from a second run of the same program whose loss takes a few queries alone.
"""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import heedful

HEAD_DIM = 64
SAMPLE = 16
TOLERANCE = 1e-5

Arrays = tuple[jax.Array, ...]
Attend = Callable[..., tuple[jax.Array, jax.Array]]


def forward(attend: Attend, x: Arrays, along: Arrays, weights: Arrays) -> Any:
    return attend(*x)


def jvp(attend: Attend, x: Arrays, along: Arrays, weights: Arrays) -> Any:
    return jax.jvp(attend, x, along)[1]


def loss(attend: Attend, weights: Arrays, x: Arrays) -> jax.Array:
    out, lse = attend(*x)
    return jnp.vdot(weights[0], jnp.sin(out)) + jnp.vdot(weights[1], lse)


def backward(attend: Attend, x: Arrays, along: Arrays, weights: Arrays) -> Any:
    return jax.grad(partial(loss, attend, weights))(x)


def forward_over_reverse(attend: Attend, x: Arrays, along: Arrays, weights: Arrays) -> Any:
    return jax.jvp(jax.grad(partial(loss, attend, weights)), (x,), (along,))[1]


def reverse_over_forward(attend: Attend, x: Arrays, along: Arrays, weights: Arrays) -> Any:
    def slope(x: Arrays) -> jax.Array:
        return jax.jvp(partial(loss, attend, weights), (x,), (along,))[1]

    return jax.grad(slope)(x)


def reverse_over_reverse(attend: Attend, x: Arrays, along: Arrays, weights: Arrays) -> Any:
    return jax.vjp(jax.grad(partial(loss, attend, weights)), x)[1](along)[0]


def thrice_reverse(attend: Attend, x: Arrays, along: Arrays, weights: Arrays) -> Any:
    def second(x: Arrays) -> Any:
        return reverse_over_reverse(attend, x, along, weights)

    return jax.vjp(second, x)[1](along)[0]


DERIVATIVES = {
    "forward": forward,
    "jvp": jvp,
    "backward": backward,
    "HVP, forward over reverse": forward_over_reverse,
    "HVP, reverse over forward": reverse_over_forward,
    "HVP, reverse over reverse": reverse_over_reverse,
    "third, reverse thrice": thrice_reverse,
}


def peak_mib() -> float:
    """The most memory this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def dense(
    rows: np.ndarray, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of the queries that stand in these rows."""
    seen = np.arange(k.shape[0])[None, :] <= rows[:, None]
    s = jnp.where(seen, q @ k.T * HEAD_DIM**-0.5, -jnp.inf)
    lse = jax.nn.logsumexp(s, axis=-1)
    return jnp.exp(s - lse[:, None]) @ v, lse


def error(found: jax.Array, exact: jax.Array) -> float:
    """Relative, RMS."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def one(name: str, length: int) -> None:
    derivative = DERIVATIVES[name]
    keys = jax.random.split(jax.random.key(0), 8)
    q, k, v, q_dot, k_dot, v_dot, of_out = (
        jax.random.normal(key, (length, HEAD_DIM)) for key in keys[:7]
    )
    x, along, weights = (
        (q, k, v),
        (q_dot, k_dot, v_dot),
        (of_out, jax.random.normal(keys[7], (length,))),
    )
    compiled = (
        jax.jit(partial(derivative, heedful.causal_flash_attention))
        .lower(x, along, weights)
        .compile()
    )
    planned = compiled.memory_analysis().temp_size_in_bytes / 2**20
    before = peak_mib()
    begin = time.perf_counter()
    found = jax.block_until_ready(compiled(x, along, weights))
    seconds, peak = time.perf_counter() - begin, peak_mib()

    rows = np.linspace(0, length - 1, SAMPLE).astype(int)
    taken = np.zeros(length, np.float32)
    taken[rows] = 1
    few = tuple(np.asarray(w) * taken.reshape(-1, *[1] * (w.ndim - 1)) for w in weights)
    by_few = compiled(x, along, few)
    with jax.enable_x64(True):
        x, along, few = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, along, few))
        q, q_dot, few = x[0][rows], along[0][rows], [w[rows] for w in few]
        exact = jax.jit(partial(derivative, partial(dense, rows)))(
            (q, *x[1:]), (q_dot, *along[1:]), few
        )
        exact = jax.tree.map(np.asarray, exact)
    if len(found) == 2:
        errors = [error(np.asarray(a)[rows], b) for a, b in zip(found, exact, strict=True)]
    else:
        errors = [error(np.asarray(found[0])[rows], exact[0])]
        errors += [error(np.asarray(a), b) for a, b in zip(by_few[1:], exact[1:], strict=True)]
    if not max(errors) < TOLERANCE:
        raise SystemExit(f"{name} at {length}: relative RMS errors {errors}, above {TOLERANCE:.0e}")
    print(
        f"| {name} | {length} | {before:.0f} MiB | {peak:.0f} MiB | {planned:.0f} MiB | {seconds:.1f} s "
        f"| {max(errors):.0e} |",
        flush=True,
    )


def main() -> None:
    lengths = [int(n) for n in sys.argv[1:]] or [8192, 32768]
    print(
        f"heedful {heedful.__version__}, jax {jax.__version__}, Python {platform.python_version()}, "
        f"XLA_FLAGS {os.environ.get('XLA_FLAGS') or 'not set'}\n\n"
        "| derivative | length | before | peak | planned | time | error |\n"
        "|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name in DERIVATIVES:
        for length in lengths:
            subprocess.run([sys.executable, __file__, name, str(length), "--one"], check=True)


if __name__ == "__main__":
    if sys.argv[3:] == ["--one"]:
        one(sys.argv[1], int(sys.argv[2]))
    else:
        main()
