"""Torch, as it calls: the only file of the crosscheck that imports it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from heedful_crosscheck.callers import Attending, Named, Results, of_kind
from heedful_crosscheck.layouts import Layout


def numbers_of(x: torch.Tensor) -> np.ndarray:
    """A tensor's numbers, wherever it lies."""
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy().view("bfloat16")
    return x.numpy()


@dataclass(frozen=True)
class TorchCaller:
    """Torch and its autograd.

    Attributes:
        on_gpu: whether its tensors lie on the GPU where there is one.
    """

    on_gpu: bool = True

    framework = "torch"

    @property
    def device(self) -> str:
        """Where its tensors lie."""
        return "cuda" if self.on_gpu and torch.cuda.is_available() else "cpu"

    def array(self, x: np.ndarray, layout: Layout) -> torch.Tensor:
        return layout.of(x, self._copy)

    def _copy(self, x: np.ndarray) -> torch.Tensor:
        # Torch knows no NumPy bfloat16, so its bits travel as integers.
        bits = x.view(np.uint16) if x.dtype.name == "bfloat16" else x
        # A copy, so that nobody writes into an array that others are asked with; and one by torch, whose
        # memory is aligned as JAX wants it.
        tensor = torch.from_numpy(np.array(bits, order="C")).clone()
        return (tensor if bits is x else tensor.view(torch.bfloat16)).to(self.device)

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        if of_kind(torch.Tensor, x).device.type != self.device:
            raise TypeError(f"the call was made on {self.device}, and answered on {x.device}")
        return numbers_of(x)

    def pull_back(
        self,
        attend: Attending,
        primals: Named,
        constants: Named,
        cotangents: Sequence[torch.Tensor],
    ) -> tuple[Results, Named]:
        leaves = {n: x.detach().requires_grad_() for n, x in primals.items()}
        results = attend(leaves, constants)
        # A result cut off from an input gives it no gradient: judged like any other wrong one.
        pairs = zip(results, cotangents, strict=True)
        connected = [(x, c.to(x.dtype)) for x, c in pairs if x.requires_grad]
        if not connected:
            return results, {n: torch.zeros_like(x) for n, x in leaves.items()}
        outputs, given = zip(*connected, strict=True)
        found = torch.autograd.grad(outputs, list(leaves.values()), given, materialize_grads=True)
        return results, dict(zip(leaves, found, strict=True))

    def pull_back_twice(
        self,
        attend: Attending,
        primals: Named,
        constants: Named,
        cotangents: Sequence[torch.Tensor],
        along: Named,
    ) -> Named:
        leaves = {n: x.detach().requires_grad_() for n, x in primals.items()}
        results = attend(leaves, constants)
        first = torch.autograd.grad(
            results,
            list(leaves.values()),
            [c.to(x.dtype) for c, x in zip(cotangents, results, strict=True)],
            create_graph=True,
            materialize_grads=True,
        )
        wide = torch.float64 if leaves["q"].dtype == torch.float64 else torch.float32
        pairs = zip(first, leaves, strict=True)
        projected = [(g.to(wide) * along[n].to(wide)).sum() for g, n in pairs]
        connected = [x for x in projected if x.requires_grad]
        if not connected:  # a gradient that is a constant: its derivative is 0
            return {n: torch.zeros_like(x) for n, x in leaves.items()}
        found = torch.autograd.grad(connected, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))
