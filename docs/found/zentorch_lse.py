"""zentorch's SDPA returns an LSE that nobody wrote, where no input requires a gradient.

python zentorch_lse.py
"""

import torch
import zentorch

torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 128, 32) for _ in range(3))
right = (q @ k.mT * 32**-0.5).logsumexp(-1)


def error():
    _, lse = torch.ops.zentorch.zentorch_sdpa(q, k, v)
    return ((lse - right).norm() / right.norm()).item()


print(f"torch {torch.__version__}, zentorch {zentorch.__version__}")
print(f"relative error where no gradient is wanted: {error():.1e}")
q.requires_grad_()
print(f"relative error where q requires one: {error():.1e}")
