"""Where captured activations go, and in a file that is the same whenever it is made."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "src/heedful_crosscheck/activations"


def write(target: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    target.write_bytes(with_sorted_header(safetensors.torch.save(tensors, dict(metadata))))


def with_sorted_header(file: bytes) -> bytes:
    """The same safetensors file, its header in one fixed order.

    safetensors writes metadata in an order that changes from run to run. The header is JSON, its
    length in front (8 bytes, little-endian), padded with spaces so that the tensors stay aligned.
    """
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    ordered = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    ordered += b" " * (-len(ordered) % 8)
    return len(ordered).to_bytes(8, "little") + ordered + file[8 + length :]
