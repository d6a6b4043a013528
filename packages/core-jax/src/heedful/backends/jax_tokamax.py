"""`jax:tokamax-…`: `tokamax.dot_product_attention`, a backend for each of its implementations.

It is jax.nn's attention with a value head size of its own and a softcap, and means what that means:
the contract around it is `jax_nn`'s. "xla" and "xla_chunked" run everywhere; the others are for GPUs,
and have not been run here yet.
"""

import sys
from functools import partial
from importlib.metadata import version
from types import MappingProxyType
from typing import Literal

from heedful.backends import jax_nn
from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.compiled import compiled
from heedful.dispatch.packages import why_not_imported

Implementation = Literal["xla", "xla_chunked", "triton", "mosaic", "cudnn"]


class TokamaxBackend:
    """tokamax with one implementation; what hides keys reaches it as one boolean mask."""

    automatic = None
    takes = jax_nn.TAKES | {"softcap", "value_dim"}
    unasked = "tokamax takes seconds to compile each kind of call"
    lacks = MappingProxyType({"return_lse": "tokamax.dot_product_attention returns no log-sum-exp"})

    def __init__(self, implementation: Implementation):
        self.implementation = implementation
        self.name = f"jax:tokamax-{implementation.replace('_', '-')}"

    def reasons(self, problem: Problem) -> list[str]:
        reasons = []
        if self.implementation not in ("xla", "xla_chunked") and problem.platform != "gpu":
            reasons.append(f"this implementation runs on GPUs; q lies on {problem.platform}")
        if problem.softcap is not None and problem.bias_shape is not None:
            reasons.append("tokamax caps the scores after the bias, not before it")
        if problem.dtype == "float64" and self.implementation == "xla_chunked":
            reasons.append("tokamax sums chunks in float32: of float64, it raises for several")
        if 0 in (problem.batch, problem.q_length, problem.kv_length):
            reasons.append("tokamax takes no empty arrays")
        reasons += jax_nn.half_limits("tokamax.dot_product_attention", problem)
        return reasons or [why for why in [why_not_imported("tokamax")] if why]

    def kernel(self, problem: Problem) -> str:
        return f"tokamax {version('tokamax')}, {self.implementation}"

    def score_bytes(self, problem: Problem) -> int:
        if self.implementation == "xla":
            return 4 * problem.score_count
        return problem.batch * problem.q_length * problem.kv_length if problem.positional else 0

    @compiled(static=2)
    def run(self, problem: Problem, operands: Operands) -> tuple[Array, None]:
        import tokamax  # type: ignore[import-not-found]  # an extra
        from absl import flags  # type: ignore[import-not-found]  # comes with it

        # tokamax itself would take the program's own options for its.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(sys.argv, known_only=True)

        seen = jax_nn.visibility(problem, operands)
        kernel = partial(
            tokamax.dot_product_attention,
            bias=operands.bias,
            mask=seen,
            scale=problem.scale,
            logits_soft_cap=problem.softcap,
            implementation=self.implementation,
            precision="highest",
        )
        return jax_nn.attend(problem, operands, seen, kernel), None


xla = TokamaxBackend("xla")
xla_chunked = TokamaxBackend("xla_chunked")
triton = TokamaxBackend("triton")
mosaic = TokamaxBackend("mosaic")
cudnn = TokamaxBackend("cudnn")
