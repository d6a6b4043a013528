"""What came of a crosscheck: the table, and the same as JSON."""

import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import jax
import jaxlib.version
import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

import heedful
from heedful_crosscheck.function import PROMISES
from heedful_crosscheck.run import Failure, Outcome

WIDTH = 130  # of the table where it is not printed to a terminal
COLUMNS = ("out", "lse", "dq", "dk", "dv")
FAILURES_SHOWN = 5  # of each backend, and as many losses; the JSON has them all
NAMED = 3  # cases of one group for which a reason was given; of more, how many. The JSON names them
VERDICTS = ("disagree", "lossy", "agree", "refused")  # the worst first


@dataclass(frozen=True)
class Row:
    """One backend on one group of cases in one dtype."""

    backend: str
    group: str
    dtype: str
    outcomes: tuple[Outcome, ...]

    @property
    def ran(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.verdict != "refused"]

    @property
    def verdict(self) -> str:
        """The worst of those that ran, of `VERDICTS`; "refused" where none did."""
        verdicts = {o.verdict for o in self.outcomes}
        return next(v for v in VERDICTS if v in verdicts)

    @property
    def factor(self) -> float:
        """How many times its limit the worst lossy tensor is out; 0 where none is lossy."""
        lossy = [j.strain for o in self.outcomes for j in o.judgements.values() if j.losses]
        return max(lossy, default=0.0)

    @property
    def worst(self) -> dict[str, Outcome]:
        """For each tensor, the outcome that is nearest to its limit, or farthest beyond."""
        tensors = dict.fromkeys(t for o in self.ran for t in o.judgements)
        return {
            tensor: max(
                (o for o in self.ran if tensor in o.judgements),
                key=lambda o: o.judgements[tensor].strain,
            )
            for tensor in tensors
        }


@dataclass(frozen=True)
class Reason:
    """One thing that keeps a backend from some of the runs.

    Attributes:
        part: what it keeps the backend from, of `Outcome.lacking`; "" of the whole run.
        outcomes: the runs.
    """

    backend: str
    reason: str
    part: str
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class Ceiling:
    """A tensor of a case that honest arithmetic itself gets so wrong that its error sets no limit.

    Attributes:
        plain: plain attention's relative RMS error there.
    """

    case: str
    dtype: str
    tensor: str
    plain: float

    def __str__(self) -> str:
        return (
            f"{self.case}, {self.dtype}: {self.tensor} reaches the ceiling: plain attention itself is "
            f"off by {_short(self.plain)}, and nobody so far off is said to agree"
        )


