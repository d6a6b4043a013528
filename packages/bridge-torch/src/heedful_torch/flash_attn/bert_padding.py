"""flash-attn's `bert_padding`: padded batches (B, S, ...) as rows of real tokens (T, ...), and back.

Not here: `index_first_axis_residual`.
"""

import torch
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows of `input` (N, ...) at `indices` (T,), as (T, ...).

    A row that is taken several times gets the sum of their gradients; in flash-attn it gets one of them.
    """
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) with `values` (T, ...) as its rows at `indices` (T,), and 0 elsewhere."""
    rows = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return rows.index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch that a mask selects, one after another.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), boolean or of 0 and 1; 1 for a real token.
        unused_mask: (B, S), the same; 1 for a token, not real, that keeps its place.

    Returns:
        (tokens, indices, cu_seqlens, max_seqlen, seqused): the tokens of either mask (T, ...); their
        places in the flattened batch (T,), int64; where each row's tokens begin among them, and T
        (B + 1,), int32; how many the longest row has; how many tokens of each row are real (B,), int32.

    Raises:
        ValueError: a mask is not (B, S).
    """
    used = _mask("attention_mask", attention_mask, hidden_states)
    kept = used if unused_mask is None else used | _mask("unused_mask", unused_mask, hidden_states)
    lengths = kept.sum(1, dtype=torch.int32)
    tokens, indices = _tokens(hidden_states, kept)
    seqused = used.sum(1, dtype=torch.int32)
    return tokens, indices, _starts(lengths), int(lengths.max()), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens of rows that hold several sequences each, one after another.

    Args:
        hidden_states: (B, S, ...).
        attention_mask_in_length: (B, S), integers; each row lists the lengths of its sequences, which
            stand one after another from its first token on, and 0 for the rest.

    Returns:
        (tokens, indices, cu_seqlens, max_seqlen): as `unpad_input`, where each sequence counts as a row.

    Raises:
        ValueError: the lengths are not (B, S), or a row of them is longer than S.
    """
    lengths = attention_mask_in_length
    _check_mask("attention_mask_in_length", lengths, hidden_states)
    totals, longest = lengths.sum(1, keepdim=True), lengths.shape[1]
    if bool((totals > longest).any()):
        raise ValueError(
            f"each row of attention_mask_in_length must sum to at most S = {longest}. "
            f"Got {totals.flatten().tolist()}."
        )
    tokens, indices = _tokens(hidden_states, torch.arange(longest, device=totals.device) < totals)
    each = lengths[lengths != 0]
    return tokens, indices, _starts(each), int(each.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The padded batch (batch, seqlen, ...) of tokens (T, ...) whose places are `indices` (T,)."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.reshape(batch, seqlen, *rows.shape[1:])


def _tokens(hidden_states: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    (indices,) = kept.flatten().nonzero(as_tuple=True)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices


def _starts(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _mask(name: str, mask: Tensor, hidden_states: Tensor) -> Tensor:
    _check_mask(name, mask, hidden_states)
    return mask != 0


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} must be (B, S) = {tuple(hidden_states.shape[:2])}, as hidden_states are. "
            f"Got {tuple(mask.shape)}."
        )
