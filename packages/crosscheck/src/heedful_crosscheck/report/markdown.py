"""A report for a pull request: the verdict, who and where, and as many failures as a comment holds."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from heedful_crosscheck.report.model import MARKS, Report, Row, printable

LIMIT = 65536  # characters of a comment on GitHub
RESERVED = 500  # of these for what is said behind the failures
SHOWN = 8  # runs of each backend that are wrong, and as many that are lossy
WORDS = {"failures": "failed", "losses": "lossy"}

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&])")


def render(report: Report) -> str:
    """GitHub's Markdown, LIMIT characters at most."""
    mark = MARKS["agree" if report.agree else report.verdict]
    text = f"### {mark} heedful crosscheck: {report.headline}\n\n{_escaped(', '.join(report.facts))}\n\n"
    text += _table(report)
    for addition in (_matrix(report), *_failures(report)):
        if len(text) + len(addition) > LIMIT - RESERVED:
            return text + "\nThe rest does not fit; the JSON and the HTML have all.\n"
        text += addition
    return text


def _table(report: Report) -> str:
    rows, told = [], report.told_verdicts
    for name, outcomes in report.by_backend.items():
        counts = Counter(o.verdict for o in outcomes)
        verdict = report.verdicts[name]
        said = f"{MARKS[verdict]} {verdict}"
        rows.append([_escaped(name), said, *(str(counts[v] or "") for v in told)])
    return _rows(["backend", "verdict", *told], rows)


def _matrix(report: Report) -> str:
    """Backend and dtype by case group, folded."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in report.rows:
        found.setdefault((row.backend, row.dtype), {})[row.group] = row
    rows = [
        [_escaped(backend), dtype, *(_cell(of.get(group)) for group in report.groups)]
        for (backend, dtype), of in found.items()
    ]
    table = _rows(["backend", "dtype", *map(_escaped, report.groups)], rows)
    return f"\n<details><summary>Case by case</summary>\n\n{table}\n</details>\n"


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{MARKS[row.verdict]} {row.count}"


def _failures(report: Report) -> Iterable[str]:
    for name, outcomes in report.by_backend.items():
        for what in ("failures", "losses"):
            found = [(o, getattr(o, what)) for o in outcomes if getattr(o, what)]
            if found:
                share = f"{len(found)} of {len(outcomes)}"
                yield f"\n**{_escaped(name)}: {WORDS[what]} in {share} runs**\n\n"
            for outcome, (first, *others) in found[:SHOWN]:
                asked = f" ({outcome.description})" if outcome.description else ""
                also = f"; also {', '.join(str(f.tensor) for f in others)}" if others else ""
                said = f"{outcome.case}, {report.asked(outcome)}: {first.said}{also}{asked}"
                yield f"- {_escaped(said)}\n"
            if len(found) > SHOWN:
                yield f"- and {len(found) - SHOWN} more\n"


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(text: str) -> str:
    """Text that stays text on one line: no markup, no cell's end, nobody mentioned."""
    line = " ".join(printable(text).split())
    return _SPECIAL.sub(r"\\\1", line).replace("@", "@\u2060")