@dataclass(frozen=True)
class Report:
    """What came of a crosscheck; print it, or read it.

    Attributes:
        outcomes: of every backend on every case in every dtype.
        seed: of the inputs and the cotangents.
        seconds: that it took.
        strict: whether `lossy` counts as disagreement.
        complete: whether it came to its end.
        declined: of each function that is no backend, which promises it declined.
    """

    outcomes: tuple[Outcome, ...]
    seed: int
    seconds: float
    strict: bool = False
    complete: bool = True
    declined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def agree(self) -> bool:
        """Whether somebody ran and nobody disagrees, to the end; where strict, nor is anybody lossy."""
        fine = self.verdict == "agree" or (self.verdict == "lossy" and not self.strict)
        return fine and self.complete

    @property
    def verdict(self) -> str:
        """The worst of `verdicts`: "disagree", "lossy", "agree"; "refused" where nothing ran."""
        found = set(self.verdicts.values())
        return next((v for v in VERDICTS if v in found), "refused")

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Everything that anybody got wrong."""
        return tuple(f for o in self.outcomes for f in o.failures)

    @property
    def losses(self) -> tuple[Failure, ...]:
        """Everything lossy: no further off than flash kernels must be, and further than they should."""
        return tuple(f for o in self.outcomes for f in o.losses)

    @property
    def ceilings(self) -> tuple[Ceiling, ...]:
        """Where the ceiling is the limit, each once."""
        reached = {
            (o.case, o.dtype, tensor): Ceiling(o.case, o.dtype, tensor, judgement.plain.rms)
            for o in self.outcomes
            for tensor, judgement in o.judgements.items()
            if judgement.ceiling
        }
        return tuple(reached.values())

    @cached_property
    def verdicts(self) -> dict[str, str]:
        """By backend: "agree", "lossy", "disagree", or "refused" where it ran nothing."""
        return {name: _row(name, "", "", found).verdict for name, found in self._by_backend.items()}

    @cached_property
    def kernels(self) -> dict[str, list[str]]:
        """What computed, in the words of those backends that say it."""
        found: dict[str, list[str]] = {}
        for o in self.outcomes:
            if o.kernel and o.kernel not in found.setdefault(o.backend, []):
                found[o.backend].append(o.kernel)
        return found

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The table: backend × case group × dtype."""
        parts: dict[tuple[str, str, str], list[Outcome]] = {}
        for o in self.outcomes:
            parts.setdefault((o.backend, o.group, o.dtype), []).append(o)
        order = list(self._by_backend)
        keys = sorted(parts, key=lambda key: order.index(key[0]))  # stable: groups stay in order
        return tuple(_row(*key, parts[key]) for key in keys)

    @cached_property
    def refusals(self) -> tuple[Reason, ...]:
        """Every reason that anybody gave, and the runs that it was given for."""
        found: dict[tuple[str, str, str], list[Outcome]] = {}
        for o in self.outcomes:
            for part, reasons in {"": o.reasons, **o.lacking}.items():
                for reason in reasons:
                    found.setdefault((o.backend, part, reason), []).append(o)
        return tuple(
            Reason(backend, reason, part, tuple(outcomes))
            for (backend, part, reason), outcomes in found.items()
        )

    @cached_property
    def _by_backend(self) -> dict[str, list[Outcome]]:
        found: dict[str, list[Outcome]] = {}
        for o in self.outcomes:
            found.setdefault(o.backend, []).append(o)
        return found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _table(self)
        for backend, kernels in self.kernels.items():
            yield Text(f"{backend}: computed by {' and by '.join(kernels)}")
        yield from _declined_lines(self)
        if self.refusals:
            yield _refusal_table(self)
        yield from _failure_lines(self)
        yield _verdict_line(self)

    def __str__(self) -> str:
        console = Console(width=WIDTH, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def as_json(self) -> dict[str, Any]:
        """Everything in the table, every run behind it, and what it ran on; JSON types only."""
        return {
            "verdict": "nothing ran" if self.verdict == "refused" else self.verdict,
            "agree": self.agree,
            "strict": self.strict,
            "complete": self.complete,
            "backends": self.verdicts,
            "kernels": self.kernels,
            "declined": {name: list(promises) for name, promises in self.declined.items()},
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "environment": environment(),
            "table": [_row_as_json(row) for row in self.rows],
            "refusals": [_reason_as_json(reason) for reason in self.refusals],
            "failures": [asdict(failure) for failure in self.failures],
            "losses": [asdict(loss) for loss in self.losses],
            "ceilings": [asdict(ceiling) for ceiling in self.ceilings],
            "runs": [_run_as_json(outcome) for outcome in self.outcomes],
        }


def _row(backend: str, group: str, dtype: str, outcomes: Iterable[Outcome]) -> Row:
    return Row(backend, group, dtype, tuple(outcomes))


# The table


def _table(report: Report) -> Table:
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        caption="each pair: relative RMS error against the float64 oracle, the backend's / plain "
        "attention's,\nin the case nearest to its limit; in brackets, how many of the cases ran",
        caption_justify="left",
    )
    for heading in ("backend", "dtype", "verdict", *("LSE" if c == "lse" else c for c in COLUMNS)):
        least = len("bfloat16") if heading == "dtype" else None
        table.add_column(heading, no_wrap=True, min_width=least)
    for backend, rows in groupby(report.rows, key=lambda row: row.backend):
        table.add_row(Text(backend, style="bold"))
        for row in rows:
            if row.ran:
                table.add_row(f"  {row.group}", row.dtype, _verdict(row), *_cells(row))
        if report.verdicts[backend] == "refused":
            table.add_row("  everything", "", Text("refused", style="yellow"))
    return table


