"""What a run knows, line by line, so that one that is stopped goes on: JSON, never pickle.

The first line says of what run it is, each other one is an outcome. A last line that was not written to
its end is left out.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from heedful_crosscheck.files import InputError, whole
from heedful_crosscheck.report.json import run_as_json
from heedful_crosscheck.report.saved import read_run
from heedful_crosscheck.run import Inquiry, Outcome

FORMAT = "heedful journal 1"
MOST = 2**31  # bytes of a journal that is read


class Journal:
    """A file that outcomes are added to, each as soon as it is known."""

    def __init__(self, path: Path, of: Mapping[str, Any]):
        self._file = path.open("w")
        self._write(of)

    def add(self, outcome: Outcome) -> None:
        self._write(run_as_json(outcome))

    def close(self) -> None:
        self._file.close()

    def _write(self, facts: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(facts) + "\n")
        self._file.flush()


@contextmanager
def kept(
    path: Path | None, resume: bool, inquiries: Sequence[Inquiry]
) -> Iterator[tuple[list[Outcome], Callable[[Outcome], None]]]:
    """What is known already, and where to say what is known since; the file is gone when all is known.

    Args:
        path: of the journal; None: none is kept.
        resume: whether to go on with what is there.
        inquiries: what the run asks.

    Raises:
        InputError: there is none to resume, it is malformed, or it is of another run: which versions,
            seeds, backends or cases differ.
    """
    if path is None:
        if resume:
            raise InputError("--resume needs --json to be a file: the journal stands beside it.")
        yield [], lambda _: None
        return
    of = _facts(inquiries)
    before = _resumed(path, of, inquiries) if resume else []
    journal = Journal(path, of)
    for outcome in before:
        journal.add(outcome)
    try:
        yield before, journal.add
    except BaseException:  # what is known stays, whatever ends the run
        journal.close()
        raise
    journal.close()
    path.unlink()


def _resumed(path: Path, of: Mapping[str, Any], inquiries: Sequence[Inquiry]) -> list[Outcome]:
    """What was known."""
    first, *lines = _lines(path)
    _check_same(path, _json(path, first), of)
    outcomes = [_outcome(path, line) for line in lines]
    _check_inputs(path, outcomes, inquiries)
    return outcomes


def _facts(inquiries: Sequence[Inquiry]) -> dict[str, Any]:
    """Of what run a journal is."""
    return {
        "format": FORMAT,
        "versions": _versions(),
        "seeds": sorted({seed for inquiry in inquiries for seed in inquiry.seeds}),
        "backends": [name for inquiry in inquiries for name in inquiry.respondents],
        "declines": sorted({name for inquiry in inquiries for name in inquiry.declines}),
        "cases": [
            f"{case.name} {dtype}" for inquiry in inquiries for case, dtype, _ in inquiry.questions
        ],
    }


def _versions() -> dict[str, str]:
    """Of Python, of what brings backends, and of what computes; what runs beneath them."""
    needed = {"heedful", "heedful-crosscheck", "jax", "jaxlib", "numpy", "torch"}
    needed |= {point.dist.name for point in entry_points(group="heedful.backends") if point.dist}
    found = {}
    for name in sorted(needed):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def _lines(path: Path) -> list[str]:
    """The lines that were written to their end."""
    try:
        *lines, _ = whole(path, MOST).decode().split("\n")
    except FileNotFoundError:
        raise InputError(
            f"there is no {path}: no run that was stopped. Leave --resume out."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not lines:
        raise InputError(f"{path} is empty. Leave --resume out.")
    return lines


def _json(path: Path, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no journal of heedful's: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is no journal of heedful's: a line is {line[:40]!r}.")
    return found


def _outcome(path: Path, line: str) -> Outcome:
    try:
        return read_run(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has a line that is no outcome: {error}") from error


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if before.get("format") != FORMAT:
        raise InputError(f"{path} is no {FORMAT!r}. Got {before.get('format')!r}.")
    differ = [_difference(of, before.get(of), now[of]) for of in now if before.get(of) != now[of]]
    if differ:
        raise InputError(
            f"{path} is of another run, and cannot be resumed: {'; '.join(differ)}. Run it as it was, "
            "or leave --resume out."
        )


def _difference(of: str, before: Any, now: Any) -> str:
    """What differs, in words: of mappings and lists what is not in both."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        return "; ".join(f"{n} was {before.get(n)}, and is {now.get(n)}" for n in names)
    if of == "cases" and isinstance(before, list):
        only = [
            sorted(set(map(str, x)) - set(map(str, y))) for x, y in ((before, now), (now, before))
        ]
        parts = zip(("without", "with"), reversed(only), strict=True)
        return f"{of} differ: it was " + ", ".join(f"{how} {_few(x)}" for how, x in parts if x)
    return f"{of} were {before}, and are {now}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_inputs(path: Path, outcomes: Sequence[Outcome], inquiries: Sequence[Inquiry]) -> None:
    """That what was asked is what would be asked now."""
    fingerprints = {(o.case, o.dtype, o.seed): o.inputs for o in outcomes if o.inputs}
    for inquiry in inquiries:
        for case, dtype, seed in inquiry.questions:
            asked = fingerprints.get((case.name, dtype, seed))
            if asked is not None and asked != case.inputs(seed, dtype).fingerprint:
                raise InputError(
                    f"{path} is of another run, and cannot be resumed: the inputs of {case.name} in "
                    f"{dtype} are others than they were. Leave --resume out."
                )
