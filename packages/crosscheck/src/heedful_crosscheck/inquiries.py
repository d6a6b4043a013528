"""Who is asked what, from what a user says: names of backends, or a function, and cases."""

from collections.abc import Sequence
from dataclasses import replace

from heedful_crosscheck import chosen_backends
from heedful_crosscheck.cases import Case, full
from heedful_crosscheck.in_process import InProcess
from heedful_crosscheck.isolation import Workers
from heedful_crosscheck.run import Inquiry

SEEDS = 3  # of a full run


def inquiries_of(
    judged: InProcess | Workers,
    backends: Sequence[str] | None,
    cases: Sequence[Case],
    dtypes: Sequence[str] | None,
    seed: int,
    jobs: int,
) -> list[Inquiry]:
    """A function by itself, since it is asked cases of its own, and the backends.

    Args:
        judged: where they are.
        backends: their names; None: all, or none beside a function.
        cases, dtypes, seed: as of `crosscheck`.
        jobs: how many compute at once.

    Raises:
        ValueError: there is no backend of a name.
    """
    of = judged.function
    found = []
    if backends or of is None:
        names = chosen_backends(backends, judged.names)
        asked = judged.respondents(names, jobs)
        found.append(Inquiry(asked, cases, dtypes, [seed], by_name=backends is not None))
    if of is not None:
        own = judged.fitted(cases, dtypes)
        declines = frozenset(of["declines"])
        found.append(Inquiry(judged.respondents([of["name"]], jobs), own, dtypes, [seed], declines))
    return found


def declined_by(judged: InProcess | Workers) -> dict[str, tuple[str, ...]]:
    """Of the function, where there is one, which promises it declines."""
    of = judged.function
    return {} if of is None else {of["name"]: tuple(of["declines"])}


def in_full(inquiry: Inquiry) -> Inquiry:
    """Every case in every dtype, with several seeds."""
    (seed,) = inquiry.seeds
    return replace(inquiry, cases=full(inquiry.cases), seeds=range(seed, seed + SEEDS))
