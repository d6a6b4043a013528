"""What flash-attn 3 and 4 share as backends: a GPU they need, and a public function that is called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError

import torch
from torch import Tensor

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.dispatch.packages import why_not_imported
from heedful_torch.backends.flash_attn import TAKES
from heedful_torch.backends.kernel import Kernel, attend, cuda_limits, limits


@dataclass(frozen=True, eq=False)
class FlashAttnOnCuda:
    """A generation of flash-attn. Memory grows with Sq + Sk.

    Attributes:
        name: of the backend.
        module: that holds the public function.
        version: the package and its version; raises where it is not installed.
        cuda: its kernel.
        capability: the least that it runs on.
        takes, lacks: features.
        by_capability: what else keeps it from a problem on a GPU of some compute capability.
    """

    name: str
    module: str
    version: Callable[[], str]
    cuda: Kernel
    capability: tuple[int, int]
    takes: frozenset[str] = TAKES
    lacks: Mapping[str, str] = field(default_factory=dict)
    by_capability: Callable[[Problem, tuple[int, int]], list[str]] | None = None

    automatic = None
    deterministic = False  # the backward pass sums dq by atomic additions, in any order

    def reasons(self, problem: Problem) -> list[str]:
        reasons = cuda_limits(problem, ("float16", "bfloat16"), self.capability)
        reasons += limits(self.cuda, problem, self.takes)
        if self.by_capability and torch.cuda.is_available():
            reasons += self.by_capability(problem, torch.cuda.get_device_capability())
        # What cannot run here is not imported here either: a broken package may abort.
        return reasons or list(
            filter(None, [why_not_imported(self.module) or self._why_not_installed()])
        )

    def _why_not_installed(self) -> str | None:
        try:  # flash-attn 2 has a folder of the name of 4's
            self.version()
        except PackageNotFoundError as missing:
            return f"{self.module} is of another package: {missing}"
        return None

    def kernel(self, problem: Problem) -> str:
        return f"{self.version()}, CUDA kernels"

    def run(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor | None]:
        return attend(self.cuda, problem, operands)
