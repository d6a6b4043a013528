"""Speed of attention on this machine's CPU: heedful's JAX backends, jax.nn and torch SDPA in one run.

    python benchmarks/attention.py [--rounds 5] [--only GLOB] [--json PATH]

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
from fnmatch import fnmatch
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

# Relative RMS against float64 on the same rounded inputs. Honest float32 kernels stay below 2e-6,
# kernels that round P and O to bfloat16 below 1e-2.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
PEER = "torch SDPA"
# What holds torch's libraries to fewer instructions than the machine has: an Intel CPU with AMX is then
# compared as one without.
HELD = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


@dataclass(frozen=True)
class Shape:
    """What is attended: self-attention of `batch` rows, `heads` heads on `kv_heads`."""

    heads: int
    length: int
    head_dim: int
    batch: int = 1
    kv_heads: int = 0
    dtype: str = "float32"
    causal: bool = False

    @property
    def group(self) -> int:
        return self.heads // (self.kv_heads or self.heads)

    def __str__(self) -> str:
        heads = f"{self.heads}" + (f"/{self.kv_heads}" if self.group > 1 else "")
        mask = "causal" if self.causal else "full"
        rows = f"{self.batch}x" if self.batch > 1 else ""
        return f"{rows}{heads}x{self.length}x{self.head_dim} {self.dtype} {mask}"


SHAPES = (
    Shape(8, 4096, 64),
    Shape(8, 4096, 64, causal=True),
    Shape(32, 2048, 128, kv_heads=8, causal=True),
    Shape(8, 4096, 128, dtype="bfloat16"),
    Shape(12, 128, 32, batch=32),
)


@dataclass
class Row:
    """One figure: the median time, and the median over rounds of the peer's time by this one."""

    shape: str
    contestant: str
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

    def forward(self) -> list[jax.Array]:
        return [jax.block_until_ready(self._forward(*self.inputs))]

    def backward(self) -> list[jax.Array]:
        return list(jax.block_until_ready(self._backward(self.pullback, self.cotangent)))


class TorchContestant:
    """torch SDPA, whichever kernel it picks on this machine."""

    def __init__(self, arrays: list[np.ndarray], shape: Shape):
        dtype = getattr(torch, shape.dtype)  # from_numpy knows no bfloat16
        *inputs, self.cotangent = (torch.from_numpy(x.astype("f4")).to(dtype) for x in arrays)
        self.inputs = [x.requires_grad_() for x in inputs]
        self.options = {"is_causal": shape.causal, "enable_gqa": shape.group > 1}
        self.out = F.scaled_dot_product_attention(*self.inputs, **self.options)

    def forward(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return [F.scaled_dot_product_attention(*self.inputs, **self.options)]

    def backward(self) -> list[torch.Tensor]:
        return list(torch.autograd.grad(self.out, self.inputs, self.cotangent, retain_graph=True))


def contestants(
    arrays: list[np.ndarray], shape: Shape
) -> dict[str, JaxContestant | TorchContestant]:
    causal = shape.causal

    def of_backend(name: str) -> JaxContestant:
        return JaxContestant(
            lambda q, k, v: heedful.attention(q, k, v, causal=causal, backend=name), arrays
        )

    def of_jax_nn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        bshd = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(*bshd, is_causal=causal).swapaxes(1, 2)

    return {
        PEER: TorchContestant(arrays, shape),
        "jax:flash": of_backend("jax:flash"),
        "jax:plain": of_backend("jax:plain"),
        "jax.nn": JaxContestant(of_jax_nn, arrays),
    }


def draw(shape: Shape) -> list[np.ndarray]:
    """q, k, v and the cotangent of out, rounded to the shape's dtype."""
    normal = np.random.default_rng(0).standard_normal
    heads = (shape.heads, *[shape.kv_heads or shape.heads] * 2, shape.heads)
    sizes = [(shape.batch, h, shape.length, shape.head_dim) for h in heads]
    return [normal(size, dtype=np.float32).astype(jnp.dtype(shape.dtype)) for size in sizes]


def reference(arrays: list[np.ndarray], shape: Shape) -> dict[str, list[np.ndarray]]:
    """Float64 outputs and gradients, one key head at a time to spare memory."""
    q, k, v, cotangent = (torch.from_numpy(x.astype("f8")) for x in arrays)
    expected = [torch.empty_like(x) for x in (q, q, k, v)]
    hidden = ~torch.ones(shape.length, shape.length).tril().bool()
    for b, h in np.ndindex(k.shape[:2]):
        own = b, slice(h * shape.group, (h + 1) * shape.group)
        inputs = [x.requires_grad_() for x in (q[own].clone(), k[b, h].clone(), v[b, h].clone())]
        scores = inputs[0] @ inputs[1].mT * shape.head_dim**-0.5
        if shape.causal:
            scores = scores.masked_fill(hidden, -torch.inf)
        out = scores.softmax(-1) @ inputs[2]
        results = out.detach(), *torch.autograd.grad(out, inputs, cotangent[own])
        for whole, part, at in zip(expected, results, (own, own, (b, h), (b, h)), strict=True):
            whole[at] = part
    out, *gradients = (x.numpy() for x in expected)
    return {"forward": [out], "backward": gradients}


def check(
    name: str,
    part: str,
    got: list[jax.Array | torch.Tensor],
    expected: list[np.ndarray],
    dtype: str,
) -> None:
    for x, y in zip(got, expected, strict=True):
        found = x.double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x).astype("f8")
        error = np.sqrt(np.mean((found - y) ** 2) / np.mean(y**2))
        if not error < TOLERANCE[dtype]:
            raise SystemExit(
                f"{name} {part}: relative RMS error {error:.1e}, above {TOLERANCE[dtype]:.0e}"
            )


