"""What a call costs beside the kernel: the same small attention, called from each framework.

    python benchmarks/crossing.py

Medians of rounds in which everything takes its turn, in µs: the jitted kernel on JAX's arrays; a bare
DLPack round trip of three tensors there and one back; a JAX function on torch's tensors
(`jax_in_torch`, `as_torch`), which is the kernel, that round trip, and an autograd function; and
`heedful.attention` on JAX's, torch's and NumPy's arrays, which also checks the call and chooses. Each
output is checked against float64.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

import heedful
import heedful_torch
from heedful_torch.autograd import jax_in_torch

SHAPE = (1, 4, 64, 32)
CALLS, ROUNDS = 50, 40
TOLERANCE = 1e-6


def kernel(q: Any, k: Any, v: Any) -> tuple[Any]:
    return (heedful.attention(q, k, v, backend="jax:flash"),)


def round_trip(*tensors: torch.Tensor) -> torch.Tensor:
    arrays = [jax.dlpack.from_dlpack(x) for x in tensors]
    return from_dlpack(arrays[0])


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    s = np.einsum("bhid,bhjd->bhij", q, k) * SHAPE[-1] ** -0.5
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhij,bhjd->bhid", p / p.sum(-1, keepdims=True), v)


def main() -> None:
    x = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
    of_jax = [jax.device_put(a) for a in x]
    of_torch = [torch.from_numpy(a.copy()) for a in x]  # aligned, so that JAX shares them
    of_torch = [a.clone() for a in of_torch]
    jitted = jax.jit(kernel)
    there, public = jax_in_torch(kernel), heedful_torch.as_torch(kernel)
    calls: dict[str, Callable[[], Any]] = {
        "the jitted kernel, JAX's arrays": lambda: jitted(*of_jax)[0].block_until_ready(),
        "a bare DLPack round trip": lambda: round_trip(*of_torch),
        "jax_in_torch": lambda: there(*of_torch)[0],
        "as_torch": lambda: public(*of_torch)[0],
        "heedful.attention, JAX's arrays": lambda: heedful.attention(
            *of_jax, backend="jax:flash"
        ).block_until_ready(),
        "heedful.attention, torch's tensors": lambda: heedful.attention(
            *of_torch, backend="jax:flash"
        ),
        "heedful.attention, NumPy's arrays": lambda: heedful.attention(*x, backend="jax:flash"),
    }
    want = exact(*x.astype(np.float64))
    for name, call in calls.items():
        error = np.abs(np.asarray(call()) - want).max()
        if "bare" not in name and not error < TOLERANCE:
            raise SystemExit(f"{name}: off by {error:.1e}, above {TOLERANCE:.0e}")
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            taken[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    base = statistics.median(taken["the jitted kernel, JAX's arrays"])
    for name, rounds in taken.items():
        median = statistics.median(rounds)
        print(f"{name:36} {median:6.0f} µs  {median - base:+6.0f}  (least {min(rounds):.0f})")


if __name__ == "__main__":
    main()
