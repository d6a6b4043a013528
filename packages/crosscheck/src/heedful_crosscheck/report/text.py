"""A report in a terminal: the table, who refused what, what is wrong, the verdict."""

import math
from collections.abc import Iterable
from itertools import groupby

from rich.console import RenderResult
from rich.table import Table
from rich.text import Text

from heedful_crosscheck.function import PROMISES
from heedful_crosscheck.report import reasons
from heedful_crosscheck.report.model import Report, Row, short

STYLES = {"agree": "green", "lossy": "yellow"} | dict.fromkeys(("crashed", "disagree"), "bold red")
COLUMNS = ("out", "lse", "dq", "dk", "dv")
FAILURES_SHOWN = 5  # of each backend, and as many losses; the JSON has them all


def render(report: Report) -> RenderResult:
    """The report, part by part."""
    yield _table(report)
    for backend, kernels in report.kernels.items():
        yield Text(f"{backend}: computed by {' and by '.join(kernels)}")
    yield from _declined_lines(report)
    if report.refusals:
        yield _refusal_table(report)
    yield from _failure_lines(report)
    yield _verdict_line(report)


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
    style = STYLES[row.verdict]
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
            pair = f"{short(judgement.errors.rms)}/{short(judgement.plain.rms)}"
        else:
            pair = "wrong"
        cells.append(Text(pair, style=style))
    return cells


def _refusal_table(report: Report) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("\nrefused by")
    table.add_column("\nreason", overflow="fold", ratio=3)
    table.add_column("\nwhere", overflow="fold", ratio=2)
    previous = None
    for refusal in reasons.told(report):
        backend = "" if refusal.backend == previous else refusal.backend
        table.add_row(backend, refusal.reason, refusal.where)
        previous = refusal.backend
    return table


def _failure_lines(report: Report) -> Iterable[Text]:
    for backend, outcomes in report.by_backend.items():
        failures = [f for o in outcomes for f in o.failures]
        losses = [f for o in outcomes for f in o.losses]
        for mark, style, found in (("✗ ", "bold red", failures), ("~ ", "yellow", losses)):
            for failure in found[:FAILURES_SHOWN]:
                yield Text.assemble((mark, style), str(failure))
                if failure is found[0] and failure.heat is not None and not failure.heat.even:
                    yield failure.heat.__rich__()
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
            ("crashed", "crashed"),
            ("lossy", "lossy, which --strict counts as disagreement"),
            ("agree", "agree"),
            ("refused", "ran nothing here"),
        )
        if (names := by_verdict.get(verdict))
    ]
    style = "bold green" if report.agree else "bold red"
    return Text(f"{'. '.join(said)}. {runs} runs, {report.seconds:.0f} s.", style=style)
