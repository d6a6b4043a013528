"""What `jax:splash` and `jax:pallas-gpu` share: JAX's own Pallas kernels, each written for one device.

They are compiled there, and interpreted on a CPU, operation by operation of every tile, to be compared
with. What hides keys and what an empty row gives is settled around them, as around jax.nn: see `jax_nn`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import jax

from heedful.call.arrays import Array
from heedful.call.problem import Problem
from heedful.dispatch.packages import why_not_imported


def reasons(problem: Problem, device: Literal["gpu", "tpu"], module: str) -> list[str]:
    """What keeps a problem from a kernel; the kernel is imported where nothing else does."""
    reasons = []
    if problem.platform not in (device, "cpu"):
        reasons.append(
            f"this kernel is compiled on a {device.upper()} and interpreted on a CPU; "
            f"q lies on {problem.platform}"
        )
    if problem.dtype == "float64":
        reasons.append("this kernel accumulates in float32")
    if 0 in (problem.batch, problem.q_length, problem.kv_length):
        reasons.append("this kernel takes no empty arrays")
    return reasons or [why for why in [why_not_imported(module)] if why]


def unasked(device: Literal["gpu", "tpu"]) -> str | None:
    """Why the crosscheck leaves it alone unless it is named."""
    if jax.default_backend() == device:
        return None
    return "it is interpreted here, and each kind of call is compiled for seconds"


def words(problem: Problem, kernel: str) -> str:
    """What computes, in words."""
    how = "interpreted" if problem.platform == "cpu" else "compiled"
    return f"jax {jax.__version__}, {kernel}, {how}"


def with_gradient(lse: Array, scale: float, q: Array, mean_key: Array) -> Array:
    """The log-sum-exp, differentiable once: these kernels give it, and no gradient of it.

    The derivative of lse_i by each score s_ij = scale · q_i · k_j is p_ij, which is that of
    Σ_j p_ij s_ij = scale · q_i · (Σ_j p_ij k_j) too, where p is left alone.

    Args:
        lse: (..., 1), a constant.
        scale: of the scores.
        q: (..., D).
        mean_key: (..., D), what attention makes of the keys as values; differentiable as such alone.
    """
    products = q.astype("float32") * mean_key.astype("float32")
    mean_score = scale * products.sum(axis=-1, keepdims=True)
    return lse + (mean_score - jax.lax.stop_gradient(mean_score))


def as_written(problem: Problem, kernel: Callable[..., Array]) -> Callable[..., Array]:
    """A kernel as its authors trace it, backward too, whatever JAX is set to; differentiable once."""

    @jax.custom_vjp
    def run(*arrays: Any) -> Array:
        with _settings(problem):
            return kernel(*arrays)

    @_no_more
    def forward(*arrays: Any) -> tuple[Array, Callable[..., Any]]:
        with _settings(problem):
            return jax.vjp(kernel, *arrays)

    @_no_more
    def backward(pull_back: Callable[..., Any], cotangent: Array) -> Any:
        with _settings(problem):
            gradients = pull_back(cotangent)
        return jax.tree.map(lambda x: None if x.dtype == jax.dtypes.float0 else x, gradients)

    run.defvjp(forward, backward)
    return run


def undifferentiated(why: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose derivative raises, and says why."""
    refusing = jax.custom_jvp(function)

    @refusing.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(why)

    return refusing


# Otherwise second derivatives of the LSE would be wrong, and other errors obscure.
_no_more = partial(undifferentiated, "this Pallas kernel has no second derivatives")


@contextmanager
def _settings(problem: Problem) -> Iterator[None]:
    # Left alone, GPUs and TPUs round float32 factors to fewer bits; of others Mosaic takes no "highest".
    precision = "highest" if problem.dtype == "float32" else None
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision(precision):
        yield
