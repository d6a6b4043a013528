"""flash-attn's names: the reference's answers, the package's signatures, and its answers too."""

import inspect
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import heedful
import heedful_torch.flash_attn as flash_attn
import reference
from heedful_crosscheck.contract import REQUIRED
from heedful_torch import CopyWarning
from heedful_torch.flash_attn import bert_padding

NAME = "torch:flash-attn-2"
needs_flash_attn = pytest.mark.skipif(
    NAME not in (REQUIRED or ()),
    reason=f"it runs in the nox session backend({NAME}), which has flash-attn",
)

SLOPES = torch.tensor([0.5, -0.1, 0.03, 0.0])
SLOPES_OF_ROWS = torch.stack([SLOPES, SLOPES.flip(0)])


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(Sq=9, Sk=13, Hkv=2, D=8, **options):
    """(B, S, H, D), B = 2, Hq = 4."""
    shapes = (2, Sq, 4, D), (2, Sk, Hkv, D), (2, Sk, Hkv, D)
    return [normal(*s, seed=n, **options).requires_grad_() for n, s in enumerate(shapes)]


def with_gradients(function, arrays, dout, **options):
    """out, lse and the gradients, of any of flash-attn's functions."""
    out, lse, S_dmask = function(*arrays, **options, return_attn_probs=True)
    assert S_dmask is None
    return [x.detach() for x in (out, lse, *torch.autograd.grad(out, arrays, dout))]


# Against the reference: what flash-attn is told, and the same in the contract's words

OPTIONS = [
    ({}, {}),
    ({"causal": True}, {"causal": True}),
    ({"softmax_scale": 0.3}, {"scale": 0.3}),
    ({"window_size": (3, 2)}, {"window": (3, 2)}),
    ({"window_size": (-1, 1)}, {"window": (None, 1)}),
    ({"window_size": [2, -1]}, {"window": (2, None)}),
    ({"window_size": (4, 0), "causal": True}, {"window": (4, 0), "causal": True}),
    ({"window_size": (4, -1), "causal": True}, {"window": (4, None), "causal": True}),
    ({"softcap": 1.5, "causal": True}, {"softcap": 1.5, "causal": True}),
    ({"softcap": -1.0}, {}),
    ({"alibi_slopes": SLOPES}, {"alibi_slopes": SLOPES}),
    (
        {"alibi_slopes": SLOPES_OF_ROWS, "causal": True},
        {"alibi_slopes": SLOPES_OF_ROWS, "causal": True},
    ),
    (
        {"alibi_slopes": SLOPES, "window_size": (5, 2), "softcap": 2.0, "softmax_scale": 0.7},
        {"alibi_slopes": SLOPES, "window": (5, 2), "softcap": 2.0, "scale": 0.7},
    ),
    ({"deterministic": True, "causal": True}, {"causal": True}),
]


