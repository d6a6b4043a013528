"""The kernels of `F.scaled_dot_product_attention`, a backend each.

SDPA chooses a kernel and does not say which. Here each backend calls the aten operator of exactly
one kernel. What SDPA does around these operators, and what the contract asks beyond SDPA, is in
`heedful_torch.backends.kernel`.
"""

from heedful.rules.scores import ADDED
from heedful.rules.visibility import FEATURES

TAKES = FEATURES | ADDED | {"grouped_heads", "return_lse", "scale", "value_dim"}
LACKS = {"softcap": "no kernel of SDPA has a softcap; jax:flash has"}
