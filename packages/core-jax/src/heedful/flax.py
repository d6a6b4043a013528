"""Attention for Flax's modules: `attention_fn=` of NNX's and of Linen's, in their signatures.

    nnx.MultiHeadAttention(8, 64, decode=False, rngs=rngs, attention_fn=heedful.flax.nnx_attention)
    nn.MultiHeadDotProductAttention(8, attention_fn=heedful.flax.linen_attention)

Which backend computes is said by `heedful.use_backend`, or by functools.partial(…, backend="jax:flash").
Each function has the very parameters of the one that it stands for, because Linen looks: what a function
does not name, a mask too, Linen leaves out. An argument is honoured or refused. Two things differ: a
query that sees no key gets 0, where Flax takes the mean of all values; and other weights are dropped,
of the same rate, by the numbers that `heedful.dropout_mask` documents.

Flax itself is not imported here.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from heedful.api import attention


def nnx_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    *,
    backend: str | Sequence[str] | None = None,
) -> jax.Array:
    """`flax.nnx.dot_product_attention`, computed by a backend of heedful.

    Args:
        query: (batch..., Sq, Hq, D).
        key: (batch..., Sk, Hkv, D), Hq a multiple of Hkv.
        value: (batch..., Sk, Hkv, Dv).
        bias: added to the scores, broadcastable to (batch..., Hq, Sq, Sk).
        mask: visible where it is not 0, likewise.
        broadcast_dropout: must be False where weights are dropped: heedful drops others in each head.
        dropout_rng: the key that what is dropped is drawn by.
        dropout_rate: with which probability a weight is dropped, where not deterministic.
        deterministic: whether nothing is dropped.
        dtype: what query, key and value are cast to first; by default they must be of one.
        precision: None; `jax.default_matmul_precision` around the whole step says it.
        module: None; weights, which it would sow, are not to be had.
        promote_dtype: Flax's own, called as there where it is given.
        is_causal: whether query i sees keys up to i alone, counted from the first of each.
        backend: as in `heedful.attention`.

    Returns:
        (batch..., Sq, Hq, Dv).

    Raises:
        TypeError, ValueError: an argument is none of those above, or cannot be honoured.
        Refusal: no backend that was asked can honour the call.
    """
    if promote_dtype is not None:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    elif dtype is not None:
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    _refuse_what_needs_weights(module, precision)
    out = attention(
        query,
        key,
        value,
        bias=_of_rank(query.ndim, bias),
        mask=None if mask is None else _of_rank(query.ndim, mask) != 0,
        causal="top_left" if is_causal else False,
        layout="bshd",
        backend=backend,
        **_dropout(broadcast_dropout, dropout_rng, dropout_rate, deterministic),
    )
    return cast(jax.Array, out)


def linen_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Any] | None = None,
    qk_attn_weights_einsum: Callable[..., Any] | None = None,
    attn_weights_value_einsum: Callable[..., Any] | None = None,
    *,
    backend: str | Sequence[str] | None = None,
) -> jax.Array:
    """`flax.linen.dot_product_attention`, computed by a backend of heedful: see `nnx_attention`.

    Args:
        force_fp32_for_softmax: the softmax is float32's in any case.
        einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: None; a kernel has its own
            products.
    """
    einsums = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    if given := [name for name, einsum in einsums.items() if einsum is not None]:
        raise ValueError(
            f"{', '.join(given)} must be None: a kernel of attention has its own products. "
            "For another einsum use flax.linen.dot_product_attention."
        )
    return nnx_attention(
        query,
        key,
        value,
        bias,
        mask,
        broadcast_dropout,
        dropout_rng,
        dropout_rate,
        deterministic,
        dtype,
        precision,
        module,
        backend=backend,
    )


def _refuse_what_needs_weights(module: Any, precision: Any) -> None:
    if module is not None:
        raise ValueError(
            "sow_weights=True asks for the attention's weights, which heedful does not make: they are "
            "quadratic in memory. For them use Flax's own dot_product_attention."
        )
    if precision not in (None, jax.lax.Precision.DEFAULT, "default"):
        raise ValueError(
            f"precision must be None. Got {precision!r}. Open jax.default_matmul_precision around the "
            "whole step in its place: it holds for gradients too."
        )


def _of_rank(rank: int, x: jax.Array | None) -> Any:
    """With as many leading axes of 1 as it lacks: two axes alone would be those of keys' padding."""
    return x if x is None else jnp.reshape(x, (1,) * (rank - x.ndim) + x.shape)


def _dropout(
    broadcast_dropout: bool, rng: jax.Array | None, rate: float, deterministic: bool
) -> dict[str, Any]:
    if deterministic or rate == 0:
        return {}
    if broadcast_dropout:
        raise ValueError(
            "broadcast_dropout must be False where weights are dropped. Got True, by which Flax drops "
            "the same ones in every batch row and head: heedful drops others in each."
        )
    if rng is None:
        raise ValueError("dropout_rate > 0 needs dropout_rng, a key of jax.random. Got None.")
    seed = jax.random.randint(rng, (), 0, 2**31 - 1, jnp.int32)
    return {"dropout_rate": rate, "dropout_seed": seed}
