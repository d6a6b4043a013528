"""tanh as the softcap takes it: its slope keeps its digits where the cap is nearly reached.

1 − tanh² is a difference of two numbers next to 1: at three times the cap it has lost five of seven
digits. The same number as 4 e^(−2|x|) / (1 + e^(−2|x|))² loses none.
"""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def tanh(x: jax.Array) -> jax.Array:
    """The hyperbolic tangent, whose derivative is `slope`."""
    return jnp.tanh(x)


@jax.custom_jvp
def slope(x: jax.Array) -> jax.Array:
    """The derivative of tanh: 1 / cosh(x)²."""
    decay = jnp.exp(-2 * jnp.abs(x))
    return 4 * decay / (1 + decay) ** 2


tanh.defjvps(lambda x_dot, _, x: x_dot * slope(x))
slope.defjvps(lambda x_dot, found, x: -2 * x_dot * found * tanh(x))
