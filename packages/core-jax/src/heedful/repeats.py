"""Axes along which an array says the same again and again: `expand` in torch, `broadcast_to` in NumPy.

A mask or bias over (B, H, S, S) is often a view of one over (1, 1, S, S), with a stride of 0. Whoever
copies it, to cross into JAX, to change its dtype or to add it to something, makes all of it. So a
backend is handed it as what it is: an axis of 1 means the same. Keys and values of all heads that are
views of one head's are that one head's. The backend is chosen for the call as it came.

What is differentiated stays whole: its gradient is to be had element by element, of which the sums over
such axes tell nothing, and is as large as that anyway. JAX's arrays have no strides; jit sees the
broadcast itself.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from heedful import dispatch
from heedful.call.arrays import Array, broadcast_to, framework_of
from heedful.call.operands import Operands
from heedful.call.problem import Problem

Asked = tuple[Problem, Operands]


def once(backend: dispatch.Backend, problem: Problem, operands: Operands) -> Asked:
    """The same call with nothing in it that repeats, as far as the backend takes it so."""
    for repeats_less in (_scores_once, _heads_once):
        changed = repeats_less(problem, operands)
        # It may refuse that one, grouped heads for example.
        if changed is not None and not dispatch.reasons(backend, changed[0]):
            problem, operands = changed
    return problem, operands


def _scores_once(problem: Problem, operands: Operands) -> Asked | None:
    """An equal call whose mask and bias repeat nothing; None where they do not."""
    slim: dict[str, Array] = {}
    shapes: dict[str, Any] = {}
    for name in ("mask", "bias"):
        x = getattr(operands, name)
        if x is not None and not _is_differentiated(x) and (axes := _repeated(x)):
            slim[name] = _first(x, axes)
            shapes[f"{name}_shape"] = tuple(slim[name].shape)
    if not slim:
        return None
    return replace(problem, **shapes), operands._replace(**slim)


def _heads_once(problem: Problem, operands: Operands) -> Asked | None:
    """An equal call of one key head, where all heads of k and v are views of one; None where not."""
    pair = operands.k, operands.v
    if any(1 not in _repeated(x) or _is_differentiated(x) for x in pair):
        return None
    k, v = (_first(x, (1,)) for x in pair)
    return replace(problem, kv_heads=1), operands._replace(k=k, v=v)


def of_each_once(function: Callable[[Array], Array], x: Array) -> Array:
    """A function of each number by itself, which repeats what x repeats."""
    axes = _repeated(x)
    return broadcast_to(function(_first(x, axes)), x.shape) if axes else function(x)


def _repeated(x: Array) -> tuple[int, ...]:
    """The axes along which it says the same again and again."""
    match framework_of(x):
        case "numpy":
            strides = x.strides
        case "torch" if str(x.layout) == "torch.strided":
            strides = x.stride()
        case _:
            return ()
    return tuple(n for n, stride in enumerate(strides) if stride == 0 and x.shape[n] > 1)


def _first(x: Array, axes: tuple[int, ...]) -> Array:
    return x[tuple(slice(1) if n in axes else slice(None) for n in range(len(x.shape)))]


def _is_differentiated(x: Array) -> bool:
    """Whether anybody may ask for a gradient or a tangent of it."""
    if framework_of(x) != "torch":
        return False
    torch = sys.modules["torch"]
    return (
        (x.requires_grad and torch.is_grad_enabled())
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )
