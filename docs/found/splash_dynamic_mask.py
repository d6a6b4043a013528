"""Splash attention with a mask that is an array works outside of `jax.jit`, and raises within it.

A flag that the mask is one becomes a traced array there, and is branched on.

    python splash_dynamic_mask.py
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import make_splash_mha_single_device

q = jnp.ones((1, 128, 8))  # (H, S, D)
mask = jnp.ones((1, 128, 128), bool)


def attend(mask):
    return make_splash_mha_single_device(mask, interpret=True)(q, q, q)


print(f"jax {jax.__version__}, {jax.devices()[0].platform}, interpreted")
print(f"outside of jit: {attend(mask).shape}")
try:
    print(f"within jit: {jax.jit(attend)(mask).shape}")
except jax.errors.TracerBoolConversionError as error:
    print(f"within jit: {type(error).__name__}")
