"""`jax.export` with symbols for batch and lengths: one program for every size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import heedful

SIZES = {
    "b, 4, 16, 8": [(1, 16), (3, 16)],
    "2, 4, s, 8": [(2, 3), (2, 530)],
    "2*b, 4, s+1, 8": [(2, 9), (4, 530)],
}


def call(backend, q, k, **lengths):
    def total(q, k):
        out, lse = heedful.attention(
            q, k, k, causal=True, backend=backend, return_lse=True, **lengths
        )
        return jnp.sin(out).sum() + jnp.sin(jnp.where(lse == -jnp.inf, 0, lse)).sum()

    return jax.value_and_grad(total, (0, 1))(q, k)


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("spec", SIZES)
def test_a_program_with_symbols_is_right_at_every_size(spec, with_lengths):
    batch, _, length, size = export.symbolic_shape(spec)
    shapes = [jax.ShapeDtypeStruct((batch, h, length, size), jnp.float32) for h in (4, 2)]
    lengths = {"kv_lengths": jax.ShapeDtypeStruct((batch,), jnp.int32)} if with_lengths else {}
    program = export.export(jax.jit(lambda q, k, more: call("jax:flash", q, k, **more)))
    exported = program(*shapes, lengths)
    rng = np.random.default_rng(0)
    for b, s in SIZES[spec]:
        q, k = (rng.standard_normal((b, h, s, 8), np.float32) for h in (4, 2))
        given = {"kv_lengths": np.full(b, s - 1, np.int32)} if with_lengths else {}
        got = exported.call(q, k, given)
        expected = call("jax:plain", q, k, **given)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), got, expected
        )
