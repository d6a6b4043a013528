"""zentorch's SDPA of float16 is off by eight times what torch's is, against float64.

python zentorch_float16.py
"""

import torch
import torch.nn.functional as F
import zentorch

torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, length, 32).half() for length in (70, 133, 133))
right = F.scaled_dot_product_attention(q.double(), k.double(), v.double())


def error(out):
    return ((out.double() - right).norm() / right.norm()).item()


print(f"torch {torch.__version__}, zentorch {zentorch.__version__}")
ours, theirs = torch.ops.zentorch.zentorch_sdpa(q, k, v)[0], F.scaled_dot_product_attention(q, k, v)
print(f"relative error: zentorch {error(ours):.5f}, torch {error(theirs):.5f}")
