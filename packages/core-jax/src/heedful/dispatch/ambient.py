"""What is said around a call: which backend it takes, in which part of a model it is, and who notes it.

Backends are asked for by `use_backend`, by a framework's `per_module`, or by the environment.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax

from heedful import torch_checkpoint
from heedful.dispatch import registry

Value = TypeVar("Value")

ENVIRONMENT = "HEEDFUL_BACKEND"

# Read once: what is compiled holds for the whole process.
_environment = os.environ.get(ENVIRONMENT)

# The names that a block asks for, and who asks. One without names asks for nothing: torch.compile, which
# guards on the blocks, learns by it that modules have hooks which they had not.
_Block: TypeAlias = tuple[tuple[str, ...], str]

# The blocks that are open here, outermost first.
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("heedful_blocks", default=())

# The hooks of `per_module` that are open here, each of which opens itself again when it is called.
_Hooks: TypeAlias = Callable[[], AbstractContextManager[None]]
hooks: ContextVar[tuple[_Hooks, ...]] = ContextVar("heedful_hooks", default=())

# The part of a model that runs here.
_part: ContextVar[str] = ContextVar("heedful_part", default="")

# Who notes what is chosen here: a `Record`.
record: ContextVar[Any] = ContextVar("heedful_record", default=None)

# The same for JAX, which keeps what it compiled by this value among others: a function that was traced
# under one choice is traced anew under another. JAX has one value a thread, so it is not to be had from
# `_blocks`, which a copied context takes along into another thread, and each asyncio task has its own.
_traced_under: Any = jax.make_user_context(default_value=None)
_MIXED = "the blocks of several tasks"


class _Opened(threading.local):
    """The blocks that were opened in this thread and are open still, in whichever task."""

    def __init__(self) -> None:
        self.blocks: list[_Block] = []


_opened = _Opened()
_is_used = False  # use_backend, in this process


def _preferred(blocks: Sequence[_Block]) -> _Block | tuple[None, str]:
    """What the innermost block that asks for something asks for, and who."""
    return next((block for block in reversed(blocks) if block[0]), (None, ""))


def check_trace() -> None:
    """Refuses a choice that JAX, which is tracing, would keep under another one's name."""
    if _traced_under.value == _preferred(_blocks.get())[0]:
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
    _keep()


def _keep() -> None:
    here = _blocks.get(), hooks.get(), _part.get()
    torch_checkpoint.recompute_within(partial(_reopened, *here))


class _Ambient:
    """What `use_backend` asks for here and now, as an attribute.

    torch.compile cannot look into a ContextVar, but reads an attribute anew at each call where a
    function of C stands behind it.
    """

    blocks: Any = property(_blocks.get)  # with the object itself as default


_ambient = _Ambient()


def asked() -> tuple[Any, str | None]:
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
    source = "asked for by use_backend"
    with block(as_names(name, source), source):
        yield


@contextmanager
def block(names: tuple[str, ...], source: str) -> Iterator[None]:
    """A block that asks for these names, or, without any, that only tells torch.compile of itself."""
    global _is_used
    _keep()  # before a checkpointed function opens its own, which it will open again
    _is_used = True
    opened = names, source
    token = _blocks.set((*_blocks.get(), opened))
    _opened.blocks.append(opened)
    _tell_jax()
    try:
        yield
    finally:
        innermost = len(_opened.blocks) - 1 - _opened.blocks[::-1].index(opened)
        del _opened.blocks[innermost]
        _blocks.reset(token)
        _tell_jax()


@contextmanager
def within(part: str, names: tuple[str, ...] = (), source: str = "") -> Iterator[None]:
    """Within it this part of a model runs, and these names, where there are any, are asked for."""
    _keep()
    with _set(_part, part), block(names, source) if names else nullcontext():
        yield


def part_of_the_model(*names: str) -> str:
    """What runs here, with the names of what is within it; empty where nobody has said it."""
    return ".".join(filter(None, (_part.get(), *names)))


@contextmanager
def part(name: str) -> Iterator[None]:
    """Names what runs within the block, for `heedful.recording`: a layer, a component.

    A part within a part has both names, with a dot between them.
    """
    with within(part_of_the_model(name)):
        yield


@contextmanager
def _reopened(
    blocks: tuple[_Block, ...], by_module: tuple[_Hooks, ...], part: str
) -> Iterator[None]:
    """Within it these blocks are open, which were so elsewhere, and no others."""
    opened = _opened.blocks
    try:
        with _set(_blocks, blocks), _set(hooks, ()), _set(_part, part), ExitStack() as hooked:
            _opened.blocks = list(blocks)
            _tell_jax()
            for again in by_module:
                hooked.enter_context(again())
            yield
    finally:
        _opened.blocks = opened
        _tell_jax()


@contextmanager
def _set(variable: ContextVar[Value], value: Value) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _tell_jax() -> None:
    opened, blocks = _opened.blocks, _blocks.get()
    tasks_take_turns = tuple(opened) != blocks[len(blocks) - len(opened) :]
    value = (_MIXED,) if tasks_take_turns else _preferred(opened)[0]
    _traced_under(value).__enter__()  # sets it; __exit__ would bring back what another task had set


def as_names(backend: str | Sequence[str], source: str) -> tuple[str, ...]:
    """One name or several, of which each is some backend's."""
    names: tuple[str, ...] = ()
    if isinstance(backend, Sequence):
        names = (backend,) if isinstance(backend, str) else tuple(backend)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f'backend must be a name such as "jax:flash", or a list of names. Got {backend!r}.'
        )
    for name in names:
        if name not in registry.names():
            raise ValueError(
                f"no backend is named {name!r}. There are {', '.join(registry.names())}. "
                f"It was {source}."
            )
    return names


def wanted(backend: str | Sequence[str] | None) -> tuple[tuple[str, ...] | None, str]:
    """The names that are asked for, None for the automatic choice, and who asks."""
    if backend is not None:
        return as_names(backend, source := "asked for by backend="), source
    names, source = _preferred(_blocks.get())
    if names is not None:
        return names, source
    if os.environ.get(ENVIRONMENT) != _environment:
        raise RuntimeError(
            f"{ENVIRONMENT} was {_environment!r} when heedful was imported, and is "
            f"{os.environ.get(ENVIRONMENT)!r} now. What is compiled would not notice: set it before "
            "Python starts, or use heedful.use_backend."
        )
    if _environment:
        listed = [name.strip() for name in _environment.split(",") if name.strip()]
        if not listed:
            raise ValueError(
                f"{ENVIRONMENT} must hold names of backends, separated by commas. Got {_environment!r}."
            )
        return as_names(listed, source := f"asked for by {ENVIRONMENT}"), source
    return None, "the automatic choice"
