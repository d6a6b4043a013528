"""What is said to be better or worse between two reports."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from heedful_crosscheck.cli import app
from heedful_crosscheck.report.changes import Changes
from reports import AGREES, LOSSY, WRONG, everything, ran, refused


def report(*outcomes, **more):
    return replace(everything(), outcomes=outcomes, **more)


def off_by(share, measure):
    """A judgement one of whose errors is this part of its limit."""
    errors = AGREES.errors._replace(**{measure: share * getattr(AGREES.limits, measure)})
    return replace(AGREES, errors=errors)


def changes(before, after):
    return Changes(report(*before), report(*after))


AGREED = ran("jax:mine", "full", out=AGREES)
LOST = ran("jax:mine", "full", out=LOSSY)
WAS_WRONG = ran("jax:mine", "full", out=WRONG)
REFUSED = refused("jax:mine", "full", "no more")
CRASHED = replace(ran("jax:mine", "full"), failures=WAS_WRONG.failures, crashed=True)


def test_nothing_changed():
    found = changes([AGREED], [AGREED])
    assert not found.worse and not found.verdicts and not found.errors and not found.environment
    assert "0 worse, 0 better, of 1 runs" in str(found)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (AGREED, LOST),
        (AGREED, REFUSED),
        (LOST, REFUSED),
        (REFUSED, WAS_WRONG),
        (REFUSED, CRASHED),
        (CRASHED, WAS_WRONG),
        (AGREED, WAS_WRONG),
    ],
)
def test_verdicts_have_an_order(better, worse):
    down, up = changes([better], [worse]), changes([worse], [better])
    assert [x.way for x in down.verdicts] == ["worse"] and down.worse
    assert [x.way for x in up.verdicts] == ["better"] and not up.worse
    assert f"was {better.verdict}, is {worse.verdict}" in str(down)


@pytest.mark.parametrize(
    ("measure", "before", "after", "counts"),
    [
        ("rms", 0.1, 0.41, True),  # more than 4 times it, and a quarter of the limit more
        ("rms", 0.1, 0.39, False),
        ("rms", 0.01, 0.25, False),
        ("rms", 0.0, 0.26, True),
        ("worst_row", 0.1, 0.51, True),
        ("worst_row", 0.1, 0.49, False),
        ("worst_row", 0.01, 0.25, False),
        ("projection", 0.2, 0.81, True),
        ("projection", 0.0, 0.49, False),
    ],
)
def test_an_error_counts_that_grows_by_more_than_noise(measure, before, after, counts):
    of = [[ran("jax:mine", "full", out=off_by(share, measure))] for share in (before, after)]
    there, back = changes(*of), changes(*of[::-1])
    assert [x.way for x in there.errors] == ["worse"] * counts and there.worse == counts
    assert [x.way for x in back.errors] == ["better"] * counts and not back.worse
    assert ("error of out grew from" in str(there)) == counts


def test_a_tensor_that_is_no_longer_there_is_worse():
    both, less = (
        ran("jax:mine", "full", **t) for t in ({"out": AGREES, "dq": AGREES}, {"out": AGREES})
    )
    less = replace(less, lacking={"gradients": ("none in this version",)})
    assert "has no dq any more: none in this version" in str(changes([both], [less]))
    assert changes([both], [less]).worse and not changes([less], [both]).worse


def test_a_run_that_is_no_longer_there_is_worse_and_a_new_one_is_not():
    new = ran("jax:mine", "causal", out=WRONG)
    gone = changes([AGREED, new], [AGREED])
    assert gone.worse and gone.only_before == [new] and "jax:mine: causal float32" in str(gone)
    added = changes([AGREED], [AGREED, new])
    assert not added.worse and added.only_after == [new]


def test_another_question_of_the_same_name_is_not_compared():
    other = replace(WAS_WRONG, lengths=(1, 1))
    found = changes([AGREED], [other])
    assert found.asked_differently == [other] and not found.pairs and not found.worse


def test_what_differs_stands_at_the_top_and_what_is_worse_comes_first():
    causal = ran("jax:mine", "causal", out=WRONG)
    before = report(AGREED, causal, environment={"jax": "0.10.2", "date": "2026-01-01"})
    mended = ran("jax:mine", "causal", out=AGREES)
    after = report(
        mended, WAS_WRONG, environment={"jax": "0.12.0", "date": "2026-02-01"}, complete=False
    )
    text = str(Changes(before, after))
    places = [text.find(x) for x in ("jax: 0.10.2 → 0.12.0", "ended early", "\nworse", "\nbetter")]
    assert places == sorted(places) and places[0] == 0, text
    assert "date" not in str(Changes(before, after))


def test_other_seeds_are_held_together_and_said():
    drawn = replace(AGREED, seed=7, inputs="cd34")
    found = Changes(report(AGREED, seed=0), report(drawn, seed=7))
    assert len(found.pairs) == 1 and found.environment == {"seed": (0, 7)}
    assert "1 runs have other numbers" in str(found)


def test_of_several_seeds_each_is_held_to_itself():
    runs = [replace(x, seed=seed) for x, seed in ((AGREED, 0), (WAS_WRONG, 1))]
    assert not changes(runs, runs).worse and len(changes(runs, runs).pairs) == 2
    assert changes(runs, runs[:1]).only_before == runs[1:]


@pytest.mark.parametrize(("after", "status"), [(AGREED, 0), (WAS_WRONG, 1)])
def test_the_exit_status_serves_ci(tmp_path, after, status):
    for name, outcome in (("before", AGREED), ("after", after)):
        (tmp_path / name).write_text(json.dumps(report(outcome).as_json()))
    files = [str(tmp_path / name) for name in ("before", "after")]
    assert CliRunner().invoke(app, ["compare", *files]).exit_code == status
    assert CliRunner().invoke(app, ["compare", files[0], str(tmp_path / "none")]).exit_code == 2
