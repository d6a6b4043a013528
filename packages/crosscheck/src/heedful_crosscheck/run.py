"""Asks every backend every question, and has the answers judged."""

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from queue import LifoQueue
from threading import BoundedSemaphore
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # has no types

from heedful.dispatch.registry import in_a_line
from heedful_crosscheck.ask import Refused, framework
from heedful_crosscheck.cases import Case
from heedful_crosscheck.explanation import Explainer
from heedful_crosscheck.files import InputError
from heedful_crosscheck.location import HeatMap
from heedful_crosscheck.question import Question
from heedful_crosscheck.respondent import Crashed, Raised, Respondent, Stopped
from heedful_crosscheck.second import directions, judge_second, right
from heedful_crosscheck.tolerance import Judgement, Standard
from heedful_crosscheck.yardstick import Tensors

DTYPES = ("float32", "bfloat16", "float16", "float64")

# Most of the time goes into XLA's compilations, which use one core and leave Python's lock alone.
WORKERS = min(os.cpu_count() or 1, 4)
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
        causes: what makes all of the answer agree, each for itself, behind the word "agrees".
    """

    backend: str
    case: str
    dtype: str
    tensor: str | None
    message: str
    description: str = ""
    heat: HeatMap | None = None
    causes: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """The message, and what explains it."""
        return (
            f"{self.message}; agrees {', or '.join(self.causes)}" if self.causes else self.message
        )

    def __str__(self) -> str:
        asked = f" ({self.description})" if self.description else ""
        return f"{self.backend}, {self.case}, {self.dtype}: {self.said}{asked}"


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
        crashed: whether its process came to an end on it, or to its limits; the one failure says how.
        output: what it printed last, where it crashed.
        seed: of the inputs and the cotangents.
        inputs: a hash of what was asked; "" where nothing was.
        description: of the case, where its name does not say what is asked.
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
    crashed: bool = False
    output: str = ""
    seed: int = 0
    inputs: str = ""
    description: str = ""

    @property
    def verdict(self) -> str:
        """Whether the backend is right: "agree", "lossy", "disagree"; "crashed"; "refused": not run."""
        if self.reasons:
            return "refused"
        if self.crashed:
            return "crashed"
        return "disagree" if self.failures else "lossy" if self.losses else "agree"


class Key(NamedTuple):
    """Which outcome: whose, and of what."""

    backend: str
    case: str
    dtype: str
    seed: int


@dataclass(frozen=True)
class Inquiry:
    """Who is asked what.

    Attributes:
        respondents: by backend, those that answer for it side by side.
        cases: what they are asked.
        dtypes: of q, k and v; None: each case's own.
        seeds: of the generated inputs and of all cotangents.
        declines: promises that these backends do not make, of `function.PROMISES`.
        by_name: whether somebody named them; those that want to be named are left out otherwise.
    """

    respondents: Mapping[str, Sequence[Respondent]]
    cases: Sequence[Case]
    dtypes: Sequence[str] | None
    seeds: Sequence[int]
    declines: frozenset[str] = frozenset()
    by_name: bool = True

    @property
    def questions(self) -> list[tuple[Case, str, int]]:
        """Case, dtype and seed, in the order in which they are asked."""
        return [
            (case, dtype, seed)
            for seed in self.seeds
            for case in self.cases
            for dtype in dtypes_of(case, self.dtypes)
        ]


def collect_outcomes(
    inquiries: Sequence[Inquiry],
    known: Callable[[Outcome], None],
    jobs: int = WORKERS,
    progress: Progress | None = None,
    answered: Collection[Key] = (),
) -> None:
    """Every backend on every case in every dtype; whatever a backend does stops nothing.

    Args:
        inquiries: one after the other.
        known: told each outcome as soon as it is one, question by question.
        jobs: how many backends compute at once.
        progress: called with (done, total, what comes next).
        answered: what is not asked again.
    """
    total = sum(len(inquiry.questions) for inquiry in inquiries)
    done = 0
    # NumPy's products here are small: with threads of their own they wait for each other, a quarter of
    # the time. torch's and XLA's are left as they are.
    one_thread = threadpool_limits(1, user_api="blas")
    with one_thread, warnings.catch_warnings():
        warnings.filterwarnings("ignore", COPIED, UserWarning)
        for inquiry in inquiries:
            with _Lanes(inquiry, jobs, known) as lanes:
                for case, dtype, seed in inquiry.questions:
                    if progress:
                        progress(done, total, f"{case.name} {dtype}")
                    names = [
                        name
                        for name in inquiry.respondents
                        if is_asked(name, case)
                        and Key(name, case.name, dtype, seed) not in answered
                    ]
                    if names:
                        lanes.ask(names, case, dtype, seed)
                    done += 1
    if progress:
        progress(done, total, "")


class _Lanes:
    """A thread for each respondent, of which as many work at once as there are jobs."""

    def __init__(self, inquiry: Inquiry, jobs: int, known: Callable[[Outcome], None]):
        self.inquiry, self.known = inquiry, known
        self.explainers = {name: Explainer() for name in inquiry.respondents}
        self.slots = BoundedSemaphore(jobs)
        self.asked: deque[list[Future[Outcome]]] = deque()  # question by question
        self.idle: dict[str, LifoQueue[Respondent]] = {}
        self.pools: dict[str, ThreadPoolExecutor] = {}

    def __enter__(self) -> "_Lanes":
        self.open = ExitStack()
        for name, respondents in self.inquiry.respondents.items():
            self.idle[name] = LifoQueue()
            for respondent in respondents:
                self.idle[name].put(respondent)
            self.pools[name] = self.open.enter_context(ThreadPoolExecutor(len(respondents)))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self.open:
            try:
                if kind is None:
                    self._wait(0)
            finally:  # ended from outside: what is known counts, what nobody began is left
                for answers in self.asked:
                    answers[:] = [answer for answer in answers if not answer.cancel()]
                for respondents in self.inquiry.respondents.values():
                    for respondent in respondents:
                        respondent.stop()
                self._wait(0)

    def ask(self, names: Sequence[str], case: Case, dtype: str, seed: int) -> None:
        """Asks a question of these backends; waits while too many are ahead of it."""
        declines = self.inquiry.declines
        try:
            question = Question.of(case, seed, dtype, declines=declines)
            question.check_range()
            refusal = question.unpromised
        except InputError as error:
            refusal = str(error)
        if refusal:
            facts = case.name, case.group, dtype
            found = [Outcome(name, *facts, (refusal,), seed=seed) for name in names]
            self.asked.append(list(map(_settled, found)))
        else:
            self.asked.append([self.pools[n].submit(self._outcome, n, question) for n in names])
            self._wait(AHEAD if question.inputs.q.nbytes < SMALL else 0)

    def _outcome(self, name: str, question: Question) -> Outcome:
        with self.slots:
            respondent = self.idle[name].get()
            try:
                return outcome(respondent, question, self.inquiry.by_name, self.explainers[name])
            finally:
                self.idle[name].put(respondent)

    def _wait(self, most: int) -> None:
        while len(self.asked) > most:
            self._tell(self.asked[0])
            self.asked.popleft()

    def _tell(self, answers: list[Future[Outcome]]) -> None:
        while answers:
            with suppress(Stopped):
                answers[0].result()
            answer = answers.pop(0)  # each is told once, whenever the run is ended
            if answer.exception() is None:
                self.known(answer.result())


def _settled(found: Outcome) -> Future[Outcome]:
    future: Future[Outcome] = Future()
    future.set_result(found)
    return future


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


def outcome(
    respondent: Respondent,
    question: Question,
    by_name: bool = True,
    explainer: Explainer | None = None,
) -> Outcome:
    """One backend's answer to one question, judged.

    Args:
        respondent: the backend.
        question: what it is asked.
        by_name: whether somebody named it; one that wants to be named is left out otherwise.
        explainer: who knows what explained this backend's failures so far.
    """
    case, dtype, name = question.case, question.dtype, respondent.name
    result = Outcome(
        *(name, case.name, case.group, dtype),
        lengths=(question.problem.q_length, question.problem.kv_length),
        seed=question.seed,
        inputs=question.inputs.fingerprint,
        description=case.description,
    )
    faults: list[Fault]
    causes: tuple[str, ...] = ()
    try:
        if not by_name and (why := respondent.why_unasked()):
            raise Refused((f"left out: {why}; name it to ask it",))
        respondent.start(question)
        started = time.perf_counter()
        with_lse, lse_reasons, answer = _first_answer(respondent, question)
        seconds = time.perf_counter() - started
        lacking = {"LSE": lse_reasons} if lse_reasons else {}
        about = respondent.about(question)
        if about.forward_only:
            lacking["gradients"] = (about.forward_only,)
        result = replace(result, lacking=lacking, seconds=seconds, kernel=about.kernel)
        asked = question
        judgements, faults = judge_all(question, answer, with_lse)
        if with_lse and "gradients" not in lacking and not faults:
            asked = _of_out_alone(question)
            judgements, faults = _judge_again(respondent, question, asked, judgements)
        if faults:
            judgements, faults = _diagnose(respondent, asked, with_lse, judgements, faults)
            if asked is not question:
                faults = [(t, f"{said}; without a cotangent of LSE") for t, said in faults]
        if any(judgement.verdict != "agree" for judgement in judgements.values()):
            once_more = partial(respondent.answer, asked, asked.inputs, with_lse)
            causes = (explainer or Explainer()).causes(once_more, asked, with_lse)
        if about.deterministic:
            faults += _unrepeated(respondent, question, with_lse, answer)
        promised = "second_derivatives" not in question.declines
        if case.second and promised and "gradients" not in lacking and not faults:
            second, reasons = _second_derivatives(respondent, question, with_lse)
            faults += [(t, fault) for t, found in second.items() for fault in found.faults]
            judgements |= second
            lacking |= {"second derivatives": reasons} if reasons else {}
        result = replace(result, judgements=judgements, lacking=lacking)
    except Refused as refusal:
        return replace(result, reasons=refusal.reasons)
    except Crashed as crash:
        result = replace(result, crashed=True, output=crash.output)
        faults = [(None, f"crashed: {crash}")]
    except Raised as raised:
        faults = [(raised.tensor, f"raised {raised}")]
    except Stopped:
        raise
    except Exception as error:  # of an answer that is none
        faults = [(None, f"cannot be judged: {in_a_line(error)}")]
    return concluded(result, question, faults, causes)


def concluded(
    result: Outcome, question: Question, faults: Sequence[Fault], causes: tuple[str, ...] = ()
) -> Outcome:
    """An outcome with what is wrong, what would explain that, and what its judgements lost."""
    losses = [(t, said) for t, found in result.judgements.items() for said in found.losses]
    heats = {tensor: judgement.heat for tensor, judgement in result.judgements.items()}
    facts = result.backend, result.case, result.dtype
    failures, lost = (
        tuple(
            Failure(*facts, tensor, said, question.description, heats.get(tensor or ""), causes)
            for tensor, said in found
        )
        for found in (faults, losses)
    )
    return replace(result, failures=failures, losses=lost)


def _first_answer(
    respondent: Respondent, question: Question
) -> tuple[bool, tuple[str, ...], Tensors]:
    """Whether LSE was asked for, why not where the backend refuses that alone, and the answer.

    The K and V that nobody sees hold NaN and infinities from the start: most runs pass, and what
    passes so has shown both that it is right and that they change nothing.
    """
    inputs = question.poisoned or question.inputs
    if not question.case.return_lse:
        return False, (), respondent.answer(question, inputs, with_lse=False)
    try:
        return True, (), respondent.answer(question, inputs, with_lse=True)
    except Refused as refusal:
        answer = respondent.answer(question, inputs, with_lse=False)
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
    respondent: Respondent, question: Question, alone: Question, judgements: dict[str, Judgement]
) -> tuple[dict[str, Judgement], list[Fault]]:
    """Judges the gradients again, of out alone, and keeps what is worse.

    On peaked rows out's gradients nearly cancel, and LSE's are large: within their sum all digits of
    out's may be lost unseen. They are what most users ask for.
    """
    answer = respondent.answer(alone, question.poisoned or question.inputs, with_lse=True)
    found, faults = judge_all(question, answer, with_lse=False)
    worse = {
        t: max(judgements[t], j, key=lambda judgement: judgement.strain) for t, j in found.items()
    }
    return worse, faults


def _diagnose(
    respondent: Respondent,
    question: Question,
    with_lse: bool,
    judgements: dict[str, Judgement],
    faults: list[Fault],
) -> tuple[dict[str, Judgement], list[Fault]]:
    """Asks a backend that failed again, more easily, to say what it stumbles over."""
    if question.poisoned is not None:
        judgements, unpoisoned = judge_all(
            question, respondent.answer(question, question.inputs, with_lse), with_lse
        )
        if not unpoisoned:
            leak = "; right while K and V that nobody sees hold no NaN and no infinity"
            return judgements, [(tensor, said + leak) for tensor, said in faults]
        faults = unpoisoned
    wrong = {tensor for tensor, _ in faults}
    if with_lse and wrong and wrong.isdisjoint({"out", "lse", "dv"}):
        answer = respondent.answer(_of_out_alone(question), question.inputs, with_lse=True)
        if not judge_all(question, answer, with_lse=False)[1]:
            part = (
                "; right without a cotangent of LSE: what flows back through LSE is wrong or lost"
            )
            faults = [(tensor, said + part) for tensor, said in faults]
    return judgements, faults


def _second_derivatives(
    respondent: Respondent, question: Question, with_lse: bool
) -> tuple[dict[str, Judgement], tuple[str, ...]]:
    """Judges the second derivatives of a backend that has them; why it has none."""
    direction = directions(question)
    try:
        got = respondent.second(question, question.poisoned or question.inputs, with_lse, direction)
    except Refused as refusal:
        return {}, refusal.reasons
    canonical = question.canonical({n.replace("d2", "d"): x for n, x in got.items()})
    got = {n.replace("d", "d2", 1): x for n, x in canonical.items()}
    return judge_second(question, got, right(question, direction, with_lse)), ()


def _unrepeated(
    respondent: Respondent, question: Question, with_lse: bool, answer: Tensors
) -> list[Fault]:
    """Tensors that came out differently when a backend that claims otherwise was asked again."""
    again = respondent.answer(question, question.poisoned or question.inputs, with_lse)
    return [
        (
            tensor,
            f"{tensor} differs between two runs, though the backend claims to be deterministic",
        )
        for tensor, first in answer.items()
        if first.tobytes() != again[tensor].tobytes()
    ]
