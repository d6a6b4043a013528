"""The plugin: an author's function, a test a case, with pytest's own options."""

import os
import subprocess
import sys

import pytest

from heedful_crosscheck.cases import select
from heedful_crosscheck.contract.cases import CASES
from heedful_pytest import heedful_contract

AUTHORS = """
import numpy as np
from heedful_crosscheck.contract.cases import CASES
from heedful_pytest import heedful_contract


def attend(q, k, v, causal=False):
    '''(B, S, H, D), top-left.'''
    s = np.einsum("bqhd,bkhd->bhqk", q, k) * q.dtype.type(q.shape[3] ** -0.5) * q.dtype.type({times})
    if causal:
        s = np.where(np.tri(*s.shape[2:], dtype=bool), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", p / p.sum(-1, keepdims=True), v)


test_mine = heedful_contract(
    attend, cases={cases}, dtypes=["float32"], layout="bshd", causal="top_left", takes=["causal"],
    declines=["hidden_nan", "empty_rows"], framework="numpy",
)
"""

FEW = """[case for case in CASES if case.name in (
        "basic: self attention", "causal: square", "top left: more queries", "mask: full",
    )]"""


@pytest.fixture
def tested(pytester):
    """Runs an author's tests, in this process, where JAX is."""

    def run(*options, times=1.0, cases=FEW):
        pytester.makepyfile(AUTHORS.format(times=times, cases=cases))
        plain = ("-p", "heedful_pytest", "-p", "no:cacheprovider", "-p", "no:xdist")
        return pytester.runpytest_inprocess(*plain, *options)

    return run


def test_each_case_that_it_takes_is_a_test(tested):
    result = tested("-v")
    result.assert_outcomes(passed=3)  # a mask it is not said to take
    result.stdout.fnmatch_lines(["*::test_mine?causal: square-float32? PASSED*"])
    tested("-k", "causal").assert_outcomes(passed=1, deselected=2)


def test_what_is_wrong_fails_and_says_where(tested):
    result = tested("-x", times=1.01)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["numpy:attend, *, float32: out is wrong: rms *; worst at *"])


def test_cases_are_fitted_and_those_of_a_quick_run_are_fewer(tested):
    cases = '["full", "*-00?", "*-17?"]'
    result = tested("-v", "--heedful-quick", "--heedful-seed=3", cases=cases)
    result.stdout.fnmatch_lines(["*::test_mine?full-float32? PASSED*", "*-fitted-float32? PASSED*"])
    found = result.parseoutcomes()
    assert "failed" not in found and found["passed"] > 5
    assert "combination-17" not in result.stdout.str()


def test_what_is_declined_is_skipped_with_the_reason():
    def attend(q, k, v, mask=None):
        raise AssertionError("nobody calls it")

    cases = select(["mask: some rows hidden"], CASES)
    described = {"takes": ["mask"], "declines": ["empty_rows"], "framework": "numpy"}
    contract = heedful_contract(attend, cases=cases, **described).heedful_contract
    (asked,) = contract.asked(quick=False)
    with pytest.raises(pytest.skip.Exception, match="declines empty_rows: a query sees no key"):
        contract.check(*asked, seed=0)


def test_the_plugin_imports_nothing_before_it_is_used():
    code = "import sys, heedful_pytest; print({'jax', 'numpy', 'heedful'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout == "set()\n"
