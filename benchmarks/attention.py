"""Speed of attention on this machine's CPU: heedful's JAX backends, jax.nn and torch SDPA in one run.

    python benchmarks/attention.py [--rounds 5] [--json PATH]

Every round times every contestant once, so that a machine whose speed drifts slows all alike; the
figures are medians over the rounds, and ratios are medians of the ratios within a round. Every output
and gradient that is timed is checked against float64 first.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

import heedful

BATCH, HEADS, LENGTH, HEAD_DIM = 1, 8, 4096, 64
TOLERANCE = 1e-5  # relative RMS against float64; honest float32 kernels stay below 2e-6
PEER = "torch SDPA"


@dataclass
class Row:
    """One figure: the median time, and the median over rounds of the peer's time by this one."""

    contestant: str
    causal: bool
    part: str
    milliseconds: float
    gflops: float
    speed_by_torch: float


class JaxContestant:
    """A JAX function of (q, k, v), its forward pass and its backward pass from saved residuals."""

    def __init__(self, function: Callable, arrays: list[np.ndarray]):
        *inputs, self.cotangent = (jnp.asarray(x) for x in arrays)
        self.inputs = inputs
        self._forward = jax.jit(function)
        self.out, self.pullback = jax.jit(lambda *x: jax.vjp(function, *x))(*inputs)
        self._backward = jax.jit(lambda pullback, cotangent: pullback(cotangent))

    def forward(self) -> list[np.ndarray]:
        return [np.asarray(jax.block_until_ready(self._forward(*self.inputs)))]

    def backward(self) -> list[np.ndarray]:
        gradients = jax.block_until_ready(self._backward(self.pullback, self.cotangent))
        return [np.asarray(g) for g in gradients]


class TorchContestant:
    """torch SDPA, whichever kernel it picks on this machine."""

    def __init__(self, arrays: list[np.ndarray], causal: bool):
        *inputs, self.cotangent = (torch.from_numpy(x) for x in arrays)
        self.inputs = [x.requires_grad_() for x in inputs]
        self.causal = causal
        self.out = F.scaled_dot_product_attention(*self.inputs, is_causal=causal)

    def forward(self) -> list[np.ndarray]:
        with torch.no_grad():
            return [F.scaled_dot_product_attention(*self.inputs, is_causal=self.causal).numpy()]

    def backward(self) -> list[np.ndarray]:
        grads = torch.autograd.grad(self.out, self.inputs, self.cotangent, retain_graph=True)
        return [g.numpy() for g in grads]


def contestants(
    arrays: list[np.ndarray], causal: bool
) -> dict[str, JaxContestant | TorchContestant]:
    def of_backend(name: str) -> JaxContestant:
        return JaxContestant(
            lambda q, k, v: heedful.attention(q, k, v, causal=causal, backend=name), arrays
        )

    def of_jax_nn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        bshd = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(*bshd, is_causal=causal).swapaxes(1, 2)

    return {
        PEER: TorchContestant(arrays, causal),
        "jax:flash": of_backend("jax:flash"),
        "jax:plain": of_backend("jax:plain"),
        "jax.nn": JaxContestant(of_jax_nn, arrays),
    }


def reference(arrays: list[np.ndarray], causal: bool) -> dict[str, list[np.ndarray]]:
    """Float64 outputs and gradients, one head at a time to spare memory."""
    heads = []
    for h in range(HEADS):
        q, k, v, cotangent = (torch.from_numpy(x[:, h : h + 1]).double() for x in arrays)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        scores = q @ k.mT * HEAD_DIM**-0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), -torch.inf)
        out = scores.softmax(-1) @ v
        heads.append([out.detach(), *torch.autograd.grad(out, inputs, cotangent)])
    out, *gradients = (torch.cat(parts, 1).numpy() for parts in zip(*heads, strict=True))
    return {"forward": [out], "backward": gradients}


def check(name: str, part: str, got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for x, y in zip(got, expected, strict=True):
        error = np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))
        if not error < TOLERANCE:
            raise SystemExit(
                f"{name} {part}: relative RMS error {error:.1e}, above {TOLERANCE:.0e}"
            )


def measure(causal: bool, rounds: int, console: Console) -> list[Row]:
    draw = np.random.default_rng(0).standard_normal
    arrays = [draw((BATCH, HEADS, LENGTH, HEAD_DIM), dtype=np.float32) for _ in range(4)]
    expected = reference(arrays, causal)
    field = contestants(arrays, causal)
    rows = []
    # 2 products forward, 5 backward, each 2·B·H·Sq·Sk·D operations; causal needs half of them.
    work = 4 * BATCH * HEADS * LENGTH**2 * HEAD_DIM * (0.5 if causal else 1.0)
    for part, factor in (("forward", 1.0), ("backward", 2.5)):
        times: dict[str, list[float]] = {name: [] for name in field}
        for turn in range(rounds + 1):
            for name, contestant in field.items():
                begin = time.perf_counter()
                result = getattr(contestant, part)()
                elapsed = time.perf_counter() - begin
                if turn == 0:  # the warm-up is checked, not counted
                    check(name, part, result, expected[part])
                else:
                    times[name].append(elapsed)
        for name, seconds in times.items():
            median = statistics.median(seconds)
            ratio = statistics.median(p / s for p, s in zip(times[PEER], seconds, strict=True))
            gflops = factor * work / median / 1e9
            rows.append(Row(name, causal, part, median * 1e3, gflops, ratio))
            console.log(f"{name} {'causal' if causal else 'full'} {part}: {median * 1e3:.0f} ms")
    return rows


def environment() -> dict[str, str]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "heedful": heedful.__version__,
        "jax": jax.__version__,
        "torch": torch.__version__,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def main(
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here too.")
    ] = None,
) -> None:
    """Times the contestants and prints one table."""
    console = Console()
    rows = measure(False, rounds, console) + measure(True, rounds, console)
    about = environment()
    shape = f"{HEADS} heads × {LENGTH} × {HEAD_DIM}, float32"
    table = Table(title=f"{shape}; outputs checked against float64", caption=str(about))
    for heading in ("", "mask", "part", "ms", "GFLOP/s", "speed by torch's", "speed by jax.nn's"):
        table.add_column(heading, justify="left" if heading in ("", "mask", "part") else "right")
    for row in rows:
        nn = next(
            r for r in rows if (r.contestant, r.causal, r.part) == ("jax.nn", row.causal, row.part)
        )
        table.add_row(
            row.contestant,
            "causal" if row.causal else "full",
            row.part,
            f"{row.milliseconds:.0f}",
            f"{row.gflops:.0f}",
            f"{row.speed_by_torch:.2f}",
            f"{nn.milliseconds / row.milliseconds:.2f}",
        )
    console.print(table)
    if json_path:
        figures = {"environment": about, "rows": [asdict(row) for row in rows]}
        json_path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
