"""What came of a crosscheck, and what can be asked of it; the files beside this one show it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from heedful_crosscheck.report.environment import environment
from heedful_crosscheck.run import DTYPES, Failure, Outcome

WIDTH = 130  # of the table where it is not printed to a terminal
MARKS = {"disagree": "✗", "crashed": "!", "lossy": "~", "agree": "✓", "refused": "–"}
VERDICTS = tuple(MARKS)  # the worst first

WORDS = {  # of one, and of several
    "disagree": ("disagrees with the float64 reference", "disagree with the float64 reference"),
    "crashed": ("crashed", "crashed"),
    "lossy": ("loses more digits than it has to", "lose more digits than they have to"),
}


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
    def count(self) -> str:
        """How many of all have the row's verdict: "12" where all do, or else "2/12"."""
        same = sum(o.verdict == self.verdict for o in self.outcomes)
        return str(same) if same == len(self.outcomes) else f"{same}/{len(self.outcomes)}"

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
            f"off by {short(self.plain)}, and nobody so far off is said to agree"
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
        environment: versions, machine and flags, of `environment`.
        command: that makes it again; None where it was no command.
    """

    outcomes: tuple[Outcome, ...]
    seed: int
    seconds: float
    strict: bool = False
    complete: bool = True
    declined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=environment)
    command: str | None = None

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
    def headline(self) -> str:
        """The verdict in a sentence for somebody who knows nothing of this."""
        of = {v: [name for name, found in self.verdicts.items() if found == v] for v in VERDICTS}
        ran = len(self.verdicts) - len(of["refused"])
        if not ran:
            return "No backend ran anything."
        one = "The one backend that ran"
        said = [
            f"{len(of[verdict])} {words[len(of[verdict]) > 1]}"
            for verdict, words in WORDS.items()
            if of[verdict]
        ]
        if not said:
            verb = f"{one} agrees" if ran == 1 else f"All {ran} backends that ran agree"
            sentence = f"{verb} with the float64 reference"
        elif ran == 1:
            sentence = said[0].replace("1", one, 1)
        else:
            sentence = ", ".join(said).replace(" ", f" of the {ran} backends that ran ", 1)
        ended = "" if self.complete else " The run was ended early: this is what was known."
        return f"{sentence}.{ended}"

    @property
    def facts(self) -> list[str]:
        """How many runs, of what, on what, in a few words each."""
        runs = sum(o.verdict != "refused" for o in self.outcomes)
        of = self.environment
        versions = [f"{n} {of[n]}" for n in ("heedful", "jax", "torch", "numpy") if of.get(n)]
        devices = of.get("torch_cuda_device") or of.get("jax_devices")
        said = [f"{runs} runs", of.get("date"), f"seed {self.seed}", versions, devices]
        return [", ".join(x) if isinstance(x, list) else str(x) for x in said if x]

    @cached_property
    def seeds(self) -> list[int]:
        """Those that somebody was asked with."""
        return list(dict.fromkeys(o.seed for o in self.outcomes))

    def asked(self, o: Outcome) -> str:
        """Which run: the dtype, and the seed where there are several."""
        return f"{o.dtype}, seed {o.seed}" if len(self.seeds) > 1 else o.dtype

    @cached_property
    def groups(self) -> list[str]:
        """The groups of the cases, in the order in which they were asked."""
        return list(dict.fromkeys(o.group for o in self.outcomes))

    @cached_property
    def dtypes(self) -> list[str]:
        """Those that somebody was asked in, in one order for all."""
        return [dtype for dtype in DTYPES if any(o.dtype == dtype for o in self.outcomes)]

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
        return {
            name: Row(name, "", "", tuple(found)).verdict for name, found in self.by_backend.items()
        }

    @cached_property
    def told_verdicts(self) -> list[str]:
        """Those that runs are counted by, the best first: nothing crashes in most reports."""
        crashed = any(o.verdict == "crashed" for o in self.outcomes)
        told = ("agree", "lossy", "disagree", "crashed", "refused")
        return [verdict for verdict in told if crashed or verdict != "crashed"]

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
        order = list(self.by_backend)
        keys = sorted(parts, key=lambda key: order.index(key[0]))  # stable: groups stay in order
        return tuple(Row(*key, tuple(parts[key])) for key in keys)

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
    def by_backend(self) -> dict[str, list[Outcome]]:
        """All outcomes of each backend, in the order in which they were asked."""
        found: dict[str, list[Outcome]] = {}
        for o in self.outcomes:
            found.setdefault(o.backend, []).append(o)
        return found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from heedful_crosscheck.report import text

        yield from text.render(self)

    def __str__(self) -> str:
        console = Console(width=WIDTH, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def as_json(self) -> dict[str, Any]:
        """Everything in the table, every run behind it, and what it ran on; JSON types only."""
        from heedful_crosscheck.report import json

        return json.render(self)

    def as_html(self) -> str:
        """One HTML file that loads nothing: verdict, tables, figures, failures, versions.

        Raises:
            ModuleNotFoundError: what it is made with is not installed: heedful-crosscheck[report].
        """
        from heedful_crosscheck.report import html

        return html.render(self)

    def as_markdown(self) -> str:
        """What fits a comment on a pull request: verdict, tables, the first failures."""
        from heedful_crosscheck.report import markdown

        return markdown.render(self)

    def as_junit(self) -> str:
        """JUnit's XML: a suite a backend, a test a case and dtype; what is refused is skipped."""
        from heedful_crosscheck.report import junit

        return junit.render(self)

    @staticmethod
    def read(path: str | Path) -> "Report":
        """The report of a file that `heedful crosscheck --json` made.

        Raises:
            ReportError: a ValueError; the file cannot be read, or is no report.
        """
        from heedful_crosscheck.report import saved

        return saved.read(path)


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def short(x: float) -> str:
    """Two digits: 1.7e-3."""
    return "0" if x == 0 else re.sub(r"e([+-])0", r"e\1", f"{x:.1e}")


def printable(text: str) -> str:
    """The same without what a terminal obeys or XML forbids: control characters, halves of pairs."""
    return _UNPRINTABLE.sub("\ufffd", text)


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
