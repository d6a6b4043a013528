"""Pallas's mha takes K and V of fewer heads than q, or causal with fewer keys, and answers wrong.

Neither is refused. Of the heads that are not there it takes the last one that is, of the keys whatever
lies behind them: NaN in the interpreter.

    python pallas_mha_shapes.py
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import mha, mha_reference

q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 4, 32))  # (B, S, H, D)


def error(out, right):
    return float(jnp.linalg.norm(out - right) / jnp.linalg.norm(right))


print(f"jax {jax.__version__}, {jax.devices()[0].platform}, interpreted")
two = k[:, :, :2], v[:, :, :2]
right = mha_reference(q, *(x.repeat(2, axis=2) for x in two), None)
print(f"relative error, 4 heads on 2: {error(mha(q, *two, None, interpret=True), right):.4f}")

fewer = k[:, :128], v[:, :128]
right = mha_reference(q, *fewer, None, causal=True)
out = mha(q, *fewer, None, causal=True, interpret=True)
print(f"relative error, causal, 256 queries on 128 keys: {error(out, right):.4f}")
