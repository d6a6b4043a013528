"""Dropout as torch's modules ask for it: at a rate, with torch's own generator behind it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import heedful
from heedful_torch.function import has_no_data, outside_compilation


def drawn_seed(q: Tensor) -> int:
    """Dropout's, from torch's default generator of CPU; without data nothing is drawn."""
    return 0 if has_no_data(q) else int(torch.randint(2**31 - 1, (), device="cpu"))


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, options: Mapping[str, Any]) -> Any:
    """`heedful.attention`, dropping with a seed that is drawn at each call where there is a rate.

    `torch.manual_seed` repeats what is dropped, and so does `torch.utils.checkpoint`.
    """
    if dropout_p == 0:
        return heedful.attention(q, k, v, **options)
    return _with_drawn_seed(q, k, v, {**options, "dropout_rate": dropout_p})


# A compiled draw would be another one, and a graph is compiled anew for each number in it.
@outside_compilation
def _with_drawn_seed(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Any:
    return heedful.attention(q, k, v, **options, dropout_seed=drawn_seed(q))
