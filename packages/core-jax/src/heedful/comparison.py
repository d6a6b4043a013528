"""How far two attention functions lie apart: their outputs, and their gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from heedful.call.arrays import Array


def value_and_grad_difference(
    f: Callable[..., Any],
    g: Callable[..., Any],
    seed: int = 42,
    *,
    batch: int = 1,
    heads: int = 1,
    q_seq_len: int = 1024,
    k_seq_len: int = 8192,
    dim: int = 512,
    add_key_mask: bool = True,
) -> tuple[float, tuple[float, float, float]]:
    """Runs two attention functions on the same random inputs and compares what comes out.

    The quick check of flash-attention-jax, with its names and the same gradients, those of `out.sum()`.
    For a judgement that knows the dtype, of functions of any frameworks on one's own arrays, there is
    `heedful_crosscheck.compare`; against the contract and a float64 oracle, `heedful crosscheck`.

        >>> from heedful import flash_attention, plain_attention, value_and_grad_difference
        >>> out, (dq, dk, dv) = value_and_grad_difference(plain_attention, flash_attention, seed=42)
        >>> out < 1e-4 and max(dq, dk, dv) < 1e-6
        True

    Args:
        f, g: functions of JAX arrays (q, k, v, mask), differentiable, that return out or (out, lse);
            an lse is left aside.
        seed: of the inputs: standard normal float32 q (batch, heads, q_seq_len, dim), k and v
            (batch, heads, k_seq_len, dim), and a mask (batch, k_seq_len) that hides half of the keys.
        add_key_mask: False calls f and g without a mask, as (q, k, v).

    Returns:
        The largest absolute difference of out, and those of dq, dk and dv.

    Raises:
        ValueError: f and g return out of different shapes.
    """
    q_key, k_key, v_key, mask_key = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(q_key, (batch, heads, q_seq_len, dim), jnp.float32)
    k = jax.random.normal(k_key, (batch, heads, k_seq_len, dim), jnp.float32)
    v = jax.random.normal(v_key, (batch, heads, k_seq_len, dim), jnp.float32)
    mask = [jax.random.bernoulli(mask_key, shape=(batch, k_seq_len))] if add_key_mask else []

    def out_and_gradients(attend: Callable[..., Any]) -> tuple[Array, tuple[Array, Array, Array]]:
        def loss(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            result = attend(q, k, v, *mask)
            out = result[0] if isinstance(result, tuple) else result
            return out.sum(), out

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients

    def difference(x: Array, y: Array) -> float:
        return float(jnp.abs(x - y).max())

    f_out, f_gradients = out_and_gradients(f)
    g_out, g_gradients = out_and_gradients(g)
    if f_out.shape != g_out.shape:
        raise ValueError(
            f"f and g must return out of one shape. Got {f_out.shape} and {g_out.shape}. "
            "Give both the same layout."
        )
    dq, dk, dv = map(difference, f_gradients, g_gradients)
    return difference(f_out, g_out), (dq, dk, dv)
