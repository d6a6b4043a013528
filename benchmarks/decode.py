"""Time of a decoded token against a long cache, beside torch's SDPA and jax.nn on the same tokens.

    python benchmarks/decode.py [ROOM]        16384 by default

One query a row against a full cache, in both layouts and through a block table of shuffled pages, with
one new token appended; then a cache that is an eighth full. Times are medians, taken in turns; "by
torch" is the ratio of speeds. Each output is checked against float64. "threads" is how the CPU time of a
call is spread over the busiest threads, in percent: where the first two are alike, the products over
keys and heads alone fill two cores, and dividing the keys would add nothing.
"""

import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

import heedful

ROUNDS = 7
PAGE = 64
TOLERANCE = 1e-5
CASES = {  # batch, query heads, key heads, head size, share of the room
    "32 heads": (1, 32, 32, 128, 1),
    "32 on 8 heads": (1, 32, 8, 128, 1),
    "8 on 1 head": (1, 8, 1, 128, 1),
    "4 rows, 32 on 8 heads": (4, 32, 8, 128, 1),
    "an eighth full": (4, 32, 8, 128, 8),
}


def threads() -> Counter[str]:
    """CPU time of each thread of this process, in nanoseconds."""
    found: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        try:
            found[task.name] = int((task / "schedstat").read_text().split()[0])
        except OSError:
            continue
    return found


def in_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, str]]:
    """Median seconds of each, and how its CPU time is spread."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    spread: dict[str, Counter[str]] = {name: Counter() for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            before, begin = threads(), time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
            spread[name] += threads() - before
    return {name: (statistics.median(seconds[name]), shares(spread[name])) for name in calls}


def shares(spread: Counter[str]) -> str:
    total = sum(spread.values())
    return "/".join(f"{100 * n / total:.0f}" for _, n in spread.most_common(4))


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Row by row in float64; (B, H, 1, D) against (B, Hkv, S, D)."""
    out = np.empty(q.shape)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = (x[b, h // group].astype(np.float64) for x in (k, v))
            s = keys @ q[b, h, 0] * q.shape[-1] ** -0.5
            p = np.exp(s - s.max())
            out[b, h, 0] = p @ values / p.sum()
    return out


def case(name: str, room: int) -> None:
    batch, q_heads, kv_heads, dim, share = CASES[name]
    room //= batch
    length = room // share
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, q_heads, 1, dim), np.float32)
    k, v = rng.standard_normal((2, batch, kv_heads, room, dim), np.float32)
    wanted = exact(q, k[:, :, :length], v[:, :, :length])
    order = rng.permutation(batch * room // PAGE)
    table = jnp.asarray(np.argsort(order).reshape(batch, -1).astype(np.int32))
    answers: dict[str, Any] = {}

    def decoding(layout: str, paged: bool) -> Callable[[], Any]:
        def turn(x: np.ndarray) -> np.ndarray:
            return x if layout == "bhsd" else np.ascontiguousarray(x.swapaxes(1, 2))

        caches = [turn(x) for x in (k, v)]
        new = [jnp.asarray(turn(x[:, :, length - 1 : length])) for x in (k, v)]
        if paged:
            caches = [x.reshape(-1, PAGE, *x.shape[2:])[order] for x in caches]
        state = [jnp.array(x) for x in caches]
        queries, lengths = jnp.asarray(turn(q)), jnp.full(batch, length - 1, jnp.int32)

        def call() -> None:
            found = heedful.decode(
                queries,
                *state,
                *new,
                cache_lengths=lengths,
                block_table=table if paged else None,
                layout=layout,
            )
            state[:] = found[2:]
            out = jax.block_until_ready(found.out)
            answers[call_name] = out if layout == "bhsd" else out.swapaxes(1, 2)

        call_name = f"heedful {'pages' if paged else layout}"
        return call

    tensors = [torch.from_numpy(x) for x in (q, k[:, :, :length], v[:, :, :length])]

    def by_torch() -> None:
        answers["torch SDPA"] = F.scaled_dot_product_attention(
            *tensors, enable_gqa=q_heads != kv_heads
        ).numpy()

    of_nn = [jnp.asarray(np.ascontiguousarray(x.swapaxes(1, 2))) for x in (q, k, v)]
    of_lengths = jnp.full(batch, length, jnp.int32)
    nn = jax.jit(lambda q, k, v, n: jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=n))

    def by_nn() -> None:
        answers["jax.nn"] = jax.block_until_ready(nn(*of_nn, of_lengths)).swapaxes(1, 2)

    calls = {
        "torch SDPA": by_torch,
        "jax.nn": by_nn,
        "heedful bhsd": decoding("bhsd", False),
        "heedful bshd": decoding("bshd", False),
        "heedful pages": decoding("bshd", True),
    }
    found = in_turns(calls)
    print(f"{name}: {batch} × {room} tokens, {length} held; {2 * k.nbytes / 2**20:.0f} MiB")
    for method, (seconds, spread) in found.items():
        error = np.sqrt(np.mean((answers[method] - wanted) ** 2) / np.mean(wanted**2))
        if not error < TOLERANCE:
            raise SystemExit(f"{method}: relative RMS error {error:.1e}, above {TOLERANCE:.0e}")
        ratio = found["torch SDPA"][0] / seconds
        print(
            f"  {method:>14} {seconds * 1e3:7.2f} ms, {ratio:5.2f} by torch; threads {spread}; "
            f"error {error:.1e}",
            flush=True,
        )


def main() -> None:
    room = int(sys.argv[1]) if len(sys.argv) > 1 else 16384
    print(f"{os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}")
    print(f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}, load {os.getloadavg()[0]:.1f}")
    for name in CASES:
        case(name, room)


if __name__ == "__main__":
    main()
