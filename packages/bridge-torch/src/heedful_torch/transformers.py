"""heedful in Hugging Face's models: one call, and a model's `attn_implementation` may name a backend.

    names = heedful_torch.transformers.register()
    model = AutoModel.from_pretrained(..., attn_implementation=names["jax:flash"])

A name there brings two functions. The one of masks decides what the one of attention is told: without it
a model's padding and causality vanish, and nobody says so. Its None means "causal, if the module is",
counted from the first query and the first key, also where a cache of fixed size has more keys than there
are queries.
"""

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

import heedful
from heedful_torch import module_call

OLDEST = "5.0"

# Asked for by a model's own forward, and said to its attention too, which they do not concern.
NOT_OF_ATTENTION = frozenset({
    *("cache", "cache_position", "past_key_values", "use_cache"),
    *("labels", "num_items_in_batch", "position_ids", "return_dict", "token_type_ids"),
    *("output_hidden_states", "output_router_logits"),
    *("max_length_k", "max_length_q"),  # said of what cu_seq_lens hold already
})  # fmt: skip


def register() -> dict[str, str]:
    """Registers heedful's attention and its masks with transformers.

    Returns:
        the names that `attn_implementation` then takes, by the backend that each stands for; that of
        "heedful" is chosen at each call, by `heedful.use_backend`, HEEDFUL_BACKEND or automatically.
        transformers takes any name with "flash" or "sdpa" in it for its own: these two words are in
        capitals, as in "heedful:jax:FLASH".

    Raises:
        ImportError: there is no transformers of 5.0 or later here.

    What a model asks is honoured or refused, never dropped: dropout (drawn from torch's generator),
    sliding windows, softcap, sinks, position biases, additive masks, sequences packed into one row.
    Weights are not returned: a model that is asked for its attentions raises.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"heedful_torch.transformers needs transformers {OLDEST} or later, which cannot be imported "
            f"here: {error}. Install heedful-torch[transformers]."
        ) from error
    names = {backend: _name(backend) for backend in heedful.backends()}
    for backend, name in (("heedful", "heedful"), *names.items()):
        chosen = None if backend == "heedful" else backend
        AttentionInterface.register(name, partial(_attention, chosen))
        AttentionMaskInterface.register(name, _mask)
    return {"heedful": "heedful", **names}


def _name(backend: str) -> str:
    return "heedful:" + backend.replace("flash", "FLASH").replace("sdpa", "SDPA")


def _mask(*sizes: Any, config: Any = None, **options: Any) -> Tensor | None:
    """Boolean (B, 1, Sq, Sk), or None where all that is hidden is what causality hides."""
    from transformers.masking_utils import sdpa_mask

    if config is not None:
        _refuse_attention_of_its_own(config)
    mask: Tensor | None = sdpa_mask(*sizes, config=config, **options)
    return mask


def _refuse_attention_of_its_own(config: Any) -> None:
    """Raises for a model whose layers compute attention themselves, whatever they are told.

    They would add the mask to their scores, True as 1. transformers does not check names that were
    registered, and has no flag that all other models set.
    """
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    modeling = sys.modules.get(name)
    if modeling is None or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        return
    if not any(getattr(x, "_supports_attention_backend", False) for x in vars(modeling).values()):
        raise ValueError(
            f"{name} computes attention itself and asks no attn_implementation, so that heedful would "
            'not be called there. Choose attn_implementation="eager" for it.'
        )


def _attention(
    backend: str | None,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a module calls: q, k and v (B, H, S, D) → out (B, S, H, D) and no weights."""
    _refuse_unknown(others)
    options: dict[str, Any] = {
        "backend": backend,
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "bias": position_bias,
    }
    q_length, kv_length = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        options["causal"] = "top_left" if causal and q_length > 1 else False
        if sliding_window is not None and sliding_window < kv_length:
            options["window"] = _window(sliding_window, causal)
    else:  # which holds causality and windows
        options |= _masked(attention_mask, position_bias)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if cu_seq_lens_q is None or cu_seq_lens_k is None:
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k go together: one of them came alone.")
        if options.get("causal") and not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
            raise ValueError(
                "a causal call of packed sequences must pack queries and keys alike. Got different "
                "cu_seq_lens_q and cu_seq_lens_k. Pass a mask that says who sees what."
            )
        options["q_segment_ids"] = _segments("cu_seq_lens_q", cu_seq_lens_q, query)
        options["kv_segment_ids"] = _segments("cu_seq_lens_k", cu_seq_lens_k, key)
    query, key, value = module_call.as_autocast(query, query, key, value)
    options["sinks"], options["bias"] = module_call.as_autocast(
        query, options["sinks"], options["bias"]
    )
    out = module_call.attention(query, key, value, dropout, options)
    return out.transpose(1, 2).contiguous(), None


def _refuse_unknown(others: dict[str, Any]) -> None:
    asked = {name: x for name, x in others.items() if x is not None and x is not False}
    if "output_attentions" in asked:
        raise ValueError(
            "output_attentions=True asks for the weights, which heedful does not return: they are "
            'quadratic in memory. For them choose attn_implementation="eager".'
        )
    unknown = sorted(asked.keys() - NOT_OF_ATTENTION)
    if unknown:
        raise TypeError(
            f"this model tells its attention {', '.join(unknown)}, of which heedful does not know what "
            'it asks for. Choose attn_implementation="eager" for it, or leave it out.'
        )


def _window(sliding_window: int, causal: bool) -> tuple[int, int | None]:
    """Of a mask function's words: j > i − w of a causal one, |i − j| ≤ w of another."""
    return (sliding_window - 1, None) if causal else (sliding_window, sliding_window)


def _masked(attention_mask: Tensor, position_bias: Tensor | None) -> dict[str, Tensor]:
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask must be a tensor. Got {type(attention_mask).__name__}: make the mask with "
            "this model's attn_implementation, as heedful_torch.transformers registers it."
        )
    if attention_mask.dtype == torch.bool:
        return {"mask": attention_mask}
    if position_bias is None:
        return {"bias": attention_mask}
    return {"bias": attention_mask + position_bias}


def _segments(name: str, cumulated: Tensor, x: Tensor) -> Tensor:
    """(B, S) of sequences packed into one row: to which one each of its places belongs."""
    batch, _, length, _ = x.shape
    if batch != 1 or cumulated.ndim != 1:
        raise ValueError(
            f"{name} must be (sequences + 1,) beside a batch of 1, one row that holds all sequences. "
            f"Got shape {tuple(cumulated.shape)} beside a batch of {batch}."
        )
    places = torch.arange(length, device=x.device, dtype=cumulated.dtype)
    return torch.searchsorted(cumulated[1:].contiguous(), places, right=True, out_int32=True)[None]