def _verdict(row: Row) -> Text:
    style = {"agree": "green", "lossy": "yellow", "disagree": "bold red"}[row.verdict]
    factor = f" ×{row.factor:.2g}" if row.verdict == "lossy" else ""
    part = "" if len(row.ran) == len(row.outcomes) else f" ({len(row.ran)}/{len(row.outcomes)})"
    return Text(row.verdict + factor + part, style=style)


def _cells(row: Row) -> list[Text]:
    cells = []
    for tensor in COLUMNS:
        if tensor not in row.worst:
            cells.append(Text("-"))
            continue
        judgement = row.worst[tensor].judgements[tensor]
        style = "bold red" if judgement.faults else "yellow" if judgement.losses else ""
        if math.isfinite(judgement.errors.rms):
            pair = f"{_short(judgement.errors.rms)}/{_short(judgement.plain.rms)}"
        else:
            pair = "wrong"
        cells.append(Text(pair, style=style))
    return cells


def _short(x: float) -> str:
    """Two digits: 1.7e-3."""
    return "0" if x == 0 else re.sub(r"e([+-])0", r"e\1", f"{x:.1e}")


def _refusal_table(report: Report) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("\nrefused by")
    table.add_column("\nreason", overflow="fold", ratio=3)
    table.add_column("\nwhere", overflow="fold", ratio=2)
    previous = None
    for reason in _alike(report.refusals):
        runs = report._by_backend[reason.backend]
        if part := reason.part:  # of interest only where it was asked for and the rest was computed
            tensor = {"LSE": "lse", "gradients": "dq", "second derivatives": "d2q"}[part]
            runs = [o for o in runs if part in o.lacking or tensor in o.judgements]
        table.add_row(
            "" if reason.backend == previous else reason.backend,
            f"{part} alone: {reason.reason}" if part else reason.reason,
            _places(reason.outcomes, runs),
        )
        previous = reason.backend
    return table


def _alike(reasons: Sequence[Reason]) -> list[Reason]:
    """By backend; reasons that differ in numbers alone are one, the numbers left out."""
    found: dict[tuple[str, str, str], list[Reason]] = {}
    for reason in sorted(reasons, key=lambda r: r.backend):
        text = re.sub(r"\b\d+\b", "…", reason.reason)
        found.setdefault((reason.backend, text, reason.part), []).append(reason)
    return [
        Reason(
            backend,
            text if len(same) > 1 else same[0].reason,
            part,
            tuple(o for reason in same for o in reason.outcomes),
        )
        for (backend, text, part), same in found.items()
    ]


def _places(outcomes: Sequence[Outcome], runs: Sequence[Outcome]) -> str:
    """Which of the runs these are: whole groups by their names, dtypes unless it is all of them."""
    refused = {(o.case, o.dtype) for o in outcomes}
    dtypes = tuple(dict.fromkeys(o.dtype for o in runs))
    dtypes_of: dict[tuple[str, ...], list[str]] = {}
    for dtype in dtypes:
        names: list[str] = []
        groups: dict[str, list[str]] = {}
        for o in runs:
            if o.dtype == dtype:
                groups.setdefault(o.group, []).append(o.case)
        for group, cases in groups.items():
            hit = [case for case in cases if (case, dtype) in refused]
            several = [f"{len(hit)} of {len(cases)} {group}"]
            names += [group] if hit == cases else hit if len(hit) <= NAMED else several
        if names:
            everywhere = names == list(groups)
            dtypes_of.setdefault(("everything",) if everywhere else tuple(names), []).append(dtype)
    return "; ".join(
        ", ".join(names) if tuple(within) == dtypes else f"{', '.join(within)}: {', '.join(names)}"
        for names, within in dtypes_of.items()
    )


