"""Asks every backend every question, and has the answers judged."""

import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from threading import Lock, current_thread, main_thread
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # has no types

import heedful
from heedful.dispatch.registry import in_a_line
from heedful.results import WrongResult
from heedful_crosscheck.ask import (
    Refused,
    about,
    ask,
    ask_second,
    float64_where_asked,
    framework,
)
from heedful_crosscheck.callers import caller_of
from heedful_crosscheck.cases import Case
from heedful_crosscheck.files import InputError
from heedful_crosscheck.location import HeatMap
from heedful_crosscheck.question import Question
from heedful_crosscheck.second import directions, is_refusal, judge_second, right
from heedful_crosscheck.tolerance import Judgement, Standard
from heedful_crosscheck.yardstick import Tensors

DTYPES = ("float32", "bfloat16", "float16", "float64")

# Most of the time goes into XLA's compilations, which leave Python's lock alone: JAX backends run side
# by side. torch chooses its SDPA kernel for the whole process, so what calls torch runs one at a time.
WORKERS = min(os.cpu_count() or 1, 4)
_one_at_a_time = Lock()
# Questions are asked before the ones ahead of them are answered, so that nobody waits for a compilation
# of somebody else; each holds its inputs and what is right, so that this is for small ones.
AHEAD, SMALL = 2, 2**22

# What bridges warn of: here arrays lie oddly on purpose.
COPIED = ".*(to_jax|was) copied"

Progress = Callable[[int, int, str], None]
Fault = tuple[str | None, str]  # the tensor, None for an exception, and what is wrong


@dataclass(frozen=True)
class Failure:
    """One thing that one backend got wrong, or, among `losses`, lost more digits of than it had to.

    Attributes:
        tensor: "out", "lse", or "dq" and so on; None where the backend raised.
        message: what, where and by how much.
        description: of the case, where its name does not say what is asked.
        heat: where the error is; None where nothing was measured.
    """

    backend: str
    case: str
    dtype: str
    tensor: str | None
    message: str
    description: str = ""
    heat: HeatMap | None = None

    def __str__(self) -> str:
        asked = f" ({self.description})" if self.description else ""
        return f"{self.backend}, {self.case}, {self.dtype}: {self.message}{asked}"


@dataclass(frozen=True)
class Outcome:
    """What came of one backend on one case in one dtype.

    Attributes:
        reasons: why it was not run; empty where it was.
        lacking: what of "LSE", "gradients" and "second derivatives" it has not, and why; the rest was
            judged without.
        judgements: by tensor.
        failures: what is wrong; empty where the backend agrees or is lossy.
        losses: what is lossy, as `tolerance` says; empty where the backend agrees.
        seconds: of the first answer, compilation included.
        kernel: what computed it, in the backend's words, where there is more to say than its name.
        lengths: Sq and Sk; None where it was not asked.
    """

    backend: str
    case: str
    group: str
    dtype: str
    reasons: tuple[str, ...] = ()
    lacking: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    judgements: dict[str, Judgement] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    losses: tuple[Failure, ...] = ()
    seconds: float = 0.0
    kernel: str = ""
    lengths: tuple[int, int] | None = None

    @property
    def verdict(self) -> str:
        """Whether the backend is right: "agree", "lossy", "disagree"; "refused" where it did not run."""
        if self.reasons:
            return "refused"
        return "disagree" if self.failures else "lossy" if self.losses else "agree"


