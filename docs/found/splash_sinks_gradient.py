"""The gradient of float32 sinks comes back in q's dtype, rounded before it is summed.

The sum is right but for that.

    python splash_sinks_gradient.py
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

S, D = 1024, 64
q, k, v, cotangent = (jax.random.normal(jax.random.key(0), (4, 1, S, D))).astype("bfloat16")
mask = splash_attention.MultiHeadMask([splash_attention.FullMask((S, S))])
attend = splash_attention.make_splash_mha_single_device(mask, interpret=True)


def loss(sinks):
    out = attend(q * jnp.bfloat16(0.125), k, v, sinks=sinks)
    return jnp.vdot(out.astype("float32"), cotangent.astype("float32"))


def right(sinks):
    scores = 0.125 * jnp.einsum("hid,hjd->hij", q.astype("float32"), k.astype("float32"))
    total = jnp.logaddexp(jax.nn.logsumexp(scores, -1, keepdims=True), sinks[:, None, None])
    out = jnp.exp(scores - total) @ v.astype("float32")
    return jnp.vdot(out, cotangent.astype("float32"))


got, want = (jax.grad(f)(jnp.full(1, 4.0)) for f in (loss, right))
print(f"jax {jax.__version__}, {jax.devices()[0].platform}, interpreted")
print(f"float32 sinks, bfloat16 q: a gradient of {got.dtype}")
print(f"it is {got[0]:.6f}, and should be {want[0]:.6f}")
