"""Holds mutants, and honest backends over many seeds, to the crosscheck's own questions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from mutants import Mutant

from heedful_crosscheck import Case, InputError, crosscheck
from heedful_crosscheck.function_backend import registered
from heedful_crosscheck.question import Question
from heedful_crosscheck.respondent import Here
from heedful_crosscheck.run import Outcome, dtypes_of, outcome

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Held:
    """What came of some mutants.

    Attributes:
        caught: of each that was called wrong, the case and dtype that showed it first.
        lossy: of each that was called lossy and never wrong, where.
        left: those that were asked, and agreed.
        unmet: those that no case asks for what they get wrong.
    """

    caught: dict[Mutant, str]
    lossy: dict[Mutant, str]
    left: tuple[Mutant, ...]
    unmet: tuple[Mutant, ...]

    def and_then(self, others: "Held") -> "Held":
        """After its uncaught ones were held to more cases."""
        lossy = {
            m: where for m, where in (self.lossy | others.lossy).items() if m not in others.caught
        }
        left = [m for m in (*self.left, *others.left) if m not in others.caught and m not in lossy]
        unmet = tuple(m for m in self.unmet if m in others.unmet)
        return Held(self.caught | others.caught, lossy, tuple(dict.fromkeys(left)), unmet)


def hold(mutants: Sequence[Mutant], cases: Iterable[Case], progress: Progress) -> Held:
    """Asks each mutant the questions that it may get wrong, until it is caught; small ones first."""
    asked = sorted(questions(cases), key=lambda question: question.problem.score_count)
    caught: dict[Mutant, str] = {}
    lossy: dict[Mutant, str] = {}
    met: set[Mutant] = set()
    for done, question in enumerate(asked):
        here = [m for m in mutants if m not in caught and m.meets(question.problem)]
        where = f"{question.case.name}, {question.dtype}"
        progress(done, len(asked), f"{where}: {len(here)} of {len(mutants) - len(caught)} left")
        try:
            if here:
                question.check_range()
        except InputError:  # as in the crosscheck: nobody is asked it
            continue
        met.update(here)
        for mutant in here:
            verdict = answered(mutant, question).verdict
            if verdict == "disagree":
                caught[mutant] = where
            elif verdict == "lossy":
                lossy.setdefault(mutant, where)
    uncaught = [m for m in mutants if m not in caught]
    return Held(
        caught,
        {m: lossy[m] for m in uncaught if m in lossy},
        tuple(m for m in uncaught if m in met and m not in lossy),
        tuple(m for m in uncaught if m not in met),
    )


def questions(cases: Iterable[Case]) -> Iterator[Question]:
    """Those that can be asked, with their inputs, and no answer yet."""
    for case in cases:
        for dtype in dtypes_of(case, None):
            with suppress(InputError):
                yield Question.of(case, 0, dtype)


def answered(mutant: Mutant, question: Question) -> Outcome:
    """What the judge says of it."""
    with registered(mutant) as name:
        return outcome(Here(name), question)


def over_seeds(
    backends: Sequence[str], cases: Sequence[Case], seeds: range, progress: Progress
) -> list[Outcome]:
    """What honest backends are called."""
    found: list[Outcome] = []
    for seed in seeds:
        progress(seed - seeds.start, len(seeds), f"seed {seed}")
        found += crosscheck(backends, cases, seed=seed).outcomes
    return found
