"""Where what is judged comes from: names by which any process can import it."""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heedful_crosscheck.function import Function
from heedful_crosscheck.function_backend import FunctionBackend, backend_of


class OriginError(ValueError):
    """What is judged cannot be had: no such module, one that raises, a description that cannot be."""


@dataclass(frozen=True)
class Origin:
    """What is imported before anybody is asked.

    Attributes:
        imports: modules, which may register backends.
        function: one that is judged, "package.module:function"; None: backends are.
        conventions: of the function, as of `Function`.
    """

    imports: tuple[str, ...] = ()
    function: str | None = None
    conventions: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> FunctionBackend | None:
        """Imports it, and makes a backend of the function.

        Raises:
            OriginError: it cannot be had.
        """
        sys.path.insert(0, "")  # as `python -m` has it
        for module in self.imports:
            _import(module, f"--import {module}")
        if self.function is None:
            return None
        judged = _found(self.function)
        try:
            # One that is described in its module is taken as it is.
            described = isinstance(judged, Function) and not self.conventions
            return backend_of(judged if described else Function(judged, **self.conventions))
        except (TypeError, ValueError) as error:
            raise OriginError(str(error)) from error


def _import(module: str, said: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # the module is the caller's, and may raise anything
        raise OriginError(f"{said}: {type(error).__name__}: {error}") from error


def _found(path: str) -> Any:
    """What `package.module:function` names."""
    module, colon, function = path.partition(":")
    if not (module and colon and function):
        raise OriginError(f"a function is named package.module:function. Got {path!r}.")
    _import(module, path)
    found: Any = sys.modules[module]
    for part in function.split("."):
        if not hasattr(found, part):
            raise OriginError(f"{module} has no {function}.")
        found = getattr(found, part)
    return found
