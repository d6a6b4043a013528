"""Axes along which an array says the same again and again: `expand` in torch, `broadcast_to` in NumPy.

A mask or bias over (B, H, S, S) is often a view of one over (1, 1, S, S), with a stride of 0. Whoever
copies it, to cross into JAX, to change its dtype or to add it to something, makes all of it. So it is
asked about as what it is before anybody sees it: an axis of 1 means the same. Keys and values of all
heads that are views of one head's are that one head's.

What is differentiated stays whole: its gradient is to be had element by element, of which the sums over
such axes tell nothing, and is as large as that anyway. JAX's arrays have no strides; jit sees the
broadcast itself.
"""

import sys
from typing import Any

from heedful.problem import Array, Options, framework_of


def without_repeats(k: Array, v: Array, options: Options) -> tuple[Array, Array, Options]:
    """The arguments of an equal call that repeats nothing; the very same ones where none does.

    The call must have been checked: an axis of a wrong size would be a right one of 1.

    Args:
        k, v: keys and values, of either layout.
        options: of `heedful.attention`.
    """
    slim = {n: x for n in ("mask", "bias") if (x := _scores_once(options.get(n))) is not None}
    if len(k.shape) > 2:
        heads = -2 if options.get("layout") == "bshd" else -3
        if all(_repeats(x, heads) and not _is_differentiated(x) for x in (k, v)):
            k, v = (_once(x, (heads,)) for x in (k, v))
    return k, v, {**options, **slim} if slim else options  # type: ignore[typeddict-item]


def _scores_once(x: Array | None) -> Array | None:
    """A mask or bias with all its repeats taken away; None where there are none."""
    if x is None or framework_of(x) is None or _is_differentiated(x):
        return None
    rank = len(x.shape)
    # The last axis of rank 2 may be the keys of (B, Sk): of 1, it would be read as (Sq, 1).
    axes = tuple(axis for axis in range(-rank, 0 if rank > 2 else -1) if _repeats(x, axis))
    return _once(x, axes) if axes else None


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
