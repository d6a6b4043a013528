"""torch's own call of attention, sent through a backend of heedful."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from heedful.dispatch.ambient import wanted
from heedful.torch_compile import run_while_tracing
from heedful_torch import dropout


def replace_sdpa(backend: str | Sequence[str] | None = None) -> AbstractContextManager[Any]:
    """Within the block, `F.scaled_dot_product_attention` is heedful's, in whatever module it is called.

        with heedful_torch.replace_sdpa("jax:flash"):
            logits = model(tokens)

    ``backend`` is as in `heedful.attention`: a name runs or raises, never falls back. Every argument has
    torch's meaning: boolean masks are True where a key is seen, float ones are added, ``is_causal`` is
    counted from the first query and key, leading axes broadcast, ``dropout_p`` is drawn from torch's
    generator (torch's kernels drop other weights). The block is that of its thread. What
    `torch.utils.checkpoint` recomputes in `backward` is within it only where `backward` is called there.
    Two fast paths of torch do not call this function and are left alone: those of
    `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` in evaluation without gradients, which
    `torch.backends.mha.set_fastpath_enabled(False)` switches off.

    Raises within the block:
        TypeError, ValueError: the call breaks torch's or heedful's rules.
        Refusal: no backend that was asked can honour the call; says every reason.
    """
    return _Replaced(backend)


class _Replaced(TorchFunctionMode):
    def __init__(self, backend: str | Sequence[str] | None) -> None:
        super().__init__()
        _check(backend)
        self.backend = backend

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return _attention(self.backend, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@run_while_tracing
def _check(backend: str | Sequence[str] | None) -> None:
    """Raises for a name that nobody has."""
    wanted(backend)


def _attention(
    backend: str | Sequence[str] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and is_causal:
        raise ValueError(
            "attn_mask and is_causal=True exclude each other in scaled_dot_product_attention. Put "
            "causality into the mask."
        )
    inputs = (query, key, value)
    if min(x.ndim for x in inputs) < 2:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(f"query, key and value must be (..., S, D). Got shapes {shapes}.")
    rank = max(x.ndim for x in inputs)
    lifted = max(rank, 4)  # so that a mask's axes are what they are there, counted from the last
    query, key, value = (_of_rank(lifted, x) for x in inputs)
    heads = [x.shape[-3] for x in (query, key, value)]
    if not enable_gqa and len({*heads} - {1}) > 1:
        raise ValueError(
            f"query, key and value have {heads} heads. For groups of heads pass enable_gqa=True."
        )
    own = 3 if enable_gqa else 2  # axes that do not broadcast
    leading = torch.broadcast_shapes(*(x.shape[:-own] for x in (query, key, value)))  # type: ignore[no-untyped-call]  # torch's own
    query, key, value = (x.expand(*leading, *x.shape[-own:]) for x in (query, key, value))
    options: dict[str, Any] = {"backend": backend, "scale": scale}
    options["causal"] = "top_left" if is_causal else False
    if attn_mask is not None:
        name = "mask" if attn_mask.dtype == torch.bool else "bias"
        options[name] = _of_rank(lifted, attn_mask)
    out: Tensor = dropout.attention(query, key, value, dropout_p, options)
    return out.reshape(out.shape[lifted - rank :])


def _of_rank(rank: int, x: Tensor) -> Tensor:
    return x[(None,) * (rank - x.ndim)]
