"""FlexAttention traces `score_mod` with scores of q's dtype, and computes it with scores of float32.

    pip install torch==2.13.0
    python flex_score_dtype.py

So a function that casts to `score.dtype`, as of distances it must where nothing may be promoted, has
the cast to bfloat16 in it, which holds 256 numbers in a row: distances beyond are rounded, and LSE
with them.
"""

import warnings

import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

warnings.filterwarnings("ignore", ".*called without torch.compile")


def cast(score, b, h, q_idx, kv_idx):
    return score - 0.02 * (q_idx - kv_idx).abs().to(score.dtype)


def promoted(score, b, h, q_idx, kv_idx):
    return score - 0.02 * (q_idx - kv_idx).abs()


torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 1024, 64, dtype=torch.bfloat16)
i = torch.arange(1024)
scores = q.double() @ k.double().mT / 8
exact = promoted(scores, 0, 0, i[:, None], i[None]).logsumexp(-1)
print(f"torch {torch.__version__}, bfloat16, LSE off by")
for function in (cast, promoted):
    _, aux = flex_attention(q, k, v, score_mod=function, return_aux=AuxRequest(lse=True))
    print(f"{function.__name__:>9}: {(aux.lse - exact).abs().max():.1e}")
