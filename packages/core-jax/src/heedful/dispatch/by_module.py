"""Backends for a model's modules, by patterns of their names: what each `per_module` shares.

A pattern is that of fnmatch, and holds for the modules it matches and for all within them; the first one
that holds for a module is its choice. The model itself has no name, which "*" alone matches.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Self

from heedful.dispatch.ambient import as_names

NO_CHOICES: Mapping[str, str | Sequence[str]] = MappingProxyType({})


@dataclass(frozen=True)
class Choices:
    """Hashable, equal where patterns, backends and order are."""

    table: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, choices: Mapping[str, str | Sequence[str]]) -> Self:
        """Checks them."""
        if not isinstance(choices, Mapping):
            raise TypeError(
                'the choices must be a mapping such as {"layers.0.*": "jax:flash"}. '
                f"Got {type(choices).__name__}."
            )
        return cls(tuple((name, as_names(x, _source(name))) for name, x in choices.items()))

    def at(self, path: Iterable[str]) -> tuple[tuple[str, ...], str]:
        """The names that are asked for there, none where no pattern holds, and who asks."""
        pattern = self.pattern_at(path)
        return ((), "") if pattern is None else (dict(self.table)[pattern], _source(pattern))

    def pattern_at(self, path: Iterable[str]) -> str | None:
        """The first that holds there."""
        parts = tuple(path)
        names = [
            ".".join(parts[:n]) for n in range(len(parts) + 1)
        ]  # of what it is in, and its own
        held = (x for x, _ in self.table if any(fnmatchcase(name, x) for name in names))
        return next(held, None)

    def check_each_decides(self, decided: Collection[str | None], names: Iterable[str]) -> None:
        """Raises for a pattern that is of no use.

        Args:
            decided: the patterns that hold somewhere.
            names: of all modules in which there may be a call.
        """
        names = sorted(filter(None, names))
        for pattern, _ in self.table:
            if pattern in decided:
                continue
            matched = next((name for name in names if fnmatchcase(name, pattern)), None)
            if matched is None:
                raise ValueError(
                    f"no module that could call attention is named {pattern!r}. "
                    f"There are {', '.join(names) or 'none with a name'}."
                )
            before = self.pattern_at(matched.split("."))
            raise ValueError(
                f"{pattern!r} decides nothing: the first pattern wins, and {before!r}, which comes "
                f"before it, holds for {matched!r} too."
            )


def _source(pattern: str) -> str:
    return f"asked for by per_module for {pattern!r}"
