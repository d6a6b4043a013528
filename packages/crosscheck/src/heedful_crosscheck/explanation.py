"""What a wrong answer would be right of: convention errors, tried one after the other.

An answer is explained by a cause (`causes`) where every tensor of it agrees with what the oracle answers
to the altered question, within the limits that the yardstick sets there: as strictly as it was found
wrong. Where out or LSE alone was understood otherwise, or the backward pass, that is tried too, and it
is said. Several causes may agree, of which the case cannot tell one from the other: all are said. Where
none does, nothing is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from heedful import oracle
from heedful_crosscheck.causes import CAUSES, LOSSES, Answering, Cause, Posed
from heedful_crosscheck.question import Question
from heedful_crosscheck.tolerance import CEILING, Standard
from heedful_crosscheck.yardstick import Arithmetic, Tensors, attend, best

# Of a case, since some causes write whole matrices of them, and all of them take minutes beyond.
MOST_SCORES = 2**17
KINDS = 16  # of a backend's failures for which every cause is tried; then those that explained any
AT_LEAST = 8  # of what arithmetic loses an eighth is lost, where that explains it
FORWARD = frozenset({"out", "lse"})

Kind = tuple[frozenset[str], frozenset[str]]


@dataclass(frozen=True)
class Explanation:
    """A cause, and of which part of an answer it is one, the rest being right as it is.

    Attributes:
        forward: of which of out and LSE.
        backward: whether of the gradients too: those of this part alone, where it is one of two.
        whole: whether that is all of the answer.
    """

    cause: Cause
    forward: frozenset[str]
    backward: bool
    whole: bool

    def said(self, question: Question) -> str:
        """What makes the answer agree, behind "agrees"."""
        words = self.cause.said(question.problem)
        if self.whole or self.cause.backward:
            return words
        part = " and ".join("LSE" if t == "lse" else t for t in sorted(self.forward, reverse=True))
        if not self.backward:
            return f"{words}, in the forward pass of {part} alone"
        return f"{words}, in {part or 'the backward pass'} alone"

    def answer(self, answering: Answering, posed: Posed) -> Tensors | None:
        """The tensors of one who understands this part so, and the rest rightly."""
        if self.whole or self.cause.backward:
            return self.cause.answer(answering, posed)
        if len(self.forward) == 1 and self.backward:
            return self._answer_in_part(answering, posed)
        altered, right = self.cause.answer(answering, posed), answering(posed)
        if altered is None:
            return None
        taken = {n for n in right if (n in self.forward if n in FORWARD else self.backward)}
        return {n: altered.get(n, np.zeros_like(x)) if n in taken else x for n, x in right.items()}

    def _answer_in_part(self, answering: Answering, posed: Posed) -> Tensors | None:
        """One of out and LSE, and what flows back through it; gradients add up."""
        (part,) = self.forward
        of_out = posed._replace(lse_cotangent=np.zeros_like(posed.lse_cotangent))
        of_lse = posed._replace(out_cotangent=np.zeros_like(posed.out_cotangent))
        own, others = (of_out, of_lse) if part == "out" else (of_lse, of_out)
        altered, right = self.cause.answer(answering, own), answering(others)
        if altered is None:
            return None
        sums = {n: x + altered.get(n, 0) for n, x in right.items() if n not in FORWARD}
        return sums | _forward_of(right) | {part: altered[part]}


class Explainer:
    """Tries every cause once for each kind of failure of a backend, and then those that explained it.

    A kind is what is asked, and which tensors are wrong of it.
    """

    def __init__(self) -> None:
        self.known: dict[Kind, tuple[Cause, ...]] = {}

    def causes(
        self, answered: Callable[[], Tensors], question: Question, with_lse: bool
    ) -> tuple[str, ...]:
        """Says what would make the answer of a backend that failed agree.

        Args:
            answered: its answer, to inputs that hold nothing strange; called where there is to be tried.
            question: what it is wrong of.
            with_lse: whether LSE was asked for.

        Returns:
            what completes "agrees …": "once causal is aligned top-left"; none where nothing explains it.
        """
        if not 0 < question.problem.score_count <= MOST_SCORES or question.problem.functions:
            return ()
        answer = answered()
        if question.misshapen(answer):
            return ()
        trial = _Trial(question, answer, with_lse)
        if not trial.wrong:
            return tuple(trial.losses())
        kind = question.problem.features, trial.wrong
        tried: Iterable[Cause] = CAUSES
        if kind in self.known:
            tried = self.known[kind]
        elif len(self.known) >= KINDS:
            tried = dict.fromkeys(cause for causes in self.known.values() for cause in causes)
        found = list(trial.explanations(tried))
        self.known.setdefault(kind, tuple(dict.fromkeys(e.cause for e in found)))
        return tuple(e.said(question) for e in found) or tuple(trial.losses())


class _Trial:
    """An answer that does not agree.

    Attributes:
        off: its tensors that do not agree by the right standards.
        wrong: those of them that are not lossy.
    """

    def __init__(self, question: Question, answer: Tensors, with_lse: bool):
        self.question, self.got = question, question.canonical(answer)
        self.answers = question.answers(with_lse)
        lse_cotangent = question.lse_cotangent * np.float64(with_lse)
        self.posed = Posed(
            question.problem, question.operands, question.out_cotangent, lse_cotangent
        )
        standards = question.standards(with_lse)
        verdicts = {t: standards[t].judge(x).verdict for t, x in self.got.items()}
        self.off = frozenset(t for t, verdict in verdicts.items() if verdict != "agree")
        self.wrong = frozenset(t for t, verdict in verdicts.items() if verdict == "disagree")

    def explanations(self, causes: Iterable[Cause]) -> Iterator[Explanation]:
        """Those by which all tensors agree."""
        with np.errstate(all="ignore"):
            for cause in causes:
                found = next(filter(self._agrees, self._parts(cause)), None)
                if found is not None:
                    yield found

    def _parts(self, cause: Cause) -> Iterator[Explanation]:
        """Which parts it may explain, as far as out and LSE tell, the largest first."""
        given, wrong = FORWARD & self.got.keys(), FORWARD & self.off
        if cause.backward or not wrong:
            if not wrong:
                yield Explanation(cause, frozenset(), backward=True, whole=False)
            return
        altered = cause.answer(_forward, self.posed)
        if altered is None:
            return
        near = {t for t in given if _is_near(altered[t], self.got[t], self.question.dtype)}
        if near == given:
            yield Explanation(cause, given, backward=True, whole=True)
        if wrong <= near:
            if len(given) > len(wrong):
                yield Explanation(cause, wrong, backward=True, whole=False)
            if self.off == wrong and self.got.keys() > given:
                yield Explanation(cause, wrong, backward=False, whole=False)

    def _agrees(self, explanation: Explanation) -> bool:
        right = self._as_came(explanation.answer(_oracle, self.posed))
        if right is None:
            return False
        dtype = self.question.dtype
        for tensor in (
            self.got.keys() - FORWARD
        ):  # before the yardstick is asked, which takes longer
            want = right[tensor]
            cancels = np.abs(want).max(initial=0) <= 1e-9 * self._uncancelled(tensor)
            if not cancels and not _is_near(want, self.got[tensor], dtype):
                return False
        found = [explanation.answer(partial(_yardstick, by), self.posed) for by in best(dtype)]
        readings = [self._as_came(x, rounded=True) or right for x in found]
        return all(
            Standard.of(
                tensor,
                right[tensor],
                [reading[tensor] for reading in readings],
                dtype,
                uncancelled=self._uncancelled(tensor),
            )
            .judge(got)
            .verdict
            == "agree"
            for tensor, got in self.got.items()
        )

    def losses(self) -> Iterator[str]:
        """Arithmetic that loses as much, in every tensor, as was lost."""
        if not self.off:
            return
        for loss in LOSSES:
            if self.question.dtype not in loss.dtypes:
                continue
            with np.errstate(all="ignore"):
                reading = self._as_came(loss.answer(self.posed), rounded=True)
            if reading is not None and self._loses_as(reading):
                yield loss.words.format(dtype=self.question.dtype)

    def _loses_as(self, reading: Tensors) -> bool:
        for tensor, got in self.got.items():
            standard = Standard.of(
                tensor,
                self.answers.right[tensor],
                [of_best[tensor] for of_best in self.answers.best],
                self.question.dtype,
                self.question.hidden[tensor],
                self._uncancelled(tensor),
                [reading[tensor]],
            )
            judgement = standard.judge(got)
            loses = standard.lossy.rms > AT_LEAST * standard.plain.rms
            if judgement.faults or (loses and judgement.errors.rms < standard.lossy.rms / AT_LEAST):
                return False
        return True

    def _uncancelled(self, tensor: str) -> float:
        return self.question.uncancelled.get(tensor, 0.0)

    def _as_came(self, tensors: Tensors | None, rounded: bool = False) -> Tensors | None:
        """One for each of the answer's, 0 where nothing depends on an option any more."""
        if tensors is None:
            return None
        question, found = self.question, {}
        for tensor, got in self.got.items():
            if tensor not in tensors:
                found[tensor] = np.zeros(got.shape)
                continue
            x = tensors[tensor]
            x = x if tensor in FORWARD else question.as_came(tensor.removeprefix("d"), x)
            found[tensor] = x.astype(got.dtype) if rounded else x
        return found


def _forward(posed: Posed) -> Tensors:
    out, lse = oracle.forward(posed.problem, posed.operands)
    return {"out": out, "lse": lse}


def _oracle(posed: Posed) -> Tensors:
    gradients = oracle.gradients(*posed).differentiable
    return _forward(posed) | {f"d{n}": x for n, x in gradients.items()}


def _yardstick(arithmetic: Arithmetic, posed: Posed) -> Tensors:
    return attend(arithmetic, *posed)


def _forward_of(tensors: Mapping[str, np.ndarray]) -> Tensors:
    return {n: x for n, x in tensors.items() if n in FORWARD}


def _is_near(right: np.ndarray, got: np.ndarray, dtype: str) -> bool:
    """Whether it may agree: whatever sets the limit, beyond four ceilings nothing does."""
    finite = np.isfinite(right)
    if right.shape != got.shape or not np.array_equal(finite, np.isfinite(got)):
        return False
    want = np.where(finite, right, 0)
    error = np.where(finite, got.astype(np.float64), 0) - want
    largest = np.abs(want).max(initial=0)
    return bool(np.abs(error).max(initial=0) <= 4 * CEILING[dtype] * (largest + 1))
