"""Who computes a problem: the Backend protocol, the registry, the choice, and its explanation."""

import math
import operator
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import jax

from heedful import numpy_bridge, torch_checkpoint
from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.results import checked_run

BACKENDS = "heedful.backends"
BRIDGES = "heedful.bridges"
ENVIRONMENT = "HEEDFUL_BACKEND"

# Where the automatic choice looks, by whose arrays the caller has: the caller's own framework first.
# NumPy arrays go to JAX before the oracle, which is a judge and slow.
SEARCH = {"jax": ("jax",), "numpy": ("jax", "numpy"), "torch": ("torch", "jax")}


@runtime_checkable
class Backend(Protocol):
    """One way to compute attention.

    It is closed by default: whatever of `problem.features` it does not name in `takes`, a collection of
    them, the dispatcher refuses for it, an option that is added after it was written too. `reasons` adds
    what is finer. Where there is more to say than that a feature is not taken, `lacks`, an optional
    mapping, says it by the feature's name.

    Three more attributes are optional: `automatic`, its rank in the automatic choice within its
    framework, lower first (without it, it is taken by name alone); `deterministic`, True where it
    claims that a repeated run is bitwise equal, which the crosscheck then holds it to; and the method
    `score_bytes(problem)`: how many bytes of scores, masks and the like, anything that grows with
    Sq · Sk, the forward pass builds beside its operands and results. Without it, or where it is 0, the
    backend's memory is linear. The automatic choice weighs it.

    Attributes:
        name: "framework:kernel", for example "jax:flash"; the framework is that of the arrays which
            `run` takes and returns.
    """

    name: str

    def reasons(self, problem: Problem) -> Sequence[str]:
        """All but features that keeps this backend from the problem; empty where nothing does."""
        ...

    def run(self, problem: Problem, operands: Operands) -> tuple[Array, Array | None]:
        """Computes the problem on arrays of the backend's own framework.

        Returns:
            out (B, Hq, Sq, Dv) in the problem's dtype, and lse (B, Hq, Sq) in its accumulator dtype,
            which may be None where `problem.return_lse` is False. Both must be differentiable in the
            framework's own way; a NumPy backend has none, and offers `gradients` instead.
        """
        ...


@runtime_checkable
class Gradients(Protocol):
    """What a NumPy backend offers beside `run`, for frameworks that differentiate through it."""

    def gradients(
        self, problem: Problem, operands: Operands, out_cotangent: Array, lse_cotangent: Array
    ) -> tuple[Array, Array, Array, Array | None]:
        """The cotangents of q, k, v and bias (None: no bias), of their shapes and dtypes."""
        ...


class Bridge(Protocol):
    """Carries a call between the caller's framework and a backend of another."""

    def reasons(self, problem: Problem, framework: str) -> Sequence[str]:
        """Everything that keeps arrays of the problem from crossing to `framework` and back."""
        ...

    def run(
        self, backend: Backend, problem: Problem, operands: Operands
    ) -> tuple[Array, Array | None]:
        """Runs the backend on the caller's arrays; the result is differentiable where they are."""
        ...


class Refusal(ValueError):
    """No backend that was asked for can compute the problem.

    Attributes:
        reasons: the name of each backend that was asked, and everything that keeps it from running.
    """

    def __init__(self, message: str, reasons: Mapping[str, Sequence[str]]):
        self.reasons = dict(reasons)
        super().__init__(message, self.reasons)  # both, for pickle makes it of these again

    def __str__(self) -> str:
        return str(self.args[0])


# The registry

_registered: dict[str, Backend] = {}
_loaded: dict[str, Any] = {}  # entry points by group and name, once loaded


def register(backend: Backend) -> None:
    """Adds a backend under its name; packages use the entry-point group `heedful.backends` instead.

    Raises:
        TypeError: it lacks part of the `Backend` protocol.
        ValueError: its name is not "framework:kernel", or is taken.
    """
    _check_backend(backend)
    if backend.name in _names():
        raise ValueError(f"a backend named {backend.name!r} is there already. Choose another name.")
    _registered[backend.name] = backend


def unregister(name: str) -> None:
    """Takes back what `register` added.

    Raises:
        KeyError: no backend of that name was registered by a call of `register`.
    """
    if name not in _registered:
        raise KeyError(f"{name} was not added by heedful.register")
    del _registered[name]


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


