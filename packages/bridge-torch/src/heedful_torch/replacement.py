"""torch's own call of attention, sent through a backend of heedful."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from heedful.dispatch.ambient import wanted
from heedful.torch_compile import run_while_tracing
from heedful_torch import module_call
from heedful_torch.function import outside_compilation


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
        self.attention = partial(_attention, backend)
        # torch.compile, where the block is within what it compiles, cannot trace how this is made.
        traced = torch.compiler.is_dynamo_compiling()
        self.multi_head = None if traced else _calling(multi_head_attention_forward, self.attention)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            func = self.attention
        elif func is multi_head_attention_forward:
            # It is itself a function that a mode is told of, and then calls attention without the mode.
            return _apart(self.multi_head or _calling(func, self.attention), args, kwargs or {})
        return func(*args, **(kwargs or {}))


@outside_compilation  # which would look for its names in torch's own module
def _apart(function: Any, args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _calling(function: Any, attention: Any) -> Any:
    """A function of torch's, which finds another attention under the name by which it calls it."""
    name = scaled_dot_product_attention.__name__
    if name not in function.__code__.co_names:
        raise RuntimeError(
            f"{function.__name__} of torch {torch.__version__} does not call {name}, where "
            "heedful_torch.replace_sdpa would replace it. Please report this."
        )
    own = FunctionType(
        function.__code__,
        {**function.__globals__, name: attention},
        function.__name__,
        function.__defaults__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


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
    query, key, value, attn_mask = module_call.as_autocast(query, query, key, value, attn_mask)
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
        if attn_mask.dtype not in (torch.bool, query.dtype):
            raise TypeError(
                f"attn_mask must be boolean or of query's dtype. Got {attn_mask.dtype} beside "
                f"{query.dtype}. For 0 and 1 pass attn_mask != 0."
            )
        options["mask" if attn_mask.dtype == torch.bool else "bias"] = _of_rank(lifted, attn_mask)
    out: Tensor = module_call.attention(query, key, value, dropout_p, options)
    return out.reshape(out.shape[lifted - rank :])


def _of_rank(rank: int, x: Tensor) -> Tensor:
    return x[(None,) * (rank - x.ndim)]
