"""Within `torch.autocast` nothing is rounded: the same bits, forward, backward, and beyond."""

import contextlib
import warnings
from itertools import product

import jax
import jax.numpy as jnp
import pytest
import torch

import heedful
from heedful_torch.outside_autocast import no_autocast, outside_autocast

OPTIONS = {
    "plain": {},
    "grouped, causal": {"Hkv": 1, "causal": True},
    "window": {"window": (3, 1), "kv_lengths": torch.tensor([9, 4])},
    "bias": {"bias": torch.linspace(-1, 1, 4 * 6 * 9).reshape(1, 4, 6, 9)},
    "large bias": {"bias": torch.linspace(-3e4, 3e4, 9).reshape(1, 1, 1, 9)},
}


def autocast(on, dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype) if on else contextlib.nullcontext()


def normal(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def leaves(Hkv=4, dtype=torch.float32, **options):
    q, k, v = (
        normal(2, H, S, 8, seed=S, dtype=dtype).requires_grad_()
        for H, S in ((4, 6), (Hkv, 9), (Hkv, 9))
    )
    if "bias" in options:
        options["bias"] = options["bias"].clone().requires_grad_()
    return [x for x in (q, k, v, options.get("bias")) if x is not None], options


def same_bits(one, other):
    assert len(one) == len(other)
    for x, y in zip(one, other, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        yield


@pytest.mark.parametrize(
    ("backend", "asked", "dtype"),
    [
        *product(("torch:sdpa-math", "torch:sdpa-flash"), OPTIONS, (torch.float32, torch.bfloat16)),
        *product(("jax:flash", "jax:plain", "numpy:oracle"), ("bias",), (torch.float32,)),
        *product(("jax:flash", "jax:nn-xla"), ("grouped, causal",), (torch.bfloat16,)),
    ],
    ids=str,
)
def test_the_same_bits_forward_and_backward(backend, asked, dtype):
    def run(forward, backward, lower=torch.bfloat16):
        inputs, options = leaves(dtype=dtype, **OPTIONS[asked])
        with autocast(forward, lower):
            out = heedful.attention(*inputs[:3], backend=backend, **options)
        dout = normal(*out.shape, seed=1, dtype=dtype)
        with autocast(backward, lower):
            return out, *torch.autograd.grad(out, inputs, dout)

    expected = run(False, False)
    same_bits(run(True, False), expected)
    same_bits(run(False, True), expected)
    same_bits(run(True, True, torch.float16), expected)


@pytest.mark.parametrize("backend", ["torch:sdpa-flash", "jax:flash", "jax:plain"])
def test_the_same_bits_of_the_lse(backend):
    def run(on):
        inputs, _ = leaves()
        with autocast(on):
            out, lse = heedful.attention(*inputs, return_lse=True, backend=backend)
            return lse, *torch.autograd.grad(out.sum() + lse.square().sum(), inputs)

    same_bits(run(True), run(False))


def second_order(f, *inputs):
    gradients = torch.autograd.grad(f(*inputs).sin().sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in gradients), inputs)


def third_order(f, q, k, v):
    (dq,) = torch.autograd.grad(f(q, k, v).sin().sum(), q, create_graph=True)
    (dk,) = torch.autograd.grad(dq.square().sum(), k, create_graph=True)
    return torch.autograd.grad(dk.square().sum(), (q, k, v))


@pytest.mark.parametrize(
    "differentiate",
    [
        second_order,
        third_order,
        lambda f, *inputs: torch.func.jvp(f, inputs, inputs),
        lambda f, *inputs: torch.func.grad(
            lambda q: torch.func.jvp(lambda q: f(q, *inputs[1:]), (q,), (q,))[1].sum()
        )(inputs[0])[None],
        lambda f, *inputs: torch.func.vmap(torch.func.grad(lambda *x: f(*x).sum()))(*inputs),
        lambda f, *inputs: torch.autograd.functional.jacobian(f, inputs, vectorize=True),
    ],
    ids=["second", "third", "jvp", "grad of jvp", "vmap of grad", "batched backward"],
)
@pytest.mark.parametrize("backend", ["torch:sdpa-math", "jax:plain"])
def test_the_same_bits_of_every_other_derivative(backend, differentiate):
    def run(on):
        inputs, _ = leaves()
        with autocast(on):
            return differentiate(lambda *qkv: heedful.attention(*qkv, backend=backend), *inputs)

    same_bits(run(True), run(False))


@pytest.mark.parametrize("backend", ["torch:sdpa-math", "torch:sdpa-flash"])
def test_the_same_bits_for_jax_arrays(backend):
    q, k, v = (jnp.asarray(x.detach().numpy()) for x in leaves()[0])

    def run(on):
        loss = jax.grad(
            lambda *qkv: jnp.sin(heedful.attention(*qkv, backend=backend)).sum(), (0, 1, 2)
        )
        with autocast(on):
            return [torch.tensor(x.__array__()) for x in loss(q, k, v)]

    same_bits(run(True), run(False))


def test_autocast_does_round_where_nobody_switches_it_off():
    x = normal(8, 8, seed=0)
    with autocast(True):
        assert (x @ x).dtype == torch.bfloat16
        with no_autocast(x):
            assert (x @ x).dtype == torch.float32
        (product,) = outside_autocast(lambda x: (x @ x,), x)
    assert torch.equal(product, x @ x)


def test_in_a_compiled_graph_too():
    def attend(x):
        return heedful.attention(x, x, x, backend="torch:sdpa-math")

    x = normal(8, 8, seed=0).requires_grad_()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with autocast(True):
        out = compiled(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
    same_bits((out, gradient), (attend(x), *torch.autograd.grad(attend(x).square().sum(), x)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "backend", ["torch:sdpa-math", "torch:sdpa-flash", "torch:sdpa-efficient", "torch:sdpa-cudnn"]
)
def test_the_same_bits_on_a_gpu(backend):
    def run(on):
        inputs, _ = leaves(dtype=torch.bfloat16)
        inputs = [x.detach().to("cuda").requires_grad_() for x in inputs]
        with torch.autocast("cuda", torch.float16, enabled=on):
            out = heedful.attention(*inputs, backend=backend)
            return out, torch.autograd.grad(out.sum(), inputs[0])[0]

    same_bits(run(True), run(False))
