"""FlexAttention's LSE is -inf for a query whose every score is finfo.min.

    pip install torch==2.13.0
    python flex_lse_finfo_min.py

Scores that are hidden by finfo.min, as padding often is, are finite, and so is their log-sum-exp,
finfo.min itself; out is the mean of V, as is right. The eager FlexAttention makes a logarithm to the
base 2 of LSE and back, and 1.44 · finfo.min is -inf.
"""

import warnings

import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

warnings.filterwarnings("ignore", ".*called without torch.compile")
lowest = torch.finfo(torch.float32).min


def hidden(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx == 0, lowest, score)


torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 4, 8)
out, aux = flex_attention(q, k, v, score_mod=hidden, return_aux=AuxRequest(lse=True))
print(f"torch {torch.__version__}")
print(f"out of row 0, off the mean of V by {(out[0, 0, 0] - v[0, 0].mean(0)).abs().max():.1e}")
print(f"its LSE {aux.lse[0, 0, 0]}, expected {torch.full((4,), lowest).logsumexp(0)}")
