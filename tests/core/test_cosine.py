"""Cosine-similarity attention against a dense computation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heedful


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def dense(q, k, v, seen, scale=10.0):
    """out and lse of (B, H, S, D), in the arrays' own framework."""
    numpy = jnp if isinstance(q, jax.Array) else np
    cosines = numpy.einsum("bhid,bhjd->bhij", q, k)
    cosines /= numpy.sqrt((q**2).sum(-1))[..., :, None] * numpy.sqrt((k**2).sum(-1))[..., None, :]
    exponentials = numpy.where(seen, numpy.exp(scale * cosines), 0)
    total = exponentials.sum(-1)
    return exponentials @ v / total[..., None], numpy.log(total)


Q, K, V = normal(2, 2, 37, 8), normal(2, 2, 53, 8, seed=1), normal(2, 2, 53, 6)
KEYS = np.arange(53) < np.array([[53], [20]])  # the key-padding form, (B, Sk)


@pytest.mark.parametrize("scale", [10.0, 1.0])
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_scores_are_cosines(convert, scale):
    with jax.enable_x64(True):
        arrays = map(convert, (Q, K, V))
        found = heedful.cosine_sim_flash_attention(*arrays, convert(KEYS), scale=scale)
        for x, want in zip(found, dense(Q, K, V, KEYS[:, None, None], scale), strict=True):
            np.testing.assert_allclose(x, want, rtol=0, atol=1e-13)


def test_gradients_of_the_first_and_second_order():
    arrays, along = (Q, K, V), (normal(*Q.shape, seed=5), normal(*K.shape, seed=6), V)

    def loss(attend):
        def of(*arrays):
            out, lse = attend(*arrays, KEYS)
            return (out**2).sum() + jnp.sin(lse).sum()

        return of

    def expected(q, k, v, keys):
        return dense(q, k, v, keys[:, None, None])

    with jax.enable_x64(True):
        ours, theirs = loss(heedful.cosine_sim_flash_attention), loss(expected)
        arrays, along = (tuple(map(jnp.asarray, x)) for x in (arrays, along))
        found, want = (jax.jvp(jax.grad(f, (0, 1, 2)), arrays, along) for f in (ours, theirs))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_length_of_a_row_plays_no_part_however_small_or_large(size):
    q, k, v = (x.astype(np.float32) for x in (Q, K, V))
    expected = heedful.cosine_sim_flash_attention(q, k, v)
    found = heedful.cosine_sim_flash_attention(q * np.float32(size), k, v)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=2e-6)


def test_a_row_without_a_direction_is_as_far_from_all():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (Q, K, V))
    q = q.at[0, 0, 3].set(0)

    def out(q):
        return heedful.cosine_sim_flash_attention(q, k, v)[0]

    np.testing.assert_allclose(out(q)[0, 0, 3], v[0, 0].mean(0), rtol=0, atol=1e-6)
    gradient = jax.grad(lambda q: out(q).sum())(q)
    np.testing.assert_array_equal(gradient[0, 0, 3], 0)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_hidden_keys_hold_changes_nothing(value):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (Q, K, V))
    hidden = jnp.where(KEYS[:, None, :, None], k, value)

    def loss(q, k, v):
        return heedful.cosine_sim_flash_attention(q, k, v, KEYS)[0].sum()

    expected, found = (jax.grad(loss, (0, 1, 2))(q, x, v) for x in (k, hidden))
    for x, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, want)
    seen = heedful.cosine_sim_flash_attention(q, k.at[0, 0, 5, 0].set(value), v)[0]
    assert jnp.isnan(seen[0, 0]).all() and jnp.isfinite(seen[0, 1]).all()


def test_other_options_are_those_of_flash_attention():
    q, k, v = (x.astype(np.float32).swapaxes(1, 2) for x in (Q, K, V))
    unit_q, unit_k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    options = {"causal": True, "window": (9, 2), "softcap": 5.0, "layout": "bshd"}
    found = heedful.cosine_sim_flash_attention(q, k, v, scale=4.0, **options)
    expected = heedful.flash_attention(unit_q, unit_k, v, scale=4.0, **options)
    for x, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_dtype(dtype):
    q, k, v = (x.astype(dtype) for x in (Q, K, V))
    out, lse = heedful.cosine_sim_flash_attention(q, k, v)
    assert (out.dtype, lse.dtype) == (dtype, "float32")
    expected, _ = dense(*(x.astype(np.float64) for x in (q, k, v)), True)
    error = np.sqrt(((out.astype(np.float64) - expected) ** 2).mean() / (expected**2).mean())
    assert error < {"bfloat16": 2e-2, "float16": 3e-3}[dtype]


def test_what_is_wrong_is_said_before_anything_is_computed():
    with pytest.raises(TypeError, match="dtype"):
        heedful.cosine_sim_flash_attention(Q, K.astype(np.float32), V)
    with pytest.raises(TypeError, match="q must be a JAX array, a NumPy array or a torch tensor"):
        heedful.cosine_sim_flash_attention([1.0], K, V)
    with pytest.raises(TypeError, match="unknown option 'colour'"):
        heedful.cosine_sim_flash_attention(Q, K, V, colour=1)
