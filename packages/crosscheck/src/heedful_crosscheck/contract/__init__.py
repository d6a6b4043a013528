"""The contract, as a test class for anyone's backend.

A backend's test is a subclass that names it, beside which the backend is registered:

    from heedful_crosscheck.contract import Contract

    class TestMine(Contract):
        backend = "jax:mine"
        accepts = {"basic", "heads", "causal", "lse"}

Each case of `contract.cases`, and some random combinations of what the crosscheck's table combines, is
either refused, with the same reasons from `explain` and from the call, or computed, and then judged as
the crosscheck judges: out, lse and every gradient against the float64 oracle, with NaN and inf in every
key that no query sees. Groups of cases listed in `accepts` may not be refused.

The environment variable HEEDFUL_REQUIRE_BACKENDS, names separated by commas, says which backends a run
is about: one not named is left out, one named that cannot run here fails. Without it, a
backend that cannot run here is skipped, and the skip says why; one that `needs_gpu` runs by `-m gpu`.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from typing import Any

import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import heedful
from heedful_crosscheck.ask import Asked, float64_where_asked, framework, why_left_out
from heedful_crosscheck.callers import QUICKLY, Caller, Identity, JaxCaller, caller_of
from heedful_crosscheck.cases import Case, of_row
from heedful_crosscheck.combinations import description, is_possible
from heedful_crosscheck.contract.cases import CASES, EVERYTHING, FORMS, case
from heedful_crosscheck.factors import FACTORS, OPTIONS, Row
from heedful_crosscheck.files import InputError
from heedful_crosscheck.question import Question
from heedful_crosscheck.respondent import Here
from heedful_crosscheck.run import COPIED, outcome

_required = os.environ.get("HEEDFUL_REQUIRE_BACKENDS")
REQUIRED = None if _required is None else {name.strip() for name in _required.split(",")}

# What a random combination varies; lengths that cost time are the crosscheck's.
SHORT = {"lengths": ("70x133", "70x70", "133x70", "64x64", "3x5", "1x1", "1x133")}
VARIED = tuple(name for name in FACTORS if name not in ("caller", "return_lse"))


@st.composite
def rows(draw: st.DrawFn, varied: Sequence[str] = VARIED) -> Row:
    """Up to six of some factors that are not at their plainest, and possible together."""
    odd = draw(st.sets(st.sampled_from(varied), max_size=6))
    row: dict[str, str] = {}
    for name, values in FACTORS.items():
        every = SHORT.get(name, tuple(values))
        wanted = every if name in odd else every[:1]
        fitting = [x for x in wanted if is_possible(row | {name: x})]
        fitting = fitting or [x for x in every if is_possible(row | {name: x})]
        assume(fitting)
        row[name] = draw(st.sampled_from(fitting))
    return row


def _taken(takes: Collection[str]) -> list[str]:
    """Of the factors to vary, those that a backend does not refuse whatever their value is."""
    options = {
        factor: {
            name for x in values.values() for name in (x if isinstance(x, Mapping) else [factor])
        }
        for factor, values in FACTORS.items()
        if factor in OPTIONS and factor != "layout"  # which is no backend's business
    }
    return [name for name in VARIED if options.get(name, set()) <= set(takes)]


class Contract:
    """Subclass it and name the backend.

    Attributes:
        backend: its name.
        caller: whose arrays call; None: its own framework's, JAX's compiled in a hurry.
        accepts: groups of which no case may be refused, "lse" and "gradients".
        cases: which cases it is asked.
        strict: whether it may lose no more digits than honest arithmetic does; otherwise as many as
            kernels of the flash family must.
    """

    backend: str
    caller: Caller | None = None
    accepts: AbstractSet[str] = EVERYTHING
    cases: Sequence[Case] = CASES + FORMS
    strict = False
    pytestmark: Any
    test_any_combination: Any
    __test__: bool

    def __init_subclass__(cls, examples: int = 10, needs_gpu: bool = False) -> None:
        """Says how many random combinations it is asked, and whether it runs by `-m gpu` alone."""
        super().__init_subclass__()
        of_random_rows = given(data=st.data())(_any_combination)
        cls.test_any_combination = settings(
            max_examples=examples, phases=[Phase.generate], deadline=None
        )(of_random_rows)
        if not hasattr(cls, "backend"):  # what several have in common
            return
        is_required = cls.backend in (REQUIRED or ())
        if REQUIRED is not None and not is_required:
            cls.__test__ = False
        marks = [pytest.mark.filterwarnings(f"ignore:{COPIED}:UserWarning")]
        if needs_gpu and not is_required:
            marks.append(pytest.mark.gpu)
        own = cls.__dict__.get("pytestmark", [])
        cls.pytestmark = [*marks, *(own if isinstance(own, list) else [own])]

    @pytest.fixture(autouse=True)
    def runs_here(self) -> None:
        """Skips the class where its backend cannot run, or fails where it is required."""
        try:
            identity = Identity(heedful.backends()[self.backend])
            why = _why_unable(identity, self.backend, self._asking)
        except LookupError as missing:
            why = f"it is no backend here: {missing}"
        if why:
            if self.backend in (REQUIRED or ()):
                pytest.fail(f"{self.backend} is required and cannot run here: {why}")
            # It runs in a session of its own, which names it in REQUIRED.
            pytest.skip(f"{self.backend} cannot run here: {why}")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Makes a test of each case."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=lambda case: case.name)

    def test_agrees_or_refuses(self, case: Case) -> None:
        """One case: refused, or right."""
        question = self._question(case)
        if why := why_left_out(self.backend, question.problem):
            pytest.skip(why)
        self._check(question)

    @property
    def _asking(self) -> Caller:
        if self.caller is not None:
            return self.caller
        own = framework(self.backend)
        return JaxCaller(QUICKLY) if own == "jax" else caller_of(own)

    def _question(self, case: Case) -> Question:
        question = Question.of(case, 0, case.dtype or "float32", self._asking)
        question.check_range()
        return question

    def _check(self, question: Question) -> None:
        case = question.case
        found = outcome(Here(self.backend), question)
        said = found.failures + (found.losses if self.strict else ())
        assert not said, "\n".join(map(str, said))
        if found.reasons:
            assert case.group not in self.accepts, found.reasons
        if "LSE" in found.lacking:
            assert "lse" not in self.accepts, found.lacking["LSE"]
        for why in found.lacking.get("gradients", ()):
            assert "gradients" not in self.accepts, why
            _check_not_differentiated(Asked(self.backend, question, question.inputs, False), why)
        if reasons := found.reasons or found.lacking.get("LSE", ()):
            _check_said_alike(self.backend, question, not found.reasons, reasons)


def _any_combination(self: Contract, data: st.DataObject) -> None:
    takes = getattr(heedful.backends()[self.backend], "takes", ())
    row = data.draw(rows(_taken(takes)))
    try:
        question = self._question(
            Case(name=f"random: {description(row)}", group="random", **of_row(row))
        )
    except InputError:  # its numbers leave its dtype
        assume(False)
    assume(why_left_out(self.backend, question.problem) is None)
    self._check(question)


# Calls as plain as can be: a backend that runs here takes one of them.
PLAINEST = [
    case("basic", f"plainest, {D}", dtype, Sq=8, Sk=8, D=D, Dv=D)
    for dtype in ("float32", "bfloat16", "float16", "float64")
    for D in (8, 64)
]


@cache
def _why_unable(backend: Identity, name: str, caller: Caller) -> str | None:
    """Why the backend refuses even the plainest calls; None where it takes one."""
    reasons: dict[str, None] = {}
    for plainest in PLAINEST:
        question = Question.of(plainest, 0, plainest.dtype or "", caller)
        with float64_where_asked(question.dtype):
            said = _explained(Asked(name, question, question.inputs, with_lse=False))
        if not said:
            return None
        reasons |= dict.fromkeys(said)
    return "; ".join(reasons)


def _explained(asked: Asked) -> tuple[str, ...]:
    explanation = heedful.explain(**asked.primals, **asked.constants, **asked.options)
    return next(v.reasons for v in explanation.verdicts if v.name == asked.backend)


def _check_not_differentiated(asked: Asked, why: str) -> None:
    """That who tries is told, and gets no zeros."""
    if asked.caller.framework == "numpy":  # which differentiates nothing
        return
    with float64_where_asked(asked.question.dtype), pytest.raises(Exception, match=re.escape(why)):
        asked.caller.pull_back(asked.attend, asked.primals, asked.constants, asked.cotangents())


def _check_said_alike(
    backend: str, question: Question, with_lse: bool, reasons: tuple[str, ...]
) -> None:
    """That `explain` and the call give the reasons that were found."""
    with float64_where_asked(question.dtype):
        asked = Asked(backend, question, question.inputs, with_lse)
        assert _explained(asked) == reasons
        call: Any = {**asked.primals, **asked.constants, **asked.options, "backend": backend}
        with pytest.raises(heedful.Refusal) as refusal:
            heedful.attention(**call)
    assert refusal.value.reasons == {backend: reasons}
