"""A backend for each module of a model, by its name."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from heedful.dispatch import ambient
from heedful.dispatch.by_module import NO_CHOICES, Choices


@contextmanager
def per_module(
    model: nn.Module, choices: Mapping[str, str | Sequence[str]] = NO_CHOICES
) -> Iterator[None]:
    """Within the block, a model's modules take the backend that is chosen for their names.

        choices = {"model.layers.0": "jax:flash", "*": "torch:sdpa-flash"}
        with heedful_torch.per_module(model, choices), heedful.recording() as record:
            model(tokens)
        print(record)

    Names are those of ``model.named_modules()``. A pattern (of fnmatch) holds for the modules that it
    matches and for all within them; of several the first wins; where none holds, it is as without the
    block. A backend is as in `heedful.attention`: a name runs or raises. It comes before `use_backend`
    around the model; `backend=`, and `use_backend` within a module and around its call, come before it.
    Without choices the modules are only named for `heedful.recording`.

    A choice is made by hooks: for a module that is called, not for one whose `forward` is, and for calls
    of heedful's attention alone, which the record shows. The block is that of its thread. What
    `torch.utils.checkpoint` recomputes is recomputed under the choices of its first pass, wherever
    `backward` is called. `torch.compile` ends a graph at each module for which there is a choice, and
    raises with fullgraph=True; what it compiled before is compiled anew.

    Raises:
        TypeError, ValueError: no backend or no module has such a name, a pattern decides nothing, or a
            module has two names with two choices.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module. Got {type(model).__name__}.")
    model = getattr(model, "_orig_mod", model)  # as torch.compile keeps it
    table = Choices.of(choices)
    hooked = _Hooked(_places(model, table))
    # torch.compile does not look for hooks at what it compiled, and looks at the blocks.
    told = ambient.block((), f"per_module {id(model)} {table}") if choices else nullcontext()
    with told, hooked():
        yield


class _Place(NamedTuple):
    """A module's name, the backends that are asked for in it, none perhaps, and who asks."""

    part: str
    names: tuple[str, ...]
    source: str


def _places(model: nn.Module, table: Choices) -> dict[nn.Module, _Place]:
    found: dict[nn.Module, _Place] = {}
    decided, named = set(), []
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_a_leaf_of_torchs(module):
            continue
        path = tuple(filter(None, name.split(".")))
        decided.add(table.pattern_at(path))
        named.append(name)
        place = _Place(ambient.part_of_the_model(*path), *table.at(path))
        if found.setdefault(module, place).names != place.names:
            raise ValueError(
                f"{found[module].part} and {place.part} are one module, of which two choices are made: "
                f"{found[module].names or 'none'} and {place.names or 'none'}. Choose one for both."
            )
    table.check_each_decides(decided, named)
    return found


def _is_a_leaf_of_torchs(module: nn.Module) -> bool:
    """Linear and its like, in which nobody calls attention."""
    return type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None


class _Entered(threading.local):
    """The modules that run in this thread, outermost first, each with what is open for it."""

    def __init__(self) -> None:
        self.modules: list[tuple[nn.Module, AbstractContextManager[None]]] = []


_entered = _Entered()
_registering = threading.Lock()


class _Hooked:
    """Hooks at modules, as long as somebody has it open. In a thread that has not, they do nothing."""

    def __init__(self, places: dict[nn.Module, _Place]) -> None:
        self.places = places
        self.handles: list[RemovableHandle] = []
        self.opened = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with _registering:
            self.opened += 1
            if self.opened == 1:
                self.handles = list(self._registered())
        token, depth = ambient.hooks.set((*ambient.hooks.get(), self)), len(_entered.modules)
        try:
            yield
        finally:
            _close(depth)
            ambient.hooks.reset(token)
            with _registering:
                self.opened -= 1
                if self.opened == 0:
                    for handle in self.handles:
                        handle.remove()

    def _registered(self) -> Iterator[RemovableHandle]:
        for module, place in self.places.items():
            hook = torch.compiler.disable if place.names else _unless_compiling
            enter, leave = hook(partial(self._enter, place)), hook(_leave)
            yield module.register_forward_pre_hook(enter)
            yield module.register_forward_hook(leave, always_call=True)

    def _enter(self, place: _Place, module: nn.Module, _: Any) -> None:
        if self in ambient.hooks.get():
            opened = ambient.within(*place)
            opened.__enter__()
            _entered.modules.append((module, opened))


def _leave(module: nn.Module, *_: Any) -> None:
    running = [entered for entered, _ in _entered.modules]
    if module in running:  # not where a hook before ours has raised
        _close(len(running) - 1 - running[::-1].index(module))


def _close(depth: int) -> None:
    """What is open for all modules but the outermost so many."""
    while len(_entered.modules) > depth:
        _entered.modules.pop()[1].__exit__(None, None, None)


def _unless_compiling(function: Callable[..., None]) -> Callable[..., None]:
    """A name is no reason to end a graph."""

    def hook(*args: Any) -> None:
        if not torch.compiler.is_compiling():
            function(*args)

    return hook
