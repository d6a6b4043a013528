"""flash-attn's Triton kernels ignore window_size and softcap: out is that of full attention.

They are made for AMD's GPUs; here Triton's interpreter runs them on a CPU, for which the package's
operators are registered for every device.

    python flash_attn_triton_ignores.py
"""

import os

os.environ |= {"TRITON_INTERPRET": "1", "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE"}

from importlib.metadata import version

import torch

custom_op = torch.library.custom_op
torch.library.custom_op = lambda *a, **options: custom_op(*a, **options | {"device_types": None})
from flash_attn import flash_attn_func  # noqa: E402  # which reads what is set above

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 64, 2, 32)
full = flash_attn_func(q, k, v)

print(f"flash-attn {version('flash-attn')}, triton {version('triton')}, torch {torch.__version__}")
for options in ({"window_size": (5, 2)}, {"softcap": 1.0}, {"causal": True}):
    same = torch.equal(flash_attn_func(q, k, v, **options), full)
    print(f"{options}: {'as if not asked' if same else 'taken'}")
