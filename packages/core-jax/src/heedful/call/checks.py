"""The checks of q, k and v and of all arrays together, in the order in which a caller meets them.

Those of an option stand with it, in `options`.
"""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax

from heedful.call.arrays import Array, accumulator_of, dtype_of, framework_of, place_of, shape_of
from heedful.call.form import LAYOUTS, Form

FLOATS = ("float64", "float32", "float16", "bfloat16")
MAX_RANK = 64


def framework_of_all(arrays: Mapping[str, Array]) -> str:
    """Whose arrays they are, by name: q, k, v and those among the options. The first one says it."""
    kinds = {name: framework_of(x) for name, x in arrays.items()}
    for name, kind in kinds.items():
        if kind is None:
            raise TypeError(
                f"{name} must be a JAX array, a NumPy array or a torch tensor. "
                f"Got {type(arrays[name]).__name__}. Convert it first, for example with numpy.asarray."
            )
        if kind == "torch" and (mend := _why_not_dense(name, arrays[name])):
            raise TypeError(mend)
        if isinstance(arrays[name], jax.Array) and _is_deleted(arrays[name]):
            raise ValueError(
                f"{name} is a JAX array whose memory was given back: it was deleted, or donated to a "
                "jitted function. Use what that function returned, or do not donate it."
            )
    first, framework = next(iter(kinds.items()))
    for name, kind in kinds.items():
        # To JAX a NumPy mask or length is a constant; q, k and v themselves are never converted.
        if kind != framework and not (framework == "jax" and kind == "numpy" and name not in "qkv"):
            raise TypeError(
                f"all arrays of a call must be of one framework. Got {first} of {framework} and {name} "
                f"of {kind}. Convert one of them: nothing here moves silently between frameworks."
            )
    places = {name: place_of(x) for name, x in arrays.items() if kinds[name] == framework}
    for name, place in places.items():
        if place is not None and places[first] is not None and place != places[first]:
            raise ValueError(
                f"all arrays of a call must lie on one device. Got {first} on {places[first]} and "
                f"{name} on {place}. Move one of them: nothing here moves silently between devices."
            )
    assert framework is not None
    return framework


def _why_not_dense(name: str, x: Array) -> str | None:
    """What is wrong with a torch tensor that is no dense memory; None where nothing is."""
    layout = str(x.layout)
    if x.is_nested:
        return (
            f"{name} must be a dense tensor. Got a nested one. Pass {name}.to_padded_tensor(0.0) and "
            "its rows' lengths as q_lengths= or kv_lengths=."
        )
    if layout != "torch.strided":
        return f"{name} must be a dense tensor. Got the layout {layout}. Pass {name}.to_dense()."
    return None


def _is_deleted(x: jax.Array) -> bool:
    return not isinstance(x, jax.core.Tracer) and x.is_deleted()


def dtype_of_all(q: Array, k: Array, v: Array) -> str:
    """The one dtype of q, k and v."""
    names = {"q": dtype_of(q), "k": dtype_of(k), "v": dtype_of(v)}
    for name, dtype in names.items():
        if dtype not in FLOATS:
            raise TypeError(
                f"q, k and v must be one of {', '.join(FLOATS)}. Got {name} of {dtype}. "
                "Cast it: nothing here casts silently."
            )
    if len(set(names.values())) > 1:
        raise TypeError(
            "q, k and v must have one dtype. Got "
            + ", ".join(f"{name} of {dtype}" for name, dtype in names.items())
            + ". Cast them: nothing here casts silently."
        )
    return names["q"]