def collect_outcomes(
    backends: Sequence[str],
    cases: Sequence[Case],
    dtypes: Sequence[str] | None,
    seed: int,
    outcomes: list[Outcome],
    progress: Progress | None = None,
    left_out: Mapping[str, str] = MappingProxyType({}),
    declines: frozenset[str] = frozenset(),
) -> None:
    """Every backend on every case in every dtype; whatever a backend raises stops nothing.

    Args:
        backends: their names.
        cases: what to ask them.
        dtypes: of q, k and v; None: each case's own.
        seed: of the generated inputs and of all cotangents.
        outcomes: where they are put, one after the other: what is known when the run is ended.
        progress: called with (done, total, what comes next).
        left_out: which of the backends are not asked, and why.
        declines: promises that these backends do not make, of `function.PROMISES`.
    """
    callers = {framework(name) for name in backends} | {case.caller for case in cases}
    if "torch" in callers and find_spec("torch"):
        caller_of("torch")  # imported now, so that its settings are among those that are kept
    settings = _Settings.now()
    pairs = [(case, dtype) for case in cases for dtype in dtypes_of(case, dtypes)]
    # NumPy's products here are small: with threads of their own they wait for each other, a quarter of
    # the time. torch's and XLA's are left as they are.
    one_thread = threadpool_limits(1, user_api="blas")
    with one_thread, warnings.catch_warnings(), ThreadPoolExecutor(WORKERS) as pool:
        warnings.filterwarnings("ignore", COPIED, UserWarning)
        asked: deque[list[Future[Outcome]]] = deque()  # question by question

        def wait(most: int) -> None:
            while len(asked) > most:
                outcomes.extend([answer.result() for answer in asked[0]])
                asked.popleft()

        try:
            for done, (case, dtype) in enumerate(pairs):
                if progress:
                    progress(done, len(pairs), f"{case.name} {dtype}")
                facts = case.name, case.group, dtype
                of_it = [name for name in backends if is_asked(name, case)]
                to_ask = [name for name in of_it if name not in left_out]
                outcomes += [Outcome(n, *facts, (left_out[n],)) for n in of_it if n in left_out]
                try:
                    question = Question.of(case, seed, dtype, declines=declines)
                    question.check_range()
                    refusal = question.unpromised
                except InputError as error:
                    refusal = str(error)
                if refusal:
                    said = (refusal,)
                    asked.append([pool.submit(Outcome, name, *facts, said) for name in to_ask])
                else:
                    asked.append([pool.submit(settings.outcome, name, question) for name in to_ask])
                    wait(AHEAD if question.inputs.q.nbytes < SMALL else 0)
            wait(0)
        finally:  # ended from outside: what is known counts, what nobody began is left
            left = [answer for answers in asked for answer in answers if not answer.cancel()]
            outcomes += [answer.result() for answer in left]
    if progress:
        progress(len(pairs), len(pairs), "")


@dataclass(frozen=True)
class _Settings:
    """What was set for the process when the run began; a backend may set it, and others come after."""

    folder: str
    x64: bool
    errors: dict[str, Any]
    torch: tuple[Any, bool] | None

    @classmethod
    def now(cls) -> "_Settings":
        torch = sys.modules.get("torch")
        of_torch = (torch.get_default_dtype(), torch.is_grad_enabled()) if torch else None
        return cls(os.getcwd(), _x64_is_enabled(), dict(np.geterr()), of_torch)

    def outcome(self, name: str, question: Question) -> Outcome:
        """The outcome; afterwards all is set as before."""
        try:
            return outcome(name, question)
        finally:
            os.chdir(self.folder)
            if self.torch is not None:
                dtype, recorded = self.torch
                sys.modules["torch"].set_default_dtype(dtype)
                sys.modules["torch"].set_grad_enabled(recorded)
            np.seterr(**self.errors)
            if _x64_is_enabled() != self.x64:
                jax.config.update("jax_enable_x64", self.x64)


def _x64_is_enabled() -> bool:
    return bool(jax.config.read("jax_enable_x64"))


def is_asked(backend: str, case: Case) -> bool:
    """Whether a case is for a backend.

    A named case with a caller is of the bridge between two frameworks: within one there is none. A row
    of the table is a combination of all factors, and every backend's.
    """
    return case.row is not None or framework(backend) != case.caller


