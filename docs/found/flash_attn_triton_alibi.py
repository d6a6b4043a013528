"""flash-attn's Triton kernels give gradients of NaN where ALiBi's slopes are below 0.

The backward kernels take exp of the scores of queries and keys beyond the last, which such slopes let
grow to inf, and multiply it by 0. They are made for AMD's GPUs; here Triton's interpreter runs them on a
CPU, for which the package's operators are registered for every device, and slopes may lie anywhere.

    python flash_attn_triton_alibi.py
"""

import os

os.environ |= {"TRITON_INTERPRET": "1", "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE"}

from importlib.metadata import version

import torch

custom_op = torch.library.custom_op
torch.library.custom_op = lambda *a, **options: custom_op(*a, **options | {"device_types": None})
from flash_attn import flash_attn_func  # noqa: E402  # which reads what is set above
from flash_attn.flash_attn_triton_amd.utils import MetaData  # noqa: E402  # likewise

MetaData.need_alibi = lambda self, slopes, batch, heads: setattr(self, "alibi_slopes", slopes)

print(f"flash-attn {version('flash-attn')}, triton {version('triton')}, torch {torch.__version__}")
for slope in (0.5, -3.0):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 16, requires_grad=True) for n in (33, 40, 40))
    out = flash_attn_func(q, k, v, alibi_slopes=torch.full((1, 1), slope))
    out.sum().backward()
    found = {n: int(x.grad.isnan().sum()) for n, x in {"dq": q, "dk": k, "dv": v}.items()}
    print(f"slope {slope}: NaN in out {int(out.isnan().sum())}, in {found}")
