"""Which backend is asked for around a call: by `use_backend`, or by the environment."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax

from heedful import torch_checkpoint
from heedful.dispatch import registry

ENVIRONMENT = "HEEDFUL_BACKEND"

# Read once: what is compiled holds for the whole process.
_environment = os.environ.get(ENVIRONMENT)

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


def _as_names(backend: str | Sequence[str], source: str) -> tuple[str, ...]:
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
