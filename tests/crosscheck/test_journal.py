"""A run that is stopped goes on where it was, and only as the run that it was."""

import json
from dataclasses import replace

import pytest

from heedful_crosscheck import InputError, Interrupted, chosen_cases, journal
from heedful_crosscheck.inquiries import in_full
from heedful_crosscheck.proceedings import proceed
from heedful_crosscheck.respondent import Here
from heedful_crosscheck.run import Inquiry

CASES = chosen_cases(["tiny", "one-key", "combination-009"])
INQUIRY = Inquiry({"numpy:oracle": [Here("numpy:oracle")]}, CASES, None, [3])


def run(path, inquiry=INQUIRY, resume=False, ended_after=None):
    """The report, and how many outcomes were known before and were found."""
    found = []
    with journal.kept(path, resume, [inquiry]) as (before, add):

        def known(outcome):
            add(outcome)
            found.append(outcome)
            if len(found) == ended_after:
                raise KeyboardInterrupt

        return proceed([inquiry], known=[known], before=before), len(before), len(found)


@pytest.fixture
def stopped(tmp_path):
    """The journal of a run that was stopped after two outcomes, and while it wrote a third."""
    path = tmp_path / "report.json.journal"
    with pytest.raises(Interrupted) as interrupted:
        run(path, ended_after=2)
    assert not interrupted.value.report.complete
    with path.open("a") as file:
        file.write('{"backend": "numpy:ora')
    return path


def test_what_is_known_is_not_asked_again_and_the_report_is_as_if_it_had_not_stopped(stopped):
    resumed, before, found = run(stopped, resume=True)
    assert 2 <= before < 5 and before + found == 5
    assert not stopped.exists()
    whole, _, _ = run(stopped)
    untimed = [[replace(o, seconds=0.0) for o in report.outcomes] for report in (resumed, whole)]
    assert untimed[0] == untimed[1]
    assert resumed.complete and resumed.agree and resumed.seed == 3


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seeds": [4]}, r"seeds were \[3\], and are \[4\]"),
        ({"cases": CASES[:2]}, "cases differ: it was with combination-009 "),
        ({"cases": [*CASES, *chosen_cases(["full"])]}, "without full bfloat16, full float32"),
        ({"respondents": {"jax:plain": [Here("jax:plain")]}}, "backends were .*oracle.* and are"),
        ({"cases": [replace(CASES[0], make=CASES[1].make), *CASES[1:]]}, "inputs of tiny in"),
    ],
)  # fmt: skip
def test_another_run_is_refused_and_what_differs_is_said(stopped, changed, says):
    before = stopped.read_bytes()
    with pytest.raises(InputError, match=says):
        run(stopped, replace(INQUIRY, **changed), resume=True)
    assert stopped.read_bytes() == before


def changed_line(number, line):
    return lambda lines: [*lines[:number], line(lines[number]), *lines[number + 1 :]]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda lines: [""], "is empty|no journal"),
        (changed_line(0, lambda _: "[]"), "no journal of heedful's"),
        (changed_line(0, lambda _: '{"format": 1}'), "is no 'heedful journal 1'"),
        (
            changed_line(0, lambda x: x.replace('"numpy": "', '"numpy": "0.')),
            "numpy was 0.*, and is",
        ),
        (changed_line(1, lambda _: "[" * 10**5), "no outcome"),
        (changed_line(1, lambda x: x.replace('"case"', '"cas"')), "no outcome"),
        (changed_line(2, lambda x: json.dumps(json.loads(x) | {"seconds": "long"})), "no outcome"),
    ],
)
def test_a_malformed_journal_is_one_clear_error(stopped, changed, says):
    stopped.write_text("\n".join(changed(stopped.read_text().split("\n"))))
    with pytest.raises(InputError, match=says):
        run(stopped, resume=True)


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(InputError, match="no run that was stopped"):
        run(tmp_path / "none", resume=True)
    with pytest.raises(InputError, match="--resume needs --json to be a file"):
        run(None, resume=True)


def test_a_full_run_asks_every_case_in_every_dtype_that_it_is_possible_in_by_three_seeds():
    questions = in_full(INQUIRY).questions
    assert {(case.name, seed) for case, _, seed in questions} == {
        (case.name, seed) for case in CASES for seed in (3, 4, 5)
    }
    assert sum(case.name == "tiny" for case, _, _ in questions) == 4 * 3
