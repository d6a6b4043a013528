"""The official flash-attn packages, a backend each, and what their generations have in common."""

from functools import partial

from torch import Tensor

from heedful_torch.backends.kernel import How, Kernel

TAKES = frozenset(
    {"causal", "window", "q_offset", "scale", "softcap", "grouped_heads", "value_dim", "return_lse"}
)

# (B, S, H, D), aligned bottom-right, K and V of fewer heads as they are, no mask, no bias.
flash_attn_kernel = partial(
    Kernel,
    flag="lower right",
    masks=None,
    alignment=8,
    equal_head_sizes=True,
    grouped=True,
)


def window(how: How, q: Tensor, k: Tensor) -> tuple[bool, int | None, int | None]:
    """Whether it is causal, and how far a query sees to the left and the right; None: to the end.

    Of (B, S, H, D) tensors, from a diagonal that ends in the lower right corner.
    """
    corner = k.shape[1] - q.shape[1]
    left = None if how.below is None else corner - how.below
    right = None if how.above is None else how.above - corner
    causal = right == 0
    return causal, left, None if causal and left is None else right
