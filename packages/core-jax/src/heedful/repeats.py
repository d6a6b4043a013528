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
from typing import Any

from heedful.problem import Array, Options, broadcast_to, framework_of

Call = tuple[Array, Array, Options]  # k, v and the options


def scores_once(k: Array, v: Array, options: Options) -> Call | None:
    """An equal call whose mask and bias repeat nothing; None where they do not.

    This call must have been checked: an axis of a wrong size would be a right one of 1.
    """
    slim: dict[str, Any] = {}
    for name in ("mask", "bias"):
        x: Any = options.get(name)
        if x is None or framework_of(x) is None or _is_differentiated(x):
            continue
        # The last axis of rank 2 may be the keys of (B, Sk): of 1, it would be read as (Sq, 1).
        rank = len(x.shape)
        axes = tuple(axis for axis in range(-rank, 0 if rank > 2 else -1) if _repeats(x, axis))
        if axes:
            slim[name] = _once(x, axes)
    if not slim:
        return None
    return k, v, {**options, **slim}  # type: ignore[typeddict-item]  # the same names, other arrays


def heads_once(k: Array, v: Array, options: Options) -> Call | None:
    """An equal call of one key head, where all heads of k and v are views of one; None where not."""
    heads = -2 if options.get("layout") == "bshd" else -3
    if len(k.shape) < 3 or not all(_repeats(x, heads) for x in (k, v)):
        return None
    if _is_differentiated(k) or _is_differentiated(v):
        return None
    return _once(k, (heads,)), _once(v, (heads,)), options


def of_each_once(function: Callable[[Array], Array], x: Array) -> Array:
    """A function of each number by itself, which repeats what x repeats."""
    axes = tuple(axis for axis in range(-len(x.shape), 0) if _repeats(x, axis))
    return broadcast_to(function(_once(x, axes)), x.shape) if axes else function(x)


def _repeats(x: Array, axis: int) -> bool:
    strides: Any = ()
    match framework_of(x):
        case "numpy":
            strides = x.strides
        case "torch" if str(x.layout) == "torch.strided":
            strides = x.stride()
    return bool(strides) and strides[axis] == 0 and x.shape[axis] > 1


def _once(x: Array, axes: tuple[int, ...]) -> Array:
    rank = len(x.shape)
    return x[tuple(slice(1) if axis - rank in axes else slice(None) for axis in range(rank))]


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
