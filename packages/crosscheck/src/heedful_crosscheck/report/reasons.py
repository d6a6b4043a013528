"""Why backends refused: reasons that are alike told once, and where they were given."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from heedful_crosscheck.report.model import Reason, Report
from heedful_crosscheck.run import Outcome

NAMED = 3  # cases of one group for which a reason was given; of more, how many. The JSON names them


@dataclass(frozen=True)
class Refusal:
    """What a backend says of why it was not run, or of what part of a run it has not.

    Attributes:
        where: in which of its runs, in words.
    """

    backend: str
    reason: str
    where: str


def told(report: Report) -> list[Refusal]:
    """By backend; reasons that are alike once."""
    found = []
    for reason in _alike(report.refusals):
        runs = report.by_backend[reason.backend]
        said = reason.reason
        if part := reason.part:  # of interest only where it was asked for and the rest was computed
            tensor = {"LSE": "lse", "gradients": "dq", "second derivatives": "d2q"}[part]
            runs = [o for o in runs if part in o.lacking or tensor in o.judgements]
            said = f"{part} alone: {said}"
        found.append(Refusal(reason.backend, said, _places(reason.outcomes, runs)))
    return found


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
