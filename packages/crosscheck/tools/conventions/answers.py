"""What a function of torch or of JAX answers to NumPy arrays, with its gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy's bfloat16
import numpy as np
from numpy import ndarray

Arrays = tuple[ndarray, ...]  # q, k, v and the cotangents of out and LSE
Function = Callable[..., Any]  # (q, k, v, **options) → out, or out, LSE and anything more


@dataclass(frozen=True)
class Answer:
    """What came, None where nothing came.

    Attributes:
        out: float64, as gradients are.
        lse: of its own dtype and shape.
        gradients: of q, k and v, of out · its cotangent + LSE · its cotangent.
        warned: whether a warning was given of the gradients.
    """

    out: ndarray
    lse: ndarray | None = None
    gradients: Arrays | None = None
    warned: bool = False


def rounded(x: ndarray, dtype: str) -> ndarray:
    """In float64 what the dtype holds."""
    return x.astype(np.dtype(dtype)).astype(np.float64)


def swapped(x: ndarray) -> ndarray:
    """(B, S, H, …) ↔ (B, H, S, …)."""
    return x.swapaxes(1, 2)


def torch_answer(
    function: Function, arrays: Arrays, dtype: str, differentiate: bool, options: dict[str, Any]
) -> tuple[ndarray, ndarray | None, Arrays | None]:
    """What makes an Answer: another process can return it."""
    import torch

    def tensor(x: Any, kind: str = dtype) -> Any:
        if not isinstance(x, ndarray):
            return x
        return torch.tensor(x).to(getattr(torch, kind)) if x.dtype == float else torch.tensor(x)

    def array(x: Any, kind: str = "float64") -> ndarray:
        return x.detach().double().numpy().astype(np.dtype(kind))

    q, k, v, dout, dlse = map(tensor, arrays)
    wanted = [x.requires_grad_(differentiate) for x in (q, k, v)]
    found = function(*wanted, **{name: tensor(x) for name, x in options.items()})
    out, lse, *_ = found if isinstance(found, tuple) else (found, None)
    gradients = None
    if differentiate and out.requires_grad:
        loss = (out * dout).sum() + (0.0 if lse is None else (lse * dlse).sum())
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        gradients = None if gradients[0] is None else tuple(map(array, gradients))
    return array(out), None if lse is None else array(lse, str(lse.dtype)[6:]), gradients


def jax_answer(
    function: Function, arrays: Arrays, dtype: str, differentiate: bool, options: dict[str, Any]
) -> tuple[ndarray, ndarray | None, Arrays | None]:
    """Of the function compiled by `jax.jit`, as it is used: uncompiled it may answer otherwise."""
    import jax
    import jax.numpy as jnp

    def jax_array(x: Any) -> Any:
        if not isinstance(x, ndarray):
            return x
        return jnp.asarray(x, dtype if x.dtype == float else x.dtype)

    def array(x: Any) -> ndarray:
        return np.asarray(x).astype(np.float64)

    # As JAX is by itself, whatever they who run this have set.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        q, k, v, dout, _ = map(jax_array, arrays)
        told = {name: jax_array(x) for name, x in options.items()}
        compiled = jax.jit(lambda q, k, v: function(q, k, v, **told))
        found, pull = jax.vjp(compiled, q, k, v) if differentiate else (compiled(q, k, v), None)
        out, lse = found if isinstance(found, (tuple, list)) else (found, None)
        gradients = None
        if pull is not None and lse is None:
            gradients = tuple(map(array, pull(dout)))
        elif pull is not None:
            dlse = arrays[4] if lse.shape == arrays[4].shape else swapped(arrays[4])
            cotangents = type(found)((dout, jnp.asarray(dlse, lse.dtype)))
            gradients = tuple(map(array, pull(cotangents)))
    return array(out), None if lse is None else np.asarray(lse), gradients
