"""Cases are data: what is pickled and read again asks the same."""

import pickle
from collections import Counter

import numpy as np
import pytest
from typer.testing import CliRunner

from heedful_crosscheck import cli
from heedful_crosscheck.cases import ACTIVATIONS, everything, hard
from heedful_crosscheck.question import Question


@pytest.mark.parametrize("case", everything(), ids=lambda case: case.name)
def test_a_case_can_be_handed_to_another_process(case):
    again = pickle.loads(pickle.dumps(case))
    dtype = case.dtype or "float32"
    ours, theirs = case.inputs(1, dtype), again.inputs(1, dtype)
    for name in "qkv":
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.options.keys() == theirs.options.keys()
    for name, x in ours.options.items():
        np.testing.assert_array_equal(x, theirs.options[name])
    assert (
        again == case or case.group in ACTIVATIONS
    )  # arrays of a file are equal to themselves alone


def test_every_case_has_a_name_of_its_own_and_says_why_it_is_there():
    cases = everything()
    assert max(Counter(case.name for case in cases).values()) == 1
    assert all(case.description for case in cases)


@pytest.mark.parametrize("case", hard(), ids=lambda case: case.name)
def test_a_hard_case_can_be_judged_at_any_seed(case):
    for dtype in case.usual if case.dtype is None else (case.dtype,):
        for seed in range(2):
            Question.of(case, seed, dtype).check_range()


def test_the_lengths_are_one_less_and_one_more_than_those_of_tiles():
    cases = [case for case in hard() if case.name.startswith("tiles-")]
    lengths = {n for case in cases for n in case.make.sizes.scores[2:]}
    assert lengths >= {n + off for n in (16, 32, 64, 128, 256) for off in (-1, 1)}


def test_the_command_lists_cases_and_why():
    result = CliRunner().invoke(cli.app, ["cases", "one-hot", "smollm2", "combination-001"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "one-hot float32, bfloat16 one key has all weight" in said
    assert "smollm2-layer15" in said and "combination-001" in said
    assert CliRunner().invoke(cli.app, ["cases", "nope"]).exit_code == cli.COULD_NOT_RUN
