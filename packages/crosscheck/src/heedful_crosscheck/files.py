"""Calls in a safetensors file: q, k, v, options, and cotangents; `save` writes one, `read` reads it.

Tensors are named `<case>.q`, `<case>.k`, `<case>.v`, floating, (B, H, S, D), or (B, S, H, D) where the
case's layout says so, and `<case>.<option>` for each option of `heedful.attention` that is an array, as
it is passed: `<case>.mask` boolean, `<case>.bias` floating, `<case>.kv_lengths` integers. Gradients are
of `<case>.out_cotangent`, shaped like out, and `<case>.lse_cotangent`, (B, Hq, Sq), which are drawn
where they are left out. A file of a single case may leave out its name: q, k, v.

All other options stand in the file's metadata, under the key `heedful`, as JSON:

    {"format": "heedful input 1", "options": {"<case>": {"causal": true, "window": [9, null]}}}

A file without them holds calls without other options.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from heedful.call import Call
from heedful.call.arrays import framework_of
from heedful.call.options import OPTIONS
from heedful_crosscheck.callers import as_numpy

FORMAT = "heedful input 1"
ARRAYS = tuple(option.name for option in OPTIONS if option.operand is not None)
COTANGENTS = ("out_cotangent", "lse_cotangent")
TENSORS = ("q", "k", "v", *ARRAYS, *COTANGENTS)
FLOATING = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
# Of which dtypes a tensor may be; what is not here is floating.
DTYPES = {"mask": ("BOOL",)} | dict.fromkeys(
    ("q_offset", "q_lengths", "kv_lengths", "q_segment_ids", "kv_segment_ids", "dropout_seed"),
    INTEGERS,
)


class InputError(ValueError):
    """A case cannot be made: an unknown name, an unreadable file, numbers that do not fit."""


def whole(path: str | Path, most: int) -> bytes:
    """A file's bytes, as many as it says that it has; of a device there is no end.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than that.
    """
    size = Path(path).stat().st_size
    if size > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    with Path(path).open("rb") as file:
        return file.read(size)


@dataclass(frozen=True)
class Saved:
    """One call of a file.

    Attributes:
        arrays: q, k and v, float64, (B, H, S, D).
        options: all, as they are passed; floating ones float64.
        cotangents: those that there are, float64: "out" (B, Hq, Sq, Dv), "lse" (B, Hq, Sq).
        wide: whether a floating option is wider than q.
    """

    arrays: dict[str, np.ndarray]
    options: dict[str, Any]
    cotangents: dict[str, np.ndarray]
    wide: bool


def save(path: str | Path, cases: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes calls to a file that `load` and `heedful crosscheck --input` read, all of it or nothing.

        save("mine.safetensors", {"layer 3": {"q": q, "k": k, "v": v, "causal": True}})

    Args:
        path: of the file.
        cases: by name what `heedful.attention` is called with: q, k and v, JAX's, NumPy's or torch's, of
            rank 4, and options by their names; besides `out_cotangent`, shaped like out, and
            `lse_cotangent`, (B, Hq, Sq).

    Raises:
        InputError: one is no such call, and why.
    """
    tensors: dict[str, np.ndarray] = {}
    options: dict[str, dict[str, Any]] = {}
    for case, call in cases.items():
        given = {name: x for name, x in call.items() if x is not None}
        arrays = {name: as_numpy(x) for name, x in given.items() if framework_of(x) is not None}
        options[case] = {name: _json(x) for name, x in given.items() if name not in arrays}
        for name, x in options[case].items():
            if callable(x):
                raise InputError(
                    f"{path}: {name} of case {case} is a function, and no file holds one."
                )
        _checked(path, case, _widened(arrays), options[case], wide=False)
        tensors |= {f"{case}.{name}": np.array(x, order="C") for name, x in arrays.items()}
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    facts = {"format": FORMAT, "options": options}
    safetensors.numpy.save_file(tensors, part, {"heedful": json.dumps(facts)})
    part.replace(path)