def dtypes_of(case: Case, dtypes: Sequence[str] | None) -> Sequence[str]:
    """In which dtypes a case is asked, of those that somebody wants."""
    if case.dtype is None:
        return case.usual if dtypes is None else dtypes
    return [case.dtype] if dtypes is None or case.dtype in dtypes else []


def outcome(name: str, question: Question) -> Outcome:
    """One backend's answer to one question, judged."""
    case, dtype = question.case, question.dtype
    lengths = question.problem.q_length, question.problem.kv_length
    result = Outcome(name, case.name, case.group, dtype, lengths=lengths)
    beside_others = framework(name) == "jax" and question.calls_from in (None, "jax")
    faults: list[Fault]
    try:
        with float64_where_asked(dtype), nullcontext() if beside_others else _one_at_a_time:
            started = time.perf_counter()
            with_lse, lse_reasons, answer = _first_answer(name, question)
            seconds = time.perf_counter() - started
            lacking = {"LSE": lse_reasons} if lse_reasons else {}
            kernel, why_no_gradients = about(name, question)
            if why_no_gradients:
                lacking["gradients"] = (why_no_gradients,)
            result = replace(result, lacking=lacking, seconds=seconds, kernel=kernel)
            asked = question
            judgements, faults = judge_all(question, answer, with_lse)
            if with_lse and "gradients" not in lacking and not faults:
                asked = _of_out_alone(question)
                judgements, faults = _judge_again(name, question, asked, judgements)
            if faults:
                judgements, faults = _diagnose(name, asked, with_lse, judgements, faults)
                if asked is not question:
                    faults = [(t, f"{said}; without a cotangent of LSE") for t, said in faults]
            faults += _unrepeated(name, question, with_lse, answer)
            promised = "second_derivatives" not in question.declines
            if case.second and promised and "gradients" not in lacking and not faults:
                second, reasons = _second_derivatives(name, question, with_lse)
                faults += [(t, fault) for t, found in second.items() for fault in found.faults]
                judgements |= second
                lacking |= {"second derivatives": reasons} if reasons else {}
            result = replace(result, judgements=judgements, lacking=lacking)
    except Refused as refusal:
        return replace(result, reasons=refusal.reasons)
    except BaseException as error:  # whatever a backend raises
        ends = not isinstance(error, Exception | SystemExit)
        # An interrupt, which other threads never see.
        if ends and current_thread() is main_thread():
            raise
        tensor = error.tensor if isinstance(error, WrongResult) else None
        faults = [(tensor, f"raised {in_a_line(error)}")]
    return concluded(result, question, faults)


def concluded(result: Outcome, question: Question, faults: Sequence[Fault]) -> Outcome:
    """An outcome with what is wrong, and what its judgements lost."""
    losses = [(t, said) for t, found in result.judgements.items() for said in found.losses]
    heats = {tensor: judgement.heat for tensor, judgement in result.judgements.items()}
    facts = result.backend, result.case, result.dtype
    failures, lost = (
        tuple(
            Failure(*facts, tensor, said, question.case.description, heats.get(tensor or ""))
            for tensor, said in found
        )
        for found in (faults, losses)
    )
    return replace(result, failures=failures, losses=lost)


def _first_answer(name: str, question: Question) -> tuple[bool, tuple[str, ...], Tensors]:
    """Whether LSE was asked for, why not where the backend refuses that alone, and the answer.

    The K and V that nobody sees hold NaN and infinities from the start: most runs pass, and what
    passes so has shown both that it is right and that they change nothing.
    """
    inputs = question.poisoned or question.inputs
    if not question.case.return_lse:
        return False, (), ask(name, question, inputs, with_lse=False)
    try:
        return True, (), ask(name, question, inputs, with_lse=True)
    except Refused as refusal:
        answer = ask(name, question, inputs, with_lse=False)
        return False, refusal.reasons, answer


def judge_all(
    question: Question, answer: Tensors, with_lse: bool
) -> tuple[dict[str, Judgement], list[Fault]]:
    """Judges every tensor of an answer by the oracle."""
    return judge_by(question.standards(with_lse), question, answer)


