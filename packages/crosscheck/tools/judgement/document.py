"""Makes `docs/judgement.md`: what the judge catches, whom it accuses, and where its limits come from.

    nox -s judgement

It takes an hour: every mutant (`mutants.py`) is asked until it is caught, and honest backends are judged
over fifty seeds.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from textwrap import fill

import numpy as np
from hold import Held, hold, over_seeds
from mutants import Mutant, mutants

from heedful_crosscheck.cases import everything, quick, share_of_pairs
from heedful_crosscheck.run import Outcome
from heedful_crosscheck.tolerance import (
    CEILING,
    LSE_CEILING,
    LSE_FLOOR,
    PLAIN_TIMES,
    PROJECTION_FLOOR,
    RMS_FLOOR,
    Judgement,
)

DOCUMENT = Path(__file__).parents[4] / "docs" / "judgement.md"
SEEDS = range(50)
HONEST = ("numpy:oracle", "jax:plain", "jax:flash", "torch:sdpa-math", "torch:sdpa-flash")
DTYPES = ("float64", "float32", "float16", "bfloat16")

# The mutants


def of_kinds(all_mutants: Sequence[Mutant], by_quick: Held, by_default: Held) -> Iterator[dict]:
    """A row for each kind, and one for all."""
    kinds = [(kind, list(of_it)) for kind, of_it in groupby(all_mutants, key=lambda m: m.kind)]
    for kind, of_it in [*kinds, ("all", list(all_mutants))]:
        met = [m for m in of_it if m not in by_default.unmet]
        quickly = [m for m in met if m not in by_quick.unmet]
        yield {
            "what is wrong": kind,
            "mutants": len(of_it),
            "asked by --quick": len(quickly),
            "caught by --quick": _share(sum(m in by_quick.caught for m in met), met),
            "asked by all cases": len(met),
            "caught by all cases": _share(sum(m in by_default.caught for m in met), met),
        }


def _share(part: int, whole: Sequence[Mutant]) -> str:
    return f"{part} ({part / max(len(whole), 1):.1%})"


def named(title: str, faults: Iterable[str]) -> str:
    """A list of what stands apart, in words."""
    said = "; ".join(faults)
    return fill(f"{title}: {said or 'none'}.", 105)


# The honest


def verdicts(outcomes: Sequence[Outcome]) -> Iterator[dict]:
    """A row for each backend."""
    for name in HONEST:
        ran = [o for o in outcomes if o.backend == name and o.verdict != "refused"]
        counts = {v: sum(o.verdict == v for o in ran) for v in ("agree", "lossy", "disagree")}
        yield {"backend": name, "runs": len(ran), **counts}


def judged(outcomes: Iterable[Outcome]) -> dict[tuple[str, str], list[Judgement]]:
    """By dtype, and whether it is LSE: what was measured of honest backends that round."""
    found: dict[tuple[str, str], list[Judgement]] = {}
    for o in outcomes:
        if o.verdict == "agree" and o.backend != "numpy:oracle":
            for tensor, judgement in o.judgements.items():
                tensors = "LSE" if tensor == "lse" else "others"
                found.setdefault((o.dtype, tensors), []).append(judgement)
    return dict(sorted(found.items(), key=lambda item: (DTYPES.index(item[0][0]), item[0][1])))


def distributions(outcomes: Iterable[Outcome]) -> Iterator[dict]:
    """By dtype, how far honest backends were from the oracle, in plain attention's own error."""
    for (dtype, tensors), measured in judged(outcomes).items():
        floor = (LSE_FLOOR if tensors == "LSE" else RMS_FLOOR)[dtype]
        ceiling = (LSE_CEILING if tensors == "LSE" else CEILING)[dtype]
        times = [j.errors.rms / j.plain.rms for j in measured if j.plain.rms > floor]
        beyond = [(j.errors.rms - PLAIN_TIMES * j.plain.rms) / floor for j in measured]
        used = [j.strain for j in measured]
        yield {
            "dtype": dtype,
            "tensors": tensors,
            "measured": len(measured),
            "plain's own error: median": _short(np.median([j.plain.rms for j in measured])),
            "times plain's: 50 %, 99 %, most": _quantiles(times),
            "beyond twice plain's, in floors: most": f"{max(0.0, *beyond):.2f}",
            "of the limit: 99 %, most": _quantiles(used, (0.99, 1)),
            "floor, ceiling": f"{floor:.2g}, {ceiling:.2g}",
        }


def projections(outcomes: Iterable[Outcome]) -> Iterator[dict]:
    """The same of the projection: what of an honest error is a wrong scale."""
    for (dtype, tensors), measured in judged(outcomes).items():
        share = [j.errors.projection / j.errors.rms for j in measured if j.errors.rms > 0]
        yield {
            "dtype": dtype,
            "tensors": tensors,
            "projection by rms: 50 %, 99 %, most": _quantiles(share),
            "largest projection": _short(max(j.errors.projection for j in measured)),
            "floor": f"{(LSE_FLOOR if tensors == 'LSE' else PROJECTION_FLOOR)[dtype]:.2g}",
        }


