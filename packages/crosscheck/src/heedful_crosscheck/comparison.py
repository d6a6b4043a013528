"""Two functions against each other: outputs and gradients, on anybody's tensors.

For whoever has no interest in the contract: f and g are any functions of arrays, of any two frameworks.
Which of them is right is said by float64: each is run on float64 copies of the inputs too, where it can
be, and what comes out is what rounding is measured by.

- Where both have float64 and lie apart there, they are two functions: no rounding explains it.
- Otherwise each may be twice as far from float64 as the other is, plus the floor of the dtype, and no
  farther than its ceiling (`tolerance`): the one is the yardstick of the other.
- Where neither has float64, they may lie four floors apart.

A function that casts to float32 inside has no float64: its float64 results are float32 numbers.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from heedful.call.arrays import framework_of
from heedful.dispatch.registry import in_a_line
from heedful_crosscheck.ask import float64_where_asked
from heedful_crosscheck.callers import Caller, Named, as_numpy, caller_of, found_framework
from heedful_crosscheck.layouts import LAYOUTS
from heedful_crosscheck.tolerance import (
    CEILING,
    PROJECTION_FLOOR,
    RMS_FLOOR,
    SIGMAS,
    WORST_ROW_TIMES,
    Errors,
    Judgement,
    Standard,
    measure,
)

WIDTH = 110  # of the table where it is not printed to a terminal
FLOORS_APART = 4
# What floors and ceilings there are, the finest first.
FINENESS = ("float64", "float32", "float16", "bfloat16")

Inputs = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """What is said of one output or gradient.

    Attributes:
        tensor: "out", "out 0" of several, or "d" and an input's name.
        agrees: whether both may be called the same.
        largest: the largest absolute difference.
        apart: of g from f, relative; of `tolerance.measure`.
        of_f, of_g: the error of each against float64; None where there is none.
        message: what differs, where and by how much; empty where they agree.
    """

    tensor: str
    agrees: bool
    largest: float
    apart: Errors
    of_f: Errors | None
    of_g: Errors | None
    message: str


@dataclass(frozen=True)
class Comparison:
    """What came of `compare`; print it, or read it.

    Attributes:
        names: of f and g.
        differences: of every output and gradient.
        notes: what could not be had, and why.
    """

    names: tuple[str, str]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def agree(self) -> bool:
        """Whether all outputs and gradients do."""
        return all(difference.agrees for difference in self.differences)

    def __getitem__(self, tensor: str) -> Difference:
        return {difference.tensor: difference for difference in self.differences}[tensor]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        f, g = self.names
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("tensor", "verdict", "largest", "apart", f"{f}'s error", f"{g}'s error"):
            table.add_column(heading)
        for x in self.differences:
            verdict = Text("agree", "green") if x.agrees else Text("differ", "bold red")
            errors = (_short(e and e.rms) for e in (x.apart, x.of_f, x.of_g))
            table.add_row(x.tensor, verdict, _short(x.largest), *errors)
        yield table
        for x in self.differences:
            if x.message:
                yield Text.assemble(("✗ ", "bold red"), f"{x.tensor}: {x.message}")
        for note in self.notes:
            yield Text.assemble(("! ", "yellow"), note)
        ending = "agree" if self.agree else "differ"
        yield Text(f"{f} and {g} {ending}.", "bold green" if self.agree else "bold red")

    def __str__(self) -> str:
        console = Console(width=WIDTH, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def compare(
    f: Callable[..., Any],
    g: Callable[..., Any],
    inputs: Inputs,
    *,
    cotangents: Sequence[Any] | None = None,
    seed: int = 0,
    frameworks: tuple[str | None, str | None] = (None, None),
) -> Comparison:
    """Compares what two functions return and what gradients they have, on the same inputs.

        print(compare(F.scaled_dot_product_attention, jax_attention, [q, k, v]))

    Args:
        f, g: functions of JAX's, torch's or NumPy's arrays that return one, or several in a tuple or
            mapping; JAX's are compiled, NumPy's have no gradients.
        inputs: what both are called with, by position, or by name where it is a mapping: arrays of any
            framework, of which each function gets contiguous copies of its own, a torch function on the
            GPU where there is one and no tensor came on the CPU; and anything else as it is. Floating
            arrays are differentiated.
        cotangents: of each floating output the array that the gradients are of; None: standard normal
            numbers, the same for both.
        seed: of these.
        frameworks: "jax", "torch" or "numpy", of f and of g; None: it is tried.

    Returns:
        the comparison; `agree` is its verdict, `str` of it the table.

    Raises:
        TypeError: a framework cannot be found out.
        ValueError: f and g return other numbers of arrays, or arrays of other shapes.
        Whatever f or g raises on the inputs as they are.
    """
    titles = _titles(f, g)
    named = _named(f, inputs)
    given = inputs.values() if isinstance(inputs, Mapping) else inputs
    on_gpu = not any(framework_of(x) == "torch" and x.device.type == "cpu" for x in given)
    asked = [
        _Asked.of(function, title, named, isinstance(inputs, Mapping), framework, on_gpu)
        for function, title, framework in zip((f, g), titles, frameworks, strict=True)
    ]
    outputs = [one.outputs() for one in asked]
    _check_alike(titles, *outputs)
    drawn = _cotangents(outputs[0], cotangents, seed)
    answers = [one.answer(drawn) for one in asked]
    notes: list[str] = []
    wide = [_widely(one, drawn, notes) for one in asked]
    tensors = [name for name in answers[0] if name in answers[1]]
    notes += [
        f"{one.title} is NumPy's, and has no gradients"
        for one in asked
        if one.caller.framework == "numpy"
    ]
    rights = [next((w[t] for w in wide if t in w), None) for t in tensors]
    scale = max((_rms(x) for x in rights if x is not None), default=0.0)
    coarsest = _coarsest([x for x in named.values() if isinstance(x, np.ndarray)])
    exact = [name for name in outputs[0] if name not in tensors]
    differences = [
        *(
            _difference(
                titles, t, [a[t] for a in answers], [w.get(t) for w in wide], coarsest, scale
            )
            for t in tensors
        ),
        *(_exact_difference(titles, name, *(found[name] for found in outputs)) for name in exact),
    ]
    return Comparison(titles, tuple(differences), tuple(notes))


def _titles(f: Callable[..., Any], g: Callable[..., Any]) -> tuple[str, str]:
    """What they are called: by their own names where these tell them apart."""
    one, other = (getattr(x, "__name__", type(x).__name__).strip("<>") for x in (f, g))
    return ("f", "g") if one == other or "lambda" in (one, other) else (one, other)


def _named(f: Callable[..., Any], inputs: Inputs) -> dict[str, Any]:
    """The inputs by name, arrays as NumPy's."""
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    else:
        try:
            parameters = inspect.signature(f).parameters.values()
            positional = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
            names = positional[: len(inputs)]
        except (TypeError, ValueError):  # what is no Python has none
            names = []
        names += [str(n) for n in range(len(names), len(inputs))]
        named = dict(zip(names, inputs, strict=True))
    return {n: x if framework_of(x) is None else as_numpy(x) for n, x in named.items()}


