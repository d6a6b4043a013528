"""The test class that ships: what it holds an author's backend to."""

import pytest

import heedful
from heedful_crosscheck.contract import REQUIRED

MINE = """
import heedful
from heedful.backends.jax_plain import PlainBackend
from heedful_crosscheck.callers import QUICKLY, JaxCaller
from heedful_crosscheck.contract import Contract
from heedful_crosscheck.contract.cases import CASES

FEW = [case for case in CASES if case.name in (
    "basic: cross attention", "causal: square", "softcap: tight", "mask: some rows hidden",
)]


class Mine(PlainBackend):
    name = "jax:mine"
    {body}


heedful.register(Mine())


class TestMine(Contract, examples=1):
    backend = "jax:mine"
    cases = FEW
    {contract}
"""


@pytest.fixture
def tested(pytester):
    """Runs an author's test, the backend's body and the class's given; in this process, where JAX is."""
    assert REQUIRED is None  # which would leave the author's backend out

    def run(
        body="pass", contract="pass", only="agrees_or_refuses", how=pytester.runpytest_inprocess
    ):
        pytester.makepyfile(MINE.format(body=body, contract=contract))
        try:
            return how("-p", "no:cacheprovider", "-k", only)
        finally:
            if "jax:mine" in heedful.backends():
                heedful.unregister("jax:mine")

    return run


def test_a_right_backend_passes(tested):
    tested(only="").assert_outcomes(passed=5)


def test_a_wrong_gradient_fails_and_says_which(tested):
    result = tested("""
    def run(self, problem, operands):
        out, lse = super().run(problem, operands)
        if problem.softcap:
            import jax
            lse = jax.lax.stop_gradient(lse)
        return out, lse
    """)
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*jax:mine, softcap: tight, float32: d[qk]*LSE*"])


def test_nan_that_nobody_sees_may_not_come_through(tested):
    result = tested("""
    def run(self, problem, operands):
        out, lse = super().run(problem, operands)
        return out + 0 * operands.q[..., :1], lse
    """)
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*mask: some rows hidden*"])


def test_what_it_accepts_it_may_not_refuse(tested):
    refusing = """takes = PlainBackend.takes - {"softcap"}"""
    tested(refusing, """accepts = {"basic", "causal"}""").assert_outcomes(passed=4)
    result = tested(refusing, """accepts = {"basic", "softcap"}""")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*softcap*"])


def test_a_backend_that_cannot_run_is_skipped_and_says_why(tested, monkeypatch, pytester):
    unable = """
    def reasons(self, problem):
        return ("needs a machine of its own",)
    """
    tested(unable).assert_outcomes(skipped=4)
    monkeypatch.setenv("HEEDFUL_REQUIRE_BACKENDS", "jax:mine")
    result = tested(unable, how=pytester.runpytest_subprocess)  # it is read when it is imported
    result.assert_outcomes(errors=4)
    result.stdout.fnmatch_lines(["*jax:mine is required and cannot run here: needs a machine*"])
