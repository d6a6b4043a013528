"""What flash-attn 3 and 4 share as backends: a GPU they need, and a public function that is called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.dispatch.packages import why_not_imported
from heedful.dispatch.registry import in_a_line
from heedful_torch.backends.kernel import How, Kernel, attend, cuda_limits, limits

TAKES = frozenset(
    {"causal", "window", "q_offset", "scale", "softcap", "grouped_heads", "value_dim", "return_lse"}
)


@dataclass(frozen=True, eq=False)
class FlashAttnOnCuda:
    """A generation of flash-attn. Memory grows with Sq + Sk.

    Attributes:
        name: of the backend.
        module: that holds the public function.
        version: the package and its version; raises where it is not installed.
        kernel_of_it: what it takes.
        capability: the least that it runs on.
        takes, lacks: features.
    """

    name: str
    module: str
    version: Callable[[], str]
    kernel_of_it: Kernel
    capability: tuple[int, int]
    takes: frozenset[str] = TAKES
    lacks: Mapping[str, str] = field(default_factory=dict)

    automatic = None
    deterministic = False  # the backward pass sums dq by atomic additions, in any order

    def reasons(self, problem: Problem) -> list[str]:
        reasons = cuda_limits(problem, ("float16", "bfloat16"), self.capability)
        reasons += limits(self.kernel_of_it, problem, self.takes)
        if why := self._why_not_installed() or why_not_imported(self.module):
            reasons.append(why)
        return reasons

    def _why_not_installed(self) -> str | None:
        try:
            self.version()
        except (ImportError, AttributeError) as missing:
            return f"{self.module} cannot be imported: {in_a_line(missing)}"
        return None

    def kernel(self, problem: Problem) -> str:
        return f"{self.version()}, CUDA kernels"

    def run(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor | None]:
        return attend(self.kernel_of_it, problem, operands)


def window(how: How, q: Tensor, k: Tensor) -> tuple[bool, int | None, int | None]:
    """Whether it is causal, and how far a query sees to the left and the right; None: to the end.

    Of (B, S, H, D) tensors, from a diagonal that ends in the lower right corner.
    """
    corner = k.shape[1] - q.shape[1]
    left = None if how.below is None else corner - how.below
    right = None if how.above is None else how.above - corner
    causal = right == 0
    return causal, left, None if causal and left is None else right