def _names() -> list[str]:
    """Every backend's name, without loading any: listing JAX's backends must not import torch."""
    return [*_entry_points(BACKENDS), *_registered]


def _load(group: str, name: str) -> Any:
    """What an entry point holds.

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
            _loaded[key] = point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a package may even exit when it is imported
            raise LookupError(f"cannot be imported: {in_a_line(error)}") from error
    return _loaded[key]


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} ({point.value})" if point.dist else point.value


def in_a_line(error: BaseException) -> str:
    """An exception in a line, whatever its own text does."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # somebody else's __str__
        return type(error).__name__


def _backend(name: str) -> Backend:
    """The backend of a name; one that is installed and broken says so in its reasons."""
    if name in _registered:
        return _registered[name]
    if name not in _entry_points(BACKENDS):
        raise ValueError(f"no backend is named {name!r}. There are {', '.join(_names())}.")
    try:
        backend: Backend = _load(BACKENDS, name)
        _check_backend(backend)
        if backend.name != name:
            raise ValueError(
                f"its entry point {name!r} holds a backend named {backend.name!r}. Give both one name."
            )
        hash(backend)
    except LookupError as error:
        return _Unusable(name, str(error))
    except Exception as error:  # attributes that raise, a name that is none
        return _Unusable(name, f"is no backend: {in_a_line(error)}")
    return backend


@dataclass(eq=False)  # hashable, as backends are
class _Unusable:
    """Stands for an installed backend that cannot be used: it refuses and says why."""

    name: str
    reason: str

    def reasons(self, problem: Problem) -> tuple[str]:
        return (self.reason,)

    def run(self, problem: Problem, operands: Operands) -> tuple[Array, Array | None]:
        raise ImportError(f"{self.name} {self.reason}")


def backends() -> Mapping[str, Backend]:
    """Every backend by name: those installed, and those registered since."""
    return MappingProxyType({name: _backend(name) for name in _names()})


# The choice

_environment = os.environ.get(
    ENVIRONMENT
)  # read once: what is compiled holds for the whole process

# The blocks of `use_backend` that are open here, outermost first.
_blocks: ContextVar[tuple[tuple[str, ...], ...]] = ContextVar("heedful_blocks", default=())

# The same for JAX, which keeps what it compiled by this value among others: a function that was traced
# under one choice is traced anew under another. JAX has one value a thread, so it is not to be had from
# `_blocks`, which a copied context takes along into another thread, and each asyncio task has its own.
_traced_under: Any = jax.make_user_context(default_value=None)
_MIXED = "the blocks of several tasks"


class _Opened(threading.local):
    """The blocks that were opened in this thread and are open still, in whichever task."""

    def __init__(self) -> None:
        self.blocks: list[tuple[str, ...]] = []


_opened = _Opened()
_is_used = False  # use_backend, in this process


def _preferred() -> tuple[str, ...] | None:
    """What the innermost block asks for."""
    blocks = _blocks.get()
    return blocks[-1] if blocks else None


def check_trace() -> None:
    """Refuses a choice that JAX, which is tracing, would keep under another one's name."""
    if _traced_under.value == _preferred():
        return
    raise RuntimeError(
        "the block of use_backend around this call was opened in another thread or task, which JAX's "
        "cache of compiled functions cannot know. Open it here, around what is compiled, or name the "
        "backend by backend=."
    )


def keep_for_recomputation() -> None:
    """Lets `torch.utils.checkpoint` recompute what runs here under the blocks that are open around it.

    Raises:
        RuntimeError: this is a recomputation, and the blocks of its first pass are not known.
    """
    if _is_used and not _blocks.get() and torch_checkpoint.recomputes_what_was_not_seen():
        raise RuntimeError(
            "torch.utils.checkpoint recomputes a function whose first pass made no call that heedful "
            "saw (it was compiled already, or not run by torch.utils.checkpoint.checkpoint): which "
            "use_backend was around it is not known. Checkpoint heedful.use_backend(name)(function) in "
            "its place, or name the backend by backend=."
        )
    _keep_blocks()


def _keep_blocks() -> None:
    torch_checkpoint.recompute_within(partial(_reopened, _blocks.get()))


