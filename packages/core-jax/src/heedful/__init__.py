"""heedful: one attention call, any array, any backend, and proof that they agree."""

# First, or its first backend's import would later cover the function `backends` with this package.
import heedful.backends as _backends_package  # noqa: F401  # imported for that alone
from heedful.api import (
    attention,
    causal_flash_attention,
    dropout_mask,
    explain,
    flash_attention,
    plain_attention,
)
from heedful.block_mask import block_mask
from heedful.cache import Decoded, decode
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.comparison import value_and_grad_difference
from heedful.cosine import cosine_sim_flash_attention
from heedful.dispatch import (
    Backend,
    Refusal,
    backends,
    part,
    recording,
    register,
    unregister,
    use_backend,
)
from heedful.ring import ring_attention, zigzag
from heedful.varlen import flash_attention_varlen

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Decoded",
    "Operands",
    "Problem",
    "Refusal",
    "attention",
    "backends",
    "block_mask",
    "causal_flash_attention",
    "cosine_sim_flash_attention",
    "decode",
    "dropout_mask",
    "explain",
    "flash_attention",
    "flash_attention_varlen",
    "part",
    "plain_attention",
    "recording",
    "register",
    "ring_attention",
    "unregister",
    "use_backend",
    "value_and_grad_difference",
    "zigzag",
]
