"""What is special about SDPA's kernels: each pinned to its operator, and brought to the contract.

That they honour every option is the contract's test; here is what the operators get and give.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import heedful
import reference
from heedful import dispatch
from heedful.call import Call
from heedful_crosscheck.contract.cases import CASES
from heedful_torch.backends import kernel, row_sums
from heedful_torch.backends.score_mask import additive_shape, score_mask, span_of
from heedful_torch.backends.sdpa import cudnn, efficient, flash
from heedful_torch.backends.sdpa import math as sdpa_math

BACKENDS = {
    "torch:sdpa-math": sdpa_math.backend,
    "torch:sdpa-flash": flash.backend,
    "torch:sdpa-efficient": efficient.backend,
    "torch:sdpa-cudnn": cudnn.backend,
}
ROUNDING = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def qkv(B=2, Hq=4, Hkv=2, Sq=6, Sk=9, D=8, Dv=8, **kind):
    shapes = (B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv)
    return tuple(
        normal(*shape, seed=seed, **kind).requires_grad_() for seed, shape in enumerate(shapes)
    )


def array(x):
    """A tensor as the reference takes it; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach().cpu()
    return x.double().numpy() if x.is_floating_point() else x.numpy()


def check(call, q, k, v, use=("out", "lse"), **options):
    """Compares a call's out, lse and gradients with the reference, to a rounding of q's dtype."""
    out, lse = call(q, k, v, return_lse=True, **options)
    dout = normal(*out.shape, seed=3, dtype=out.dtype, device=out.device)
    dlse = normal(*lse.shape, seed=4, dtype=lse.dtype, device=lse.device)
    bias = options.get("bias")
    leaves = [x for x in (q, k, v, bias) if x is not None]
    used = [pair for name, pair in (("out", (out, dout)), ("lse", (lse, dlse))) if name in use]
    outputs, cotangents = zip(*used, strict=True)
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    expected = reference.attention(
        *map(array, (q, k, v)),
        array(dout) if "out" in use else None,
        array(dlse) if "lse" in use else None,
        **{name: array(x) for name, x in options.items()},
    )
    for got, truth in zip((out, lse, *gradients), expected, strict=False):
        size = np.abs(truth, where=np.isfinite(truth), out=np.zeros_like(truth)).max()
        np.testing.assert_allclose(array(got), truth, rtol=0, atol=ROUNDING[q.dtype] * max(1, size))


def attention(backend):
    return lambda *qkv, **options: heedful.attention(*qkv, backend=backend, **options)


