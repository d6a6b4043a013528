"""`jax:flash`: the flash core."""

from heedful.flash import flash
from heedful.problem import Array, Operands, Problem


class FlashBackend:
    """Takes every problem; its memory grows with Sq + Sk."""

    name = "jax:flash"
    automatic = 0
    deterministic = True

    def reasons(self, problem: Problem) -> tuple[str, ...]:
        return ()

    def run(self, problem: Problem, operands: Operands) -> tuple[Array, Array]:
        return flash(problem, operands)


backend = FlashBackend()
