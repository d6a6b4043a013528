"""Calls without numbers: shapes and dtypes are all that `heedful.explain` reads.

What is asked has the names of the crosscheck's factors: an option's, or "segments" and "dropout" for the
two options of each. An array gets the shape that its axes have, and anything else a value of its factor.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np

from heedful.call.options import NUMBERS
from heedful_crosscheck.factors import AXES, FACTORS, FUNCTIONS
from heedful_crosscheck.factors import OPTIONS as FACTOR_OPTIONS
from heedful_crosscheck.files import ARRAYS, DTYPES
from heedful_crosscheck.recipes import Sizes

OF_SCORES = ("mask", "bias")  # whose axes are full or 1, as the caller says
USUAL: dict[str, Any] = {"return_lse": True, "dropout_rate": 0.2}
# Factors of several options, which are asked for together.
SEVERAL: dict[str, tuple[str, ...]] = {
    factor: tuple(next(value for value in FACTORS[factor].values() if value))
    for factor in ("segments", "dropout")
}
ASKABLE = (*(factor for factor in FACTOR_OPTIONS if factor != "layout"), "return_lse")


def sizes(shape: str, kv_heads: int | None, kv_length: int | None, value_dim: int | None) -> Sizes:
    """Sizes of q's "B,Hq,Sq,D" and of what K and V have otherwise.

    Raises:
        ValueError: that is no shape of q.
    """
    try:
        b, hq, sq, d = (int(size) for size in shape.split(","))
    except ValueError:
        raise ValueError(f"a shape is q's, B,Hq,Sq,D, as 2,16,4096,128. Got {shape!r}.") from None
    given = (kv_heads, kv_length, value_dim)
    hkv, sk, dv = (x if own is None else own for own, x in zip(given, (hq, sq, d), strict=True))
    return Sizes(b, hq, hkv, sq, sk, d, dv)


def asked(said: Sequence[str]) -> dict[str, str | None]:
    """What `call` takes, of "name" and "name=value"."""
    parts = (text.partition("=") for text in said)
    return {name: value if equals else None for name, equals, value in parts}


def call(
    framework: str, sizes: Sizes, dtype: str, asked: Mapping[str, str | None]
) -> dict[str, Any]:
    """What `heedful.explain` takes for a call of these sizes; no memory is filled.

    Args:
        framework: whose arrays: "jax", "numpy" or "torch".
        sizes: B, Hq, Hkv, Sq, Sk, D, Dv.
        dtype: of q, k, v and floating options.
        asked: by names of `ASKABLE`, with values or None for what is usual. A value is the axes of a
            mask or bias, of "bhqk", that are not 1; and what is no array, as JSON.

    Raises:
        ValueError: an unknown option or framework, or a value that is none of it.
    """
    b, hq, hkv, sq, sk, d, dv = sizes
    shapes = {"q": (b, hq, sq, d), "k": (b, hkv, sk, d), "v": (b, hkv, sk, dv)}
    arguments = {name: array(framework, shape, dtype) for name, shape in shapes.items()}
    if "q_offset" in asked:  # which nothing asks for without a place
        asked = {"causal": None, **asked}
    for name, said in asked.items():
        if name not in ASKABLE:
            raise ValueError(f"what can be asked is {', '.join(ASKABLE)}. Got {name!r}.")
        if name in SEVERAL and said is not None:
            raise ValueError(
                f"{name} is {' and '.join(SEVERAL[name])}, and has no value. Got {said!r}."
            )
        for option in SEVERAL.get(name, (name,)):
            arguments[option] = _argument(framework, option, sizes, dtype, said)
    return arguments


def _argument(framework: str, name: str, sizes: Sizes, dtype: str, said: str | None) -> Any:
    if name not in ARRAYS or (name in NUMBERS and said is not None):
        return _value(name, said)
    its_dtype = {"BOOL": "bool", "I64": "int32"}.get(DTYPES.get(name, ("",))[0], dtype)
    return array(framework, _shape(name, sizes, said), its_dtype)


def array(framework: str, shape: tuple[int, ...], dtype: str) -> Any:
    """An array of a shape; one number, however large it is.

    Raises:
        ValueError: there is no such framework here.
    """
    match framework:
        case "jax":
            return jax.ShapeDtypeStruct(shape, np.dtype(dtype))
        case "numpy":
            return np.broadcast_to(np.zeros((), dtype), shape)
        case "torch" if find_spec("torch"):
            import torch

            where = "cuda" if torch.cuda.is_available() else "cpu"
            return torch.zeros((), dtype=getattr(torch, dtype), device=where).expand(shape)
    raise ValueError(
        f"arrays are of jax, numpy or torch, where it is installed. Got {framework!r}."
    )


def _shape(name: str, sizes: Sizes, said: str | None) -> tuple[int, ...]:
    full = dict(zip("bhqk", sizes.scores, strict=True))
    if name in OF_SCORES:
        axes = "bhqk" if said is None else said
        if not set(axes) <= set(full):
            raise ValueError(f'{name}= has the axes of "bhqk" that are not 1. Got {said!r}.')
        return tuple(full[axis] if axis in axes else 1 for axis in "bhqk")
    if said is not None:
        raise ValueError(f"{name} has no value: only its shape counts. Got {said!r}.")
    return tuple(full[axis] for axis in AXES[name])


def _value(name: str, said: str | None) -> Any:
    if said is None:
        return USUAL.get(name) or next(x for x in FACTORS[name].values() if x is not None)
    if name in FUNCTIONS:
        raise ValueError(f"{name} is a function: only whether there is one counts. Got {said!r}.")
    for text in (said, f"[{said}]"):  # a pair without brackets
        try:
            value = json.loads(text)
        except ValueError:
            continue
        return tuple(value) if isinstance(value, list) else value
    return said  # a word
