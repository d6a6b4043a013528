"""How agreement is judged.

One tolerance for each dtype hides bugs in easy cases and fails honest kernels in hard ones. So a tensor
of a backend agrees in a case when

    error(backend) ≤ 2 · error(plain attention in the same dtype) + floor(dtype), at most ceiling(dtype)

both errors against the float64 oracle on the same rounded inputs, by three measures:

rms         ‖error‖ / ‖want‖ over the whole tensor: catches drift.
worst row   the largest RMS of a row's error, divided by the larger of the row's and the tensor's RMS:
            catches one broken row or tile. By the row alone it would condemn honest kernels, since a
            row of dq can be zero by cancellation.
projection  ⟨error, want⟩ / ⟨want, want⟩, the share of the error that is a wrong scale. Rounding is
            random and mostly cancels in it, so that it shows a factor of 1.001 beneath bfloat16's
            noise, where rms sees nothing.

LSE alone is measured by the larger of its own size and 1, row by row: it is a logarithm, whose error of
δ makes every probability wrong by e^δ, and a padded row at −1e9 must not be the measure of the others.

Lossy. Plain attention (`yardstick.best`) is the best that honest arithmetic in the dtype does. Flash
kernels that take delta of an O rounded to half precision do worse on peaked rows, and those that keep
one LSE for a row's maximum and sum do in float32 on large logits. What is beyond the limit above, and
within the same one made of `yardstick.lossy`, is `lossy`: said with its factor, which is its largest
error by its limit, and never called agreement. In float32 it ends where the ceiling does: a gradient n
times too large, which that LSE makes of a row masked by a bias of −1e9, is wrong. In half precision it
ends where an error is as large as the tensor: all digits may be lost, no answer may be worse than 0.

The ceiling. However far off plain attention is, an error that no user would call the same number is no
agreement: two digits in float32, 5 % in bfloat16. A case in which the ceiling is the limit is named in
the report; there who is no farther off than twice plain attention is lossy.

The projection's limit. With c_i = ⟨error_i, want_i⟩ of row i, rounding makes the c_i random in sign.
By Hoeffding, whatever their sizes, P(|Σ c_i| > z · √Σ c_i²) ≤ 2 exp(−z²/2): at z = 6, 3e-8, one false
alarm in thousands of full runs. So the limit gets 6·√Σ c_i² / ⟨want, want⟩ on top, measured on the
backend's own error; within a row the roundings may be correlated (they share one sum, one delta), and
rows alone have to be independent. A systematic factor 1 + ε has c_i = ε‖want_i‖², which exceeds that
as soon as there are more than some 36 rows of like size, however small ε is, except for the floor.

The floors. What is systematic but honest: exp to 20 bits in torch's CPU kernel (1e-6), sums that
truncate, the oracle's own float64. The floor of rms also covers tensors of a few numbers, where
errors are luck, and torch's CPU kernel, which adds up dk and dv tile by tile in half precision. It
is half a unit roundoff in half precision; 32 of them in float32, where all error is accumulation.
A worst row may be four times as far out. LSE is computed and returned in the accumulator's dtype and
gets its floor, but for half precision, where kernels take short polynomials for their exponentials:
torch's CPU kernel is off by up to 8e-5 in a row that sees few keys.

Exactness. Infinities of LSE stand exactly where they should; what belongs to a query that sees nothing
or to a key nobody sees is exactly zero; nothing else is NaN or infinite.

What judge and judged share, and why it hides nothing. A fault that both had would be no error, or, in
a yardstick, a wide limit.

- Softmax and gradients: the oracle and the yardsticks say them in NumPy, each for itself. The oracle
  itself is on trial against autodiff, finite differences and a definition pair by pair
  (tests/core/test_oracle.py).
- Scores: the yardsticks take them by `heedful.rules.scores`, as our own kernels do; the oracle has its
  own words. In float64 there is no rounding behind which a faulty rule could stand: it takes yardstick
  and kernels beyond the ceiling there, 1e-6, so that in the table's float64 rows nobody agrees who goes
  by it, and the report names them (tests/conformance/test_yardstick.py).
- Visibility: `heedful.rules.visibility` is the kernels' alone. The oracle has its own words for it. The
  yardsticks take the oracle's, since a fault there sets all backends apart from the oracle; so does
  what is said to be hidden, which only ever demands more: zeros, and indifference to NaN.
- Rank, layout, broadcasting, offsets: `question` reads them out of the call itself.
- A gradient that cancels entirely is divided by the size of its terms, made of the inputs' RMS alone.
- The order of summation: a yardstick's noise is a sample. It is drawn twice, and the larger counts;
  its size is put in by hand too (`shaken`), measured where there is float64 to measure by.
- float64 itself: the oracle's arithmetic is plain attention's there, and their difference is nothing
  even where both are off, beside a bias of −30000 by 2e-12. A reading that is shaken is the measure.
- `Problem` is shared: scale's default, causal and window are read from the call once, for backends and
  oracle alike. A wrong reading would make all agree on another question, and show here in nothing. So
  it is judged where whole calls meet what reads them for itself: ONNX's cases, the definition pair by
  pair, the tests' reference (tests/conformance/test_onnx.py, tests/core/test_oracle.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from heedful_crosscheck.location import Edges, HeatMap, heat_map, locate, place

RMS_FLOOR = {"float64": 1e-13, "float32": 2e-6, "float16": 2.4e-4, "bfloat16": 2e-3}
PROJECTION_FLOOR = {"float64": 1e-13, "float32": 2e-6, "float16": 1e-4, "bfloat16": 2e-4}
LSE_FLOOR = {"float64": 1e-13, "float32": 2e-6, "float16": 1e-4, "bfloat16": 1e-4}
CEILING = {"float64": 1e-6, "float32": 1e-2, "float16": 2e-2, "bfloat16": 5e-2}
LSE_CEILING = {**CEILING, "float16": 1e-2, "bfloat16": 1e-2}
LOSSY_CEILING = {**CEILING, "float16": 1.0, "bfloat16": 1.0}
UTMOST = 1.0  # an error as large as the tensor is wrong whatever the yardsticks say
WORST_ROW_TIMES = 4
PLAIN_TIMES = 2
SIGMAS = 6

# A yardstick's tensor, once for each order of operations.
Readings = np.ndarray | Sequence[np.ndarray]


class Errors(NamedTuple):
    """How far a tensor is from the oracle's, by the three measures."""

    rms: float
    worst_row: float
    projection: float


