"""Cosine-similarity attention: rows of q and k of length 1, the other variant of flash-attention-jax."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from heedful.api import flash_attention
from heedful.call.arrays import Array, accumulator_of, dtype_of
from heedful.call.checks import dtype_of_all, framework_of_all
from heedful.compiled import compiled


def cosine_sim_flash_attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, *, scale: float = 10.0, **options: Any
) -> tuple[Array, Array]:
    """(out, lse) by the JAX flash core, of scores that are cosines: scale · q_i · k_j / (‖q_i‖ ‖k_j‖).

    A row of zeros has no direction, so that its cosines are 0 and its gradient is too. One that holds
    NaN or infinity has none either: its cosines are NaN, which spread where it is seen, and its gradient
    is 0. Lengths of rows are taken in float32 (float64 for float64), and rows of length 1 are rounded to
    their dtype again, as products take them.

    Args:
        q, k, v: JAX or NumPy arrays, as in `heedful.attention`, in any rank and layout.
        mask: as in `heedful.flash_attention`, (B, Sk) for keys alone.
        scale: factor of the cosines, 10 by default: scores lie between −scale and scale.
        options: all others of `heedful.flash_attention`.

    Returns:
        out and lse as of `heedful.flash_attention`; differentiable, to any order.

    Raises:
        TypeError, ValueError: the call breaks the contract; says what came and how to mend it.
        Refusal: the flash core cannot honour the call; says why.

    Source: Henry et al. 2020, Query-Key Normalization for Transformers; here the scale is not learned.
    """
    if framework_of_all({"q": q, "k": k, "v": v}) == "torch":
        raise TypeError(
            "cosine_sim_flash_attention takes JAX and NumPy arrays. Got torch tensors. Pass "
            "heedful.attention torch.nn.functional.normalize(q, dim=-1) and the same of k, with "
            f"scale={scale!r}."
        )
    dtype_of_all(q, k, v)
    return flash_attention(_normalised(q), _normalised(k), v, mask, scale=scale, **options)


def _normalised(x: Array) -> Array:
    if isinstance(x, np.ndarray):
        with np.errstate(invalid="ignore"):
            return _by(np, x, dtype_of(x))
    return _in_jax((x.shape, dtype_of(x)), x)


@compiled(static=1)
def _in_jax(known: tuple[tuple[int, ...], str], x: Array) -> Array:
    return _by(jnp, x, known[1])


def _by(numpy: Any, x: Array, dtype: str) -> Array:
    """Rows along the last axis, by `numpy`, which is NumPy or jax.numpy."""
    wide = x.astype(accumulator_of(dtype))
    # By its largest number first: squares of 1e30 overflow, and those of 1e-30 are 0. Any number near it
    # would do, so that in derivatives it stands still: where it is 0 or none, 1.
    largest = abs(wide).max(axis=-1, keepdims=True, initial=0)
    has_length = (largest > 0) & numpy.isfinite(largest)
    # Replaced before the arithmetic and not only after it, or their derivatives were 0 · NaN.
    safe = numpy.where(has_length, wide, 1) / _still(numpy, numpy.where(has_length, largest, 1))
    directions = safe / numpy.sqrt((safe * safe).sum(axis=-1, keepdims=True))
    without = numpy.where(largest == 0, 0, numpy.nan).astype(wide.dtype)
    return numpy.where(has_length, directions, without).astype(x.dtype)


def _still(numpy: Any, x: Array) -> Array:
    return x if numpy is np else lax.stop_gradient(x)
