"""heedful_torch: PyTorch in heedful, its kernels as backends, its tensors on every other one."""

from heedful_torch.by_module import per_module
from heedful_torch.dlpack import CopyWarning, to_jax, to_torch
from heedful_torch.pytrees import as_jax, as_torch
from heedful_torch.replacement import replace_sdpa
from heedful_torch.transfers import Transfer, TransferReport, transfer_report

__version__ = "0.1.0"

__all__ = [
    "CopyWarning",
    "Transfer",
    "TransferReport",
    "as_jax",
    "as_torch",
    "per_module",
    "replace_sdpa",
    "to_jax",
    "to_torch",
    "transfer_report",
]
