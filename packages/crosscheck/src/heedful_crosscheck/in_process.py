"""Backends in this process: quick to ask, easy to debug, and whatever one does, it does to all."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Self

import heedful
from heedful.dispatch.registry import names as known
from heedful_crosscheck.ask import framework
from heedful_crosscheck.callers import caller_of
from heedful_crosscheck.cases import Case
from heedful_crosscheck.fitting import fitted
from heedful_crosscheck.memory import most
from heedful_crosscheck.origin import Origin, OriginError
from heedful_crosscheck.report.environment import environment
from heedful_crosscheck.respondent import Here, Respondent
from heedful_crosscheck.settings import Settings


def here(
    names: Sequence[str], jobs: int, cases: Sequence[Case] = ()
) -> dict[str, list[Respondent]]:
    """A backend each; JAX's as often as there are jobs, since they are compiled side by side."""
    callers = {framework(name) for name in names} | {case.caller for case in cases}
    if "torch" in callers and find_spec("torch"):
        caller_of("torch")  # imported now, so that its settings are among those that are kept
    settings = Settings.now()
    return {n: [Here(n, settings)] * (jobs if framework(n) == "jax" else 1) for n in names}


class InProcess:
    """What is judged, imported here; the twin of `isolation.Workers`.

    Attributes:
        names: of all backends there are.
        function: of the function that is judged its name, declines and layout; None: there is none.
        environment: versions, machine and flags.

    Raises:
        OriginError: what is judged cannot be had.
    """

    def __init__(self, origin: Origin):
        self._backend = origin.load()
        self.function: dict[str, Any] | None = None
        if (backend := self._backend) is not None:
            if backend.name in known():
                raise OriginError(
                    f"there is a backend named {backend.name!r}. Pass --name to call yours otherwise."
                )
            heedful.register(backend)
            of = backend.of
            facts = {"declines": sorted(of.declines), "layout": of.layout}
            self.function = {"name": backend.name, **facts}
        self.names = known()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._backend is not None:
            heedful.unregister(self._backend.name)

    @property
    def environment(self) -> dict[str, Any]:
        return environment()

    def respondents(self, names: Sequence[str], jobs: int) -> dict[str, list[Respondent]]:
        """A backend each."""
        return here(names, jobs)

    def fitted(self, cases: Sequence[Case], dtypes: Sequence[str] | None) -> list[Case]:
        """The cases as the function is asked them, as of `fitting.fitted`."""
        assert self._backend is not None
        return fitted(self._backend, cases, dtypes)

    def memory(
        self, cases: Sequence[Case], names: Sequence[str], dtypes: Sequence[str], jobs: int
    ) -> list[str]:
        """What each case takes, in words."""
        return list(map(str, most(cases, dtypes, names, jobs)))