class _Asked:
    """One of the two functions, with the inputs in its framework.

    Attributes:
        caller: its framework.
        results: names of what it returned, once it was asked.
    """

    def __init__(
        self, function: Callable[..., Any], title: str, named: Named, by_name: bool, caller: Caller
    ):
        self.function, self.title, self.named = function, title, named
        self.by_name, self.caller = by_name, caller
        self.results: list[str] = []

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        title: str,
        named: Named,
        by_name: bool,
        framework: str | None,
        on_gpu: bool,
    ) -> "_Asked":
        """The same, its framework found out where nobody says it."""

        def tried(caller: Caller) -> tuple[Callable[..., Any], list[Any]]:
            one = cls(function, title, named, by_name, caller)
            arrays = one.arrays()

            def first(*xs: Any) -> Any:
                return one.called(dict(zip(arrays, xs, strict=True)))[0]

            return first, list(arrays.values())

        with _x64_for(named):
            found = framework or found_framework(title, tried, on_gpu)
        return cls(function, title, named, by_name, caller_of(found, on_gpu))

    def arrays(self) -> Named:
        """Copies in its framework."""
        return {
            name: self.caller.array(x, LAYOUTS["packed"])
            for name, x in self.named.items()
            if isinstance(x, np.ndarray)
        }

    def called(self, arrays: Named) -> tuple[Any, ...]:
        """What it returns, one after the other."""
        given = self.named | arrays
        found = self.function(**given) if self.by_name else self.function(*given.values())
        if isinstance(found, Mapping):
            self.results = list(found)
            return tuple(found.values())
        if isinstance(found, tuple | list):
            self.results = [f"out {n}" for n in range(len(found))]
            return tuple(found)
        self.results = ["out"]
        return (found,)

    def outputs(self) -> dict[str, np.ndarray]:
        """What it returns, by name; before anything is differentiated."""
        with _x64_for(self.named):
            found = self.called(self.arrays())
            return dict(zip(self.results, map(self.caller.to_numpy, found), strict=True))

    def answer(self, cotangents: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs, and of floating inputs the gradients, where it has any."""
        with _x64_for(self.named):
            arrays = self.arrays()
            primals = {n: x for n, x in arrays.items() if _floats(self.named[n])}
            constants = {n: x for n, x in arrays.items() if n not in primals}
            given = [self.caller.array(x, LAYOUTS["packed"]) for x in cotangents.values()]
            found, gradients = self.caller.pull_back(
                _Floating(self, tuple(cotangents)), primals, constants, given
            )
            answer = dict(zip(cotangents, map(self.caller.to_numpy, found), strict=True))
            of = gradients or {}
            return answer | {f"d{n}": self.caller.to_numpy(x) for n, x in of.items()}

    def widened(self) -> "_Asked":
        """The same on float64 copies."""
        wide = {n: x.astype(np.float64) if _floats(x) else x for n, x in self.named.items()}
        return _Asked(self.function, self.title, wide, self.by_name, self.caller)


class _Floating:
    """A function's floating results; hashable, since JAX keeps what it compiles by it."""

    def __init__(self, asked: _Asked, names: tuple[str, ...]):
        self.asked, self.names = asked, names

    def __call__(self, primals: Named, constants: Named) -> tuple[Any, ...]:
        found = self.asked.called({**primals, **constants})
        return tuple(x for n, x in zip(self.asked.results, found, strict=True) if n in self.names)


def _check_alike(titles: tuple[str, str], of_f: Named, of_g: Named) -> None:
    f, g = titles
    facts = [[(n, x.shape, _floats(x)) for n, x in of.items()] for of in (of_f, of_g)]
    if facts[0] != facts[1]:
        said = [", ".join(f"{n} {x.dtype} {x.shape}" for n, x in of.items()) for of in (of_f, of_g)]
        raise ValueError(
            f"{f} and {g} must return the same arrays, of the same shapes. Got {said[0]} of {f}, and "
            f"{said[1]} of {g}. Give both the same layout, within a function of your own."
        )


def _cotangents(
    outputs: Mapping[str, np.ndarray], given: Sequence[Any] | None, seed: int
) -> dict[str, np.ndarray]:
    floating = {n: x for n, x in outputs.items() if _floats(x)}
    if given is None:
        random = np.random.default_rng(seed)
        return {n: random.standard_normal(x.shape).astype(x.dtype) for n, x in floating.items()}
    found = dict(zip(floating, map(as_numpy, given), strict=False))
    if len(given) != len(floating) or any(x.shape != floating[n].shape for n, x in found.items()):
        raise ValueError(
            f"cotangents must be one for each floating output, {[x.shape for x in floating.values()]}. "
            f"Got {[x.shape for x in map(as_numpy, given)]}."
        )
    return found


def _widely(
    asked: _Asked, cotangents: Mapping[str, np.ndarray], notes: list[str]
) -> dict[str, np.ndarray]:
    """Its answer in float64, as far as it has one; a note where it has none."""
    try:
        wide = {n: x.astype(np.float64) for n, x in cotangents.items()}
        found = asked.widened().answer(wide)
    except Exception as error:  # whatever a kernel does with a dtype that is not for it
        first, *_ = in_a_line(error).splitlines()
        notes.append(f"no float64 of {asked.title}: {first}")
        return {}
    kept = {n: x for n, x in found.items() if x.dtype == np.float64 and not _is_narrow(x)}
    if not kept:
        notes.append(f"no float64 of {asked.title}: it computes in a narrower dtype inside")
    return kept


def _is_narrow(x: np.ndarray) -> bool:
    """Whether all of its numbers are float32's."""
    with np.errstate(over="ignore"):
        return bool((x.astype(np.float32).astype(np.float64) == x)[np.isfinite(x)].all())


# What is said of one tensor


def _difference(
    titles: tuple[str, str],
    tensor: str,
    answers: Sequence[np.ndarray],
    wide: Sequence[np.ndarray | None],
    coarsest: str,
    scale: float,
) -> Difference:
    dtype = _coarsest(answers, coarsest)
    x, y = (_in_rows(a) for a in answers)
    with np.errstate(invalid="ignore"):
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        finite = np.isfinite(x) & np.isfinite(y)
    strange = ~finite & ~same
    x, y = np.where(finite, x, 0), np.where(finite, y, 0)
    rights = [None if w is None else np.where(finite, np.nan_to_num(_in_rows(w)), 0) for w in wide]
    largest, apart = float(np.abs(y - x).max(initial=0)), _apart(y, x, scale)
    found = Difference(tensor, False, largest, apart, None, None, "")
    if strange.any():
        where = _where(strange.argmax(), answers[0])
        first, second = (a.reshape(-1)[strange.argmax()] for a in answers)
        f, g = titles
        return replace(
            found,
            message=f"{f} has {first:.3g} where {g} has {second:.3g}, at {where}, and so in "
            f"{strange.sum()} of {strange.size} places",
        )
    worst = _where(np.abs(y - x).argmax(), answers[0]) if x.size else ""
    right = next((r for r in rights if r is not None), None)
    if right is None:
        floors = Errors(
            FLOORS_APART * RMS_FLOOR[dtype],
            FLOORS_APART * WORST_ROW_TIMES * RMS_FLOOR[dtype],
            FLOORS_APART * PROJECTION_FLOOR[dtype] + SIGMAS * _noise(y, x, scale),
        )
        over = _over(apart, floors)
        said = (
            f"{over}, without float64 of either; the largest difference at {worst}" if over else ""
        )
        return replace(found, agrees=not over, message=said)
    of_f, of_g = (_judged(right, one, other, dtype, scale) for one, other in ((x, y), (y, x)))
    found = replace(found, of_f=of_f.errors, of_g=of_g.errors)
    if rights[0] is not None and rights[1] is not None:
        meant = _apart(rights[1], rights[0], scale)
        limit = CEILING["float64"]
        if meant.rms > limit or meant.worst_row > WORST_ROW_TIMES * limit:
            return replace(
                found,
                message=f"they compute something else: {meant.rms:.2g} apart in float64 too, which is "
                f"no rounding; the largest difference, {largest:.2g}, at {worst}",
            )
    said = "; ".join(
        f"{title} is off by {over}"
        for title, judgement in zip(titles, (of_f, of_g), strict=True)
        if (over := _over(judgement.errors, judgement.limits))
    )
    where = f"; the largest difference, {largest:.2g}, at {worst}" if said else ""
    return replace(found, agrees=not said, message=said + where)


def _exact_difference(
    titles: tuple[str, str], tensor: str, x: np.ndarray, y: np.ndarray
) -> Difference:
    """Of integers and booleans: any is one."""
    f, g = titles
    differ, message = np.asarray(x != y), ""
    if differ.any():
        first, at = differ.argmax(), _where(differ.argmax(), x)
        said = f"{f} has {x.reshape(-1)[first]} where {g} has {y.reshape(-1)[first]}, at {at}"
        message = f"{said}, and so in {differ.sum()} of {differ.size} places"
    apart = np.abs(y.astype(np.float64) - x.astype(np.float64))
    nothing = Errors(0.0, 0.0, 0.0)
    return Difference(
        tensor, not message, float(apart.max(initial=0)), nothing, None, None, message
    )


def _judged(
    right: np.ndarray, got: np.ndarray, yardstick: np.ndarray, dtype: str, scale: float
) -> Judgement:
    """One by float64, with the other as its yardstick."""
    right, got, yardstick = (x.reshape(1, 1, *x.shape) for x in (right, got, yardstick))
    return Standard.of("out", right, yardstick, dtype, uncancelled=scale).judge(got)


def _apart(got: np.ndarray, want: np.ndarray, scale: float) -> Errors:
    return measure(got, want, _size(want, scale))[0]


def _noise(got: np.ndarray, want: np.ndarray, scale: float) -> float:
    return measure(got, want, _size(want, scale))[1]


def _size(want: np.ndarray, scale: float) -> float:
    """What it is divided by: its RMS, unless nothing is left of it but rounding."""
    rms = _rms(want)
    return (scale if rms < 1e-9 * scale else rms) or 1.0


def _rms(x: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        finite = np.where(np.isfinite(x), x, 0).astype(np.float64)
    return float(np.sqrt((finite**2).mean())) if finite.size else 0.0


def _over(errors: Errors, limits: Errors) -> str:
    return ", ".join(
        f"{name} {error:.2g} over {limit:.2g}"
        for name, error, limit in zip(
            ("rms", "worst row", "projection"), errors, limits, strict=True
        )
        if error > limit
    )


def _in_rows(x: np.ndarray) -> np.ndarray:
    """Float64, (rows, the last axis)."""
    return x.astype(np.float64).reshape(-1, x.shape[-1] if x.ndim and x.shape[-1] else 1)


def _where(flat: Any, like: np.ndarray) -> str:
    return str(tuple(int(i) for i in np.unravel_index(int(flat), like.shape or (1,))))


def _floats(x: Any) -> bool:
    """Whether it is a floating array; NumPy holds bfloat16 for none."""
    return isinstance(x, np.ndarray) and x.dtype.name in FINENESS


def _x64_for(named: Mapping[str, Any]) -> AbstractContextManager[object]:
    wide = any(_floats(x) and x.dtype == np.float64 for x in named.values())
    return float64_where_asked("float64" if wide else "")


def _coarsest(arrays: Sequence[np.ndarray], *others: str) -> str:
    names = [*(x.dtype.name for x in arrays if _floats(x)), *others]
    return max(names, key=FINENESS.index, default="float64")


def _short(x: float | None) -> str:
    return "-" if x is None else f"{x:.1e}"
