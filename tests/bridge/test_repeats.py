"""What is expanded or broadcast is handed on as what it is: no backend and no bridge makes all of it."""

import numpy as np
import pytest
import torch

import heedful
from heedful import api
from heedful.call import Call
from heedful.oracle import FEATURES
from heedful.repeats import once

pytestmark = [  # what is left is copied: NumPy's views that are read-only, what is differentiated
    pytest.mark.filterwarnings("ignore::heedful_torch.dlpack.CopyWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

B, H, S, D = 64, 32, 512, 8  # a bias over all scores has 2 GiB
FULL = (B, H, S, S)


class Recording:
    """A backend that keeps the operands that it was handed."""

    takes = FEATURES

    def __init__(self, name, grouped=True):
        self.name, self.grouped, self.seen = name, grouped, None

    def reasons(self, problem):
        return () if self.grouped or problem.group == 1 else ("no grouped heads",)

    def run(self, problem, operands):
        self.seen = operands
        return operands.q * 1, None


@pytest.fixture(params=["torch:recording", "numpy:recording", "jax:recording"])
def recording(request):
    backend = Recording(request.param)
    heedful.register(backend)
    yield backend
    heedful.unregister(backend.name)


def torch_arrays(*shapes):
    return [torch.randn(shape) for shape in shapes]


def numpy_arrays(*shapes):
    random = np.random.default_rng(0)
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("make", [torch_arrays, numpy_arrays])
def test_an_expanded_bias_or_mask_reaches_every_backend_as_what_it_is(make, recording):
    q, row, keys = make((B, H, S, D), (S, S), (B, 1, 1, S))
    bias, mask = _expand(row, FULL), _expand(keys > 0, FULL)
    out = heedful.attention(q, q, q, bias=bias, mask=mask, backend=recording.name)
    assert type(out) is type(q)
    assert tuple(recording.seen.bias.shape) == (1, 1, S, S)
    assert tuple(recording.seen.mask.shape) == (B, 1, 1, S)


@pytest.mark.parametrize("make", [torch_arrays, numpy_arrays])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_expanded_heads_are_one_head(make, layout, recording):
    q, one = make((2, 4, 6, D), (2, 1, 6, D))
    k = _expand(one, (2, 4, 6, D))
    if layout == "bshd":
        q, k = (x.swapaxes(1, 2) for x in (q, k))
    heedful.attention(q, k, k, backend=recording.name, layout=layout)
    assert tuple(recording.seen.k.shape) == tuple(recording.seen.v.shape) == (2, 1, 6, D)
    heedful.attention(q, k, k + 0, backend=recording.name, layout=layout)
    assert tuple(recording.seen.k.shape) == (2, 4, 6, D)


def test_a_backend_without_grouped_heads_gets_them_all():
    backend = Recording("numpy:recording", grouped=False)
    heedful.register(backend)
    try:
        q, one, row = numpy_arrays((2, 4, 6, D), (2, 1, 6, D), (6, 6))
        k = _expand(one, (2, 4, 6, D))
        assert heedful.explain(q, k, k, backend=backend.name).problem.kv_heads == 4
        heedful.attention(q, k, k, bias=_expand(row, (2, 4, 6, 6)), backend=backend.name)
        assert backend.seen.k.shape == (2, 4, 6, D)
        assert backend.seen.bias.shape == (1, 1, 6, 6)
        # Still the first of the list.
        heedful.attention(q, k, k, backend=[backend.name, "jax:flash"])
        assert backend.seen.bias is None
    finally:
        heedful.unregister(backend.name)


@pytest.mark.parametrize("make", [torch_arrays, numpy_arrays])
def test_integers_that_are_a_mask_are_converted_once(make, monkeypatch):
    q, row = make((2, 2, 6, D), (6, 6))
    ones = _expand(row.astype(int) if isinstance(row, np.ndarray) else row.int(), (2, 2, 6, 6))
    handed = []
    monkeypatch.setattr(api, "attention", lambda *_, mask, **__: handed.append(mask))
    heedful.flash_attention(q, q, q, ones)
    (mask,) = handed
    strides = mask.stride() if isinstance(mask, torch.Tensor) else mask.strides
    assert strides[:2] == (0, 0)
    assert bool((mask == (ones != 0)).all())


def test_with_several_leading_axes_too(recording):
    q, row = torch_arrays((3, 5, 4, 6, D), (3, 1, 1, 6, 6))
    heedful.attention(q, q, q, bias=row.expand(3, 5, 4, 6, 6).detach(), backend=recording.name)
    assert tuple(recording.seen.bias.shape) in ((15, 1, 6, 6), (15, 4, 6, 6))
    heedful.attention(q, q, q, bias=row[:1].expand(3, 5, 4, 6, 6), backend=recording.name)
    assert tuple(recording.seen.bias.shape) == (1, 1, 6, 6)


@pytest.mark.parametrize("shape", [(2, 4, 6, 7), (3, 4, 6, 6), (2, 5, 6, 6)])
def test_a_wrong_size_is_wrong_though_it_repeats(shape):
    q, row = torch_arrays((2, 4, 6, D), (1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"bias .*Got \("):
        heedful.attention(q, q, q, bias=row.expand(shape))


def test_key_padding_that_says_the_same_of_every_key_stays_over_the_batch():
    """Of 1 along the keys, (B, 1) would be (Sq, 1)."""
    q, k, alive = torch_arrays((3, 2, 5, D), (3, 2, 6, D), (3, 1))
    mask = (alive > 0).expand(3, 6)
    expected = heedful.attention(q, k, k, mask=mask.clone())
    torch.testing.assert_close(heedful.attention(q, k, k, mask=mask), expected)


@pytest.mark.parametrize("backend", ["jax:flash", "jax:plain", "torch:sdpa-math", "numpy:oracle"])
@pytest.mark.parametrize("wanted", ["all of it", "the row"])
def test_a_gradient_comes_back_in_the_shape_that_came_in(backend, wanted):
    q, k, row = torch_arrays((2, 4, 6, D), (2, 4, 6, D), (1, 1, 6, 6))
    row.requires_grad_()
    expanded = row.expand(2, 4, 6, 6)
    whole = expanded.detach().clone().requires_grad_()
    cotangent = torch.randn(2, 4, 6, D)
    (expected,) = torch.autograd.grad(
        heedful.attention(q, k, k, bias=whole, backend=backend), whole, cotangent
    )
    if wanted == "the row":
        expected = expected.sum((0, 1), keepdim=True)
    (got,) = torch.autograd.grad(
        heedful.attention(q, k, k, bias=expanded, backend=backend),
        expanded if wanted == "all of it" else row,
        cotangent,
    )
    torch.testing.assert_close(got, expected)


def test_a_tangent_and_a_transformation_find_all_of_it():
    q, k, row = torch_arrays((2, 4, 6, D), (2, 4, 6, D), (1, 1, 6, 6))
    tangent = torch.randn(1, 1, 6, 6)

    def of(bias):
        return heedful.attention(q, k, k, bias=bias, backend="torch:sdpa-math")

    def of_row(row):
        return of(row.expand(2, 4, 6, 6))

    _, expected = torch.func.jvp(lambda row: of(row.repeat(2, 4, 1, 1)), (row,), (tangent,))
    _, got = torch.func.jvp(of_row, (row,), (tangent,))
    torch.testing.assert_close(got, expected)
    full = torch.func.grad(lambda bias: of(bias).square().sum())
    expanded = row.expand(2, 4, 6, 6)
    torch.testing.assert_close(full(expanded), full(expanded.clone()))


def test_what_repeats_nothing_is_handed_on_itself():
    k, bias = torch_arrays((2, 4, 6, D), (2, 4, 6, 6))
    call = Call.of(k, k, k, bias=bias, causal=True)
    operands = call.operands
    problem, handed = once(Recording("torch:recording"), call.problem, operands)
    assert problem is call.problem
    assert handed is operands


def _expand(x, shape):
    return x.expand(shape) if isinstance(x, torch.Tensor) else np.broadcast_to(x, shape)
