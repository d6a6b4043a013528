"""flash-attn's packed sequences for torch: each sequence is what `flash_attn_func` makes of it alone."""

import pytest
import torch

import heedful
import heedful_torch.flash_attn as flash_attn
from heedful_torch import CopyWarning

LENGTHS = [(5, 9), (0, 3), (7, 0), (11, 4), (10, 10)]  # of queries and keys
SLOPES = torch.tensor([0.5, -0.1, 0.03, 0.0])


def cumulated(lengths):
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


CU_Q, CU_K = map(cumulated, zip(*LENGTHS, strict=True))
CUMULATED = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 11, "max_seqlen_k": 10}


def packed(Hkv=2, D=8):
    """q (total_q, 4, D), k and v (total_k, Hkv, D)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (CU_Q[-1], 4, D), (CU_K[-1], Hkv, D), (CU_K[-1], Hkv, D)
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def with_gradients(function, arrays, **told):
    """out, lse, and the gradients of both together."""
    out, lse, S_dmask = function(*arrays, **told, return_attn_probs=True)
    assert S_dmask is None
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    seen = torch.where(lse.isfinite(), lse, 0)
    loss = (out * weights).sum() + seen.square().sum()
    return [x.detach() for x in (out, lse, *torch.autograd.grad(loss, arrays))]


def one_by_one(q, k, v, **told):
    """Each sequence by `flash_attn_func`, in float64 by the oracle."""
    sequences = (
        x.double().split([int(n) for n in cu.diff()]) for x, cu in ((q, CU_Q), (k, CU_K), (v, CU_K))
    )
    outs, lses = [], []
    with heedful.use_backend("numpy:oracle"):
        for arrays in zip(*sequences, strict=True):
            if not len(arrays[0]):
                continue
            if not len(arrays[1]):
                outs.append(0 * arrays[0])
                lses.append(torch.full((4, len(arrays[0])), -torch.inf).double())
                continue
            out, lse, _ = flash_attn.flash_attn_func(*(x[None] for x in arrays), **told)
            outs.append(out[0])
            lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1), None


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"causal": True, "deterministic": True},
        {"window_size": (3, 2), "softcap": 1.5, "softmax_scale": 0.3},
        {"alibi_slopes": SLOPES, "causal": True},
    ],
    ids=", ".join,
)
def test_each_sequence_is_what_it_is_alone(told):
    arrays = packed()
    ours = with_gradients(flash_attn.flash_attn_varlen_func, arrays, **CUMULATED, **told)
    right = with_gradients(
        one_by_one, arrays, **{n: x for n, x in told.items() if n != "deterministic"}
    )
    assert ours[0].shape == arrays[0].shape and ours[1].shape == (4, len(arrays[0]))
    for got, want in zip(ours, right, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-5)


def test_packed_functions_are_the_function():
    q, k, v = (x.detach().requires_grad_() for x in packed(Hkv=4))
    kv = torch.stack([k, v], 1).detach().requires_grad_()
    out, lse, dq, dk, dv = with_gradients(flash_attn.flash_attn_varlen_func, [q, k, v], **CUMULATED)
    with pytest.warns(CopyWarning):
        of_kv = with_gradients(flash_attn.flash_attn_varlen_kvpacked_func, [q, kv], **CUMULATED)
    for got, want in zip(of_kv, [out, lse, dq, torch.stack([dk, dv], 1)], strict=True):
        torch.testing.assert_close(got, want)

    qkv = torch.stack([k, k, v], 1).detach()
    of_keys = {**CUMULATED, "cu_seqlens_q": CU_K, "max_seqlen_q": 10}
    with pytest.warns(CopyWarning):
        got = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, CU_K, 10, causal=True)
    assert torch.equal(got, flash_attn.flash_attn_varlen_func(k, k, v, **of_keys, causal=True))


def test_torch_func_differentiates_with_lengths_from_outside():
    arrays = packed()

    def loss(*arrays):
        return flash_attn.flash_attn_varlen_func(*arrays, **CUMULATED).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(*(x.detach() for x in arrays))
    for got, want in zip(found, torch.autograd.grad(loss(*arrays), arrays), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("told", "kind", "said"),
    [
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p must be 0.0. Got 0.1"),
        ({"block_table": CU_Q[None]}, NotImplementedError, "block_table must be None"),
        (
            {"alibi_slopes": SLOPES.repeat(5, 1)},
            NotImplementedError,
            r"must be \(Hq,\).* Got \(5, 4\)",
        ),
        ({"alibi_slopes": SLOPES.half()}, TypeError, "must be float32"),
        ({"max_seqlen_q": 10}, ValueError, "max_seqlen_q must be .* of 11 tokens. Got 10"),
        ({"max_seqlen_k": 9}, ValueError, "max_seqlen_k must be .* of 10 tokens. Got 9"),
        ({"cu_seqlens_q": CU_Q + 1}, ValueError, "cu_seqlens_q must begin with 0"),
        ({"cu_seqlens_k": 2 * CU_K}, ValueError, "cu_seqlens_k must end within k"),
        ({"cu_seqlens_k": CU_K.float()}, TypeError, "cu_seqlens_k"),
    ],
    ids=str,
)
def test_what_it_cannot_honour_is_one_error(told, kind, said):
    with pytest.raises(kind, match=said):
        flash_attn.flash_attn_varlen_func(*packed(), **{**CUMULATED, **told})


def test_shapes_are_those_of_flash_attn():
    q, k, v = packed()
    with pytest.raises(ValueError, match="q, k and v must be packed"):
        flash_attn.flash_attn_varlen_func(q[None], k[None], v[None], **CUMULATED)
    with pytest.raises(ValueError, match=r"kv must be \(total_k, 2, H, D\).*dim=1"):
        flash_attn.flash_attn_varlen_kvpacked_func(q, torch.stack([k, v]), **CUMULATED)
