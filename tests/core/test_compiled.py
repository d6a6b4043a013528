"""What was compiled is forgotten, its program with it, when enough others have been asked for since."""

import gc

import jax
import jax.numpy as jnp
import numpy as np

from compilations import counted
from heedful.compiled import KEPT, compiled


def programs():
    gc.collect()
    return len(jax.local_devices()[0].client.live_executables())


def test_only_the_last_ones_are_kept():
    @compiled(static=1)
    def added(n, x):
        return x + n

    x = jnp.zeros(3)
    before = programs()
    for n in range(KEPT + 30):
        assert np.asarray(added(n, x))[0] == n
    assert programs() - before <= KEPT + 1
    with counted() as counts:
        added(KEPT + 29, x)
    assert not counts["compiled"]
    added.cache_clear()
    assert programs() <= before + 1


def test_it_is_called_as_the_function_is():
    @compiled(static=2)
    def scaled(by, plus, x, y):
        """Some words."""
        return by * x + plus * y

    assert (scaled.__name__, scaled.__doc__) == ("scaled", "Some words.")
    assert scaled(2, 3, jnp.float32(5), jnp.float32(7)) == 31
