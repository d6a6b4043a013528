"""What a terminal shows of a run while it goes on: how far it is, and what fails, once it is known."""

from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from heedful_crosscheck.run import Outcome

PACE = 600.0  # seconds; what is left is estimated by how long the questions of these took


class Shown:
    """A bar on stderr, and a line above it for each failure."""

    def __init__(self) -> None:
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left  {task.description}"),
            console=Console(stderr=True),
            transient=True,
            speed_estimate_period=PACE,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def progress(self, done: int, total: int, what: str) -> None:
        self._bar.update(self._task, completed=done, total=total, description=what)

    def known(self, outcome: Outcome) -> None:
        for failure in outcome.failures:
            line = Text.assemble(("✗ ", "bold red"), str(failure))
            self._bar.console.print(line, soft_wrap=True)
