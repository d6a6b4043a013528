"""flash-attn's packed sequences for torch: each sequence is what `flash_attn_func` makes of it alone."""

import pytest
import torch

import heedful
import heedful_torch.flash_attn as flash_attn
from compilations import counted
from heedful_torch import CopyWarning

LENGTHS = [(5, 9), (0, 3), (7, 0), (11, 4), (10, 10)]  # of queries and keys
SLOPES = torch.tensor([0.5, -0.1, 0.03, 0.0])
OF_SEQUENCES = torch.linspace(-0.1, 0.5, 20).reshape(5, 4)


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
    of_sequences = told.get("alibi_slopes") is OF_SEQUENCES
    with heedful.use_backend("numpy:oracle"):
        for n, arrays in enumerate(zip(*sequences, strict=True)):
            if of_sequences:
                told["alibi_slopes"] = OF_SEQUENCES[n]
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
        {"alibi_slopes": OF_SEQUENCES, "window_size": torch.tensor([4, -1])},
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


PAGES, PAGE, BLOCKS = 20, 3, 4
TABLE = torch.randperm(PAGES, generator=torch.Generator().manual_seed(2)).reshape(5, BLOCKS).int()


def on_pages(x, table=TABLE):
    """Packed keys or values on pages that the table names, NaN behind them."""
    pages = torch.full((PAGES, PAGE, *x.shape[1:]), torch.nan)
    for n in range(5):
        for j, token in enumerate(x[CU_K[n] : CU_K[n + 1]].detach()):
            pages[table[n, j // PAGE], j % PAGE] = token
    return pages.requires_grad_()


@pytest.mark.parametrize("told", [{}, {"causal": True, "window_size": (3, -1)}], ids=", ".join)
def test_keys_on_pages_are_those_that_stand_there(told):
    q, k, v = arrays = packed()
    paged = [q, on_pages(k), on_pages(v)]
    used = TABLE.clone()
    used[
        torch.arange(BLOCKS) * PAGE >= CU_K.diff()[:, None]
    ] = -7  # names no page, and nobody looks
    out, lse, *gradients = with_gradients(
        flash_attn.flash_attn_varlen_func, paged, **CUMULATED, **told, block_table=used
    )
    right = with_gradients(one_by_one, arrays, **told)
    for n, x in enumerate(right[3:], 3):
        right[n] = torch.nan_to_num(on_pages(x).detach())
    for got, want in zip((out, lse, *gradients), right, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-5)


def test_longer_sequences_on_pages_compile_nothing_anew():
    q, k, v = packed()
    paged = [q.detach(), on_pages(k).detach(), on_pages(v).detach()]
    seen = []
    for last in (4, 5):
        told = {**CUMULATED, "cu_seqlens_k": cumulated([9, 3, 0, 4, last])}
        with counted() as counts:
            seen.append(flash_attn.flash_attn_varlen_func(*paged, **told, block_table=TABLE))
    assert not counts["compiled"] and not torch.equal(*seen)


def test_dropout_is_that_of_a_seed_drawn_from_torch():
    arrays = packed()
    torch.manual_seed(5)
    seed = int(torch.randint(2**31 - 1, ()))

    def dense(q, k, v, **_):
        """In float64, by the definition; what is dropped is counted over all sequences."""
        q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(2, 0) for x in (k, v))
        h, i, j = map(torch.arange, (4, q.shape[1], k.shape[1]))
        n, m = (torch.repeat_interleave(torch.arange(5), cu.diff()) for cu in (CU_Q, CU_K))
        place = i + (CU_K[1:] - CU_Q[1:])[n]
        seen = (n[:, None] == m) & (j <= place[:, None])
        scores = (q @ k.mT * 8**-0.5).masked_fill(~seen, -torch.inf)
        kept = heedful.dropout_mask(0.3, seed, 0, h[:, None, None], i[:, None], j)
        weights = torch.where(kept & seen, scores.softmax(-1) / 0.7, 0)
        weights = torch.where(seen.any(1)[:, None], weights, 0)
        return (weights @ v).transpose(0, 1), scores.logsumexp(-1), None

    right = with_gradients(dense, arrays)
    torch.manual_seed(5)
    told = {**CUMULATED, "dropout_p": 0.3, "causal": True}
    ours = with_gradients(flash_attn.flash_attn_varlen_func, arrays, **told)
    for got, want in zip(ours, right, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-5)
    again = with_gradients(flash_attn.flash_attn_varlen_func, arrays, **told)
    assert not torch.equal(again[0], ours[0]) and torch.equal(again[1], ours[1])


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


PAGED = {name: on_pages(x) for name, x in zip("kv", packed()[1:], strict=True)}


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
        ({"dropout_p": 1.0}, ValueError, "dropout_p must lie .*, without 1. Got 1.0"),
        ({"block_table": TABLE}, ValueError, r"k must be \(pages, page size, H, D\)"),
        ({**PAGED, "block_table": TABLE[:3]}, ValueError, r"5 rows here. Got .* \(3, 4\)"),
        ({**PAGED, "block_table": TABLE.float()}, ValueError, "must be int32 .* Got torch.float32"),
        ({**PAGED, "block_table": TABLE + 1}, ValueError, "from 0 to 19 .*Got 20"),
        ({**PAGED, "block_table": TABLE[:, :3]}, ValueError, "room for, 9 tokens. Got 10"),
        (
            {**PAGED, "v": PAGED["v"][:5], "block_table": TABLE},
            ValueError,
            "as many pages of the same size",
        ),
        ({"alibi_slopes": OF_SEQUENCES[:3]}, ValueError, r"\(sequences, Hq\).* 5. Got \(3, 4\)"),
        ({"alibi_slopes": SLOPES.half()}, TypeError, "must be float32"),
        ({"max_seqlen_q": 10}, ValueError, "max_seqlen_q must be .* of 11 tokens. Got 10"),
        ({"max_seqlen_k": 9}, ValueError, "max_seqlen_k must be .* of 10 tokens. Got 9"),
        ({"cu_seqlens_q": CU_Q + 1}, ValueError, "cu_seqlens_q must begin with 0"),
        ({"cu_seqlens_k": 2 * CU_K}, ValueError, "cu_seqlens_k must end within k"),
        ({"cu_seqlens_k": CU_K.float()}, TypeError, "cu_seqlens_k"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_cannot_honour_is_one_error(told, kind, said):
    arrays = dict(zip("qkv", packed(), strict=True))
    with pytest.raises(kind, match=said):
        flash_attn.flash_attn_varlen_func(**{**arrays, **CUMULATED, **told})


def test_shapes_are_those_of_flash_attn():
    q, k, v = packed()
    with pytest.raises(ValueError, match="q, k and v must be packed"):
        flash_attn.flash_attn_varlen_func(q[None], k[None], v[None], **CUMULATED)
    with pytest.raises(ValueError, match=r"kv must be \(total_k, 2, H, D\).*dim=1"):
        flash_attn.flash_attn_varlen_kvpacked_func(q, torch.stack([k, v]), **CUMULATED)
