"""jax.nn's attention of float16 runs on a CPU, but not within `jax.jit`.

It asks XLA for the product F16_F16_F32, and falls back where that raises; compiled, it raises later.

    python jax_nn_float16.py
"""

import jax
import jax.numpy as jnp

attention = jax.nn.dot_product_attention
q = jax.random.normal(jax.random.key(0), (1, 8, 2, 16), jnp.float16)

print(f"jax {jax.__version__}, {jax.devices()[0].platform}")
print(f"uncompiled: {attention(q, q, q).dtype}")
print(f"compiled: {jax.jit(attention)(q, q, q).dtype}")
