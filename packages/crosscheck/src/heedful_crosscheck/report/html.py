"""A report as one HTML file, which loads nothing and runs nothing: to be mailed, or attached to a paper.

What it says stands in the template, escaped; here is what the template needs and a report has not.
"""

import math
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import jinja2
from markupsafe import Markup

from heedful_crosscheck.function import PROMISES
from heedful_crosscheck.report import charts, heat, reasons
from heedful_crosscheck.report.model import MARKS, VERDICTS, Report, Row, printable, short
from heedful_crosscheck.run import Outcome
from heedful_crosscheck.tolerance import Judgement

# A file that can be mailed; the JSON has all.
SHOWN = 20  # runs of a backend that are wrong, and as many that are lossy
MAPS = 5  # of these, that show where the error is


def render(report: Report) -> str:
    """The file's text."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("heedful_crosscheck.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"short": short, "printable": printable}
    return templates.get_template("report.html.jinja").render(
        report=report,
        backends=[Section(n, name, report) for n, name in enumerate(report.by_backend, 1)],
        marks=MARKS,
        words=_words,
        promises=PROMISES,
        shown=SHOWN,
        maps=MAPS,
        heat_map=heat.draw,
    )


@dataclass(frozen=True)
class Nearest:
    """What of a tensor came nearest to its limit, or went farthest beyond: which measure, and where."""

    case: str
    measure: str
    error: float
    limit: float
    judgement: Judgement

    @classmethod
    def of(cls, row: Row, tensor: str) -> "Nearest":
        """Among the outcomes of a row."""
        outcome = row.worst[tensor]
        judgement = outcome.judgements[tensor]
        measure = max(
            judgement.errors._fields,
            key=lambda name: (
                getattr(judgement.errors, name) / (getattr(judgement.limits, name) or 1)
            ),
        )
        error, limit = (getattr(x, measure) for x in (judgement.errors, judgement.limits))
        return cls(outcome.case, measure.replace("_", " "), error, limit, judgement)

    @property
    def strain(self) -> str:
        """The error as a part of its limit."""
        strain = self.judgement.strain
        if not math.isfinite(strain):
            return "wrong"
        return "< 0.01" if 0 < strain < 0.01 else f"{strain:.2g}" if strain < 100 else short(strain)


@dataclass(frozen=True)
class Section:
    """What the page says of one backend.

    Attributes:
        number: of the section, by which it is linked to: a name may be anything.
    """

    number: int
    name: str
    report: Report

    @property
    def outcomes(self) -> list[Outcome]:
        return self.report.by_backend[self.name]

    @property
    def verdict(self) -> str:
        return self.report.verdicts[self.name]

    @cached_property
    def counts(self) -> Counter[str]:
        """How many runs there are of each verdict."""
        return Counter(o.verdict for o in self.outcomes)

    @cached_property
    def dtypes(self) -> list[str]:
        """In which it was asked."""
        return [d for d in self.report.dtypes if any(o.dtype == d for o in self.outcomes)]

    @cached_property
    def _rows(self) -> dict[tuple[str, str], Row]:
        return {(r.group, r.dtype): r for r in self.report.rows if r.backend == self.name}

    def row(self, group: str, dtype: str) -> Row | None:
        """A cell of the matrix; None where nothing was asked."""
        return self._rows.get((group, dtype))

    @cached_property
    def tensors(self) -> list[str]:
        """All that was judged."""
        return list(dict.fromkeys(t for o in self.outcomes for t in o.judgements))

    def nearest(self, dtype: str, tensor: str = "") -> Nearest | None:
        """Of a tensor, or of all, in a dtype."""
        row = Row(self.name, "", dtype, tuple(o for o in self.outcomes if o.dtype == dtype))
        found = [Nearest.of(row, t) for t in row.worst if tensor in ("", t)]
        return max(found, key=lambda nearest: nearest.judgement.strain, default=None)

    @cached_property
    def wrong(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.failures]

    @cached_property
    def lossy(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.losses]

    @cached_property
    def refusals(self) -> list[reasons.Refusal]:
        return [r for r in reasons.told(self.report) if r.backend == self.name]

    @property
    def figure(self) -> Markup:
        """The errors, drawn: of numbers alone, no text of anybody's."""
        return Markup(charts.errors(self.outcomes, f"errors-{self.number}"))

    def again(self, o: Outcome) -> str:
        """The command that asks for a run alone; "" of a function, which no name brings back."""
        if self.name in self.report.declined:
            return ""
        modules = re.findall(r"--import[= ](\S+)", self.report.command or "")
        registered = [x for module in modules for x in ("--import", module)]
        asked = {"--backend": o.backend, "--cases": o.case, "--dtype": o.dtype, "--seed": o.seed}
        options = [str(x) for option in asked.items() for x in option]
        return shlex.join(["heedful", "crosscheck", *registered, *options])


def _words(row: Row) -> str:
    counts = Counter(o.verdict for o in row.outcomes)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
