"""Which weights dropout keeps: the documented function, in every framework, for every tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

import heedful
from heedful.call import Call
from heedful.flash.autodiff import flash
from heedful.flash.tiles import Tiles
from heedful.rules.dropout import threefry


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def every(b, h, i, j):
    """The indices of a whole call."""
    b, h, i, j = map(np.arange, (b, h, i, j))
    return b[:, None, None, None], h[None, :, None, None], i[:, None], j


def test_the_cipher_is_that_of_jax():
    key, counters = np.random.default_rng(0).integers(0, 2**32, (2, 1000), np.uint32)
    expected = threefry_2x32(key[:2], counters)
    key, counters = key[:2, None].view(np.int32), counters.view(np.int32)
    found = threefry((key[0], key[1]), (counters[:500], counters[500:]))
    np.testing.assert_array_equal(np.concatenate(found).view(np.uint32), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_the_mask_is_the_documented_function(seed):
    key = threefry_2x32(np.array([seed, 0], np.uint32), np.array([1, 3], np.uint32))
    i, j = (x.ravel().astype(np.uint32) for x in np.mgrid[:5, :7])
    words = np.asarray(threefry_2x32(key, np.concatenate([i, j])))[:35].reshape(5, 7)
    found = heedful.dropout_mask(0.3, seed, 1, 3, np.arange(5)[:, None], np.arange(7))
    np.testing.assert_array_equal(found, words >= 0.3 * 2.0**32)


def test_numpy_and_jax_find_the_same_bits():
    indices = every(2, 3, 40, 50)
    expected = heedful.dropout_mask(0.25, 9, *indices)
    found = heedful.dropout_mask(0.25, 9, *map(jnp.asarray, indices))
    assert isinstance(found, jax.Array)
    np.testing.assert_array_equal(found, expected)


def test_of_numbers_alone_it_is_numpys():
    assert [bool(heedful.dropout_mask(0.5, 1, 0, 0, 0, j)[0]) for j in range(6)] == list(
        heedful.dropout_mask(0.5, 1, 0, 0, 0, np.arange(6))
    )


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"dropout_rate": 1}, ValueError, "must lie between 0 and 1, without 1. Got 1."),
        ({"j": np.ones(3)}, TypeError, "j must hold integers. Got float64."),
        (
            {"i": 0.5},
            TypeError,
            "i must be a JAX array, a NumPy array or a torch tensor. Got float.",
        ),
    ],
)
def test_what_is_no_place_is_refused(wrong, error, message):
    place = {"dropout_rate": 0.5, "dropout_seed": 1, "b": 0, "h": 0, "i": 0, "j": np.arange(3)}
    with pytest.raises(error, match=message):
        heedful.dropout_mask(**place | wrong)


# For a rate of 0.3 and n weights, the share that is dropped is within 5 · √(0.21 / n) of it, but for one
# time in two million; and so is the share of pairs both of which are within 5 · √(0.0819 / n) of 0.09.
RATE = 0.3


@pytest.mark.parametrize("axis", range(4), ids="bhij")
def test_along_every_axis_as_many_are_dropped_as_are_asked(axis):
    dropped = ~heedful.dropout_mask(RATE, 4, *every(16, 16, 64, 64))
    along = np.moveaxis(dropped, axis, 0).reshape(dropped.shape[axis], -1)
    np.testing.assert_allclose(along.mean(1), RATE, rtol=0, atol=5 * (0.21 / along.shape[1]) ** 0.5)


@pytest.mark.parametrize("axis", range(5), ids=["seed", *"bhij"])
@pytest.mark.parametrize("distance", [1, 2, 8])
def test_neighbours_along_every_axis_are_dropped_independently(axis, distance):
    seeds = np.arange(16)[:, None, None, None, None]
    dropped = ~heedful.dropout_mask(RATE, seeds, *every(16, 16, 16, 16))
    after = np.moveaxis(dropped, axis, 0)
    both = after[:-distance] & after[distance:]
    assert abs(both.mean() - RATE**2) < 5 * (0.0819 / both.size) ** 0.5


def test_tiles_of_any_size_drop_the_same():
    random = np.random.default_rng(1)
    q, k, v = (random.standard_normal((2, 4, n, 8)) for n in (37, 50, 50))
    call = Call.of(*map(jnp.asarray, (q, k, v)), causal=True, dropout_rate=0.4, dropout_seed=6)
    problem, operands = call.problem.compiled, call.problem.as_operand(call.operands)
    expected = heedful.attention(
        q, k, v, causal=True, dropout_rate=0.4, dropout_seed=6, backend="numpy:oracle"
    )
    for tiles in (Tiles(1, 2, 16, 16), Tiles(2, 4, 37, 7), Tiles(1, 1, 5, 50)):
        out, _ = flash(problem, operands, tiles)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-14)


def test_each_of_a_vmap_drops_what_it_would_by_itself():
    random = np.random.default_rng(2)
    q = jnp.asarray(random.standard_normal((3, 2, 2, 9, 8)))
    seeds = jnp.array([5, 5, 8])

    def attend(q, seed):
        return heedful.flash_attention(q, q, q, dropout_rate=0.5, dropout_seed=seed)[0]

    found = jax.vmap(attend)(q, seeds)
    for n in range(3):
        np.testing.assert_allclose(found[n], attend(q[n], seeds[n]), rtol=0, atol=1e-14)
    for batch in (2, 1):  # of one row, the numbers of all members are one
        shared = jax.vmap(lambda q: attend(q, 5))(q[:, :batch])
        np.testing.assert_allclose(shared[:2], found[:2, :batch], rtol=0, atol=1e-14)


def test_its_mean_over_seeds_is_attention_without_it():
    random = np.random.default_rng(3)
    q, k, v = map(jnp.asarray, random.standard_normal((3, 1, 1, 6, 8)))
    out = jax.vmap(
        lambda seed: heedful.plain_attention(q, k, v, dropout_rate=RATE, dropout_seed=seed)[0]
    )(jnp.arange(4000))
    expected, lse = heedful.plain_attention(q, k, v)
    np.testing.assert_allclose(
        out.mean(0), expected, rtol=0, atol=5 * (out.std(0) / 4000**0.5).max()
    )
    found = heedful.plain_attention(q, k, v, dropout_rate=RATE, dropout_seed=1)[1]
    np.testing.assert_array_equal(found, lse)  # of all weights, dropped or not


def test_a_rate_of_zero_drops_nothing_whatever_the_seed():
    q = jnp.asarray(np.random.default_rng(4).standard_normal((1, 2, 5, 8)))
    for seed in (3, jnp.array([4])):
        found = heedful.attention(q, q, q, dropout_rate=0.0, dropout_seed=seed, backend="jax:plain")
        expected = heedful.attention(q, q, q, backend="jax:plain")
        np.testing.assert_array_equal(found, expected)