@dataclass(frozen=True)
class Judgement:
    """What is said of one tensor.

    Attributes:
        errors, plain, limits: the backend's, plain attention's, and the most that agrees.
        faults: what is wrong, a sentence each; empty where the tensor agrees or is lossy.
        losses: what is lossy, a sentence; empty otherwise.
        ceiling: whether plain attention is so far off here that the ceiling is the limit.
        heat: where the error is, of a tensor that does not agree.
    """

    errors: Errors
    plain: Errors
    limits: Errors
    faults: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    ceiling: bool = False
    heat: HeatMap | None = None

    @property
    def verdict(self) -> Literal["agree", "lossy", "disagree"]:
        """What the tensor is."""
        return "disagree" if self.faults else "lossy" if self.losses else "agree"

    @property
    def strain(self) -> float:
        """The largest error as a part of its limit: over 1 it does not agree. Of `lossy`, the factor."""
        if not np.isfinite(self.errors.rms):
            return float("inf")
        return max(_times(e, limit) for e, limit in zip(self.errors, self.limits, strict=True))


@dataclass(frozen=True)
class Standard:
    """What a tensor is judged by, made once for all backends.

    Attributes:
        right: the oracle's, float64, rows along the last axis.
        want: the same in units, 0 where it is infinite.
        finite: where it is finite: all but the LSE of empty rows.
        unit: of `_unit`.
        size: what errors are divided by, in units.
        plain, lossy: the errors of the two yardsticks.
        hidden: what must be exactly 0.
        edges: where something begins among the rows, to say where an error lies.
    """

    tensor: str
    dtype: str
    right: np.ndarray
    want: np.ndarray
    finite: np.ndarray
    unit: np.ndarray | np.float64
    size: float
    plain: Errors
    lossy: Errors
    hidden: np.ndarray
    edges: Edges = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tensor: str,
        right: np.ndarray,
        plain: Readings,
        dtype: str,
        hidden: np.ndarray | bool = False,
        uncancelled: float = 0.0,
        lossy: Readings = (),
        edges: Edges = MappingProxyType({}),
    ) -> "Standard":
        """The standard of one tensor.

        Args:
            tensor: "out", "lse", "dq", "dk", "dv", or an option's, "dbias".
            right: the oracle's, float64, rows along the last axis; LSE (B, H, S).
            plain: the yardstick's, or several readings of it, whose largest errors count.
            dtype: of q.
            hidden: boolean, broadcastable to the tensor: what must be exactly 0, since nothing is seen.
            uncancelled: RMS of the terms that a gradient is the sum of. Where all of it cancels (a
                single key: the weight is 1 whatever q is) there is no size to divide by but theirs.
            lossy: the second yardstick's readings: within their limit, and not within plain's, is lossy.
            edges: of `location.edges`, those of the tensor's rows.
        """
        right = _in_rows(tensor, right)
        finite = np.isfinite(right)
        unit = _unit(tensor, np.where(finite, right, 0))
        want = np.where(finite, right, 0) / unit
        size = 1.0 if tensor == "lse" else _size(want, uncancelled / float(unit))

        def errors(readings: Readings) -> Errors:
            in_units = (np.where(finite, _in_rows(tensor, x), 0) / unit for x in _several(readings))
            return _largest([measure(x, want, size)[0] for x in in_units])

        hidden = np.broadcast_to(hidden, right.shape)
        of_plain, of_lossy = errors(plain), errors(lossy)
        return cls(
            tensor, dtype, right, want, finite, unit, size, of_plain, of_lossy, hidden, edges
        )

    def beside(self, answer: np.ndarray) -> "Standard":
        """The same with somebody's answer in the oracle's place.

        He may be as far from the oracle as whom he judges, so that both errors count.
        """
        right = _in_rows(self.tensor, answer)
        finite = np.isfinite(right)
        want = np.where(finite, right, 0) / self.unit
        plain, lossy = (Errors(*(2 * e for e in errors)) for errors in (self.plain, self.lossy))
        return replace(self, right=right, finite=finite, want=want, plain=plain, lossy=lossy)

    def judge(self, got: np.ndarray) -> Judgement:
        """Judges a backend's tensor, shaped like the oracle's."""
        tensor, dtype = self.tensor, self.dtype
        got = _in_rows(tensor, got)
        if got.shape != self.right.shape:
            wanted, came = (x.shape[:-1] if tensor == "lse" else x.shape for x in (self.right, got))
            return _unmeasured(f"{tensor} has shape {came}, expected {wanted}")
        if faults := _inexact(tensor, got, self.right, self.hidden):
            with np.errstate(invalid="ignore", over="ignore"):
                error = (np.where(self.finite, got, 0) / self.unit - self.want) / self.size
            strange = ~np.isfinite(error).all(-1) | (self.hidden & (got != 0)).any(-1)
            return replace(_unmeasured(*faults), heat=heat_map(np.abs(error), strange))
        got = np.where(self.finite, got, 0) / self.unit
        errors, noise = measure(got, self.want, self.size)
        floors = _floors(tensor, dtype, noise)
        ceilings = _ceilings((LSE_CEILING if tensor == "lse" else CEILING)[dtype])
        honest = _limits(self.plain, floors)
        limits = Errors(*map(min, honest, ceilings))
        lossy_limits = Errors(
            *map(
                max,
                map(min, honest, _ceilings(UTMOST)),
                map(min, _limits(self.lossy, floors), _ceilings(LOSSY_CEILING[dtype])),
            )
        )
        said: dict[str, tuple[str, ...]] = {}
        heat = None
        if not _within(errors, limits):
            rows = row_errors(got, self.want, self.size)
            where, heat = locate(got, self.want, self.size, rows, limits.worst_row, self.edges)
            over = _over(errors, limits, self.plain)
            if _within(errors, lossy_limits):
                factor = max(_times(e, limit) for e, limit in zip(errors, limits, strict=True))
                loss = f"{tensor} is lossy, {factor:.2g} times its limit: {over}; {where}"
                said["losses"] = (loss,)
            else:
                said["faults"] = (f"{tensor} is wrong: {over}; {where}",)
        unmoved = _limits(self.plain, _floors(tensor, dtype, noise=0))
        ceiling = not _within(unmoved, ceilings)
        return Judgement(errors, self.plain, limits, **said, ceiling=ceiling, heat=heat)