class Recorder(TorchDispatchMode):
    """Records every attention operator that runs, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_attention" in func.__name__:
            self.calls.append((func.__name__.removesuffix(".default"), args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    @property
    def names(self):
        return [name for name, _, _ in self.calls]


# Pinned


@pytest.mark.parametrize(
    ("backend", "operators"),
    [
        ("torch:sdpa-math", {"aten::_scaled_dot_product_attention_math"}),
        (
            "torch:sdpa-flash",
            {
                "aten::_scaled_dot_product_flash_attention_for_cpu",
                "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
            },
        ),
    ],
)
@pytest.mark.parametrize("told", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_runs_its_own_operator_whatever_sdpa_is_told(backend, operators, told):
    q, k, v = qkv()
    with sdpa_kernel(told), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        heedful.attention(q, k, v, causal=True, backend=backend).sum().backward()
    names = {event.name for event in profiler.events()}
    assert {
        name for name in names if name.startswith("aten::") and "_attention" in name
    } == operators


@pytest.mark.parametrize(
    ("backend", "operator"),
    [
        ("torch:sdpa-flash", "_scaled_dot_product_flash_attention"),
        ("torch:sdpa-efficient", "_scaled_dot_product_efficient_attention"),
        ("torch:sdpa-cudnn", "_scaled_dot_product_cudnn_attention"),
    ],
)
def test_cuda_operators_get_what_their_shapes_ask_for(backend, operator):
    # Shapes alone, on the device without memory: torch's own shape functions check the calls.
    q, k, v = (
        x.detach().to("meta").requires_grad_() for x in qkv(D=60, Dv=50, dtype=torch.bfloat16)
    )
    problem = dataclasses.replace(Call.of(q, k, v, return_lse=True).problem, platform="gpu")
    with Recorder() as recorder:
        out, lse = BACKENDS[backend].run(problem, Call.of(q, k, v).operands)
        gradients = torch.autograd.grad((out.sum(), lse.sum()), (q, k, v))
    assert (out.shape, lse.shape) == ((2, 4, 6, 50), (2, 4, 6))
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
    calls = 1 if backend == "torch:sdpa-flash" else problem.group
    assert recorder.names == [operator] * calls + [operator + "_backward"] * calls
    for _, args, _ in recorder.calls:
        assert all(x.shape[-1] % 8 == 0 for x in args[:3])


def test_causal_is_the_kernels_flag_where_it_means_the_same():
    q, k, v = qkv(Sk=6)
    with Recorder() as recorder:
        heedful.attention(q, k, v, causal=True, backend="torch:sdpa-flash")
        heedful.attention(
            q, k[:, :, :4], v[:, :, :4], causal="top_left", backend="torch:sdpa-flash"
        )
        # The first two queries see nothing: without them it is a square.
        heedful.attention(q, k[:, :, :4], v[:, :, :4], causal=True, backend="torch:sdpa-flash")
    for _, args, kwargs in recorder.calls:
        assert args[4] is True
        assert kwargs.get("attn_mask") is None
    assert recorder.calls[-1][1][0].shape[2] == 4


def test_a_window_at_decoding_touches_the_window_alone():
    q, k, v = qkv(Sq=1, Sk=1000)
    with Recorder() as recorder:
        heedful.attention(q, k, v, causal=True, window=(9, None), backend="torch:sdpa-flash")
    for _, args, kwargs in recorder.calls:
        assert args[1].shape[2] == args[2].shape[2] == 10
        assert kwargs.get("attn_mask") is None


@pytest.mark.parametrize(
    ("lengths", "options", "expected"),
    [
        ((5, 5), {}, (range(5), range(5), "nothing", None, None)),
        ((5, 5), {"causal": True}, (range(5), range(5), "band", None, 0)),
        ((5, 9), {"causal": True}, (range(5), range(9), "band", None, 4)),
        ((5, 9), {"causal": "top_left"}, (range(5), range(5), "band", None, 0)),
        ((9, 5), {"causal": True}, (range(4, 9), range(5), "band", None, 0)),
        ((9, 5), {"causal": "top_left"}, (range(9), range(5), "band", None, 0)),
        ((1, 9), {"causal": True}, (range(1), range(9), "nothing", None, None)),
        ((5, 9), {"causal": True, "q_offset": 30}, (range(5), range(9), "nothing", None, None)),
        ((5, 9), {"causal": True, "q_offset": -9}, (range(5, 5), range(0), "nothing", None, None)),
        ((1, 9), {"window": (2, 0)}, (range(1), range(6, 9), "nothing", None, None)),
        ((5, 9), {"window": (None, 1)}, (range(5), range(9), "band", None, 5)),
        ((5, 9), {"window": (2, 1)}, (range(5), range(2, 9), "band", 0, 3)),
        ((9, 4), {"window": (1, 0), "q_offset": 0}, (range(5), range(4), "band", -1, 0)),
        ((3, 0), {"causal": True}, (range(3, 3), range(0), "nothing", None, None)),
    ],
)
def test_span(lengths, options, expected):
    q, k, v = qkv(Sq=lengths[0], Sk=lengths[1])
    assert tuple(span_of(Call.of(q, k, v, **options).problem)) == expected


# The log-sum-exp's gradient


def test_torch_itself_drops_the_gradient_of_the_lse():
    q, k, v = qkv(Hq=2)
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    assert not lse.requires_grad


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("use", [("out",), ("lse",), ("out", "lse")], ids="+".join)
def test_lse_is_differentiable(dtype, use):
    check(attention("torch:sdpa-flash"), *qkv(Dv=5, dtype=dtype), use=use, causal=True)


@pytest.mark.parametrize("size", [1e-7, 1.0, 300.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_lse_cotangents_of_any_size_survive_half_precision(dtype, size):
    # delta is what the kernel would make of the columns: it must be dlse to float32's rounding.
    dlse = size * (1 + torch.rand(1000, dtype=torch.float64)).float().reshape(1, 1, 1000)
    dlse[..., ::2] *= -1
    zeros = torch.zeros(1, 1, 1000, 8, dtype=dtype)
    dout, out = kernel._with_lse_cotangent(dlse, zeros, zeros, 16)
    delta = (dout.float() * out.float()).sum(-1)
    np.testing.assert_allclose(delta.numpy(), -dlse.numpy(), rtol=3e-7)


def test_the_lse_costs_nothing_in_backward_where_it_is_not_used():
    q, k, v = qkv()
    out, _ = heedful.attention(q, k, v, return_lse=True, backend="torch:sdpa-flash")
    with Recorder() as recorder:
        out.sum().backward()
    assert {args[0].shape[-1] for _, args, _ in recorder.calls} == {8}


# The probabilities of the backward pass

LOWEST = torch.finfo(torch.float32).min


def test_torch_itself_takes_a_rounded_lse_for_the_sum():
    # A masked row's gradient is the sum of 64 where it should be the mean. Fails when torch is mended.
    q, k, v = qkv(B=1, Hq=1, Hkv=1, Sq=1, Sk=64)
    mask = torch.full((1, 1, 1, 64), LOWEST)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv, torch.ones_like(dv))


def bias_of(value, rows=slice(None), columns=slice(None), shape=(1, 1, 6, 9)):
    bias = torch.zeros(shape)
    bias[..., rows, columns] = value
    return bias


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    "bias",
    [
        bias_of(LOWEST),  # beside it q·k is lost, in float64 too: each key is seen alike
        bias_of(-1e30),
        bias_of(1e30, shape=(2, 4, 6, 9)),
        bias_of(LOWEST, rows=slice(1, None, 2)),
        bias_of(LOWEST, columns=slice(4, None)),
        bias_of(-1e30, rows=slice(2), shape=(2, 1, 6, 1)),
        bias_of(LOWEST, shape=(1, 4, 1, 9)),
        bias_of(LOWEST, shape=(2, 1, 1, 1)),
    ],
    ids=["lowest", "-1e30", "+1e30", "mixed rows", "keys", "a query", "a key", "one number"],
)
def test_beside_a_large_bias_they_sum_to_one(bias, dtype):
    q, k, v = qkv(dtype=dtype)
    bias = bias.to(torch.promote_types(dtype, torch.float32)).detach().requires_grad_()
    check(attention("torch:sdpa-flash"), q, k, v, bias=bias)
    check(attention("torch:sdpa-flash"), q, k, v, bias=bias, causal=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": "top_left"},
        {"scale": -1.0},
        {"bias": bias_of(2048.0, rows=slice(0, None, 3), shape=(1, 1, 70, 600)).requires_grad_()},
    ],
    ids=["full", "causal", "top left", "negative", "bias"],
)
def test_beside_large_logits_they_sum_to_one(options):
    # Integers, so that every logit near 4096 and 2048 is exact.
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randint(-3, 4, (2, heads, length, 16), generator=generator).float()
        for heads, length in ((4, 70), (2, 600))
    )
    q[..., 0], k[..., 0] = 64, 64
    q, k, v = (x.requires_grad_() for x in (q, k, normal(2, 2, 600, 16)))
    _, lse = heedful.attention(
        q, k, v, backend="torch:sdpa-flash", return_lse=True, **{"scale": 1.0} | options
    )
    assert lse.detach().abs()[..., 1:].min() > 4000
    check(attention("torch:sdpa-flash"), q, k, v, **{"scale": 1.0} | options)


def test_the_scores_are_rounded_alike_forward_and_backward():
    # By a scale that is no power of two, which the CPU kernel multiplies by in two places.
    q, k, v = qkv(B=8, Hq=16, Hkv=16, Sq=40, Sk=40, D=32, Dv=32)
    out = heedful.attention(12 * q, k, v, backend="torch:sdpa-flash")
    (dv,) = torch.autograd.grad(out[:, :, 7].sum(), v)
    torch.testing.assert_close(dv.sum(2), torch.ones_like(dv[:, :, 0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("Sq", [1, 3, 40, 200])
@pytest.mark.parametrize("Sk", [1, 7, 600])
def test_they_sum_to_one_whatever_the_sizes_of_the_kernels_products(Sq, Sk):
    # Logits of hundreds beside a bias of 1e4: products that add up in another order round otherwise.
    q, k, v = qkv(B=1, Sq=Sq, Sk=Sk, D=64, Dv=64)
    bias = bias_of(1e4, rows=slice(0, None, 2), shape=(1, 4, Sq, 1)).requires_grad_()
    out, lse = heedful.attention(
        60 * q, k, v, bias=bias, return_lse=True, backend="torch:sdpa-flash"
    )
    dout = normal(*out.shape, seed=3)
    (dv,) = torch.autograd.grad(out, v, dout, retain_graph=True)
    summed = dout.unflatten(1, (2, 2)).sum((2, 3))
    torch.testing.assert_close(dv.sum(2), summed, rtol=0, atol=2e-5)
    (dv,) = torch.autograd.grad((out, lse), v, (dout, torch.ones_like(lse)))
    torch.testing.assert_close(dv.sum(2), summed, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [-1e5, -1e7, -1e9, 1e9, -3e38])
def test_beside_a_bias_that_rounds_the_scores_they_sum_to_one(size):
    # What is left of q·k is anybody's guess; that each row of P sums to 1 is not.
    q, k, v = qkv()
    bias = torch.full((2, 4, 6, 9), size).requires_grad_()
    out, lse = heedful.attention(q, k, v, bias=bias, return_lse=True, backend="torch:sdpa-flash")
    dout, dlse = normal(*out.shape, seed=3), normal(*lse.shape, seed=4)
    (dv,) = torch.autograd.grad(out, v, dout, retain_graph=True)
    summed = dout.unflatten(1, (2, 2)).sum((2, 3))
    torch.testing.assert_close(dv.sum(2), summed, rtol=1e-5, atol=1e-5)
    (dbias,) = torch.autograd.grad((out, lse), bias, (dout, dlse))
    torch.testing.assert_close(dbias.sum(-1), dlse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "backend", ["torch:sdpa-flash", "torch:sdpa-efficient", "torch:sdpa-cudnn"]
)
def test_on_cuda_they_sum_to_one(monkeypatch, backend):
    # Played by the stand-in below: the CUDA kernels make P of a rounded LSE too.
    q, k, v = qkv(Sq=9, dtype=torch.bfloat16)
    options = {}
    if backend == "torch:sdpa-efficient":
        options["bias"] = bias_of(-1e30, shape=(2, 1, 9, 9)).bfloat16().requires_grad_()
        check(on_cuda(monkeypatch, backend), q, k, v, **options)
    with torch.no_grad():
        q[..., 0], k[..., 0] = 2.0**15, 2.0**15
    out, _ = on_cuda(monkeypatch, backend)(q, k, v, causal=True, scale=1.0, **options)
    dout = normal(*out.shape, seed=3, dtype=out.dtype)
    (dv,) = torch.autograd.grad(out, v, dout)
    summed = dout.float().unflatten(1, (2, 2)).sum((2, 3))
    torch.testing.assert_close(dv.float().sum(2), summed, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "bias",
    [
        bias_of(LOWEST),
        bias_of(LOWEST, rows=slice(1, None, 2), shape=(2, 4, 6, 9)),
        bias_of(LOWEST, columns=slice(4, None)),
        bias_of(LOWEST, shape=(1, 4, 6, 1)),
        torch.where(bias_of(True).bool().logical_xor(torch.eye(6, 9).bool()), LOWEST, LOWEST / 2),
        bias_of(-LOWEST / 1.01, columns=slice(2, 5)),
    ],
    ids=["all", "rows", "keys", "a query", "two of them", "positive"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_efficient_kernel_is_given_no_mask_that_overflows_to_base_2(monkeypatch, bias, dtype):
    bias = bias.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    q, k, v = qkv(dtype=dtype)
    call = on_cuda(monkeypatch, "torch:sdpa-efficient")
    check(call, q, k, v, bias=bias.to(dtype).requires_grad_())


def test_what_a_row_of_them_sums_to_is_asked_only_where_it_is_large(monkeypatch):
    asked = []
    monkeypatch.setattr(
        row_sums, "_sums_of", lambda *tile: asked.append(tile[3]) or tile[-1][tile[3]]
    )
    q, k, _ = qkv(Sq=40)
    lse = torch.full((2, 4, 40), 15.9)
    lse[1, 2, :32:3], lse[0, 0, 0], lse[0, 0, 1] = -17.0, torch.inf, torch.nan
    sums = row_sums.row_sums(q, k, None, None, 1.0, None, None, None, None, lse, False)
    assert (sums[1, 2, :32:3] == -17).all()
    assert (sums == 1).sum() == 2 * 4 * 40 - 11
    assert asked == [slice(0, 32)]


def test_the_operator_of_the_sums_is_well_formed():
    q, k, _ = (x.detach() for x in qkv())
    lse = torch.full((2, 4, 6), 20.0)
    arguments = (q, k, normal(1, 1, 6, 9), None, 1.0, 30.0, -2, 3, None, lse, True)
    torch.library.opcheck(torch.ops.heedful.row_sums, arguments)


def test_the_sums_are_over_what_is_seen_of_scores_as_they_are_capped():
    q, k, _ = (4 * x.detach() for x in qkv(Sk=700))
    seen = torch.ones(6, 700, dtype=torch.bool).tril(600).triu(3)
    scores = 30 * torch.tanh(0.5 * q @ k.repeat_interleave(2, 1).mT / 30)
    scores = torch.where(seen, scores, -torch.inf)
    lse = scores.logsumexp(-1) + 0.1
    assert (lse > row_sums.HARMLESS).all()
    sums = row_sums.row_sums(q, k, None, None, 0.5, 30.0, 3, 600, None, lse, False)
    torch.testing.assert_close(sums, torch.exp(scores - lse[..., None]).sum(-1))


# What the operators would get wrong


def test_grouped_heads_share_one_k_and_v():
    q, k, v = qkv(Hq=6)
    with Recorder() as recorder:
        out = heedful.attention(q, k, v, backend="torch:sdpa-flash")
        out.sum().backward()
    memory = {x.untyped_storage().data_ptr() for x in (k, v)}
    forward, backward = recorder.calls[:3], recorder.calls[3:]
    assert {x.untyped_storage().data_ptr() for _, args, _ in forward for x in args[1:3]} == memory
    assert {x.untyped_storage().data_ptr() for _, args, _ in backward for x in args[2:4]} == memory
    assert {x.shape for _, args, _ in backward for x in args[2:4]} == {(2, 2, 9, 8)}


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),  # the last axis strides
        lambda x: torch.cat([x, x], -1)[..., :8],
        lambda x: x[:, :, :1].expand(x.shape),  # a row with stride 0
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.flatten()[: -x.shape[2] * 7].as_strided(x.shape, (9, 9, 1, 1)),  # rows overlap
    ],
    ids=["columns first", "slice", "broadcast", "bshd", "overlapping rows"],
)
def test_any_layout(view):
    views = (view(x.detach()).requires_grad_() for x in qkv(Hq=2))
    check(attention("torch:sdpa-flash"), *views, kv_lengths=torch.tensor([9, 4]))


def test_a_transposed_mask():
    mask = torch.rand(9, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    check(attention("torch:sdpa-flash"), *qkv(), mask=mask.T)


@pytest.mark.parametrize("scale", [-2.0, 0.0])
def test_a_scale_of_zero_or_less_with_the_causal_flag(scale):
    check(attention("torch:sdpa-flash"), *qkv(Sk=6), causal=True, scale=scale)


@pytest.mark.parametrize("backend", ["torch:sdpa-math", "torch:sdpa-flash"])
def test_a_bias_of_minus_infinity_hides(backend):
    q, k, v = (x.detach() for x in qkv())
    mask = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0, 0, 2] = False
    bias = torch.where(mask, 0.0, -torch.inf).requires_grad_()
    out = heedful.attention(q, k, v, bias=bias, backend=backend)
    torch.testing.assert_close(out, heedful.attention(q, k, v, mask=mask, backend=backend))
    out.sum().backward()
    assert (bias.grad[~mask] == 0).all()


@pytest.mark.parametrize("backend", ["torch:sdpa-math", "torch:sdpa-flash"])
def test_autocast_does_not_round(backend):
    q, k, v = qkv()
    bias = normal(1, 4, 6, 9).requires_grad_()
    out = heedful.attention(q, k, v, bias=bias, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        again = heedful.attention(q, k, v, bias=bias, backend=backend)
    assert torch.equal(again, out)
    (expected,) = torch.autograd.grad(out.sum(), bias)
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(again.sum(), bias)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("cotangent_requires_grad", [False, True])
def test_second_derivatives_of_a_fused_kernel_are_refused(cotangent_requires_grad):
    q, k, v = qkv()
    out = heedful.attention(q, k, v, backend="torch:sdpa-flash")
    loss = out.square().sum() if cotangent_requires_grad else out.sum()
    (dq,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        (dq.square().sum() + q.sum()).backward()


def test_second_derivatives_of_the_math_kernel():
    q, k, v = qkv(B=1, Hq=1, Hkv=1, Sq=2, Sk=2, D=1, Dv=1, dtype=torch.float64)
    torch.autograd.gradgradcheck(attention("torch:sdpa-math"), (q, k, v))


@pytest.mark.parametrize("backend", ["torch:sdpa-math", "torch:sdpa-flash"])
def test_a_repeated_run_is_bitwise_equal(backend):
    assert BACKENDS[backend].deterministic

    def run():
        q, k, v = qkv(Sq=300, Sk=700, D=64, Dv=64)
        out = heedful.attention(q, k, v, backend=backend)
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    assert all(map(torch.equal, run(), run()))


# What the kernels build, and who is chosen for it


def expanded(*shape, dtype=torch.float32):
    """A tensor of any size, in no memory."""
    return torch.zeros((), dtype=dtype).expand(shape)


def large(B=1, Hq=2, Hkv=2, Sq=16384, Sk=16384, D=32, dtype=torch.float32):
    return [expanded(B, H, S, D, dtype=dtype) for H, S in ((Hq, Sq), (Hkv, Sk), (Hkv, Sk))]


LENGTHS = torch.tensor([16384])


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, "torch:sdpa-flash"),
        ({"causal": True}, "torch:sdpa-flash"),
        ({"return_lse": True}, "torch:sdpa-flash"),
        ({"kv_lengths": LENGTHS}, "torch:sdpa-flash"),  # one row of a mask
        ({"mask": expanded(1, 16384, dtype=torch.bool)}, "torch:sdpa-flash"),
        ({"bias": expanded(1, 2, 1, 16384)}, "torch:sdpa-flash"),
        ({"bias": expanded(1, 1, 16384, 16384)}, "torch:sdpa-flash"),  # the caller holds as much
        ({"mask": expanded(16384, 16384, dtype=torch.bool)}, "jax:flash"),  # a quarter of it
        ({"window": (256, 0)}, "jax:flash"),
        ({"window": (256, 256)}, "jax:flash"),
        ({"causal": True, "window": (256, None)}, "jax:flash"),
        ({"causal": True, "kv_lengths": LENGTHS}, "jax:flash"),
        ({"q_lengths": LENGTHS, "kv_lengths": LENGTHS}, "jax:flash"),
        ({"causal": True, "q_offset": torch.tensor([0])}, "jax:flash"),
        ({"causal": True, "q_offset": 5}, "jax:flash"),
        ({"causal": True, "mask": expanded(1, 16384, dtype=torch.bool)}, "jax:flash"),
        ({"causal": True, "bias": expanded(2, 1, 1)}, "jax:flash"),
        ({"softcap": 2.0}, "jax:flash"),
    ],
    ids=str,
)
def test_the_automatic_choice_at_16384(options, chosen):
    assert heedful.explain(*large(), **options).chosen == chosen


@pytest.mark.parametrize(
    ("sizes", "options", "chosen"),
    [
        ({"Sq": 512, "Sk": 1024}, {"window": (9, 0)}, "torch:sdpa-flash"),  # 2 MiB
        ({"Sq": 513, "Sk": 1024}, {"window": (1024, 0)}, "jax:flash"),
        ({"Sq": 1}, {"window": (256, 0)}, "torch:sdpa-flash"),
        ({"Sq": 1, "B": 64}, {"kv_lengths": LENGTHS.expand(64)}, "torch:sdpa-flash"),
        ({"Sq": 1024, "Sk": 512}, {"causal": True}, "torch:sdpa-flash"),  # a square, and empty rows
        ({"Sq": 512, "Sk": 1024}, {"causal": True}, "torch:sdpa-flash"),
        ({"Sq": 1024, "Sk": 2048}, {"causal": True}, "jax:flash"),  # the diagonal ends lower right
        ({"Sq": 1024, "Sk": 16384, "q_offset": 16384}, {"causal": True}, "torch:sdpa-flash"),
        (
            {"Sq": 400, "Sk": 400, "B": 4},
            {"q_lengths": LENGTHS[:0].new_zeros(4)},
            "torch:sdpa-flash",
        ),
        (
            {"Sq": 400, "Sk": 400, "B": 4},
            {"causal": True, "kv_lengths": LENGTHS.new_zeros(4)},
            "jax:flash",  # a mask for each batch row
        ),
    ],
    ids=str,
)
def test_the_automatic_choice_counts_what_is_built(sizes, options, chosen):
    if "q_offset" in sizes:
        options = options | {"q_offset": sizes.pop("q_offset")}
    assert heedful.explain(*large(**sizes), **options).chosen == chosen


def test_without_a_linear_backend_the_least_is_taken():
    # float64, which JAX does not take here.
    explanation = heedful.explain(*large(dtype=torch.float64), window=(256, 0))
    assert explanation.chosen == "torch:sdpa-flash"
    verdicts = {verdict.name: verdict for verdict in explanation.verdicts}
    assert verdicts["torch:sdpa-flash"].score_bytes == 8 * 16384**2
    assert verdicts["torch:sdpa-math"].score_bytes == (2 * 2 + 1) * 8 * 16384**2
    assert "torch:sdpa-flash" in str(explanation) and "builds 2 GiB" in str(explanation)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_mask_is_as_large_as_it_is_said_to_be(case):
    inputs = case.inputs(0, "float32")
    q, k, v = (torch.zeros(1).expand(x.shape) for x in (inputs.q, inputs.k, inputs.v))
    arrays = {name: torch.from_numpy(x) for name, x in inputs.arrays.items()}
    options = {**inputs.options, **arrays}
    for name in {"bias", "sinks", "alibi_slopes"} & options.keys():
        options[name] = expanded(*options[name].shape)
    problem = Call.of(q, k, v, **options).problem
    place = span_of(problem)
    made = score_mask(problem, Call.of(q, k, v, **options).operands, place, torch.float32)
    if place.columns and place.rows:
        assert made.additive.shape == additive_shape(problem, place)


@pytest.mark.parametrize(
    ("backend", "options", "bytes_of_mask"),
    [
        ("torch:sdpa-flash", {"causal": True}, 0),
        ("torch:sdpa-cudnn", {"causal": True, "Sk": 6}, 0),
        ("torch:sdpa-efficient", {"causal": "top_left"}, 0),
        ("torch:sdpa-efficient", {"causal": True}, 2 * 6 * 9),
        ("torch:sdpa-efficient", {"mask": torch.ones(2, 1, 6, 9, dtype=torch.bool)}, 2 * 2 * 6 * 9),
        ("torch:sdpa-efficient", {"bias": normal(4, 6, 9, dtype=torch.bfloat16)}, 2 * 4 * 6 * 9),
        ("torch:sdpa-efficient", {"kv_lengths": torch.tensor([1, 2])}, 0),
        ("torch:sdpa-math", {}, 2 * 4 * 2 * 4 * 6 * 9),
    ],
)
def test_what_the_kernels_build_on_a_gpu(backend, options, bytes_of_mask):
    q, k, v = qkv(Sk=options.get("Sk", 9), dtype=torch.bfloat16)
    options = {name: x for name, x in options.items() if name != "Sk"}
    problem = dataclasses.replace(Call.of(q, k, v, **options).problem, platform="gpu")
    assert BACKENDS[backend].score_bytes(problem) == bytes_of_mask


# Refusals, which are data


def refusals(backend, platform="cpu", bias=None, mask=None, **options):
    sizes = {
        name: options.pop(name) for name in ("Sq", "Sk", "D", "Hkv", "dtype") if name in options
    }
    q, k, v = qkv(**{"Dv": sizes.get("D", 8)} | sizes)
    operands = {"bias": bias, "mask": mask, **options}
    problem = Call.of(q, k, v, **operands).problem
    asked = dataclasses.replace(problem, platform=platform)
    reasons = list(dispatch.reasons(BACKENDS[backend], asked))
    machine = ("this torch sees no", "this torch is built without", "this kernel needs cuDNN")
    return [reason for reason in reasons if not reason.startswith(machine)]


@pytest.mark.parametrize(
    ("backend", "options", "reasons"),
    [
        ("torch:sdpa-math", {"softcap": 3.0}, ["no kernel of SDPA has a softcap; jax:flash has"]),
        (
            "torch:sdpa-math",
            {"return_lse": True},
            ["this kernel returns no LSE; torch:sdpa-flash does"],
        ),
        ("torch:sdpa-flash", {"softcap": 3.0}, ["no kernel of SDPA has a softcap; jax:flash has"]),
        (
            "torch:sdpa-efficient",
            {"dtype": torch.float64},
            [
                "this kernel needs a CUDA GPU; the arrays lie on cpu",
                "this kernel takes float32 and float16 and bfloat16, not float64",
            ],
        ),
        (
            "torch:sdpa-cudnn",
            {"softcap": 2.0},
            [
                "no kernel of SDPA has a softcap; jax:flash has",
                "this kernel needs a CUDA GPU; the arrays lie on cpu",
                "this kernel takes float16 and bfloat16, not float32",
            ],
        ),
    ],
)
def test_refusals_on_a_cpu(backend, options, reasons):
    assert refusals(backend, **options) == reasons


@pytest.mark.parametrize(
    ("backend", "options", "reasons"),
    [
        ("torch:sdpa-flash", {}, []),
        ("torch:sdpa-flash", {"causal": True}, []),
        ("torch:sdpa-flash", {"causal": "top_left"}, []),  # keys 6 to 8 are seen by nobody
        ("torch:sdpa-flash", {"causal": True, "Sq": 1, "window": (3, None)}, []),
        ("torch:sdpa-flash", {"D": 256}, []),
        (
            "torch:sdpa-flash",
            {"causal": "top_left", "Sk": 4},
            ["this kernel takes no mask, which causal with a q_offset 0 would need"],
        ),
        (
            "torch:sdpa-flash",
            {
                "window": (2, 2),
                "mask": torch.ones(2, 9, dtype=torch.bool),
                "bias": torch.zeros(6, 9, dtype=torch.bfloat16),
            },
            [
                "this kernel takes no mask, which mask and window would need",
                "this kernel takes no bias",
            ],
        ),
        (
            "torch:sdpa-flash",
            {"causal": True, "q_offset": torch.tensor([1, 2])},
            ["this kernel takes no mask, which causal with a q_offset of its own a row would need"],
        ),
        ("torch:sdpa-flash", {"D": 264}, ["this kernel takes head sizes up to 256, not 264"]),
        (
            "torch:sdpa-flash",
            {"D": 256, "return_lse": True},
            [
                "with return_lse this kernel takes head sizes up to 253, not 256: "
                "the gradient of the LSE needs columns of its own"
            ],
        ),
        ("torch:sdpa-efficient", {"mask": torch.ones(2, 9, dtype=torch.bool), "causal": True}, []),
        ("torch:sdpa-efficient", {"bias": torch.zeros(6, 9, dtype=torch.bfloat16)}, []),
        (
            "torch:sdpa-efficient",
            {"bias": torch.zeros(6, 9)},
            ["this kernel takes a bias of q's dtype, bfloat16, not of float32"],
        ),
        (
            "torch:sdpa-efficient",
            {"causal": True, "Sq": 1, "Sk": 65537, "window": (None, None)},
            [],
        ),
        (
            "torch:sdpa-efficient",
            {"kv_lengths": torch.tensor([1, 2]), "Sk": 65537},
            ["with a mask this kernel is wrong on lengths over 65536, silently (pytorch#162588)"],
        ),
        (
            "torch:sdpa-cudnn",
            {"causal": True},
            [
                "this kernel takes no mask, which causal with a q_offset 3 would need",
                "this kernel is trusted with causal on equal lengths only",
            ],
        ),
        ("torch:sdpa-cudnn", {"Sk": 1}, ["cuDNN's attention takes no single key"]),
        ("torch:sdpa-cudnn", {"D": 136}, ["this kernel takes head sizes up to 128, not 136"]),
    ],
)
def test_refusals_on_a_gpu(backend, options, reasons):
    assert refusals(backend, platform="gpu", **{"dtype": torch.bfloat16} | options) == reasons


def test_math_refuses_while_torch_is_set_to_round_scores():
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        assert (
            "allow_fp16_bf16_reduction_math_sdp(False)"
            in refusals("torch:sdpa-math", dtype=torch.bfloat16)[0]
        )
        assert refusals("torch:sdpa-math") == []
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


# The CUDA kernels, played by a dense stand-in with their conventions


class StandIn:
    """aten's CUDA operators in plain torch: their signatures, alignments, causal flags and LSEs."""

    def scores(self, q, k, mask, causal, scale, lower_right=False):
        assert all(x.shape[-1] % 8 == 0 and x.stride(-1) == 1 for x in (q, k))
        s = scale * q.float() @ k.float().mT
        if mask is not None:
            assert mask.shape == s.shape and mask.dtype == q.dtype
            assert mask.stride(-1) == 1 and mask.stride(-2) % 8 == 0
            s = s + mask.float()
        if causal:
            hidden = s.new_ones(s.shape[-2:]).triu(1 + (s.shape[-1] - s.shape[-2]) * lower_right)
            s = s.masked_fill(hidden.bool(), -math.inf)
        return s

    def forward(self, q, k, v, *args, **kwargs):
        s = self.scores(q, k, *args, **kwargs)
        return (s.softmax(-1) @ v.float()).to(q.dtype), s.logsumexp(-1)

    def backward(self, dout, q, k, v, out, lse, *args, scale, **kwargs):
        p = (self.scores(q, k, *args, scale=scale, **kwargs) - lse.unsqueeze(-1)).exp()
        delta = (dout.float() * out.float()).sum(-1, keepdim=True)
        ds = p * (dout.float() @ v.float().mT - delta)
        gradients = scale * ds @ k.float(), scale * ds.mT @ q.float(), p.mT @ dout.float(), ds
        return tuple(x.to(q.dtype) for x in gradients)

    def _scaled_dot_product_flash_attention(self, q, k, v, dropout, causal, debug, *, scale):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out, lse = self.forward(q, k, v, None, causal, scale, lower_right=True)
        return out, lse, None, None, q.shape[2], k.shape[2], torch.zeros(2), torch.zeros(()), None

    def _scaled_dot_product_flash_attention_backward(
        self, dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, *seeds, scale
    ):
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        group = q.shape[1] // k.shape[1]
        repeated = (x.repeat_interleave(group, 1) for x in (k, v))
        dq, dk, dv, _ = self.backward(
            dout, q, *repeated, out, lse, None, causal, scale=scale, lower_right=True
        )
        return dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))

    def _scaled_dot_product_efficient_attention(
        self, q, k, v, bias, want, dropout, causal, *, scale
    ):
        # To base 2, where finfo.min becomes -inf.
        s = self.scores(q, k, bias, causal, scale) / math.log(2)
        p = (s - s.amax(-1, keepdim=True)).exp2()
        out = (p / p.sum(-1, keepdim=True) @ v.float()).to(q.dtype)
        lse = (s.amax(-1) + p.sum(-1).log2()) * math.log(2)
        room = torch.full((*q.shape[:2], -q.shape[2] % 32), math.inf)
        return out, torch.cat([lse, room], -1), torch.zeros(()), torch.zeros(())

    def _scaled_dot_product_efficient_attention_backward(
        self, dout, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale
    ):
        assert lse.shape[-1] % 32 == 0
        *gradients, dbias = self.backward(
            dout, q, k, v, out, lse[..., : q.shape[2]], bias, causal, scale=scale
        )
        return *gradients, dbias if wanted[3] else None

    def _scaled_dot_product_cudnn_attention(
        self, q, k, v, bias, want, dropout, causal, debug, *, scale
    ):
        out, lse = self.forward(q, k, v, bias, causal, scale)
        seeds = torch.zeros(()), torch.zeros(())
        return out, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], *seeds, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout,
        causal, *, scale,
    ):  # fmt: skip
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        return self.backward(dout, q, k, v, out, lse.squeeze(-1), bias, causal, scale=scale)[:3]


