"""A report that was saved as JSON, read again.

What is read is the runs: the table and the lists beside it follow from them. A file may be a stranger's,
so that it is held to the form below, piece by piece, before anything is made of it.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from heedful_crosscheck.files import whole
from heedful_crosscheck.function import PROMISES
from heedful_crosscheck.location import HeatMap
from heedful_crosscheck.question import described
from heedful_crosscheck.report.json import FORMAT
from heedful_crosscheck.report.model import Report, printable
from heedful_crosscheck.run import DTYPES, Failure, Outcome
from heedful_crosscheck.tolerance import Errors, Judgement

LARGEST = 2**28  # bytes; a run of everything takes 5 MB
CELLS = 64  # of a line of a heat map, and lines of it, at most


class ReportError(ValueError):
    """A file is no report, and why."""


Value = str | int | float | bool | list[str] | None
Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0)] | None
Starts = Annotated[tuple[Count, ...], Meta(min_length=2, max_length=CELLS + 1)]
Dtype = Literal[DTYPES]  # type: ignore[valid-type]  # a tuple that mypy does not look into


class _Errors(Struct):
    rms: Share
    worst_row: Share
    projection: Share

    def read(self) -> Errors:
        found = (self.rms, self.worst_row, self.projection)
        return Errors(*(math.inf if x is None else x for x in found))


class _Heat(Struct):
    lines: Literal["heads", "rows"]
    first_line: Starts
    columns: Literal["rows", "columns"]
    first_column: Starts
    heads: Annotated[int, Meta(ge=1)]
    cells: Annotated[tuple[str, ...], Meta(min_length=1, max_length=CELLS)]

    def read(self) -> HeatMap:
        """Raises ValueError."""
        cells = tuple(tuple(map(_cell, line.split())) for line in self.cells)
        of_cells = (self.first_line, cells), *((self.first_column, line) for line in cells)
        if any(len(first) != len(of) + 1 for first, of in of_cells) or not all(
            a < b for first in (self.first_line, self.first_column) for a, b in pairwise(first)
        ):
            raise ValueError("the lines and cells of a heat map are not those that it says")
        return HeatMap(
            self.lines, self.first_line, self.columns, self.first_column, self.heads, cells
        )


class _Tensor(Struct):
    error: _Errors
    plain: _Errors
    limit: _Errors
    ceiling: bool
    faults: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    heat: _Heat | None = None

    def read(self) -> Judgement:
        error, plain, limit = (x.read() for x in (self.error, self.plain, self.limit))
        said = _clean(self.faults), _clean(self.losses)
        heat = None if self.heat is None else self.heat.read()
        return Judgement(error, plain, limit, *said, self.ceiling, heat)


class _Said(Struct):
    tensor: str | None
    message: str
    causes: tuple[str, ...]


class _Run(Struct):
    backend: str
    case: str
    group: str
    dtype: Dtype
    verdict: str
    reasons: tuple[str, ...]
    lacking: dict[Literal["LSE", "gradients", "second derivatives"], tuple[str, ...]]
    tensors: dict[str, _Tensor]
    failures: tuple[_Said, ...]
    losses: tuple[_Said, ...]
    seconds: Annotated[float, Meta(ge=0)]
    kernel: str
    lengths: tuple[Count, Count] | None
    crashed: bool
    output: str
    seed: Count
    inputs: str
    description: str

    def read(self) -> Outcome:
        backend, case, group, description = map(
            printable, (self.backend, self.case, self.group, self.description)
        )
        judgements = {printable(tensor): x.read() for tensor, x in self.tensors.items()}
        heats = {tensor: judgement.heat for tensor, judgement in judgements.items()}
        failures, losses = (
            tuple(
                Failure(
                    *(backend, case, self.dtype, x.tensor and printable(x.tensor)),
                    *(printable(x.message), described(description, self.seed)),
                    *(heats.get(x.tensor or ""), _clean(x.causes)),
                )
                for x in said
            )
            for said in (self.failures, self.losses)
        )
        return Outcome(
            backend,
            case,
            group,
            self.dtype,
            reasons=_clean(self.reasons),
            lacking={part: _clean(reasons) for part, reasons in self.lacking.items()},
            judgements=judgements,
            failures=failures,
            losses=losses,
            seconds=self.seconds,
            kernel=printable(self.kernel),
            lengths=self.lengths,
            crashed=self.crashed,
            output=printable(self.output),
            seed=self.seed,
            inputs=printable(self.inputs),
            description=description,
        )


class _Report(Struct):
    format: Literal[FORMAT]  # type: ignore[valid-type]  # as of Dtype
    strict: bool
    complete: bool
    declined: dict[str, tuple[Literal[tuple(PROMISES)], ...]]  # type: ignore[valid-type]  # as well
    command: str | None
    seed: Count
    seconds: Annotated[float, Meta(ge=0)]
    environment: dict[str, Value]
    runs: tuple[_Run, ...]


def read(path: str | Path) -> Report:
    """The report of a file that `render` made.

    Raises:
        ReportError: the file cannot be read, or holds something else.
    """
    try:
        found = msgspec.json.decode(whole(path, LARGEST), type=_Report)
        outcomes = tuple(run.read() for run in found.runs)
    except (OSError, ValueError, RecursionError) as error:  # msgspec's are ValueErrors
        raise ReportError(
            f"{path} is no report that `heedful crosscheck --json` of this version made: {error}"
        ) from error
    for n, (run, outcome) in enumerate(zip(found.runs, outcomes, strict=True)):
        if outcome.verdict != run.verdict:
            raise ReportError(
                f"{path}: runs[{n}] says {run.verdict!r}, and what it lists is {outcome.verdict!r}."
            )
    if repeated := len(outcomes) - len({(o.backend, o.case, o.dtype, o.seed) for o in outcomes}):
        raise ReportError(f"{path}: {repeated} of its runs are there twice.")
    return Report(
        outcomes,
        found.seed,
        found.seconds,
        found.strict,
        found.complete,
        {printable(name): promises for name, promises in found.declined.items()},
        {printable(name): _clean_value(x) for name, x in found.environment.items()},
        found.command and printable(found.command),
    )


def read_run(text: str) -> Outcome:
    """One outcome, of `json.run_as_json`.

    Raises:
        ValueError, RecursionError: it is none.
    """
    return msgspec.json.decode(text, type=_Run).read()


def _cell(text: str) -> float | None:
    """A number of a heat map, None where it is not finite."""
    if text == "-":
        return None
    x = float(text)
    if not 0 <= x < math.inf:
        raise ValueError(f"a cell of a heat map must be finite, 0 or more. Got {text}.")
    return x


def _clean_value(x: Value) -> Value:
    return printable(x) if isinstance(x, str) else list(_clean(x)) if isinstance(x, list) else x


def _clean(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(printable(text) for text in texts)