class _Ambient:
    """What `use_backend` asks for here and now, as an attribute.

    torch.compile cannot look into a ContextVar, but reads an attribute anew at each call where a
    function of C stands behind it.
    """

    blocks: Any = property(_blocks.get)  # with the object itself as default


_ambient = _Ambient()


def ambient() -> tuple[Any, str | None]:
    """What a call without `backend=` is asked to take, by `use_backend` and by the environment."""
    blocks = _ambient.blocks
    return None if blocks is _ambient else blocks, os.environ.get(ENVIRONMENT)


@contextmanager
def use_backend(name: str | Sequence[str]) -> Iterator[None]:
    """Within the block, calls without `backend=` use this backend, or the first able one of a list.

    What JAX compiles is kept apart by it: a jitted function is traced anew under each choice, once. The
    block is that of its thread and of its asyncio task. A thread that is started within it knows nothing
    of it; a block is also a decorator, which opens it there:

        Thread(target=heedful.use_backend("jax:plain")(work))

    A task that is suspended within its block, while another runs in the same thread, must not be traced
    there: a call that notices raises. Functions that are compiled already do not notice.

    What torch.utils.checkpoint recomputes is recomputed under the blocks of its first pass, wherever
    `backward` is called. A function that was compiled before, by torch.compile or jax.jit, makes no call
    there that could be noticed; a block that is checkpointed with it goes along always:

        checkpoint(heedful.use_backend("jax:plain")(compiled), x, use_reentrant=False)
    """
    global _is_used
    names = _as_names(name, "asked for by use_backend")
    _keep_blocks()  # before a checkpointed function opens its own, which it will open again
    _is_used = True
    token = _blocks.set((*_blocks.get(), names))
    _opened.blocks.append(names)
    _tell_jax()
    try:
        yield
    finally:
        innermost = len(_opened.blocks) - 1 - _opened.blocks[::-1].index(names)
        del _opened.blocks[innermost]
        _blocks.reset(token)
        _tell_jax()


@contextmanager
def _reopened(blocks: tuple[tuple[str, ...], ...]) -> Iterator[None]:
    """Within it these blocks are open, which were so elsewhere, and no others."""
    token, opened = _blocks.set(blocks), _opened.blocks
    _opened.blocks = list(blocks)
    _tell_jax()
    try:
        yield
    finally:
        _opened.blocks = opened
        _blocks.reset(token)
        _tell_jax()


def _tell_jax() -> None:
    opened, blocks = _opened.blocks, _blocks.get()
    value: tuple[str, ...] | None
    if tuple(opened) == blocks[len(blocks) - len(opened) :]:
        value = opened[-1] if opened else None
    else:  # tasks take turns in this thread
        value = (_MIXED,)
    _traced_under(value).__enter__()  # sets it; __exit__ would bring back what another task had set


UNKNOWN = 2**63  # bytes: more than any machine has


@dataclass(frozen=True)
class Verdict:
    """What one backend says to a problem.

    Attributes:
        name: of the backend.
        reasons: all that keeps it from the problem; empty where it accepts.
        score_bytes: what it builds that grows with Sq · Sk; 0 where its memory is linear, `UNKNOWN`
            where a size is a symbol.
    """

    name: str
    reasons: tuple[str, ...]
    score_bytes: int = 0

    @property
    def accepted(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        if not self.accepted:
            return "; ".join(self.reasons)
        return f"accepts{f', and {self.builds}' if self.score_bytes else ''}"

    @property
    def builds(self) -> str:
        if self.score_bytes == UNKNOWN:
            return "builds scores or masks over (Sq, Sk)"
        size, unit = float(self.score_bytes), "bytes"
        for larger in ("KiB", "MiB", "GiB", "TiB"):
            if size < 1024:
                break
            size, unit = size / 1024, larger
        return f"builds {size:.3g} {unit} of scores or masks over (Sq, Sk)"


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


def _as_names(backend: str | Sequence[str], source: str) -> tuple[str, ...]:
    names: tuple[str, ...] = ()
    if isinstance(backend, Sequence):
        names = (backend,) if isinstance(backend, str) else tuple(backend)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f'backend must be a name such as "jax:flash", or a list of names. Got {backend!r}.'
        )
    for name in names:
        if name not in _names():
            raise ValueError(
                f"no backend is named {name!r}. There are {', '.join(_names())}. It was {source}."
            )
    return names


