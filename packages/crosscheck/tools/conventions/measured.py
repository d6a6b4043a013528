"""What a published function means, cell by cell: each is asked, and its answer held to the right one."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from answers import Answer, swapped
from numpy import ndarray
from oracle import BATCH, HEAD_DIM, HEADS, SQUARE, TALL, WIDE, Case, reference
from published import ABSENT, LSE, Published

DTYPES = ("float32", "float16", "bfloat16")
NO_WINDOW = {"None": None, "(None, None)": (None, None), "(−1, −1)": (-1, -1)}


def distance(found: ndarray, right: ndarray) -> float:
    """Relative RMS; infinite where one is no number."""
    if found.shape != right.shape or not np.isfinite(found).all():
        return np.inf
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def alike(found: ndarray, right: ndarray) -> bool:
    return distance(found, right) < 1e-3


def which(found: ndarray, candidates: Mapping[str, ndarray], otherwise: str = "**wrong**") -> str:
    return next((name for name, right in candidates.items() if alike(found, right)), otherwise)


def ask(
    function: Published,
    case: Case,
    dtype: str = "float32",
    differentiate: bool = False,
    **options: Any,
) -> Answer | None:
    """Its answer, scaled by D^-½ if not told otherwise; None where it raises."""
    options = {"scale": HEAD_DIM**-0.5} | options
    try:
        return function.ask(tuple(vars(case).values()), dtype, differentiate, options)
    except ImportError:
        raise  # it was not asked at all
    except Exception as error:  # whatever it raises is its answer
        asked = ", ".join([dtype, *options, *["gradients"] * differentiate])
        first = f"{type(error).__name__}: {error}".split("\n")[0]
        print(f"{function.name}: {asked}: {first}", file=sys.stderr)
        return None


# Position and empty rows


def position(function: Published) -> dict[str, str]:
    plain = ask(function, Case.of(SQUARE))
    right = reference(Case.of(SQUARE))
    documented = plain is not None and alike(plain.out, right.out)
    unscaled = function.ask(tuple(vars(Case.of(SQUARE)).values()), "float32", False, {})
    scales = {"D^-½": right.out, "1": reference(Case.of(SQUARE), scale=1.0).out}
    return {
        "layout": f"({', '.join(function.layout)})" if documented else "**not as documented**",
        "default scale": which(unscaled.out, scales),
        "causal, Sq ≠ Sk": alignment(function),
        "out of an empty row": out_of_an_empty_row(function),
        "gradients of an empty row": gradients_of_an_empty_row(function),
        "a hidden NaN reaches out": hidden_nan(function),
    }


def tril(lengths: tuple[int, int], offset: int = 0) -> ndarray:
    """What causal lets see, query i standing at i + offset."""
    return np.tri(*lengths, offset, dtype=bool)


@cache
def alignment(function: Published) -> str:
    """Of causal with more keys than queries, and with fewer where that differs."""
    found = []
    for lengths in (WIDE, TALL):
        answer = ask(function, Case.of(lengths), causal=True)
        found.append("raises" if answer is None else "**wrong**")
        for name, offset in (("top-left", 0), ("bottom-right", lengths[1] - lengths[0])):
            seen = tril(lengths, offset)
            rows = seen.any(1)  # what the others give is another question
            right = reference(Case.of(lengths), seen=seen).out[:, :, rows]
            if answer is not None and alike(answer.out[:, :, rows], right):
                found[-1] = name
    wide, tall = found
    return wide if wide == tall else f"{wide}; {tall} where Sq > Sk"


@dataclass(frozen=True)
class Hiding:
    """A way to hide keys, and what is seen then, (Sq, Sk)."""

    case: Case
    options: dict[str, Any]
    seen: ndarray

    @property
    def empty(self) -> ndarray:
        return ~self.seen.any(1)


@cache
def hiding(function: Published, with_lse: bool = False) -> Hiding:
    """By a mask, by a bias of −inf or by causal: the first that the function takes."""
    seen = np.ones(SQUARE, bool)
    seen[5], seen[:, -1] = False, False
    mask = np.broadcast_to(seen, (BATCH, HEADS, *SQUARE))
    for options in ({"mask": mask}, {"bias": np.where(mask, 0.0, -np.inf)}):
        with_it = options | ({LSE: True} if with_lse else {})
        if options.keys() <= function.names.keys() and ask(function, Case.of(SQUARE), **with_it):
            return Hiding(Case.of(SQUARE), options, seen)
    # Aligned bottom-right, some rows see nothing where there are more of them than keys.
    lengths = TALL if alignment(function) == "bottom-right" else SQUARE
    return Hiding(Case.of(lengths), {"causal": True}, tril(lengths, lengths[1] - lengths[0]))


def out_of_an_empty_row(function: Published) -> str:
    way = hiding(function)
    if not way.empty.any():
        return ABSENT
    rows = ask(function, way.case, **way.options).out[:, :, way.empty]
    mean = np.broadcast_to(way.case.v.mean(2, keepdims=True), rows.shape)
    return "mean of V" if alike(rows, mean) else the_one(rows)


def the_one(x: ndarray) -> str:
    """The one value that all of them are."""
    first = x.flat[0]
    if not np.array_equal(x, np.full_like(x, first), equal_nan=True):
        return "**anything**"
    text = f"{first:+.3g}" if np.isinf(first) else f"{first:.3g}"
    return text.replace("-", "−").replace("e+", "e").replace("nan", "NaN")


def gradients_of_an_empty_row(function: Published) -> str:
    """Which gradients are other than without the row; "none" is right."""
    way = hiding(function)
    answer = ask(function, way.case, differentiate=gradient(function) == "yes", **way.options)
    if not way.empty.any() or answer.gradients is None:
        return ABSENT
    right = reference(way.case, seen=way.seen).gradients
    named = dict(zip(("dq", "dk", "dv"), zip(answer.gradients, right, strict=True), strict=True))
    nan = [name for name, (found, _) in named.items() if np.isnan(found).any()]
    off = [name for name, pair in named.items() if not alike(*pair)]
    return f"NaN in {', '.join(nan)}" if nan else f"into {', '.join(off)}" if off else "none"


def hidden_nan(function: Published) -> str:
    """Whether a NaN in the last key, in K or in V, comes out of rows that do not see it."""
    way = hiding(function)
    rows = ~way.seen[:, -1] & ~way.empty
    reached = []
    for name in ("k", "v"):
        x = getattr(way.case, name).copy()
        x[:, :, -1] = np.nan
        out = ask(function, replace(way.case, **{name: x}), **way.options).out
        if np.isnan(out[:, :, rows]).any():
            reached.append(name.upper())
    return f"of {' and '.join(reached)}" if reached else "no"


# Log-sum-exp


def log_sum_exp(function: Published) -> dict[str, str]:
    case, way = Case.of(SQUARE), hiding(function, with_lse=True)
    plain = ask(function, case, with_lse=True)
    learned = ask(function, case, with_lse=True, differentiate=True)
    differentiate = learned is not None  # a kernel may write its LSE for a backward pass alone
    half = ask(function, case, "bfloat16", differentiate, with_lse=True)
    hidden = ask(function, way.case, "float32", differentiate, with_lse=True, **way.options)
    right = reference(case).lse
    bases = {"natural": right, "2": right / np.log(2)}
    base, of_learned = (which(heads_first(x.lse), bases) for x in (plain, learned or plain))
    letters = {BATCH: "B", HEADS: "H", SQUARE[0]: "S"}
    empty = heads_first(hidden.lse)[..., way.empty]
    return {
        "base": base if base == of_learned else f"{of_learned} where q requires grad, else {base}",
        "shape": f"({', '.join(letters.get(n, str(n)) for n in plain.lse.shape)})",
        "dtype, of bfloat16": "raises" if half is None else half.lse.dtype.name,
        "LSE of an empty row": the_one(empty) if empty.size else ABSENT,
        "gradient through the LSE": through_lse(case, learned),
    }


def through_lse(case: Case, answer: Answer | None) -> str:
    if answer is None:
        return "raises"
    if answer.gradients is None:
        return ABSENT
    rights = {"yes": reference(case, through_lse=True), "dropped": reference(case)}
    flat = {name: np.concatenate(x.gradients) for name, x in rights.items()}
    return which(np.concatenate(answer.gradients), flat)


def heads_first(lse: ndarray) -> ndarray:
    """(B, H, S) in float64, as it came or turned."""
    return (lse if lse.shape[1] == HEADS else swapped(lse)).astype(np.float64)


# Options


@cache
def options() -> dict[str, tuple[Any, dict[str, Any]]]:
    """What is asked for, by name, and what it means to the reference."""
    random = np.random.default_rng(1)
    scores = (BATCH, HEADS, *SQUARE)
    i, j = np.indices(SQUARE)
    bias = np.broadcast_to(random.standard_normal(scores[1:]), scores)
    mask = np.broadcast_to((random.random(scores[1:]) < 0.7) | (i == j), scores)
    lengths = np.array([70, 128], np.int32)
    segments = (np.arange(128, dtype=np.int32) // 50)[None].repeat(BATCH, 0)
    slopes = np.broadcast_to(2.0 ** -np.arange(1, HEADS + 1), (BATCH, HEADS))
    sinks = random.standard_normal(HEADS)
    return {
        "window": ((5, 2), {"seen": (i - 5 <= j) & (j <= i + 2)}),
        "softcap": (1.0, {"softcap": 1.0}),
        "bias": (bias, {"bias": bias}),
        "mask": (mask, {"seen": mask}),
        "lengths": (lengths, {"seen": j < lengths[:, None, None, None]}),
        "segments": (segments, {"seen": (segments[:, :, None] == segments[:, None])[:, None]}),
        "ALiBi": (slopes, {"bias": -slopes[..., None, None] * abs(i - j)}),
        "sinks": (sinks, {"sinks": sinks}),
    }


def verdict(answer: Answer | None, right: Answer, without: Answer | None = None) -> str:
    """How an option was taken, by out and by the gradients where there are any."""
    if answer is None:
        return "raises"
    if without is not None and alike(answer.out, without.out):
        return "**ignored**"
    if not alike(answer.out, right.out):
        return "**wrong**"
    pairs = [] if answer.gradients is None else zip(answer.gradients, right.gradients, strict=True)
    return "yes" if all(alike(*pair) for pair in pairs) else "**wrong gradients**"


@cache
def gradient(function: Published) -> str:
    """Of q, k and v, with nothing asked for."""
    if not function.differentiated:
        return ABSENT
    answer = ask(function, Case.of(SQUARE), differentiate=True)
    if answer is not None and answer.gradients is None:
        return "**none**, with a warning" if answer.warned else "**none, silently**"
    return verdict(answer, reference(Case.of(SQUARE)))


def of_options(function: Published) -> dict[str, str]:
    case, differentiate = Case.of(SQUARE), gradient(function) == "yes"
    cells = dict.fromkeys(options(), ABSENT)
    for name in cells.keys() & function.names.keys():
        value, means = options()[name]
        answer = ask(function, case, differentiate=differentiate, **{name: value})
        cells[name] = verdict(answer, reference(case, **means), reference(case))
    grouped = Case.of(SQUARE, kv_heads=2)
    answer = ask(function, grouped, differentiate=differentiate, grouped=True)
    cells["grouped heads"] = verdict(answer, reference(grouped))
    return cells | {"gradient": gradient(function)}


def together(function: Published) -> dict[str, str]:
    case = Case.of(SQUARE)
    cells = dict.fromkeys(("softcap and bias", "causal beside a mask", "no window is"), ABSENT)
    if {"softcap", "bias"} <= function.names.keys():
        both = {name: options()[name][0] for name in ("softcap", "bias")}
        ways = {"softcap first": False, "bias first": True}
        rights = {name: reference(case, **both, bias_first=x).out for name, x in ways.items()}
        answer = ask(function, case, **both)
        cells["softcap and bias"] = "raises" if answer is None else which(answer.out, rights)
    (hides,) = hiding(function).options
    if hides != "causal":
        mask = options()["mask"][0]
        ways = {"both": mask & tril(SQUARE), "mask alone": mask, "causal alone": tril(SQUARE)}
        rights = {name: reference(case, seen=seen).out for name, seen in ways.items()}
        told = mask if hides == "mask" else np.where(mask, 0.0, -np.inf)
        answer = ask(function, case, causal=True, **{hides: told})
        cells["causal beside a mask"] = "raises" if answer is None else which(answer.out, rights)
    if "window" in function.names and "splash" not in function.name:  # whose windows are objects
        answers = {name: ask(function, case, window=x) for name, x in NO_WINDOW.items()}
        full = reference(case).out
        open_ = [name for name, x in answers.items() if x is not None and alike(x.out, full)]
        cells["no window is"] = " or ".join(open_)
    return cells


# Errors


def errors(function: Published) -> dict[str, str]:
    """By dtype, of out and the largest of a gradient, against float64 on the rounded inputs."""
    cells = {}
    for dtype in DTYPES:
        case = Case.of(SQUARE).rounded(dtype)
        answer = ask(function, case, dtype, differentiate=gradient(function) == "yes")
        right = reference(case)
        out, largest = "raises" if answer is None else "", ABSENT
        if answer is not None:
            out = short(distance(answer.out, right.out))
        if answer is not None and answer.gradients is not None:
            pairs = zip(("dq", "dk", "dv"), answer.gradients, right.gradients, strict=True)
            error, name = max((distance(*pair), name) for name, *pair in pairs)
            largest = f"{name} {short(error)}"
        cells |= {f"{dtype}: out": out, f"{dtype}: gradients": largest}
    return cells


def short(error: float) -> str:
    return f"{error:.1e}".replace("e-0", "e-")
