"""The choice, explained."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from heedful.call.problem import Problem
from heedful.dispatch import registry
from heedful.dispatch.ambient import wanted
from heedful.dispatch.choice import Verdict, automatic, first, verdict_of, why


@dataclass(frozen=True)
class Explanation:
    """Which backend a call takes and why, and what every backend says; print it, or read it.

    Attributes:
        problem: what was asked.
        chosen: the backend's name, or None where nobody that was asked can.
        why: one line.
        verdicts: one for each backend, in the order of the registry.
    """

    problem: Problem
    chosen: str | None
    why: str
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        width = max((len(v.name) for v in self.verdicts), default=0)
        lines = [f"chosen: {self.chosen or 'none'} ({self.why})"]
        for verdict in self.verdicts:
            lines.append(f"  {verdict.name:<{width}}  {verdict}")
        return "\n".join(lines)


def explain_choice(problem: Problem, backend: str | Sequence[str] | None = None) -> Explanation:
    """What `choose` would do, and what every backend says."""
    return explain_names(problem, *wanted(backend))


def explain_names(problem: Problem, names: tuple[str, ...] | None, source: str) -> Explanation:
    """The same of names that are asked for, None for the automatic choice, and of who asks."""
    tried = automatic(problem) if names is None else names
    verdicts = {
        name: verdict_of(registry.backend_named(name), problem)
        if name in tried or _is_at_hand(name)
        else Verdict(name, ("not asked, and torch is not loaded: backend= asks it",))
        for name in registry.names()
    }
    asked = [verdicts[name] for name in tried]
    chosen = first(problem, asked, by_memory=names is None)
    name = None if chosen is None else chosen.name
    return Explanation(problem, name, why(source, asked, chosen), tuple(verdicts.values()))


def _is_at_hand(name: str) -> bool:
    """Whether a backend can be asked without importing torch, which takes seconds."""
    return registry.is_registered(name) or not name.startswith("torch:") or "torch" in sys.modules
