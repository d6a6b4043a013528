"""Which backends and bridges there are: those installed, by entry point, and those registered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from heedful.bridges import numpy as numpy_bridge
from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.dispatch.backend import Backend, Bridge

BACKENDS = "heedful.backends"
BRIDGES = "heedful.bridges"

# Where the automatic choice looks, by whose arrays the caller has: the caller's own framework first.
# NumPy arrays go to JAX before the oracle, which is a judge and slow.
SEARCH = {"jax": ("jax",), "numpy": ("jax", "numpy"), "torch": ("torch", "jax")}

_registered: dict[str, Backend] = {}
_loaded: dict[str, Any] = {}  # entry points by group and name, once loaded and found right


def register(backend: Backend) -> None:
    """Adds a backend under its name; packages use the entry-point group `heedful.backends` instead.

    One whose class was registered under that name before, by a test or a notebook's cell that is run
    again, takes its place.

    Raises:
        TypeError: it lacks part of the `Backend` protocol.
        ValueError: its name is not "framework:kernel", or is taken.
    """
    _check_backend(backend)
    before = _registered.get(backend.name)
    if backend.name in names() and (before is None or _class(before) != _class(backend)):
        raise ValueError(f"a backend named {backend.name!r} is there already. Choose another name.")
    _registered[backend.name] = backend
    ranked.cache_clear()


def _class(backend: Backend) -> tuple[str, str]:
    """By name: one that is defined again is another class."""
    return type(backend).__module__, type(backend).__qualname__


def unregister(name: str) -> None:
    """Takes back what `register` added.

    Raises:
        KeyError: no backend of that name was registered by a call of `register`.
    """
    if name not in _registered:
        raise KeyError(f"{name} was not added by heedful.register")
    del _registered[name]
    ranked.cache_clear()


def _check_backend(backend: Backend) -> None:
    lacking = [part for part in ("name", "reasons", "run") if not hasattr(backend, part)]
    if lacking:
        raise TypeError(
            f"a backend must have name, reasons and run. Got {type(backend).__name__} "
            f"without {', '.join(lacking)}."
        )
    rank = getattr(backend, "automatic", None)
    if rank is not None and (not isinstance(rank, int | float) or rank != rank):
        raise TypeError(f"automatic must be a rank, a number, or None. Got {rank!r}.")
    hash(backend)  # what is compiled for it is kept by it; says "unhashable type" where it is not
    framework, colon, kernel = str(backend.name).partition(":")
    if framework not in SEARCH or not colon or not kernel:
        raise ValueError(
            f'a backend is named "framework:kernel", its framework one of {", ".join(SEARCH)}. '
            f"Got {backend.name!r}."
        )


@cache  # reading every installed package's metadata takes milliseconds
def _entry_points(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """What installed packages declare, by name; more than one where they clash."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=group):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def names() -> list[str]:
    """Every backend's name, without loading any: listing JAX's backends must not import torch."""
    return [*_entry_points(BACKENDS), *_registered]


def _load(group: str, name: str, check: Callable[[Any], None] = lambda _: None) -> Any:
    """What an entry point holds, checked once.

    Raises:
        LookupError: it cannot be had, and why: whatever a broken package does, the others go on.
    """
    key = f"{group}/{name}"
    if key not in _loaded:
        point, *others = _entry_points(group)[name]
        if others:
            packages = " and ".join(sorted(_package(p) for p in (point, *others)))
            raise LookupError(
                f"is declared by more than one package: {packages}. Uninstall all but one"
            )
        try:
            loaded = point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a package may even exit when it is imported
            raise LookupError(f"cannot be imported: {in_a_line(error)}") from error
        check(loaded)
        _loaded[key] = loaded
    return _loaded[key]


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} ({point.value})" if point.dist else point.value


def in_a_line(error: BaseException) -> str:
    """An exception in a line, whatever its own text does."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # somebody else's __str__
        return type(error).__name__


def backend_named(name: str) -> Backend:
    """The backend of a name; one that is installed and broken says so in its reasons."""
    if name in _registered:
        return _registered[name]
    if name not in _entry_points(BACKENDS):
        raise ValueError(f"no backend is named {name!r}. There are {', '.join(names())}.")

    def check(backend: Backend) -> None:
        _check_backend(backend)
        if backend.name != name:
            raise ValueError(
                f"its entry point {name!r} holds a backend named {backend.name!r}. Give both one name."
            )

    try:
        backend: Backend = _load(BACKENDS, name, check)
    except LookupError as error:
        return Unusable(name, str(error))
    except Exception as error:  # attributes that raise, a name that is none
        return Unusable(name, f"is no backend: {in_a_line(error)}")
    return backend


@cache  # asked at every call
def ranked(framework: str) -> tuple[str, ...]:
    """Names of a framework's backends that the automatic choice tries, in its order.

    One that could not be had when this was first asked is not tried.
    """
    found = [backend_named(name) for name in names() if name.startswith(f"{framework}:")]
    ranks = [(getattr(backend, "automatic", None), backend.name) for backend in found]
    return tuple(name for _, name in sorted(pair for pair in ranks if pair[0] is not None))


@dataclass(eq=False)  # hashable, as backends are
class Unusable:
    """Stands for an installed backend that cannot be used: it refuses and says why."""

    name: str
    reason: str

    def reasons(self, problem: Problem) -> tuple[str]:
        return (self.reason,)

    def run(self, problem: Problem, operands: Operands) -> tuple[Array, Array | None]:
        raise ImportError(f"{self.name} {self.reason}")


def is_registered(name: str) -> bool:
    """Whether it was added by `register`, and is no package's."""
    return name in _registered


def backends() -> Mapping[str, Backend]:
    """Every backend by name: those installed, and those registered since."""
    return MappingProxyType({name: backend_named(name) for name in names()})


def bridge_between(caller: str, framework: str) -> Bridge | None:
    """The bridge between two frameworks; None where they are the same.

    Raises:
        LookupError: the package that holds it is not installed, or broken.
    """
    if caller == framework:
        return None
    if "torch" not in (caller, framework):
        return numpy_bridge.bridge
    if "torch" not in _entry_points(BRIDGES):
        raise LookupError(
            f"carrying arrays between {caller} and {framework} needs the package heedful-torch, which "
            "is not installed here. Install it from where you have heedful"
        )
    return _load(BRIDGES, "torch")