def _in_rows(tensor: str, x: np.ndarray) -> np.ndarray:
    """Float64, rows along the last axis; LSE's have one number."""
    x = np.asarray(x, np.float64)
    return x[..., None] if tensor == "lse" else x


def measure(got: np.ndarray, want: np.ndarray, size: float) -> tuple[Errors, float]:
    """The errors, and how large a projection rounding makes by chance: one standard deviation."""
    error = got - want
    if not error.any():
        return Errors(0.0, 0.0, 0.0), 0.0
    along = (error * want).sum(-1)
    energy = max((want**2).sum(), want.size * size**2)
    return (
        Errors(
            rms=_rms(error) / size,
            worst_row=float(row_errors(got, want, size).max()),
            projection=abs(float(along.sum() / energy)),
        ),
        float(np.sqrt((along**2).sum()) / energy),
    )


def row_errors(got: np.ndarray, want: np.ndarray, size: float) -> np.ndarray:
    """Each row's error, relative to the larger of its own RMS and the tensor's."""
    row_rms = np.sqrt((want**2).mean(-1))
    return np.sqrt(((got - want) ** 2).mean(-1)) / np.maximum(row_rms, size)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).mean())) if x.size else 0.0


def _size(want: np.ndarray, uncancelled: float) -> float:
    """What the tensor's errors are divided by: its RMS, unless all of it cancelled."""
    rms = _rms(want)
    return (uncancelled if rms < 1e-9 * uncancelled else rms) or 1.0


