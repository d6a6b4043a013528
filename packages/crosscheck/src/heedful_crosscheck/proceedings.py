"""From inquiries to a report, which is what is known by then where the run is ended from outside."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from heedful_crosscheck.report import Report
from heedful_crosscheck.report.environment import environment
from heedful_crosscheck.run import WORKERS, Inquiry, Key, Outcome, Progress, collect_outcomes


class Interrupted(KeyboardInterrupt):
    """The run was ended from outside.

    Attributes:
        report: what is known so far.
    """

    def __init__(self, report: Report):
        super().__init__(report)
        self.report = report


def proceed(
    inquiries: Sequence[Inquiry],
    *,
    strict: bool = False,
    declined: Mapping[str, tuple[str, ...]] | None = None,
    jobs: int = WORKERS,
    progress: Progress | None = None,
    known: Sequence[Callable[[Outcome], None]] = (),
    before: Sequence[Outcome] = (),
    environment: Callable[[], Mapping[str, Any]] = environment,
) -> Report:
    """Collects all outcomes, and reports them.

    Args:
        inquiries: who is asked what.
        strict: whether `lossy` counts as disagreement.
        declined: of each function that is judged, which promises it declined.
        jobs: how many backends compute at once.
        progress: called with (done, total, what comes next).
        known: each of them is told each outcome as soon as it is one.
        before: what is known from a run that was stopped, and is not asked again.
        environment: what it ran on, once it has.

    Raises:
        Interrupted: a KeyboardInterrupt came; it has the report so far.
    """
    started = time.perf_counter()
    outcomes = list(before)

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        for told in known:
            told(outcome)

    def report(complete: bool) -> Report:
        seconds = time.perf_counter() - started
        seed = min((seed for inquiry in inquiries for seed in inquiry.seeds), default=0)
        facts = strict, complete, declined or {}, environment()
        return Report(tuple(outcomes), seed, seconds, *facts)

    answered = {Key(o.backend, o.case, o.dtype, o.seed) for o in before}
    try:
        collect_outcomes(inquiries, tell, jobs, progress, answered)
    except KeyboardInterrupt as end:
        raise Interrupted(report(complete=False)) from end
    return report(complete=True)
