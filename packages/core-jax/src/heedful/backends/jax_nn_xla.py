"""`jax:nn-xla`: `jax.nn.dot_product_attention` as XLA compiles it, score matrix and all."""

import jax

from heedful.backends import jax_nn
from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.compiled import compiled


class XlaBackend:
    """jax.nn with `implementation="xla"`; its memory grows with Sq · Sk.

    Causal, windows, offsets and lengths reach it as one boolean mask over (Sq, Sk), which is what XLA's
    implementation makes of its own `is_causal` too, a byte a score beside the scores' four.
    """

    name = "jax:nn-xla"
    automatic = None
    takes, lacks = jax_nn.TAKES, jax_nn.LACKS
    deterministic = True

    def reasons(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.dtype == "float64":
            reasons.append("jax.nn.dot_product_attention computes every softmax in float32")
        reasons += jax_nn.half_limits("jax.nn.dot_product_attention", problem)
        if problem.dtype == "bfloat16" and problem.platform == "cpu" and _without_a_matrix(problem):
            reasons.append(
                f"XLA of jax {jax.__version__} fails on a CPU where a product of bfloat16 has two axes "
                f"of 1 among Hq·Sq, Sk and D and no batch: {problem.group * problem.q_length}, "
                f"{problem.kv_length} and {problem.head_dim}"
            )
        return reasons

    def score_bytes(self, problem: Problem) -> int:
        return 4 * problem.score_count  # float32

    @compiled(static=2)
    def run(self, problem: Problem, operands: Operands) -> tuple[Array, None]:
        seen = jax_nn.visibility(problem, operands)
        # In float32 as the scores are, so that bias's gradient is rounded but once.
        bias = None if operands.bias is None else operands.bias.astype("float32")
        kernel = jax_nn.kernel("xla", problem, bias=bias, mask=seen)
        # Left alone, GPUs and TPUs round float32 factors to fewer bits.
        with jax.default_matmul_precision("highest"):
            return jax_nn.attend(problem, operands, seen, kernel), None


def _without_a_matrix(problem: Problem) -> bool:
    """Whether XLA makes a plain multiplication of the products, and then knows it for no bfloat16.

    "Algorithm not supported by the ElementalIrEmitter: ALG_DOT_BF16_BF16_F32": seen in 0.10.2 with
    nothing but such sizes, and gone in 0.12.
    """
    if jax.__version_info__ >= (0, 12) or problem.batch * problem.kv_heads != 1:
        return False
    return (problem.group * problem.q_length, problem.kv_length, problem.head_dim).count(1) >= 2


backend = XlaBackend()