def judge_by(
    standards: Mapping[str, Standard], question: Question, answer: Tensors
) -> tuple[dict[str, Judgement], list[Fault]]:
    """Judges those tensors of an answer that there is a standard of."""
    if misshapen := question.misshapen(answer):
        return {}, list(misshapen)
    judgements = {
        tensor: standards[tensor].judge(got)
        for tensor, got in question.canonical(answer).items()
        if tensor in standards
    }
    return judgements, [
        (t, fault) for t, judgement in judgements.items() for fault in judgement.faults
    ]


def _of_out_alone(question: Question) -> Question:
    """The same with a cotangent of 0 for LSE."""
    return replace(question, lse_cotangent=np.zeros_like(question.lse_cotangent))


def _judge_again(
    name: str, question: Question, alone: Question, judgements: dict[str, Judgement]
) -> tuple[dict[str, Judgement], list[Fault]]:
    """Judges the gradients again, of out alone, and keeps what is worse.

    On peaked rows out's gradients nearly cancel, and LSE's are large: within their sum all digits of
    out's may be lost unseen. They are what most users ask for.
    """
    answer = ask(name, alone, question.poisoned or question.inputs, with_lse=True)
    found, faults = judge_all(question, answer, with_lse=False)
    worse = {
        t: max(judgements[t], j, key=lambda judgement: judgement.strain) for t, j in found.items()
    }
    return worse, faults


def _diagnose(
    name: str,
    question: Question,
    with_lse: bool,
    judgements: dict[str, Judgement],
    faults: list[Fault],
) -> tuple[dict[str, Judgement], list[Fault]]:
    """Asks a backend that failed again, more easily, to say what it stumbles over."""
    if question.poisoned is not None:
        judgements, unpoisoned = judge_all(
            question, ask(name, question, question.inputs, with_lse), with_lse
        )
        if not unpoisoned:
            leak = "; right while K and V that nobody sees hold no NaN and no infinity"
            return judgements, [(tensor, said + leak) for tensor, said in faults]
        faults = unpoisoned
    wrong = {tensor for tensor, _ in faults}
    if with_lse and wrong and wrong.isdisjoint({"out", "lse", "dv"}):
        answer = ask(name, _of_out_alone(question), question.inputs, with_lse=True)
        if not judge_all(question, answer, with_lse=False)[1]:
            part = (
                "; right without a cotangent of LSE: what flows back through LSE is wrong or lost"
            )
            faults = [(tensor, said + part) for tensor, said in faults]
    return judgements, faults


def _second_derivatives(
    name: str, question: Question, with_lse: bool
) -> tuple[dict[str, Judgement], tuple[str, ...]]:
    """Judges the second derivatives of a backend that has them; why it has none."""
    direction = directions(question)
    try:
        got = ask_second(name, question, with_lse, direction)
    except Exception as error:  # which kind says "there is none" differs by framework
        if is_refusal(error):
            return {}, ("its gradient cannot be differentiated again",)
        raise
    if got is None:
        return {}, ("NumPy differentiates nothing",)
    canonical = question.canonical({n.replace("d2", "d"): x for n, x in got.items()})
    got = {n.replace("d", "d2", 1): x for n, x in canonical.items()}
    return judge_second(question, got, right(question, direction, with_lse)), ()


def _unrepeated(name: str, question: Question, with_lse: bool, answer: Tensors) -> list[Fault]:
    """Tensors that came out differently when a backend that claims otherwise was asked again."""
    if not getattr(heedful.backends()[name], "deterministic", False):
        return []
    again = ask(name, question, question.poisoned or question.inputs, with_lse)
    return [
        (
            tensor,
            f"{tensor} differs between two runs, though the backend claims to be deterministic",
        )
        for tensor, first in answer.items()
        if first.tobytes() != again[tensor].tobytes()
    ]
