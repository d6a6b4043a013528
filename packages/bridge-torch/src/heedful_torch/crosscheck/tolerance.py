"""How agreement is judged.

One tolerance for each dtype hides bugs in easy cases and fails honest kernels in hard ones. So a tensor
of a backend passes a case when

    error(backend) ≤ 2 · error(plain attention in the same dtype) + floor(dtype)

both errors against the float64 oracle on the same rounded inputs, by three measures:

rms         ‖error‖ / ‖want‖ over the whole tensor: catches drift.
worst row   the largest RMS of a row's error, divided by the larger of the row's and the tensor's RMS:
            catches one broken row or tile. By the row alone it would condemn honest kernels, since a
            row of dq can be zero by cancellation.
projection  ⟨error, want⟩ / ⟨want, want⟩, the share of the error that is a wrong scale. Rounding is
            random and mostly cancels in it, so that it shows a factor of 1.001 beneath bfloat16's
            noise, where rms sees nothing.

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
A worst row may be four times as far out. LSE is computed and returned in the accumulator's dtype:
it gets that dtype's floor, times ten for half precision, where kernels take short polynomials for
their exponentials.

Exactness. Infinities of LSE stand exactly where they should; what belongs to a query that sees nothing
or to a key nobody sees is exactly zero; nothing else is NaN or infinite.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RMS_FLOOR = {"float64": 1e-13, "float32": 2e-6, "float16": 2.4e-4, "bfloat16": 2e-3}
PROJECTION_FLOOR = {"float64": 1e-13, "float32": 2e-6, "float16": 1e-4, "bfloat16": 2e-4}
LSE_FLOOR = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-5, "bfloat16": 2e-5}
WORST_ROW_TIMES = 4
PLAIN_TIMES = 2
SIGMAS = 6

# Rows. A failure names the tile it lies in; most kernels' tiles are this or divide it.
TILE = 128


class Errors(NamedTuple):
    """How far a tensor is from the oracle's, by the three measures."""

    rms: float
    worst_row: float
    projection: float


@dataclass(frozen=True)
class Judgement:
    """What is said of one tensor.

    Attributes:
        errors, plain, limits: the backend's, plain attention's, and the most that passes.
        faults: what is wrong, a sentence each; empty where the tensor passes.
    """

    errors: Errors
    plain: Errors
    limits: Errors
    faults: tuple[str, ...]

    @property
    def strain(self) -> float:
        """The largest error as a part of its limit: over 1 fails."""
        if not np.isfinite(self.errors.rms):
            return float("inf")
        return max(e / limit for e, limit in zip(self.errors, self.limits, strict=True))


def judge(
    tensor: str,
    got: np.ndarray,
    want: np.ndarray,
    plain: np.ndarray,
    dtype: str,
    hidden: np.ndarray | bool = False,
    uncancelled: float = 0.0,
) -> Judgement:
    """Judges one tensor of a backend.

    Args:
        tensor: "out", "lse", "dq", "dk", "dv" or "dbias".
        got, plain: the backend's and plain attention's, rows along the last axis; LSE (B, H, S).
        want: the oracle's, float64.
        dtype: of q.
        hidden: boolean, broadcastable to the tensor: what must be exactly 0, since nothing is seen.
        uncancelled: RMS of the terms that a gradient is the sum of. Where all of it cancels (a single
            key: the weight is 1 whatever q is) there is no size to divide by but that of its terms.
    """
    if got.shape != want.shape:
        return _unmeasured(f"{tensor} has shape {got.shape}, expected {want.shape}")
    got, plain = (np.asarray(x, np.float64) for x in (got, plain))
    if tensor == "lse":
        got, want, plain = got[..., None], want[..., None], plain[..., None]
    if faults := _inexact(tensor, got, want, np.broadcast_to(hidden, want.shape)):
        return _unmeasured(*faults)
    finite = np.isfinite(want)  # all but the LSE of empty rows, found equal above
    got, want, plain = (np.where(finite, x, 0) for x in (got, want, plain))

    size = _size(want, uncancelled)
    errors, noise = measure(got, want, size)
    plain_errors, _ = measure(plain, want, size)
    limits = _limits(plain_errors, tensor, dtype, noise)
    if all(e <= limit for e, limit in zip(errors, limits, strict=True)):
        return Judgement(errors, plain_errors, limits, ())
    return Judgement(
        errors,
        plain_errors,
        limits,
        (_fault(tensor, got, want, size, errors, plain_errors, limits),),
    )


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


def _limits(plain: Errors, tensor: str, dtype: str, noise: float) -> Errors:
    rms_floor, projection_floor = RMS_FLOOR[dtype], PROJECTION_FLOOR[dtype]
    if tensor == "lse":
        rms_floor = projection_floor = LSE_FLOOR[dtype]
    return Errors(
        rms=PLAIN_TIMES * plain.rms + rms_floor,
        worst_row=PLAIN_TIMES * plain.worst_row + WORST_ROW_TIMES * rms_floor,
        projection=PLAIN_TIMES * plain.projection + projection_floor + SIGMAS * noise,
    )


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


def _fault(
    tensor: str,
    got: np.ndarray,
    want: np.ndarray,
    size: float,
    errors: Errors,
    plain: Errors,
    limits: Errors,
) -> str:
    over = [
        f"{name} {error:.2g} over {limit:.2g} (plain attention {by_plain:.2g})"
        for name, error, limit, by_plain in zip(
            ("rms", "worst row", "projection"), errors, limits, plain, strict=True
        )
        if error > limit
    ]
    rows = row_errors(got, want, size)
    worst = np.unravel_index(rows.argmax(), rows.shape)
    first = worst[-1] // TILE * TILE
    tile = (*worst[:-1], slice(first, first + TILE))
    squares = ((got - want) ** 2).sum(-1)
    share = squares[tile].sum() / squares.sum()
    last = min(first + TILE, rows.shape[-1]) - 1
    return (
        f"{tensor} is wrong: {', '.join(over)}; worst at {_place(worst)}, in the tile of rows "
        f"{first}-{last}, which holds {share:.0%} of the squared error"
    )


def _where(wrong: np.ndarray) -> str:
    rows = wrong.any(-1)
    first = np.unravel_index(rows.argmax(), rows.shape)
    return f"at {_place(first)}, and so in {rows.sum()} of {rows.size} rows"


def _place(index: tuple[np.intp, ...]) -> str:
    b, h, row = (int(i) for i in index)
    return f"(b {b}, h {h}, row {row})"