def on_cuda(monkeypatch, backend):
    """A call of a CUDA kernel, which the stand-in plays."""
    module = {"flash": flash, "efficient": efficient, "cudnn": cudnn}
    monkeypatch.setattr(module[backend.partition("-")[2]], "aten", StandIn())

    def call(q, k, v, **options):
        problem = dataclasses.replace(Call.of(q, k, v, **options).problem, platform="gpu")
        return BACKENDS[backend].run(problem, Call.of(q, k, v, **options).operands)

    return call


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("torch:sdpa-flash", {}),
        ("torch:sdpa-flash", {"causal": True}),
        ("torch:sdpa-flash", {"causal": True, "q_offset": -2}),
        ("torch:sdpa-efficient", {}),
        ("torch:sdpa-efficient", {"causal": "top_left"}),
        ("torch:sdpa-efficient", {"window": (2, 1), "kv_lengths": torch.tensor([0, 9])}),
        ("torch:sdpa-efficient", {"bias": normal(1, 4, 6, 1), "causal": True}),
        ("torch:sdpa-efficient", {"bias": normal(2, 1, 6, 9), "q_lengths": torch.tensor([6, 2])}),
        ("torch:sdpa-cudnn", {}),
        ("torch:sdpa-cudnn", {"causal": True, "Sk": 6}),
    ],
)
def test_around_the_cuda_kernels(monkeypatch, backend, options):
    q, k, v = qkv(Sk=options.get("Sk", 9), D=20, Dv=12, dtype=torch.float16)
    options = {name: x for name, x in options.items() if name != "Sk"}
    if "bias" in options:
        options["bias"] = options["bias"].half().requires_grad_()
    check(on_cuda(monkeypatch, backend), q, k, v, **options)


