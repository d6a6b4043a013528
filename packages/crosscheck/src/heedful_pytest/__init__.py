"""pytest's plugin: an attention function's contract as tests of its author's repository, one a case.

    from heedful_pytest import heedful_contract

    test_attend = heedful_contract(attend, layout="bshd", causal="top_left", takes=["causal", "gqa"])

A package of its own, since pytest imports it in every run where it is installed: it imports neither JAX
nor `heedful_crosscheck` before a contract is there, so that what a conftest.py sets for them counts.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from heedful_crosscheck import Case
    from heedful_crosscheck.function_backend import FunctionBackend

__all__ = ["heedful_contract"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--heedful-quick`, `--heedful-seed`."""
    group = parser.getgroup("heedful", "attention functions, held to heedful's contract")
    group.addoption(
        "--heedful-quick", action="store_true", help="fewer cases: the table's best rows alone"
    )
    group.addoption(
        "--heedful-seed", type=int, default=0, metavar="N", help="of inputs and cotangents"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes a test of each case that the function is said to take."""
    contract = getattr(metafunc.function, "heedful_contract", None)
    if contract is not None:
        asked = contract.asked(metafunc.config.getoption("heedful_quick"))
        ids = [f"{case.name}-{dtype}" for case, dtype in asked]
        metafunc.parametrize("heedful_case", asked, ids=ids)


def heedful_contract(
    function: Callable[..., Any],
    *,
    cases: "Sequence[Case | str] | None" = None,
    dtypes: Sequence[str] | None = None,
    strict: bool = False,
    **conventions: Any,
) -> Callable[..., None]:
    """A test function to be given a name: each case that the function takes is a test of its own.

    What the function is not said to take is not asked; what it is said to take must be right. A case in
    which it would have to keep a promise that it declines is skipped.

    Args:
        function: an attention function, or a `heedful_crosscheck.Function`.
        cases, dtypes, strict: as of `heedful_crosscheck.crosscheck`.
        conventions: what the function calls things, as of `heedful_crosscheck.Function`.

    Raises:
        TypeError, ValueError: a description that cannot be.
    """
    from heedful_crosscheck import Function
    from heedful_crosscheck.run import COPIED

    described = function if isinstance(function, Function) else Function(function, **conventions)
    contract = _Contract(described, cases, dtypes, strict)

    @pytest.mark.filterwarnings(f"ignore:{COPIED}:UserWarning")
    def test(heedful_case: "tuple[Case, str]", pytestconfig: pytest.Config) -> None:
        contract.check(*heedful_case, pytestconfig.getoption("heedful_seed"))

    test.heedful_contract = contract  # type: ignore[attr-defined]  # for the hook below
    return test


class _Contract:
    """What a function is asked, and how it is judged."""

    def __init__(
        self,
        function: Any,
        cases: "Sequence[Case | str] | None",
        dtypes: Sequence[str] | None,
        strict: bool,
    ):
        self.function, self.cases, self.dtypes, self.strict = function, cases, dtypes, strict
        self._backend: FunctionBackend | None = None

    @property
    def backend(self) -> "FunctionBackend":
        from heedful_crosscheck.function_backend import backend_of

        if self._backend is None:
            self._backend = backend_of(self.function)
        return self._backend

    def asked(self, quick: bool) -> "list[tuple[Case, str]]":
        """The cases that it takes, each in its dtypes."""
        import heedful_crosscheck as judge
        from heedful_crosscheck.fitting import fitted, takes
        from heedful_crosscheck.run import dtypes_of

        chosen = judge.chosen_cases(self.cases)
        if quick:
            few = {case.name for case in judge.quick()}
            own = self.cases is not None  # a quick run leaves out combinations of them alone
            chosen = [x for x in chosen if x.name in few or (own and x.row is None)]
        return [
            (case, dtype)
            for case in fitted(self.backend, chosen, self.dtypes)
            for dtype in dtypes_of(case, self.dtypes)
            if takes(self.backend, case, dtype)
        ]

    def check(self, case: "Case", dtype: str, seed: int) -> None:
        from heedful_crosscheck import InputError
        from heedful_crosscheck.callers import QUICKLY, JaxCaller, caller_of
        from heedful_crosscheck.function_backend import registered
        from heedful_crosscheck.question import Question
        from heedful_crosscheck.respondent import Here
        from heedful_crosscheck.run import outcome

        framework = self.backend.framework
        caller = JaxCaller(QUICKLY) if framework == "jax" else caller_of(framework)
        try:
            question = Question.of(case, seed, dtype, caller, self.backend.declines)
            question.check_range()
        except InputError as error:  # honest arithmetic overflows too
            pytest.skip(str(error))
        if question.unpromised:
            pytest.skip(question.unpromised)
        with registered(self.backend) as name:
            found = outcome(Here(name), question)
        if found.reasons:
            pytest.skip("; ".join(found.reasons))
        said = found.failures + (found.losses if self.strict else ())
        if said:
            pytest.fail("\n".join(map(str, said)), pytrace=False)
