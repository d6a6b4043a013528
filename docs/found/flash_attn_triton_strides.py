"""flash-attn's Triton kernels give wrong gradients where dout does not lie as out, or v as k does.

The backward kernels read dout by the strides of out, and write dv by those of k. They are made for AMD's
GPUs; here Triton's interpreter runs them on a CPU, for which the package's operators are registered for
every device.

    python flash_attn_triton_strides.py
"""

import os

os.environ |= {"TRITON_INTERPRET": "1", "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE"}

from importlib.metadata import version

import torch

custom_op = torch.library.custom_op
torch.library.custom_op = lambda *a, **options: custom_op(*a, **options | {"device_types": None})
from flash_attn import flash_attn_func  # noqa: E402  # which reads what is set above

torch.manual_seed(0)
q, k, v, dout = torch.randn(4, 1, 33, 2, 16)


def gradients(q, k, v, dout):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout)


def heads_first(x):
    """The same numbers; in memory the heads are before the sequence."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


print(f"flash-attn {version('flash-attn')}, triton {version('triton')}, torch {torch.__version__}")
right = gradients(q, k, v, dout)
for what, arrays in {
    "dout": (q, k, v, heads_first(dout)),
    "v": (q, k, heads_first(v), dout),
    "all": tuple(map(heads_first, (q, k, v, dout))),
}.items():
    off = [(x - y).abs().max().item() for x, y in zip(gradients(*arrays), right, strict=True)]
    print(
        f"{what} with the heads first: dq, dk, dv are off by {', '.join(f'{x:.1e}' for x in off)}"
    )
