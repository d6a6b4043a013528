"""`jax:nn-xla`: `jax.nn.dot_product_attention` as XLA compiles it, score matrix and all."""

from functools import partial

import jax

from heedful.backends import jax_nn
from heedful.problem import Array, Operands, Problem


class XlaBackend:
    """jax.nn with `implementation="xla"`; its memory grows with Sq · Sk.

    Causal, windows, offsets and lengths reach it as one boolean mask over (Sq, Sk), which is what XLA's
    implementation makes of its own `is_causal` too, a byte a score beside the scores' four.
    """

    name = "jax:nn-xla"
    automatic = None
    deterministic = True

    def reasons(self, problem: Problem) -> list[str]:
        reasons = jax_nn.limits(problem)
        if problem.dtype == "float64":
            reasons.append("jax.nn.dot_product_attention computes every softmax in float32")
        promotion = jax.config.jax_numpy_dtype_promotion  # type: ignore[attr-defined]  # untyped
        if problem.dtype in ("float16", "bfloat16") and promotion == "strict":
            reasons.append(
                f"jax.nn.dot_product_attention promotes {problem.dtype} to float32 implicitly, "
                'which jax_numpy_dtype_promotion="strict" forbids'
            )
        if problem.dtype == "float16" and problem.platform != "gpu":
            reasons.append(
                "jax.nn.dot_product_attention asks XLA for the product F16_F16_F32, "
                f"which XLA has on GPUs alone; q lies on {problem.platform}"
            )
        return reasons

    @partial(jax.jit, static_argnums=(0, 1))
    def run(self, problem: Problem, operands: Operands) -> tuple[Array, None]:
        seen = jax_nn.visibility(problem, operands)
        # In float32 as the scores are, so that bias's gradient is rounded but once.
        bias = None if operands.bias is None else operands.bias.astype("float32")
        kernel = jax_nn.kernel("xla", problem, bias=bias, mask=seen)
        # Left alone, GPUs and TPUs round float32 factors to fewer bits.
        with jax.default_matmul_precision("highest"):
            return jax_nn.attend(problem, operands, seen, kernel), None


backend = XlaBackend()
