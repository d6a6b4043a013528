"""What changed between two reports: of two versions of torch, JAX, a driver, or a kernel of one's own.

A run is worse where its verdict is, where it lost a tensor, or where an error grew by more than noise,
as `NOISE` says it. Rounding is a sample, and another order of summation draws it anew; between seeds,
which draw everything anew, no honest backend's error moved that far (docs/judging.md). A run that is no
longer there is worse too: nobody knows whether it is right.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from heedful_crosscheck.report.model import WIDTH, Report
from heedful_crosscheck.run import Outcome
from heedful_crosscheck.tolerance import Judgement

# Counts what is more than so many times what it was, and by more than this part of the limit: beside
# small tensors and peaked rows rounding is a sample of few numbers, and a projection may be nothing.
NOISE = {"rms": (4.0, 0.25), "worst_row": (5.0, 0.25), "projection": (4.0, 0.5)}
# How bad it is, the best first: to refuse is better than to be wrong, and worse than to be right.
BADNESS = ("agree", "lossy", "refused", "crashed", "disagree")
SHOWN = 20  # of each kind

Way = Literal["worse", "better"]


@dataclass(frozen=True)
class Change:
    """One thing that is better or worse than it was.

    Attributes:
        run: the later one.
        message: what it was, and what it is.
    """

    way: Way
    run: Outcome
    message: str

    def __str__(self) -> str:
        return f"{self.run.backend}, {self.run.case}, {self.run.dtype}: {self.message}"


@dataclass(frozen=True)
class Changes:
    """What changed from one report to another; print it, or read it."""

    before: Report
    after: Report

    @cached_property
    def pairs(self) -> list[tuple[Outcome, Outcome]]:
        """The runs that both have, and that were asked the same."""
        return [pair for pair in self._both if _one_question(*pair)]

    @cached_property
    def asked_differently(self) -> list[Outcome]:
        """Runs of one name that are two questions, which say nothing about each other."""
        return [b for a, b in self._both if not _one_question(a, b)]

    @cached_property
    def only_before(self) -> list[Outcome]:
        return [o for key, o in self._before.items() if key not in self._after]

    @cached_property
    def only_after(self) -> list[Outcome]:
        return [o for key, o in self._after.items() if key not in self._before]

    @cached_property
    def verdicts(self) -> list[Change]:
        """Runs whose verdict is another, or which have more tensors or fewer; what is worse first."""
        return _worse_first(change for a, b in self.pairs for change in _of_verdict(a, b))

    @cached_property
    def errors(self) -> list[Change]:
        """Errors that grew or shrank by more than noise, where the verdict is the same."""
        return _worse_first(
            change for a, b in self.pairs if a.verdict == b.verdict for change in _of_errors(a, b)
        )

    @cached_property
    def environment(self) -> dict[str, tuple[object, object]]:
        """Versions, machine and flags that differ, and what they were and are; "seed" where it does."""
        a, b = ({**r.environment, "seed": r.seed} for r in (self.before, self.after))
        keys = dict.fromkeys([*a, *b])
        return {k: (a.get(k), b.get(k)) for k in keys if k != "date" and a.get(k) != b.get(k)}

    @property
    def worse(self) -> bool:
        """Whether anything is."""
        changes = [*self.verdicts, *self.errors]
        return bool(self.only_before) or any(change.way == "worse" for change in changes)

    @cached_property
    def _before(self) -> dict[tuple[object, ...], Outcome]:
        return {self._key(o): o for o in self.before.outcomes}

    @cached_property
    def _after(self) -> dict[tuple[object, ...], Outcome]:
        return {self._key(o): o for o in self.after.outcomes}

    @property
    def _both(self) -> list[tuple[Outcome, Outcome]]:
        return [(o, self._after[key]) for key, o in self._before.items() if key in self._after]

    def _key(self, o: Outcome) -> tuple[object, ...]:
        """The seed tells runs apart where a report has several; one and one are held together."""
        of_one_seed = len(self.before.seeds) == len(self.after.seeds) == 1
        return (o.backend, o.case, o.dtype, *(() if of_one_seed else (o.seed,)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _notes(self)
        for title, changes in (("verdicts", self.verdicts), ("errors", self.errors)):
            if changes:
                yield Text(f"\n{title}", style="bold")
            for change in changes[:SHOWN]:
                style = {"worse": "bold red", "better": "green"}[change.way]
                yield Text.assemble((f"{change.way:<6} ", style), str(change))
            if len(changes) > SHOWN:
                worse = sum(change.way == "worse" for change in changes[SHOWN:])
                yield Text(f"  and {len(changes) - SHOWN} more, {worse} of them worse")
        for title, runs in (
            ("no longer there, which counts as worse", self.only_before),
            ("new", self.only_after),
            ("asked something else than before, and not compared", self.asked_differently),
        ):
            if runs:
                yield Text(f"\n{title}: {len(runs)} runs", style="bold")
                yield Text(_named(runs))
        yield _verdict(self)

    def __str__(self) -> str:
        console = Console(width=WIDTH, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _one_question(a: Outcome, b: Outcome) -> bool:
    """By what depends neither on the seed nor on the last digit of whoever drew the numbers."""
    if a.lengths is None or b.lengths is None:  # it was refused before anybody was asked
        return True
    return (a.group, a.description, a.lengths) == (b.group, b.description, b.lengths)


def _of_verdict(a: Outcome, b: Outcome) -> Iterator[Change]:
    if a.verdict != b.verdict:
        worse = BADNESS.index(b.verdict) > BADNESS.index(a.verdict)
        said = [*b.reasons, *(f.message for f in (*b.failures, *b.losses))]
        why = f": {said[0]}" if said else ""
        yield Change("worse" if worse else "better", b, f"was {a.verdict}, is {b.verdict}{why}")
    elif a.verdict != "crashed":
        lost = [t for t in a.judgements if t not in b.judgements]
        gained = [t for t in b.judgements if t not in a.judgements]
        why = "; ".join(reason for reasons in b.lacking.values() for reason in reasons)
        if lost:
            yield Change("worse", b, f"has no {', '.join(lost)} any more{why and f': {why}'}")
        if gained:
            yield Change("better", b, f"has {', '.join(gained)} now")


def _of_errors(a: Outcome, b: Outcome) -> Iterator[Change]:
    for tensor, now in b.judgements.items():
        if tensor not in a.judgements:
            continue
        for measure in NOISE:
            before, after = (_share(x, measure) for x in (a.judgements[tensor], now))
            if way := _way(measure, before, after):
                verb = "grew" if way == "worse" else "shrank"
                what = f"{measure.replace('_', ' ')} error of {tensor}"
                said = f"the {what} {verb} from {before:.2g} to {after:.2g} of its limit"
                yield Change(way, b, said)
                break


def _share(judgement: Judgement, measure: str) -> float:
    """An error as a part of its limit."""
    error, limit = (getattr(x, measure) for x in (judgement.errors, judgement.limits))
    return error / limit if limit else math.inf if error else 0.0


def _way(measure: str, before: float, after: float) -> Way | None:
    times, least = NOISE[measure]
    less, more = sorted((before, after))
    if not more > max(times * less, less + least):
        return None
    return "worse" if after > before else "better"


def _worse_first(changes: Iterator[Change]) -> list[Change]:
    return sorted(changes, key=lambda change: change.way != "worse")


def _notes(changes: Changes) -> Iterator[Text]:
    for name, (was, now) in changes.environment.items():
        yield Text(f"{name}: {was} → {now}")
    for which, report in (("first", changes.before), ("second", changes.after)):
        if not report.complete:
            yield Text(f"The {which} report is of a run that was ended early.", style="yellow")
    if other := sum(a.inputs != b.inputs for a, b in changes.pairs if a.inputs and b.inputs):
        yield Text(
            f"{other} runs have other numbers than before: their errors differ by chance too."
        )


def _named(runs: list[Outcome]) -> str:
    """By backend, a few of each."""
    of: dict[str, list[str]] = {}
    for o in runs:
        of.setdefault(o.backend, []).append(f"{o.case} {o.dtype}")
    return "\n".join(
        f"  {backend}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for backend, names in of.items()
    )


def _verdict(changes: Changes) -> Text:
    found = [*changes.verdicts, *changes.errors]
    worse = sum(change.way == "worse" for change in found) + len(changes.only_before)
    better = sum(change.way == "better" for change in found)
    said = f"{worse} worse, {better} better, of {len(changes.pairs)} runs that both have."
    return Text(f"\n{said}", style="bold red" if changes.worse else "bold green")