def read(path: str | Path) -> dict[str, Saved]:
    """The calls of a file, by name.

    Raises:
        InputError: the file cannot be read, or what is in it is no such call.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    dtypes: dict[str, dict[str, str]] = {}
    try:
        with safetensors.safe_open(path, "numpy") as file:
            options = _options(path, (file.metadata() or {}).get("heedful"))
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                case, _, part = name.rpartition(".")
                dtype = file.get_slice(name).get_dtype()
                _check_tensor(path, name, part, dtype)
                found.setdefault(case, {})[part] = file.get_tensor(name)
                dtypes.setdefault(case, {})[part] = dtype
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    if not found:
        raise InputError(f"{path} holds no tensors.")
    if unknown := options.keys() - found.keys():
        raise InputError(f"{path} has options of {sorted(unknown)}, and no tensors of them.")
    calls = {}
    for case in dict.fromkeys((*options, *found)):  # as they were saved
        arrays = found[case]
        of_options = {n: t for n, t in dtypes[case].items() if n in ARRAYS and t in FLOATING}
        wide = any(dtype != dtypes[case].get("q") for dtype in of_options.values())
        name = case or Path(path).stem
        calls[name] = _checked(path, name, _widened(arrays), options.get(case, {}), wide)
    return calls


def _options(path: str | Path, text: str | None) -> dict[str, dict[str, Any]]:
    """By case the options that are no arrays."""
    if text is None:
        return {}
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its metadata `heedful` is no JSON: {error}") from error
    options = facts.get("options") if isinstance(facts, dict) else None
    if not isinstance(options, dict) or facts.get("format") != FORMAT:
        got = facts.get("format") if isinstance(facts, dict) else facts
        raise InputError(
            f"{path}: its metadata `heedful` must be of format {FORMAT!r}, with options. Got {got!r}. "
            "heedful_crosscheck.save writes it."
        )
    for case, of_it in options.items():
        if not isinstance(of_it, dict):
            raise InputError(f"{path}: the options of case {case} must be by name. Got {of_it!r}.")
    return {
        case: {n: tuple(x) if isinstance(x, list) else x for n, x in of_it.items()}
        for case, of_it in options.items()
    }


def _check_tensor(path: str | Path, name: str, part: str, dtype: str) -> None:
    if part not in TENSORS:
        raise InputError(
            f"{path}: tensors are named <case>.q, or q alone, and so are {', '.join(TENSORS[1:])}. "
            f"Got {name!r}."
        )
    if dtype not in DTYPES.get(part, FLOATING):
        kind = {"BOOL": "boolean", "I64": "integers"}.get(DTYPES.get(part, ("",))[0], "floating")
        raise InputError(f"{path}: {part} is {kind}. Got {name} of {dtype}.")


def _checked(
    path: str | Path, case: str, arrays: dict[str, np.ndarray], options: dict[str, Any], wide: bool
) -> Saved:
    """A call in canonical form.

    Raises:
        InputError: it is none.
    """
    if lacking := [part for part in "qkv" if part not in arrays]:
        raise InputError(
            f"{path}: case {case} lacks {', '.join(lacking)}. A case is q, k and v, and what else is "
            "asked."
        )
    heads_last = options.get("layout") == "bshd"
    for part in "qkv":
        if arrays[part].ndim != 4:
            form = "(B, S, H, D)" if heads_last else "(B, H, S, D)"
            raise InputError(
                f"{path}: {part} of case {case} must be {form}. Got {arrays[part].shape}."
            )
    for part in ("q", "k", "v", *COTANGENTS):
        if part in arrays and not np.isfinite(arrays[part]).all():
            raise InputError(
                f"{path}: {part} of case {case} must be finite, hidden rows too. Put zeros there: the "
                "crosscheck itself fills K and V that nobody sees with NaN."
            )
    cotangents = {n: arrays[n] for n in COTANGENTS if n in arrays}
    given = {n: x for n, x in arrays.items() if n not in COTANGENTS}
    if twice := options.keys() & given.keys():
        raise InputError(
            f"{path}: case {case} has {', '.join(sorted(twice))} as tensor and as number."
        )
    try:
        problem = Call.of(**given, **options).problem
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: case {case}: {error}") from error
    rows = (problem.batch, problem.q_heads, problem.q_length)
    of_out = (*rows, problem.value_dim)
    shapes = {
        "out_cotangent": (of_out[0], of_out[2], of_out[1], of_out[3]) if heads_last else of_out,
        "lse_cotangent": rows,
    }
    for name, x in cotangents.items():
        if x.shape != shapes[name]:
            raise InputError(
                f"{path}: {name} of case {case} must be {shapes[name]}. Got {x.shape}."
            )

    def canonical(x: np.ndarray) -> np.ndarray:
        return x.swapaxes(1, 2) if heads_last and x.ndim == 4 else x

    return Saved(
        {name: canonical(given.pop(name)) for name in "qkv"},
        options | given,
        {name.removesuffix("_cotangent"): canonical(x) for name, x in cotangents.items()},
        wide,
    )


def _widened(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Floating ones float64, bfloat16 too, which NumPy holds for no floating type."""
    return {n: x if x.dtype.kind in "biu" else x.astype(np.float64) for n, x in arrays.items()}


def _json(x: Any) -> Any:
    """NumPy's numbers as Python's, a pair as a list."""
    if isinstance(x, np.generic):
        return x.item()
    return [_json(side) for side in x] if isinstance(x, tuple | list) else x
