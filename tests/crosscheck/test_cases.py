"""Cases are data: what is pickled and read again asks the same."""

import pickle

import numpy as np
import pytest

from heedful_crosscheck.cases import everything


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
    assert again == case or case.group == "minilm"  # arrays of a file are equal to themselves alone
