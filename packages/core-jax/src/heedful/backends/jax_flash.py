"""`jax:flash`: the flash core."""

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.flash import flash
from heedful.rules import FEATURES


class FlashBackend:
    """Takes every problem; its memory grows with Sq + Sk."""

    name = "jax:flash"
    automatic = 0
    deterministic = True
    takes = FEATURES | {"grouped_heads", "return_lse", "value_dim"}

    def reasons(self, problem: Problem) -> tuple[str, ...]:
        return ()

    def run(self, problem: Problem, operands: Operands) -> tuple[Array, Array]:
        return flash(problem, operands)


backend = FlashBackend()
