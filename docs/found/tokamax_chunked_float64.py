"""tokamax's "xla_chunked" sums its chunks in float32: with float64 inputs it raises.

It does so where there is more than one chunk; of shorter lengths it answers.

    python tokamax_chunked_float64.py
"""

from importlib.metadata import version

import jax
import tokamax
from absl import flags

flags.FLAGS(["tokamax_chunked_float64"])
jax.config.update("jax_enable_x64", True)
print(f"tokamax {version('tokamax')}, jax {jax.__version__}, {jax.devices()[0].platform}")
for length in (64, 4096):
    q = jax.random.normal(jax.random.key(0), (1, length, 1, 32), "float64")  # (B, S, H, D)
    try:
        out = tokamax.dot_product_attention(q, q, q, implementation="xla_chunked")
        print(f"{length} keys: {out.dtype}")
    except TypeError as error:
        print(f"{length} keys: {str(error).splitlines()[0]}")