def _unit(tensor: str, want: np.ndarray) -> np.ndarray | np.float64:
    """What a tensor's numbers are divided by before anything is measured.

    LSE is a logarithm: an error of δ, not of a part of it, makes every probability wrong by e^δ. So it
    is measured in ones, and where it is larger than that by its own size, row by row: one row with a
    bias of −1e9 must not be the measure of all others. The rest is divided by one number for all,
    which measures nothing and keeps squares from overflowing.
    """
    if tensor == "lse":
        return np.maximum(np.abs(want), 1.0)
    return np.float64(np.abs(want).max(initial=0.0) or 1.0)


def _several(readings: Readings) -> Sequence[np.ndarray]:
    return [readings] if isinstance(readings, np.ndarray) else readings


def _largest(readings: Sequence[Errors]) -> Errors:
    """Measure by measure; a reading that overflowed says nothing."""
    told = [x for x in readings if np.isfinite(x).all()]
    return Errors(*(max(x) for x in zip(*told, strict=True))) if told else Errors(0.0, 0.0, 0.0)


def _floors(tensor: str, dtype: str, noise: float) -> Errors:
    rms, projection = RMS_FLOOR[dtype], PROJECTION_FLOOR[dtype]
    if tensor == "lse":
        rms = projection = LSE_FLOOR[dtype]
    return Errors(rms, WORST_ROW_TIMES * rms, projection + SIGMAS * noise)


def _limits(yardstick: Errors, floors: Errors) -> Errors:
    return Errors(*(PLAIN_TIMES * e + floor for e, floor in zip(yardstick, floors, strict=True)))


def _ceilings(ceiling: float) -> Errors:
    return Errors(ceiling, WORST_ROW_TIMES * ceiling, ceiling)


def _within(errors: Errors, limits: Errors) -> bool:
    return all(e <= limit for e, limit in zip(errors, limits, strict=True))


def _times(error: float, limit: float) -> float:
    return 0.0 if error == 0 else error / limit if limit else float("inf")


# What is wrong, in words


def _unmeasured(*faults: str) -> Judgement:
    nothing = Errors(0.0, 0.0, 0.0)
    return Judgement(Errors(np.inf, np.inf, np.inf), nothing, nothing, faults)


def _inexact(tensor: str, got: np.ndarray, want: np.ndarray, hidden: np.ndarray) -> list[str]:
    """What breaks the rules that no rounding excuses."""
    infinite = np.isneginf(want)  # LSE of an empty row
    strange = ~np.isfinite(got) & ~(infinite & np.isneginf(got))
    finite = infinite & np.isfinite(got)
    nonzero = hidden & np.isfinite(got) & (got != 0) & ~infinite
    faults, unseen = [], "where nothing is seen"
    if strange.any():
        faults.append(f"{tensor} has {got[strange][0]} {_where(strange)}")
    if finite.any():
        faults.append(f"{tensor} is {got[finite][0]:.3g}, not -inf, {unseen} {_where(finite)}")
    if nonzero.any():
        faults.append(f"{tensor} is {got[nonzero][0]:.3g}, not 0, {unseen} {_where(nonzero)}")
    return faults


def _over(errors: Errors, limits: Errors, plain: Errors) -> str:
    return ", ".join(
        f"{name} {error:.2g} over {limit:.2g} (plain attention {by_plain:.2g})"
        for name, error, limit, by_plain in zip(
            ("rms", "worst row", "projection"), errors, limits, plain, strict=True
        )
        if error > limit
    )


def _where(wrong: np.ndarray) -> str:
    rows = wrong.any(-1)
    first = np.unravel_index(rows.argmax(), rows.shape)
    return f"at {place(first)}, and so in {rows.sum()} of {rows.size} rows"