def agrees_with_the_reference(arrays, told, meant, tolerance):
    dout = normal(*arrays[0].shape, seed=7, dtype=arrays[0].dtype)
    ours = with_gradients(flash_attn.flash_attn_func, arrays, dout, **told)
    numbers = [x.detach().double().numpy() for x in (*arrays, dout)]
    meant = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in meant.items()}
    right = reference.attention(*numbers, **meant, layout="bshd")
    assert [x.dtype for x in ours] == [arrays[0].dtype, torch.float32, *[arrays[0].dtype] * 3]
    for got, want in zip(ours, right[:5], strict=True):
        np.testing.assert_allclose(got.double().numpy(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("told", "meant"), OPTIONS, ids=lambda x: ", ".join(x))
@pytest.mark.parametrize("lengths", [(9, 9), (9, 13), (13, 9)], ids=str)
def test_values_and_gradients_are_those_of_the_reference(told, meant, lengths):
    agrees_with_the_reference(qkv(*lengths), told, meant, 1e-5)


@pytest.mark.parametrize("Hkv", [1, 4])
@pytest.mark.parametrize(("told", "meant"), [OPTIONS[1], OPTIONS[-2]], ids=lambda x: ", ".join(x))
def test_heads_may_be_grouped_as_one_likes(told, meant, Hkv):
    agrees_with_the_reference(qkv(Hkv=Hkv), told, meant, 1e-5)


@pytest.mark.parametrize(("told", "meant"), [OPTIONS[1], OPTIONS[-2]], ids=lambda x: ", ".join(x))
def test_half_precision_takes_slopes_of_float32(told, meant):
    agrees_with_the_reference(qkv(dtype=torch.bfloat16), told, meant, 0.03)


@pytest.mark.parametrize("backend", ["torch:sdpa-math", "jax:plain"])
def test_the_backend_is_said_from_outside(backend):
    arrays = qkv()
    with heedful.use_backend(backend):
        got = flash_attn.flash_attn_func(*arrays, causal=True)
    want = heedful.attention(*arrays, causal=True, layout="bshd", backend=backend)
    assert torch.equal(got, want)
    with heedful.use_backend("torch:sdpa-math"), pytest.raises(heedful.Refusal, match="softcap"):
        flash_attn.flash_attn_func(*arrays, softcap=3.0)


def test_float64_takes_the_same_slopes():
    arrays = [x.detach().double() for x in qkv()]
    with heedful.use_backend("numpy:oracle"):
        out = flash_attn.flash_attn_func(*arrays, alibi_slopes=SLOPES)
    right = reference.attention(
        *(x.numpy() for x in arrays), layout="bshd", alibi_slopes=SLOPES.double().numpy()
    )
    np.testing.assert_allclose(out.numpy(), right[0], rtol=1e-12)


# Packed in one tensor


@pytest.mark.parametrize("backend", ["torch:sdpa-flash", "jax:flash"])
def test_packed_functions_are_the_function(backend):
    q, k, v = qkv(Sq=13, Hkv=4)
    dout = normal(*q.shape, seed=7)
    told = {"causal": True, "window_size": (6, -1), "softmax_scale": 0.3}
    kv = torch.stack([k, v], 2).detach().requires_grad_()
    qkv_ = torch.stack([q, k, v], 2).detach().requires_grad_()
    slices_are_copied = pytest.warns(CopyWarning) if backend == "jax:flash" else nullcontext()
    with heedful.use_backend(backend):
        out, lse, dq, dk, dv = with_gradients(flash_attn.flash_attn_func, [q, k, v], dout, **told)
        with slices_are_copied:
            of_kv = with_gradients(flash_attn.flash_attn_kvpacked_func, [q, kv], dout, **told)
            of_qkv = with_gradients(flash_attn.flash_attn_qkvpacked_func, [qkv_], dout, **told)
    for got, want in zip(of_kv, [out, lse, dq, torch.stack([dk, dv], 2)], strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(of_qkv, [out, lse, torch.stack([dq, dk, dv], 2)], strict=True):
        torch.testing.assert_close(got, want)


# Dropout


def dense(q, k, v, rate, seed, scale=8**-0.5):
    """Causal attention in float64 by the definition, dropped where `heedful.dropout_mask` says so."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    (B, H, Sq), Sk = q.shape[:3], k.shape[2]
    b, h, i, j = map(torch.arange, (B, H, Sq, Sk))
    scores = (q @ k.mT * scale).masked_fill(j > i[:, None] + Sk - Sq, -torch.inf)
    kept = heedful.dropout_mask(
        rate, seed, b[:, None, None, None], h[None, :, None, None], i[:, None], j
    )
    weights = torch.where(kept, scores.softmax(-1) / (1 - rate), 0)
    return (weights @ v).transpose(1, 2), scores.logsumexp(-1), None


@pytest.mark.parametrize(("p", "deterministic"), [(0.2, False), (0.9, True)])
def test_dropout_is_that_of_a_seed_drawn_from_torch(p, deterministic):
    arrays = qkv()
    dout = normal(*arrays[0].shape, seed=7)
    torch.manual_seed(5)
    seed = int(torch.randint(2**31 - 1, ()))
    right = with_gradients(lambda *x, **_: dense(*x, p, seed), arrays, dout)
    torch.manual_seed(5)
    told = {"dropout_p": p, "causal": True, "deterministic": deterministic}
    ours = with_gradients(flash_attn.flash_attn_func, arrays, dout, **told)
    for got, want in zip(ours, right, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-5)
    again = with_gradients(flash_attn.flash_attn_func, arrays, dout, **told)
    assert not torch.equal(again[0], ours[0]) and torch.equal(again[1], ours[1])


def test_packed_functions_drop_the_same():
    q, k, v = (x.detach() for x in qkv(Sq=13, Hkv=4))
    kv, qkv_ = torch.stack([k, v], 2), torch.stack([q, k, v], 2)
    found = []
    with heedful.use_backend("numpy:oracle"):
        for function, arrays in (
            (flash_attn.flash_attn_func, (q, k, v)),
            (flash_attn.flash_attn_kvpacked_func, (q, kv)),
            (flash_attn.flash_attn_qkvpacked_func, (qkv_,)),
        ):
            torch.manual_seed(5)
            found.append(function(*arrays, dropout_p=0.5))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_checkpoint_drops_the_same_again():
    arrays = qkv()
    dout = normal(*arrays[0].shape, seed=7)

    def gradients(attention):
        torch.manual_seed(5)
        out = attention(*arrays)
        torch.randint(9, ())  # what comes later draws too
        return torch.autograd.grad(out, arrays, dout)

    def attention(*arrays):
        return flash_attn.flash_attn_func(*arrays, dropout_p=0.5)

    checkpointed = partial(checkpoint, attention, use_reentrant=False)
    for got, want in zip(gradients(checkpointed), gradients(attention), strict=True):
        assert torch.equal(got, want)


def test_a_compiled_call_draws_what_an_eager_one_draws():
    arrays = [x.detach() for x in qkv()]

    def attention(*arrays):
        return flash_attn.flash_attn_func(*arrays, dropout_p=0.5)

    def several(attention):
        torch.manual_seed(5)
        return [attention(*arrays) for _ in range(3)]

    compiled = torch.compile(attention, backend="eager")
    # A seed that were a constant of the graph would compile it anew.
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = several(compiled)
    for got, want in zip(found, several(attention), strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(found[0], found[1])


def test_without_data_nothing_is_drawn():
    state = torch.get_rng_state()
    q, k, v = (x.to("meta") for x in qkv())
    assert flash_attn.flash_attn_func(q, k, v, dropout_p=0.5).shape == q.shape
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 9, 4, 8) for _ in range(3))
        assert flash_attn.flash_attn_func(q, k, v, dropout_p=0.5).shape == q.shape
    assert torch.equal(torch.get_rng_state(), state)


# What is refused, and what is not there


@pytest.mark.parametrize(
    ("told", "kind", "said"),
    [
        ({"dropout_p": 1.0}, ValueError, "dropout_p must lie .*, without 1. Got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must lie .*, without 1. Got -0.1"),
        ({"window_size": (None, 3)}, ValueError, r"Got \(None, 3\). An open side is -1"),
        ({"window_size": (-2, 3)}, ValueError, r"Got \(-2, 3\). An open side is -1"),
        ({"window_size": (1.5, 3)}, ValueError, "window must hold integers"),
        ({"window_size": 3}, ValueError, r"must be a pair \(left, right\). Got 3"),
        ({"alibi_slopes": SLOPES.half()}, TypeError, "must be float32, .* Got torch.float16"),
        ({"alibi_slopes": SLOPES[:2]}, ValueError, "one slope for each query head"),
        ({"softcap": float("nan")}, ValueError, "softcap must be positive and finite"),
    ],
    ids=str,
)
def test_what_it_cannot_honour_is_one_error(told, kind, said):
    with pytest.raises(kind, match=said):
        flash_attn.flash_attn_func(*qkv(), **told)


def test_shapes_are_those_of_flash_attn():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"q must be \(B, S, H, D\). Got shape \(9, 4, 8\)"):
        flash_attn.flash_attn_func(q[0], k[0], v[0])
    with pytest.raises(ValueError, match=r"kv must be \(B, S, 2, H, D\).*dim=2"):
        flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 1))
    with pytest.raises(ValueError, match=r"qkv must be \(B, S, 3, H, D\)"):
        flash_attn.flash_attn_qkvpacked_func(k)


class OnceSoOnceSo:
    """A backend that claims nothing."""

    name = "torch:once-so-once-so"
    takes = frozenset({"grouped_heads"})

    def reasons(self, problem):
        return []

    def run(self, problem, operands):
        return torch.zeros_like(operands.q), None


def test_deterministic_is_refused_by_who_does_not_claim_it():
    heedful.register(OnceSoOnceSo())
    try:
        with heedful.use_backend(OnceSoOnceSo.name):
            flash_attn.flash_attn_func(*qkv())
            with pytest.raises(heedful.Refusal, match="bit for bit, each time") as refused:
                flash_attn.flash_attn_func(*qkv(), deterministic=True)
    finally:
        heedful.unregister(OnceSoOnceSo.name)
    assert list(refused.value.reasons) == [OnceSoOnceSo.name]


# Padding

HIDDEN = normal(3, 5, 2, 4)
MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
UNUSED = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]])
LENGTHS = torch.tensor([[2, 1, 0, 0, 0], [5, 0, 0, 0, 0], [1, 1, 2, 0, 0]])


@pytest.mark.parametrize("kind", [torch.bool, torch.int32], ids=str)
@pytest.mark.parametrize("unused", [None, UNUSED], ids=["", "unused"])
def test_what_is_unpadded_and_padded_again_is_what_the_masks_keep(kind, unused):
    hidden = HIDDEN.clone().requires_grad_()
    kept = MASK.bool() if unused is None else (MASK + unused).bool()
    masks = [mask.to(kind) for mask in (MASK, unused) if mask is not None]
    tokens, indices, starts, longest, used = bert_padding.unpad_input(hidden, *masks)
    assert torch.equal(tokens, HIDDEN[kept])
    assert torch.equal(indices, kept.flatten().nonzero()[:, 0])
    assert starts.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    assert starts.dtype == used.dtype == torch.int32
    assert type(longest) is int and longest == kept.sum(1).max()
    assert used.tolist() == [2, 4, 0]

    padded = bert_padding.pad_input(tokens, indices, 3, 5)
    assert torch.equal(padded, torch.where(kept[..., None, None], HIDDEN, 0))
    cotangent = normal(*HIDDEN.shape, seed=1)
    padded.backward(cotangent)
    assert torch.equal(hidden.grad, torch.where(kept[..., None, None], cotangent, 0))


def test_sequences_that_stand_in_one_row_are_counted_one_by_one():
    tokens, indices, starts, longest = bert_padding.unpad_input_for_concatenated_sequences(
        HIDDEN, LENGTHS
    )
    assert indices.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert torch.equal(tokens, HIDDEN.flatten(0, 1)[indices])
    assert starts.tolist() == [0, 2, 3, 8, 9, 10, 12] and starts.dtype == torch.int32
    assert longest == 5
    with pytest.raises(ValueError, match=r"sum to at most S = 5. Got \[6, 10, 8\]"):
        bert_padding.unpad_input_for_concatenated_sequences(HIDDEN, 2 * LENGTHS)


def test_rows_that_are_taken_twice_get_both_gradients():
    rows = normal(4, 3).requires_grad_()
    taken = bert_padding.index_first_axis(rows, torch.tensor([2, 0, 2]))
    assert torch.equal(taken, rows[[2, 0, 2]])
    taken.sum().backward()
    assert rows.grad[:, 0].tolist() == [1, 0, 2, 0]
    put = bert_padding.index_put_first_axis(rows[:2], torch.tensor([3, 1]), 5)
    assert torch.equal(put[[3, 1]], rows[:2]) and not put[[0, 2, 4]].any()


def test_masks_of_another_shape_are_one_error():
    for name, masks in (("attention_mask", (MASK.T,)), ("unused_mask", (MASK, UNUSED[:2]))):
        with pytest.raises(ValueError, match=rf"^{name} must be \(B, S\) = \(3, 5\)"):
            bert_padding.unpad_input(HIDDEN, *masks)


# The package's own, interpreted


FUNCTIONS = [name for name in flash_attn.__all__ if name != "bert_padding"]


@needs_flash_attn
@pytest.mark.parametrize("name", [*FUNCTIONS, *bert_padding.__all__])
def test_signatures_are_those_of_the_package(package, name):
    ours = getattr(flash_attn, name, None) or getattr(bert_padding, name)
    parameters = inspect.signature(ours).parameters.values()
    assert [(x.name, x.default) for x in parameters] == package("signature", name)


# Its Triton kernels ignore windows and softcaps, and take slopes for each batch row alone.
TAKEN = [
    told
    for told, _ in OPTIONS
    if not {"window_size", "softcap"} & set(told)
    and told.get("alibi_slopes", SLOPES_OF_ROWS).ndim == 2
] + [{"alibi_slopes": SLOPES_OF_ROWS}]


@needs_flash_attn
@pytest.mark.parametrize("told", TAKEN, ids=", ".join)
@pytest.mark.parametrize("lengths", [(9, 9), (9, 13)], ids=str)
@pytest.mark.parametrize("Hkv", [1, 2])
def test_values_and_gradients_are_those_of_the_package(package, told, lengths, Hkv):
    arrays = qkv(*lengths, Hkv=Hkv)
    dout = normal(*arrays[0].shape, seed=7)
    ours = with_gradients(flash_attn.flash_attn_func, arrays, dout, **told)
    theirs = package("answer", "flash_attn_func", arrays, dout, told)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@needs_flash_attn
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_that_of_the_package(package, dtype):
    told = {"alibi_slopes": SLOPES_OF_ROWS, "causal": True}
    arrays = qkv(dtype=dtype)
    dout = normal(*arrays[0].shape, seed=7, dtype=dtype)
    ours = with_gradients(flash_attn.flash_attn_func, arrays, dout, **told)
    theirs = package("answer", "flash_attn_func", arrays, dout, told)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)


@needs_flash_attn
def test_packed_functions_are_those_of_the_package(package):
    q, k, v = qkv(Sq=13, Hkv=4)
    dout = normal(*q.shape, seed=7)
    for name, arrays in (
        ("flash_attn_kvpacked_func", [q, torch.stack([k, v], 2)]),
        ("flash_attn_qkvpacked_func", [torch.stack([q, k, v], 2)]),
    ):
        arrays = [x.detach().requires_grad_() for x in arrays]
        ours = with_gradients(getattr(flash_attn, name), arrays, dout, causal=True)
        theirs = package("answer", name, arrays, dout, {"causal": True})
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# Of queries and keys. Causal, a sequence without keys has its kernels write out of bounds.
PACKED = [(5, 9), (0, 3), (7, 7), (2, 2)]
SLOPES_OF_SEQUENCES = torch.linspace(0, 0.5, 16).reshape(4, 4)


@needs_flash_attn
@pytest.mark.parametrize(
    ("told", "lengths"),
    [
        ({}, [*PACKED[:3], (3, 0)]),
        ({"causal": True, "softmax_scale": 0.3}, PACKED),
        ({"alibi_slopes": SLOPES_OF_SEQUENCES, "causal": True}, PACKED),
    ],
    ids=lambda x: ", ".join(map(str, x)),
)
def test_packed_sequences_are_those_of_the_package(package, told, lengths):
    cu_q, cu_k = (
        torch.tensor([0, *each]).cumsum(0, dtype=torch.int32) for each in zip(*lengths, strict=True)
    )
    q, k, v = (x[0] for x in qkv(int(cu_q[-1]), int(cu_k[-1])))
    cumulated = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 7, "max_seqlen_k": 9}
    cases = [("flash_attn_varlen_func", [q, k, v], cumulated)]
    if "alibi_slopes" in told:
        kv, of_one = torch.stack([k, v], 1), {"cu_seqlens": cu_k, "max_seqlen": 9}
        ungrouped = torch.stack([k, k.flip(0), v], 1).repeat(1, 1, 2, 1)
        cases.append(("flash_attn_varlen_kvpacked_func", [q, kv], cumulated))
        cases.append(("flash_attn_varlen_qkvpacked_func", [ungrouped], of_one))
    for name, arrays, of_lengths in cases:
        arrays = [x.detach().requires_grad_() for x in arrays]
        dout = normal(len(arrays[0]), 4, 8, seed=7)
        options = {**of_lengths, **told}
        slices_are_copied = pytest.warns(CopyWarning) if "packed" in name else nullcontext()
        with slices_are_copied:
            ours = with_gradients(getattr(flash_attn, name), arrays, dout, **options)
        theirs = package("answer", name, arrays, dout, options)
        theirs[1] = theirs[1].T  # on CUDA it lies as ours
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


ANGLES = normal(24, 4, seed=3)


@needs_flash_attn
@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ((1, 1), {}),
        ((3, 3), {"causal": True, "rotary_cos": ANGLES.cos(), "rotary_sin": ANGLES.sin()}),
        (
            (2, 2),
            {
                "rotary_cos": ANGLES.cos(),
                "rotary_sin": ANGLES.sin(),
                "rotary_interleaved": False,
                "cache_batch_idx": torch.tensor([2, 0], dtype=torch.int32),
                "num_splits": 2,
            },
        ),
    ],
    ids=["", "rotary, causal", "rotary, picked rows"],
)
def test_a_cache_is_that_of_the_package(package, sizes, told):
    queries, new = sizes
    rows = 3 if "cache_batch_idx" in told else 2
    shapes = [
        (2, queries, 4, 8),
        (rows, 24, 2, 8),
        (rows, 24, 2, 8),
        (2, new, 2, 8),
        (2, new, 2, 8),
    ]
    arrays = [normal(*shape, seed=n) for n, shape in enumerate(shapes)]
    told = {**told, "cache_seqlens": torch.tensor([5, 17], dtype=torch.int32)}
    *theirs, k_cache, v_cache = package("cached", arrays, told)
    ours = flash_attn.flash_attn_with_kvcache(*arrays, **told, return_softmax_lse=True)
    for got, want in zip((*ours, *arrays[1:3]), (*theirs, k_cache, v_cache), strict=True):
        torch.testing.assert_close(got, want.reshape(got.shape), rtol=1e-5, atol=1e-5)


@needs_flash_attn
@pytest.mark.parametrize(
    "call",
    [
        ("unpad_input", HIDDEN, MASK),
        ("unpad_input", HIDDEN, MASK.bool(), UNUSED.bool()),
        ("unpad_input_for_concatenated_sequences", HIDDEN, LENGTHS),
        ("pad_input", HIDDEN[0], torch.tensor([0, 3, 4, 7, 9]), 2, 5),
        ("index_first_axis", HIDDEN, torch.tensor([2, 0])),
        ("index_put_first_axis", HIDDEN, torch.tensor([4, 0, 2]), 6),
    ],
    ids=lambda call: call[0],
)
def test_padding_is_that_of_the_package(package, call):
    name, *arguments = call
    ours = getattr(bert_padding, name)(*arguments)
    theirs = package("padding", name, *arguments)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
