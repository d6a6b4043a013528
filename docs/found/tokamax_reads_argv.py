"""tokamax takes a program's own options for its flags, and the program ends.

python tokamax_reads_argv.py --an-option-of-the-program
"""

import jax.numpy as jnp
import tokamax

q = jnp.ones((1, 3, 2, 8))
print(tokamax.dot_product_attention(q, q, q, implementation="xla").shape)
