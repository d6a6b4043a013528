"""flash-attn's Triton kernels, causal: a sequence without keys overwrites the LSE of the next one.

Where a tile of 64 queries sees no key, the forward kernel writes an LSE of 0 for all 64, also where the
sequence has fewer: over that of the next one, whose gradients are made of it, or beyond the array. The
kernels are made for AMD's GPUs; here Triton's interpreter runs them on a CPU, for which the package's
operators are registered for every device.

    python flash_attn_triton_varlen.py
"""

import os

os.environ |= {"TRITON_INTERPRET": "1", "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE"}

from importlib.metadata import version

import torch

custom_op = torch.library.custom_op
torch.library.custom_op = lambda *a, **options: custom_op(*a, **options | {"device_types": None})
from flash_attn import flash_attn_varlen_func  # noqa: E402  # which reads what is set above

print(f"flash-attn {version('flash-attn')}, triton {version('triton')}, torch {torch.__version__}")
torch.manual_seed(0)
k, v = (torch.randn(130, 1, 16, requires_grad=True) for _ in range(2))
q = torch.randn(65 + 130, 1, 16)


def of_the_last_130_queries(q, *lengths):
    """The LSE and dv, of sequences of so many queries and keys."""
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in lengths)
    longest = {"max_seqlen_q": 130, "max_seqlen_k": 130}
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, **longest, causal=True, return_attn_probs=True
    )
    return lse[-130:].detach(), *torch.autograd.grad(out[-130:].sum(), v)


alone, beside = (
    of_the_last_130_queries(q[65:], [130], [130]),
    of_the_last_130_queries(q, [65, 130], [0, 130]),
)
for name, x, y in zip(("LSE", "dv"), alone, beside, strict=True):
    print(
        f"{name} alone and behind a sequence of 65 queries and no keys: {int((x != y).sum())} of "
        f"{x.numel()} numbers differ, by up to {(x - y).abs().max():.1e}"
    )
