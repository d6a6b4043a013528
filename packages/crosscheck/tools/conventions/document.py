"""Makes `docs/conventions.md`: what published attention functions mean, measured by calling them raw.

    nox -s conventions

What raises is told on stderr, with what was asked.
"""

import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from textwrap import fill

from measured import errors, log_sum_exp, of_options, position, together
from oracle import BATCH, HEAD_DIM, HEADS, SQUARE
from published import ABSENT, LSE, NEED_A_GPU, PUBLISHED, Published

DOCUMENT = Path(__file__).parents[4] / "docs" / "conventions.md"


def called(function: Published) -> dict[str, str]:
    return {"calls": function.calls, "version": f"{function.package} {version(function.package)}"}


@dataclass(frozen=True)
class Theme:
    """A table, and what it says."""

    title: str
    measure: Callable[[Published], dict[str, str]]
    text: str

    def rows(self, functions: Iterable[Published]) -> list[dict[str, str]]:
        """A row a function; of the log-sum-exp, those that return one."""
        with_lse = self.measure is log_sum_exp
        return [
            {"function": f.name} | self.measure(f)
            for f in functions
            if LSE in f.names or not with_lse
        ]


THEMES = (
    Theme("What is called", called, ""),
    Theme(
        "Position and empty rows",
        position,
        "An empty row is a query that sees no key. Its gradients are none where dq, dk and dv are what "
        "they are without it. A hidden NaN stands in a key, in its K or its V, and comes out of a query "
        "that does not see the key. What hides keys is a mask, and causal where there is none.",
    ),
    Theme(
        "Log-sum-exp",
        log_sum_exp,
        "Of those that return one. Its gradient is dropped where that of a loss of out and LSE is that "
        "of out alone.",
    ),
    Theme(
        "Options",
        of_options,
        "Taken rightly by out and by dq, dk and dv: yes. An ignored option changes nothing, and nothing "
        "is said. FlexAttention's masks and scores are functions that the caller writes, splash's "
        "masks objects; here those of their documentation. flash-attn 2 wants ALiBi's slopes on a GPU.",
    ),
    Theme(
        "Options together",
        together,
        "What comes first in the scores, what is seen, and what an open window is called.",
    ),
    Theme(
        "Errors",
        errors,
        "Relative RMS of full attention against float64 on the inputs rounded to the dtype; of the "
        "gradients the largest. JAX's functions are compiled by `jax.jit`.",
    ),
)


def lines(rows: list[dict[str, str]]) -> list[str]:
    """A table in Markdown."""
    cells = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return [f"| {' | '.join(line)} |" for line in cells]


def made() -> str:
    """When, where and with what."""
    import jax
    import torch

    packages = ("numpy", "jax", "jaxlib", "torch", "triton", "onnx")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    cpu = f"{os.cpu_count()} cores, {platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    gpu = "a GPU" if torch.cuda.is_available() or jax.default_backend() == "gpu" else "no GPU"
    return f"{date.today()}, {cpu}, {gpu}; Python {platform.python_version()}, {versions}"


def main() -> None:
    """Writes the document."""
    opening = (
        "What published attention functions mean, as each answers when it is called raw, held to a "
        f"reference of a few lines in float64. Made by `nox -s conventions`, not written: {made()}.",
        f"Arrays are standard normal, B = {BATCH}, H = {HEADS}, S = {SQUARE[0]}, D = {HEAD_DIM}, and "
        f"float32 where nothing else is said. {ABSENT} is what there is not; bold is what nobody would "
        "expect; where that is a fault, the smallest program that shows it is in "
        "[found](found/README.md).",
        f"Not measured here, because they need a GPU: {', '.join(NEED_A_GPU)}.",
    )
    blocks = ["# Conventions", *(fill(text, 105) for text in opening)]
    for theme in THEMES:
        blocks += [f"## {theme.title}", *filter(None, [fill(theme.text, 105)])]
        blocks += ["\n".join(lines(theme.rows(PUBLISHED)))]
    DOCUMENT.write_text("\n\n".join(blocks) + "\n")


if __name__ == "__main__":
    main()