def form_and_sizes(q: Array, k: Array, v: Array, layout: Any) -> tuple[Form, dict[str, Any]]:
    """The caller's form, and the sizes of the problem by the names of its attributes."""
    if layout not in LAYOUTS:
        raise ValueError(
            f'layout must be "bhsd" or "bshd". Got {shown(layout)}. '
            "It is never guessed: say where the head axis stands."
        )
    shapes = {"q": shape_of(q), "k": shape_of(k), "v": shape_of(v)}

    def got() -> str:
        return ", ".join(f"{name} {shape}" for name, shape in shapes.items())

    rank = len(shapes["q"])
    if rank < 2 or len({len(s) for s in shapes.values()}) > 1:
        forms = (
            "(S, D), (H, S, D) or (B, H, S, D)"
            if layout == "bhsd"
            else "(S, D), (S, H, D) or (B, S, H, D)"
        )
        raise ValueError(
            f"q, k and v must have the same rank, at least 2: {forms}. Got {got()}. "
            "Add the missing axes: they are never guessed."
        )
    if rank > MAX_RANK:
        raise ValueError(
            f"q, k and v may have {MAX_RANK} axes, as many as NumPy's arrays. Got {rank}. "
            "Join the leading ones by reshape: all are batch."
        )

    def split(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int, int]:
        if rank == 2:
            return (), 1, shape[0], shape[1]
        lead, (a, b, d) = shape[:-3], shape[-3:]
        return (lead, a, b, d) if layout == "bhsd" else (lead, b, a, d)

    lead, q_heads, q_length, head_dim = split(shapes["q"])
    k_lead, kv_heads, kv_length, k_dim = split(shapes["k"])
    v_lead, v_heads, v_length, value_dim = split(shapes["v"])
    where = f"in layout {layout!r}"
    if not lead == k_lead == v_lead:
        raise ValueError(
            f"q, k and v must have the same batch axes {where}. Got {got()}. "
            "Broadcast them first: they are never repeated silently."
        )
    if k_dim != head_dim:
        raise ValueError(
            f"q and k must have the same head size, their last axis. Got {got()}. "
            "Only v may have a head size of its own."
        )
    if v_length != kv_length:
        raise ValueError(
            f"k and v must have the same length {where}. Got {got()}. "
            "If the axes are in the other order, pass the other layout=."
        )
    if v_heads != kv_heads:
        raise ValueError(
            f"k and v must have the same number of heads {where}. Got {got()}. "
            "If the axes are in the other order, pass the other layout=."
        )
    if kv_heads == 0 or q_heads == 0 or q_heads % kv_heads:
        raise ValueError(
            f"q's heads must be a multiple of k's {where}. Got {q_heads} and {kv_heads} from {got()}. "
            "If the axes are in the other order, pass the other layout=."
        )
    if head_dim == 0 or value_dim == 0:
        raise ValueError(f"head sizes must be at least 1. Got {got()}. Check the last axis.")
    return Form(rank, layout, lead), {
        "batch": math.prod(lead),
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "q_length": q_length,
        "kv_length": kv_length,
        "head_dim": head_dim,
        "value_dim": value_dim,
    }


# What several options are checked by


def check_integers(name: str, x: Array) -> None:
    """Raises TypeError for an array of anything else."""
    if not dtype_of(x).removeprefix("u").startswith("int"):
        raise TypeError(f"{name} must hold integers. Got {dtype_of(x)}. Cast it to int32.")


def check_floating(name: str, x: Array, dtype: str, if_bool: str | None = None) -> None:
    """Raises TypeError for an array that has neither the dtype of q, k and v nor its accumulator's.

    `if_bool` says how to mend a boolean one.
    """
    if dtype_of(x) not in (allowed := {dtype, accumulator_of(dtype)}):
        raise TypeError(
            f"{name} must be {' or '.join(sorted(allowed))} for {dtype} q, k, v. Got {dtype_of(x)}. "
            + (
                if_bool
                if if_bool and dtype_of(x) == "bool"
                else "Cast it: nothing here casts silently."
            )
        )


def broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether each axis, counted from the last, is full or 1."""
    return len(shape) <= len(full) and all(
        axis in (1, whole) for axis, whole in zip(shape[::-1], full[::-1], strict=False)
    )


def is_integral(x: Any) -> bool:
    """Whether it is a whole number, Python's or NumPy's; True and False are none."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def is_real(x: Any) -> bool:
    """Whether it is a real number, Python's or NumPy's; True and False are none."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def as_float(x: Any) -> float:
    """The number, infinite where no float is so large."""
    try:
        return float(x)
    except OverflowError:
        return math.copysign(math.inf, x > 0 or -1)


def shown(x: Any) -> str:
    """What came, for an error: in short, and whatever came."""
    try:
        text = repr(x)
    except ValueError:  # Python writes no integer of more than some thousand digits
        return "an integer of thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}…"
