"""XLA on a CPU: the product of a bfloat16 array with a transposed one is summed in bfloat16.

The same numbers, laid out by hand beforehand, lose only what rounding the result loses. It is what
`jax.nn.dot_product_attention` computes where its caller holds (B, H, S, D) and hands it `swapaxes`.

    python xla_bfloat16_transposed.py
"""

import jax
import jax.numpy as jnp
import numpy as np

random = np.random.default_rng(0)
p = jax.nn.softmax(jnp.asarray(random.standard_normal((2, 4, 70, 133)))).astype(jnp.bfloat16)
v = jnp.asarray(random.standard_normal((2, 4, 133, 64)), jnp.bfloat16)
right = np.einsum("bhqk,bhkd->bqhd", *(np.asarray(x, np.float64) for x in (p, v)))


def product(p, v):
    return jnp.einsum("bhqk,bkhd->bqhd", p, v)


def error(out):
    return np.linalg.norm(np.asarray(out, np.float64) - right) / np.linalg.norm(right)


print(f"jax {jax.__version__}, {jax.devices()[0].platform}")
transposed_before = error(jax.jit(product)(p, v.swapaxes(1, 2)))
transposed_within = error(jax.jit(lambda p, v: product(p, v.swapaxes(1, 2)))(p, v))
print(
    f"relative error, transposed before: {transposed_before:.4f}, within: {transposed_within:.4f}"
)
