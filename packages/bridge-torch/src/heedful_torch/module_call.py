"""`heedful.attention` as modules of torch ask for it: with a rate of dropout, under autocast."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import heedful
from heedful_torch.function import has_no_data, is_written_down, outside_compilation


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, options: Mapping[str, Any]) -> Any:
    """`heedful.attention`, dropping with a seed that is drawn at each call where there is a rate.

    `torch.manual_seed` repeats what is dropped, and so does `torch.utils.checkpoint`.
    """
    if dropout_p == 0:
        return heedful.attention(q, k, v, **options)
    return _with_drawn_seed(q, k, v, {**options, "dropout_rate": dropout_p})


def drawn_seed(q: Tensor) -> int:
    """Dropout's, from torch's default generator of CPU; without data nothing is drawn.

    Raises:
        NotImplementedError: what is called is written down, in which one draw would be a constant.
    """
    if is_written_down():
        raise NotImplementedError(
            "torch is recording a graph of its operations, in which the seed of dropout would be a "
            "constant: each run would drop the same weights. Record it without dropout, or pass "
            "dropout_seed= as a tensor to heedful.attention."
        )
    return 0 if has_no_data(q) else int(torch.randint(2**31 - 1, (), device="cpu"))


def as_autocast(place: Tensor, *tensors: Any) -> tuple[Any, ...]:
    """Tensors in the dtype that `torch.autocast` says for products where `place` lies.

    As it casts what torch's own attention is handed: floating ones but float64, and nothing else.
    """
    kind = place.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    )


# A compiled draw would be another one, and a graph is compiled anew for each number in it.
@outside_compilation
def _with_drawn_seed(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Any:
    return heedful.attention(q, k, v, **options, dropout_seed=drawn_seed(q))