def measure(shape: Shape, rounds: int, console: Console) -> list[Row]:
    arrays = draw(shape)
    expected = reference(arrays, shape)
    field = contestants(arrays, shape)
    rows = []
    # 2 products forward, 5 backward, each 2·B·H·Sq·Sk·D operations; causal needs half of them.
    work = 4 * shape.batch * shape.heads * shape.length**2 * shape.head_dim
    work *= 0.5 if shape.causal else 1.0
    for part, factor in (("forward", 1.0), ("backward", 2.5)):
        times: dict[str, list[float]] = {name: [] for name in field}
        for turn in range(rounds + 1):
            for name, contestant in field.items():
                begin = time.perf_counter()
                result = getattr(contestant, part)()
                elapsed = time.perf_counter() - begin
                if turn == 0:  # the warm-up is checked, not counted
                    check(name, part, result, expected[part], shape.dtype)
                else:
                    times[name].append(elapsed)
        for name, seconds in times.items():
            median = statistics.median(seconds)
            ratio = statistics.median(p / s for p, s in zip(times[PEER], seconds, strict=True))
            gflops = factor * work / median / 1e9
            rows.append(Row(str(shape), name, part, median * 1e3, gflops, ratio))
            console.log(f"{shape} {part}: {name} {median * 1e3:.0f} ms, {ratio:.2f} by torch")
    return rows


def processor() -> str:
    """Its name, where the system tells it: ratios in bfloat16 depend on what it multiplies."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    facts = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    matrices = [f for f in ("avx512_bf16", "amx_bf16") if f in facts.get("flags", "").split()]
    return " ".join([facts.get("model name", platform.machine()), *matrices])


def environment() -> dict[str, str]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "heedful": heedful.__version__,
        "jax": jax.__version__,
        "torch": torch.__version__,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    } | {name: os.environ[name] for name in HELD if name in os.environ}


def table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title)
    for heading in ("", "part", "ms", "GFLOP/s", "speed by torch's", "speed by jax.nn's"):
        table.add_column(heading, justify="left" if heading in ("", "part") else "right")
    for row in rows:
        nn = next(r for r in rows if (r.contestant, r.part) == ("jax.nn", row.part))
        table.add_row(
            row.contestant,
            row.part,
            f"{row.milliseconds:.0f}",
            f"{row.gflops:.0f}",
            f"{row.speed_by_torch:.2f}",
            f"{nn.milliseconds / row.milliseconds:.2f}",
        )
    return table


def main(
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    only: Annotated[str, typer.Option(help="Shapes to time, as a glob.")] = "*",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here too.")
    ] = None,
) -> None:
    """Times the contestants and prints a table for each shape."""
    console = Console()
    chosen = [shape for shape in SHAPES if fnmatch(str(shape), only)]
    if not chosen:
        raise typer.BadParameter(
            f"no shape is like {only!r}. There are: {', '.join(map(str, SHAPES))}."
        )
    rows = [row for shape in chosen for row in measure(shape, rounds, console)]
    about = environment()
    for shape in chosen:
        console.print(table(str(shape), [row for row in rows if row.shape == str(shape)]))
    console.print("Every output and gradient was checked against float64.", about)
    if json_path:
        figures = {"environment": about, "rows": [asdict(row) for row in rows]}
        json_path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