def _failure_lines(report: Report) -> Iterable[Text]:
    for backend, outcomes in report._by_backend.items():
        failures = [f for o in outcomes for f in o.failures]
        losses = [f for o in outcomes for f in o.losses]
        for mark, style, found in (("✗ ", "bold red", failures), ("~ ", "yellow", losses)):
            for failure in found[:FAILURES_SHOWN]:
                yield Text.assemble((mark, style), str(failure))
            if len(found) > FAILURES_SHOWN:
                yield Text(
                    f"  and {len(found) - FAILURES_SHOWN} more of {backend}, all in the JSON"
                )
    for ceiling in report.ceilings:
        yield Text.assemble(("! ", "yellow"), str(ceiling))


def _declined_lines(report: Report) -> Iterable[Text]:
    for name, promises in report.declined.items():
        for promise in promises:
            yield Text(f"{name}: declines {promise}: {PROMISES[promise]}")
        if report.verdicts.get(name) == "disagree" and len(promises) < len(PROMISES):
            others = ", ".join(promise for promise in PROMISES if promise not in promises)
            yield Text(f"{name}: what it does not promise it may decline by name: {others}")


def _verdict_line(report: Report) -> Text:
    by_verdict: dict[str, list[str]] = {}
    for name, verdict in report.verdicts.items():
        by_verdict.setdefault(verdict, []).append(name)
    runs = sum(o.verdict != "refused" for o in report.outcomes)
    said = [
        f"{len(names)} {meaning}: {', '.join(names)}"
        for verdict, meaning in (
            ("disagree", "disagree"),
            ("lossy", "lossy, which --strict counts as disagreement"),
            ("agree", "agree"),
            ("refused", "ran nothing here"),
        )
        if (names := by_verdict.get(verdict))
    ]
    style = "bold green" if report.agree else "bold red"
    return Text(f"{'. '.join(said)}. {runs} runs, {report.seconds:.0f} s.", style=style)


# JSON


def environment() -> dict[str, Any]:
    """What may change a result: versions, machine, flags."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "heedful": heedful.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "torch": torch and torch.__version__,  # where somebody imported it
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "jax_devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "torch_cuda_device": torch.cuda.get_device_name() if torch and on_gpu else None,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    return {
        "backend": row.backend,
        "group": row.group,
        "dtype": row.dtype,
        "verdict": row.verdict,
        "factor": _number(row.factor) if row.verdict == "lossy" else None,
        "ran": len(row.ran),
        "refused": len(row.outcomes) - len(row.ran),
        "worst": {
            tensor: {"case": o.case, **_judgement_as_json(o, tensor)}
            for tensor, o in row.worst.items()
        },
    }


def _reason_as_json(reason: Reason) -> dict[str, Any]:
    return {
        "backend": reason.backend,
        "reason": reason.reason,
        "part": reason.part or "everything",
        "runs": [[o.case, o.dtype] for o in reason.outcomes],
    }


def _run_as_json(o: Outcome) -> dict[str, Any]:
    return {
        "backend": o.backend,
        "case": o.case,
        "group": o.group,
        "dtype": o.dtype,
        "verdict": o.verdict,
        "reasons": list(o.reasons),
        "lacking": {part: list(reasons) for part, reasons in o.lacking.items()},
        "tensors": {tensor: _judgement_as_json(o, tensor) for tensor in o.judgements},
        "failures": [{"tensor": f.tensor, "message": f.message} for f in o.failures],
        "losses": [{"tensor": f.tensor, "message": f.message} for f in o.losses],
        "seconds": round(o.seconds, 3),
    }


def _judgement_as_json(o: Outcome, tensor: str) -> dict[str, Any]:
    judgement = o.judgements[tensor]
    measures = {"error": judgement.errors, "plain": judgement.plain, "limit": judgement.limits}
    return {
        "verdict": judgement.verdict,
        "factor": _number(judgement.strain) if judgement.losses else None,
        "ceiling": judgement.ceiling,
    } | {
        name: {measure: _number(x) for measure, x in errors._asdict().items()}
        for name, errors in measures.items()
    }


def _number(x: float) -> float | None:
    """JSON has no infinity: what could not be measured is null."""
    return float(x) if math.isfinite(x) else None