# The same kernels themselves. Not run on a GPU yet.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("torch:sdpa-flash", {}),
        ("torch:sdpa-flash", {"causal": True}),
        ("torch:sdpa-flash", {"causal": True, "q_offset": -20}),
        ("torch:sdpa-flash", {"D": 200, "Dv": 200}),
        ("torch:sdpa-efficient", {}),
        ("torch:sdpa-efficient", {"causal": "top_left"}),
        ("torch:sdpa-efficient", {"window": (20, 3), "kv_lengths": torch.tensor([0, 97])}),
        ("torch:sdpa-efficient", {"bias": normal(1, 4, 65, 1), "causal": True}),
        (
            "torch:sdpa-efficient",
            {"bias": normal(2, 1, 65, 97), "q_lengths": torch.tensor([65, 2])},
        ),
        ("torch:sdpa-cudnn", {}),
        ("torch:sdpa-cudnn", {"causal": True, "Sk": 65}),
        ("torch:sdpa-math", {"causal": True, "bias": normal(65, 97)}),
    ],
)
def test_on_a_gpu(backend, options, dtype):
    options = {
        name: x.to("cuda") if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    if "bias" in options:
        options["bias"] = options["bias"].to(dtype).requires_grad_()
    sizes = {name: options.pop(name) for name in ("Sk", "D", "Dv") if name in options}
    q, k, v = qkv(**{"Sq": 65, "Sk": 97, "D": 40, "Dv": 40} | sizes, dtype=dtype, device="cuda")
    if backend == "torch:sdpa-math":
        q, k, v = (x.detach() for x in (q, k, v))
        out = heedful.attention(q, k, v, backend=backend, **options)
        truth, *_ = reference.attention(
            *map(array, (q, k, v)), **{name: array(x) for name, x in options.items()}
        )
        np.testing.assert_allclose(array(out), truth, atol=ROUNDING[dtype])
    else:
        check(attention(backend), q, k, v, **options)