def _wanted(backend: str | Sequence[str] | None) -> tuple[tuple[str, ...] | None, str]:
    """The names that are asked for, None for the automatic choice, and who asks."""
    if backend is not None:
        return _as_names(backend, source := "asked for by backend="), source
    if (preferred := _preferred()) is not None:
        return preferred, "asked for by use_backend"
    if os.environ.get(ENVIRONMENT) != _environment:
        raise RuntimeError(
            f"{ENVIRONMENT} was {_environment!r} when heedful was imported, and is "
            f"{os.environ.get(ENVIRONMENT)!r} now. What is compiled would not notice: set it before "
            "Python starts, or use heedful.use_backend."
        )
    if _environment:
        names = [name.strip() for name in _environment.split(",") if name.strip()]
        if not names:
            raise ValueError(
                f"{ENVIRONMENT} must hold names of backends, separated by commas. Got {_environment!r}."
            )
        return _as_names(names, source := f"asked for by {ENVIRONMENT}"), source
    return None, "the automatic choice"


def _automatic(problem: Problem) -> list[str]:
    """Names in the order in which the automatic choice tries them, loading as few as it can."""
    names = []
    for framework in SEARCH[problem.framework]:
        native = [_backend(name) for name in _names() if name.startswith(f"{framework}:")]
        ranked = [(getattr(b, "automatic", None), b.name) for b in native]
        names += [name for _, name in sorted(pair for pair in ranked if pair[0] is not None)]
    return names


TILE_BYTES = 2 * 2**20  # of scores, which a backend of linear memory holds too


def _first(problem: Problem, asked: Iterable[Verdict], by_memory: bool) -> Verdict | None:
    """The first verdict that accepts, asking no further; None where none does.

    By memory, one that builds more over (Sq, Sk) than a tile, and more than the caller himself holds of
    that shape, is taken only where nobody builds less: its memory is quadratic, and with a window so is
    its time. (To cross into another framework costs 0.2 ms.)
    """
    accepted = []
    for verdict in asked:
        if verdict.accepted:
            if not by_memory or _is_harmless(verdict.score_bytes, problem):
                return verdict
            accepted.append(verdict)
    return min(accepted, key=lambda verdict: verdict.score_bytes, default=None)


def _is_harmless(score_bytes: int, problem: Problem) -> bool:
    if score_bytes <= TILE_BYTES or score_bytes == UNKNOWN:
        return score_bytes != UNKNOWN
    held = [(problem.mask_shape, "bool"), (problem.bias_shape, problem.bias_dtype)]
    return score_bytes <= sum(
        math.prod(shape) * jax.numpy.dtype(dtype).itemsize
        for shape, dtype in held
        if shape is not None and 1 not in shape[2:]
    )


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


_jax_has_run = False
_is_forked = False  # from a process in which JAX had run


def _after_fork() -> None:
    global _is_forked
    _is_forked = _is_forked or _jax_has_run


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


def reasons(backend: Backend, problem: Problem) -> tuple[str, ...]:
    """Everything that keeps the backend from the problem: the crossing's reasons, then its own."""
    framework = backend.name.partition(":")[0]
    crossing: list[str] = []
    if _is_forked and "jax" in (framework, problem.framework):
        crossing.append(
            "this process was forked from one in which JAX had run, whose threads do not come along: "
            'the call would hang. Start it by "spawn" or "forkserver" (multiprocessing.get_context, '
            "DataLoader's multiprocessing_context)"
        )
    if framework == "jax" and jax.dtypes.canonicalize_dtype(problem.dtype) != problem.dtype:
        crossing.append('float64 needs jax.config.update("jax_enable_x64", True)')
    try:
        if bridge := bridge_between(problem.framework, framework):
            crossing += bridge.reasons(problem, framework)
    except LookupError as missing:
        crossing.append(str(missing))
    return (*crossing, *_own_reasons(backend, problem.compiled if framework == "jax" else problem))


def _own_reasons(backend: Backend, problem: Problem) -> tuple[str, ...]:
    """What it does not take and what else it says; where it fails to say, that is a reason."""
    part = "takes"
    try:
        refused = [] if isinstance(backend, _Unusable) else _not_taken(backend, problem)
        part = "reasons"
        own = backend.reasons(problem)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a broken backend raises, the others must go on
        return (f"its {part} fails: {in_a_line(error)}",)
    if not isinstance(own, list | tuple) or not all(isinstance(reason, str) for reason in own):
        return (f"it must give its reasons as a list of strings. Got {type(own).__name__}.",)
    return (*refused, *own)


