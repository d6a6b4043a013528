"""score_mod and mask_mod in torch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import heedful

Q, K, V = (np.random.default_rng(n).standard_normal((2, 2, 9, 8), np.float32) for n in range(3))
TENSORS = tuple(map(torch.from_numpy, (Q, K, V)))
PARTS = torch.arange(9) // 4


def same_part(b, h, i, j):
    return PARTS[i] == PARTS[j]


@pytest.mark.parametrize("backend", ["torch:sdpa-math", "torch:sdpa-flash", "torch:flex"])
def test_a_mask_mod_is_the_mask_that_it_says(backend):
    mask = PARTS[:, None] == PARTS
    options = {"causal": True, "backend": backend}
    found = heedful.attention(*TENSORS, mask_mod=same_part, **options)
    torch.testing.assert_close(found, heedful.attention(*TENSORS, mask=mask, **options))


def test_rows_that_are_cut_off_keep_their_numbers():
    """With this offset the first three queries see nothing, and flex is not asked about them."""

    def of(cast):
        return lambda s, b, h, i, j: s + cast(i * j - h, s)

    options = {"causal": True, "q_offset": -3}
    by_torch = of(lambda x, s: x.to(s.dtype))
    found = heedful.attention(*TENSORS, score_mod=by_torch, backend="torch:flex", **options)
    by_jax = of(lambda x, s: x.astype(s.dtype))
    right = heedful.attention(Q, K, V, score_mod=by_jax, backend="numpy:oracle", **options)
    np.testing.assert_allclose(found.numpy(), right, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_mod": lambda b, h, i, j: i - j}, TypeError, "one number of bool. Got int64"),
        ({"score_mod": 1.0}, TypeError, "score_mod must be a function of torch tensors. Got 1.0"),
        (
            {"mask_mod": same_part, "backend": "jax:flash"},
            heedful.Refusal,
            "mask_mod of a call from torch do not speak jax",
        ),
    ],
)
def test_what_is_no_such_function_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        heedful.attention(*TENSORS, **{"backend": "torch:sdpa-math", **options})


def test_of_a_block_mask_the_function_is_asked_for():
    mask = heedful.block_mask(lambda b, h, i, j: jnp.less(j, i), None, None, 9, 9)
    with pytest.raises(TypeError, match="Of a block mask pass the function that it is of"):
        heedful.attention(*TENSORS, mask_mod=mask)