def _quantiles(numbers: Sequence[float], at: Sequence[float] = (0.5, 0.99, 1)) -> str:
    return ", ".join(f"{np.quantile(numbers, q):.2f}" for q in at) if numbers else "—"


def _short(x: float) -> str:
    return f"{x:.1e}"


# The document

OPENING = """
What the judge catches, whom it accuses falsely, and where its limits come from. Made by `nox -s
judgement`, not written: {made}, XLA_FLAGS `{flags}`. How agreement is judged, and what judge and
judged share, stands in `heedful_crosscheck/tolerance.py`.
"""
PLANTED = """
A mutant is the float64 oracle with one fault: it is asked something else than it was asked, or its
answer is changed (`packages/crosscheck/tools/judgement/mutants.py`). So nothing but the fault can
be seen, and no other error helps to see it. It is caught where a case calls it wrong; `lossy` is
not. Those that no case asks for what they get wrong, since the contract or the table's rules keep
the two apart, are not counted in the shares. `--quick` has {quick}.
"""
OF_KERNELS = """
Faults of a kernel's own arithmetic, which no change of question makes, are planted in
`tests/conformance/broken.py`; each is caught, and named for the right tensor, in every run of the
tests.
"""
FALSE_ALARMS = """
Honest backends over {seeds} seeds of `--quick`, in all its dtypes. torch's flash kernel loses what
a rounded O loses, and is called so.
"""
LIMITS = """
An error may be twice plain attention's in the same case, plus a floor, and no more than the
ceiling. In those same runs, the oracle's own left out, of every tensor that agreed:
"""
TWICE = """
Why twice. Plain attention's error is a sample: another honest order of the same sums draws another.
Where it lies above the floor, honest backends are within the factor of the column "times plain's";
its most is what the factor has to hold, and what it leaves below 2 is room for kernels and machines
that are not here.
"""
FLOOR = """
Why a floor. Where plain attention is exact by luck, or nearly, twice its error is no room at all:
exponentials of 20 bits, and sums by tiles in half precision, are systematic and honest. The column
"in floors" says how much of the floor they take at most.
"""
CEILING_TEXT = """
Why a ceiling. In a case where plain attention itself is far off, twice its error would be no
judgement. The ceiling is what a user would still call the same number, not what rounding needs: the
median of plain's own error lies far below it.
"""
PROJECTION = """
The projection sees a wrong scale beneath the noise, because rounding mostly cancels in it:
"""


def prose(text: str, **facts: object) -> str:
    """A paragraph."""
    return fill(" ".join(text.format(**facts).split()), 105)


def table(rows: Iterable[dict]) -> str:
    """In Markdown."""
    rows = list(rows)
    cells = [rows[0].keys(), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def made() -> str:
    """When, where and with what."""
    packages = ("heedful", "numpy", "jax", "torch")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return f"{date.today()}, {machine}, Python {platform.python_version()}, {versions}"


def document(
    all_mutants: Sequence[Mutant], by_quick: Held, by_default: Held, outcomes: Sequence[Outcome]
) -> str:
    """The whole page."""
    late = [m for m in by_default.caught if m not in by_quick.caught]
    lossy = [f"{m.fault} (lossy: {where})" for m, where in by_default.lossy.items()]
    blocks = [
        "# Judgement",
        prose(OPENING, made=made(), flags=os.environ.get("XLA_FLAGS", "")),
        "## Planted faults",
        prose(PLANTED, quick=share_of_pairs(quick())),
        table(of_kinds(all_mutants, by_quick, by_default)),
        named("Not caught by all cases", [*(m.fault for m in by_default.left), *lossy]),
        named(
            "Caught by all cases alone, not by `--quick`",
            [f"{m.fault} ({by_default.caught[m]})" for m in late],
        ),
        named("Asked by no case", [m.fault for m in by_default.unmet]),
        prose(OF_KERNELS),
        "## False alarms",
        prose(FALSE_ALARMS, seeds=len(SEEDS)),
        table(verdicts(outcomes)),
        "## Where the limits come from",
        prose(LIMITS),
        table(distributions(outcomes)),
        *map(prose, (TWICE, FLOOR, CEILING_TEXT, PROJECTION)),
        table(projections(outcomes)),
    ]
    return "\n\n".join(blocks) + "\n"


def progress(name: str) -> Callable[[int, int, str], None]:
    return lambda done, total, what: print(
        f"{name} {done}/{total}: {what}", file=sys.stderr, flush=True
    )


def main() -> None:
    """Writes the document."""
    all_mutants = mutants()
    few = quick()
    by_quick = hold(all_mutants, few, progress("--quick"))
    known = {case.name for case in few}
    rest = [case for case in everything() if case.name not in known]
    uncaught = [m for m in all_mutants if m not in by_quick.caught]
    by_rest = hold(uncaught, rest, progress("all cases"))
    by_default = by_quick.and_then(by_rest)
    outcomes = over_seeds(HONEST, few, SEEDS, progress("honest"))
    DOCUMENT.write_text(document(all_mutants, by_quick, by_default, outcomes))


if __name__ == "__main__":
    main()
