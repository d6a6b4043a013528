"""flash-attn's names on any backend and device: what was written for CUDA runs on a laptop.

    import heedful_torch.flash_attn as flash_attn

Names, signatures and meaning are those of flash-attn 2.8.3, whose functions of dense sequences, of
packed ones, of a cache and of padding are here.
"""

from heedful_torch.flash_attn import bert_padding
from heedful_torch.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from heedful_torch.flash_attn.kv_cache import flash_attn_with_kvcache
from heedful_torch.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
