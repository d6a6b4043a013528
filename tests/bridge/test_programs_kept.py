"""What a new length leaves behind: programs that are forgotten with the function they were made for."""

import gc

import jax
import numpy as np
import pytest
import torch

import heedful
from heedful.bridges import numpy as numpy_bridge
from heedful.flash import autodiff
from heedful_torch import autograd


def from_numpy(length):
    x = np.ones((1, 2, length, 16), np.float32)
    heedful.attention(x, x, x, backend="jax:flash")


def from_torch(length):
    x = torch.ones(1, 2, length, 16)
    heedful.attention(x, x, x, backend="jax:flash")


def gradient_in_torch(length):
    x = torch.ones(1, 2, length, 16, requires_grad=True)
    heedful.attention(x, x, x, backend="jax:flash").sum().backward()


def programs():
    gc.collect()
    return len(jax.local_devices()[0].client.live_executables())


@pytest.mark.parametrize(
    ("call", "each"), [(from_numpy, 1), (from_torch, 1), (gradient_in_torch, 2)]
)
def test_all_that_a_length_leaves_behind_is_bounded(call, each):
    bounded = (
        autograd._run,
        autograd._run_and_linearize,
        autograd._pull,
        numpy_bridge._run_compiled,
        autodiff._results,
    )
    call(5)
    for function in bounded:
        function.cache_clear()
    before = programs()
    for length in range(20, 26):
        call(length)
    assert programs() - before == 6 * each
    for function in bounded:
        function.cache_clear()
    assert programs() <= before