def _not_taken(backend: Backend, problem: Problem) -> list[str]:
    """A refusal for each feature that the backend does not take."""
    lacks: Mapping[str, str] = getattr(backend, "lacks", {})
    refused = []
    for feature in sorted(problem.features.difference(getattr(backend, "takes", ()))):
        words = lacks.get(feature, f"does not take {feature}")
        sizes = problem.of_shapes.get(feature)
        refused.append(f"{words}: {sizes}" if sizes else words)
    return refused


def _verdict(backend: Backend, problem: Problem) -> Verdict:
    why = reasons(backend, problem)
    if why or not hasattr(backend, "score_bytes"):
        return Verdict(backend.name, why)
    sizes = (problem.batch, problem.q_heads, problem.q_length, problem.kv_length)
    if not all(isinstance(size, int) for size in sizes):  # a dimension of jax.export
        return Verdict(backend.name, (), UNKNOWN)
    try:
        score_bytes = operator.index(backend.score_bytes(problem))
    except Exception as error:  # whatever a broken backend raises, the others must go on
        return Verdict(backend.name, (f"its score_bytes fails: {error}",))
    return Verdict(backend.name, (), score_bytes)


def choose(problem: Problem, backend: str | Sequence[str] | None = None) -> Backend:
    """The backend for a problem. Reads no array data, so it works under any JAX trace.

    Raises:
        Refusal: nobody that was asked can; carries every reason of each.
    """
    names, source = _wanted(backend)
    said: list[Verdict] = []

    def asked() -> Iterator[Verdict]:
        for name in _automatic(problem) if names is None else names:
            said.append(_verdict(_backend(name), problem))
            yield said[-1]

    if chosen := _first(problem, asked(), by_memory=names is None):
        return _backend(chosen.name)
    reasons = {verdict.name: verdict.reasons for verdict in said}
    if not said:
        raise Refusal(f"no backend for {problem.framework} arrays is installed", reasons)
    lines = [f"{verdict.name}: {verdict}" for verdict in said]
    nobody = "cannot compute this call" if len(lines) == 1 else "none of them can compute this call"
    raise Refusal(f"{', '.join(reasons)} ({source}) {nobody}.\n  " + "\n  ".join(lines), reasons)


def explain_choice(problem: Problem, backend: str | Sequence[str] | None = None) -> Explanation:
    """What `choose` would do, and what every backend says."""
    names, source = _wanted(backend)
    tried = _automatic(problem) if names is None else names
    verdicts = {
        name: _verdict(_backend(name), problem)
        if name in tried or _is_at_hand(name)
        else Verdict(name, ("not asked, and torch is not loaded: backend= asks it",))
        for name in _names()
    }
    asked = [verdicts[name] for name in tried]
    chosen = _first(problem, asked, by_memory=names is None)
    if chosen is None:
        why = [f"none of {', '.join(v.name for v in asked)} accepts"]
    else:
        passed_over = asked[: asked.index(chosen)]
        refused = [v.name for v in passed_over if not v.accepted]
        why = [f"{', '.join(refused)} refused"] if refused else []
        why += [f"{v.name} {v.builds}" for v in passed_over if v.accepted]
    name = None if chosen is None else chosen.name
    return Explanation(problem, name, "; ".join([source, *why]), tuple(verdicts.values()))


def _is_at_hand(name: str) -> bool:
    """Whether a backend can be asked without importing torch, which takes seconds."""
    return name in _registered or not name.startswith("torch:") or "torch" in sys.modules


def run(backend: Backend, problem: Problem, operands: Operands) -> tuple[Array, Array | None]:
    """Computes the problem on the caller's arrays, across a bridge where the frameworks differ."""
    framework = backend.name.partition(":")[0]
    global _jax_has_run
    _jax_has_run = _jax_has_run or "jax" in (framework, problem.framework)
    if framework == "jax":
        problem, operands = problem.compiled, problem.as_operand(operands)
    bridge = bridge_between(problem.framework, framework)
    if bridge is None:
        return checked_run(backend, problem, operands)
    return bridge.run(backend, problem, operands)
