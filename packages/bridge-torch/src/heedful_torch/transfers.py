"""What crossed between torch and the other frameworks, and whether it was copied: `transfer_report`.

A file of its own because every place where memory crosses (`heedful_torch.dlpack`, `autograd`,
`bridge`) tells it, and it knows none of them. While no report is open, to tell it costs a look at an
empty list.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from heedful.call.arrays import dtype_of

__all__ = ["Transfer", "TransferReport", "crossed", "is_reported", "transfer_report"]


@dataclass(frozen=True)
class Transfer:
    """One array that crossed from one framework to another.

    Attributes:
        source, target: "torch", "jax" or "numpy".
        shape, dtype, device: of the array, which crossing does not change.
        bytes: of its elements.
        copied: whether it has fresh memory on the other side, rather than the same.
        why: it was copied, or how it is shared.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    bytes: int
    copied: bool
    why: str

    def __str__(self) -> str:
        array = f"{self.dtype}{list(self.shape)} on {self.device}, {self.bytes} bytes"
        how = "copied" if self.copied else "shared"
        return f"{self.source} to {self.target}: {array}, {how}: {self.why}"


@dataclass
class TransferReport:
    """The crossings within a block, in their order; printed, equal ones are one line."""

    transfers: list[Transfer] = field(default_factory=list)

    @property
    def shared(self) -> list[Transfer]:
        return [transfer for transfer in self.transfers if not transfer.copied]

    @property
    def copied(self) -> list[Transfer]:
        return [transfer for transfer in self.transfers if transfer.copied]

    def __iter__(self) -> Iterator[Transfer]:
        return iter(self.transfers)

    def __len__(self) -> int:
        return len(self.transfers)

    def __str__(self) -> str:
        lines = [
            str(transfer) if count == 1 else f"{transfer} ({count} times)"
            for transfer, count in Counter(self.transfers).items()
        ]
        totals = (
            f"{len(found)} {how}, {sum(transfer.bytes for transfer in found)} bytes"
            for how, found in (("shared", self.shared), ("copied", self.copied))
        )
        return "\n".join([*lines, "; ".join(totals)])


@contextlib.contextmanager
def transfer_report() -> Iterator[TransferReport]:
    """Reports what crosses between torch and JAX or NumPy within the block: shared or copied, and why.

        with heedful_torch.transfer_report() as report:
            heedful.attention(q, k, v, backend="jax:flash")
        print(report)
        assert not report.copied

    All threads are reported: JAX runs a torch function, and torch a backward pass on a GPU, on threads
    of their own. JAX may not have run yet what was called: wait for it within the block, by
    `jax.block_until_ready`. Blocks nest; each has its own report.

    Yields:
        a `TransferReport`, which holds a `Transfer` for each array, in their order.
    """
    report = TransferReport()
    _open.append(report)
    try:
        yield report
    finally:
        _open[:] = [other for other in _open if other is not report]


# Of the process and not of the context: callbacks and backward passes come from other threads.
_open: list[TransferReport] = []


def is_reported() -> bool:
    """Whether anybody listens, and it is worth finding out why something is copied."""
    return bool(_open)


def crossed(source: str, target: str, array: Any, *, copied: bool, why: str) -> None:
    """Tells the open reports of one array: a tensor, or an array of NumPy or JAX."""
    if not _open:
        return
    shape = tuple(array.shape)
    transfer = Transfer(
        source,
        target,
        shape,
        dtype_of(array),
        str(getattr(array, "device", "cpu")),  # NumPy 1's have none
        math.prod(shape) * array.dtype.itemsize,
        copied,
        why,
    )
    for report in tuple(_open):
        report.transfers.append(transfer)
