"""flash-attn as a backend: what its own functions give, what it refuses, and its process's end."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

import heedful
import reference
from heedful.call import Call
from heedful_crosscheck.contract import REQUIRED
from heedful_torch.backends.flash_attn import four, three, two
from heedful_torch.backends.kernel import attend, limits
from heedful_torch.backends.row_sums import row_sums
from heedful_torch.worker import WorkerError

NAME = "torch:flash-attn-2"
needs_flash_attn = pytest.mark.skipif(
    NAME not in (REQUIRED or ()),
    reason=f"it runs in the nox session of {NAME}, which has flash-attn",
)


def qkv(B=1, Hq=4, Hkv=2, Sq=33, Sk=40, D=16, dtype=torch.float32):
    shapes = (B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, D)
    random = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes
    )


def reasons(*arrays, **options):
    return next(v for v in heedful.explain(*arrays, **options).verdicts if v.name == NAME).reasons


# Where it is not installed, or broken


def in_a_process(code, *path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Enough of Triton for the patches, where there is none.
TRITON = """
bfloat16 = None
class InterpreterBuilder:
    create_dot = cast_impl = create_fp_to_fp = binary_op = None
TensorHandle = None
"""

ASKED = """
    import torch, heedful
    q = torch.ones(1, 1, 4, 8)
    for verdict in heedful.explain(q, q, q).verdicts:
        print(verdict.name, "|", verdict)
    assert heedful.attention(q, q, q).shape == q.shape
"""


def installed(folder, package, distribution, version, text):
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(text)
    metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "raise ImportError('undefined symbol: _ZN3c104')",
            "ImportError: undefined symbol: _ZN3c104",
        ),
        ("import sys; sys.exit('no GPU')", "SystemExit: no GPU"),
        ("import os; os.abort()", "was ended by signal 6"),
    ],
)
def test_a_broken_flash_attn_changes_nothing_but_one_reason(tmp_path, text, said):
    installed(tmp_path, "flash_attn", "flash-attn", "2.8.3", text)
    if not find_spec("triton"):
        installed(tmp_path, "triton", "triton", "3.7.1", "")
        (tmp_path / "triton" / "language.py").write_text(TRITON)
        (tmp_path / "triton" / "runtime").mkdir()
        (tmp_path / "triton" / "runtime" / "interpreter.py").write_text(TRITON)
    lines = dict(line.split(" | ", 1) for line in in_a_process(ASKED, tmp_path).splitlines())
    assert lines[NAME].startswith("its Triton kernels cannot be interpreted: ")
    assert said in lines[NAME]
    assert lines["torch:sdpa-flash"].startswith("accepts")


# What is the same as the package's own


@needs_flash_attn
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_out_and_gradients_are_those_of_flash_attn_func(package, dtype, causal):
    """Bit for bit, where the public function is right: without a cotangent of the LSE."""
    q, k, v = qkv(dtype=dtype)
    dout = torch.randn_like(q)
    out, lse = heedful.attention(q, k, v, causal=causal, backend=NAME, return_lse=True)
    gradients = torch.autograd.grad(out, (q, k, v), dout)

    *arrays, their_dout = (x.detach().transpose(1, 2) for x in (q, k, v, dout))
    own_out, own_lse, *own_gradients = package(
        "answer", "flash_attn_func", arrays, their_dout, {"causal": causal}
    )
    for ours, own in zip((out, *gradients), (own_out, *own_gradients), strict=True):
        assert torch.equal(ours, own.transpose(1, 2))
    assert torch.equal(lse, own_lse)


@needs_flash_attn
def test_with_lengths_they_are_those_of_flash_attn_varlen_func(package):
    arrays, of_q, of_k = qkv(B=2, Sq=20, Sk=40), (7, 20), (40, 31)
    lengths = {"q_lengths": torch.tensor(of_q), "kv_lengths": torch.tensor(of_k)}
    dout = torch.randn_like(arrays[0])
    out, lse = heedful.attention(*arrays, **lengths, causal=True, backend=NAME, return_lse=True)
    got = out, *torch.autograd.grad(out, arrays, dout)

    def rows(x, lengths):  # (B, H, S, D) → (tokens, H, D)
        return torch.cat([x.detach()[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])

    each = of_q, of_k, of_k
    ends = {
        f"cu_seqlens_{n}": torch.tensor([0, *x]).cumsum(0, dtype=torch.int32)
        for n, x in {"q": of_q, "k": of_k}.items()
    }
    own_out, own_lse, *own_gradients = package(
        "answer",
        "flash_attn_varlen_func",
        [rows(x, lengths) for x, lengths in zip(arrays, each, strict=True)],
        rows(dout, of_q),
        {"causal": True, **ends, "max_seqlen_q": 20, "max_seqlen_k": 40},
    )
    for ours, own, lengths in zip(got, (own_out, *own_gradients), (of_q, *each), strict=True):
        assert torch.equal(rows(ours, lengths), own)
    assert torch.equal(rows(lse[..., None], of_q).squeeze(-1), own_lse)


@needs_flash_attn
def test_gradients_do_not_depend_on_how_tensors_lie():
    """The package's Triton kernels read dout by out's strides, and write dv by those of k."""
    q, k, v = (x.detach() for x in qkv())
    dout = torch.randn_like(q)

    def gradients(*arrays):
        *primals, dout = arrays
        primals = [x.requires_grad_() for x in primals]
        return torch.autograd.grad(heedful.attention(*primals, backend=NAME), primals, dout)

    right = gradients(q, k, v, dout)
    q, dout, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, dout, v))
    for arrays in ((q, k, v, dout.contiguous()), (q.contiguous(), k, v.contiguous(), dout)):
        for ours, want in zip(gradients(*(x.detach() for x in arrays)), right, strict=True):
            assert torch.equal(ours, want)


@needs_flash_attn
def test_it_says_what_computes():
    q, k, v = qkv()
    (verdict,) = (v for v in heedful.explain(q, k, v, backend=NAME).verdicts if v.name == NAME)
    assert verdict.kernel.startswith("flash-attn 2.") and "Triton kernels, interpreted" in str(
        verdict
    )


# What is refused


@needs_flash_attn
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"softcap": 5.0}, "its Triton kernels, which run on a CPU, ignore a softcap"),
        ({"window": (3, 0)}, "this kernel takes no mask, which window would need"),
        (
            {"causal": "top_left", "kv_lengths": torch.tensor([8])},
            "beside kv_lengths this kernel aligns each row's last query with its last key, not with a "
            "q_offset 0",
        ),
        (
            {"causal": True, "q_offset": torch.tensor([3]), "q_lengths": torch.tensor([8])},
            "this kernel takes no mask, which causal with a q_offset of its own a row would need",
        ),
        ({"mask": torch.ones(33, 40, dtype=torch.bool)}, "does not take mask"),
        ({"bias": torch.ones(33, 40)}, "does not take bias"),
        ({"sinks": torch.ones(4)}, "does not take sinks"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_its_kernels_lack_is_refused_in_one_line(options, said):
    q, k, v = qkv()
    assert reasons(q, k, v, **options) == (said,)
    with pytest.raises(heedful.Refusal, match=said):
        heedful.attention(q, k, v, **options, backend=NAME)


@needs_flash_attn
def test_float64_and_wide_heads_are_refused():
    assert reasons(*qkv(dtype=torch.float64)) == (
        "these kernels take float32, float16 and bfloat16, not float64",
    )
    assert reasons(*qkv(D=264)) == ("this kernel takes head sizes up to 256, not 264",)
    (said,) = reasons(*qkv(D=256), return_lse=True)
    assert "the gradient of the LSE needs columns of its own" in said


# Its CUDA kernels, played by a stand-in of the published signature: what they are told, no more


class FlashAttnInterface(ModuleType):
    """`flash_attn.flash_attn_interface` by its documentation, in float64."""

    def _probabilities(self, q, k, scale, causal, left, right, softcap, slopes=None, longest=None):
        assert left >= -1 and right >= -1 and scale > 0
        group = q.shape[2] // k.shape[2]
        q, k = (x.transpose(1, 2).double() for x in (q, k))
        scores = scale * q @ k.repeat_interleave(group, 1).mT
        capped = softcap * torch.tanh(scores / softcap) if softcap else scores
        p = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        j = torch.arange(k.shape[2])
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        if causal or right >= 0:
            seen &= j <= p + (0 if causal else right)
        if left >= 0:
            seen &= j >= p - left
        distance = (p - j).abs()
        if causal and not 0 <= left < (
            longest or k.shape[2]
        ):  # its alibi.h: the bias of a column alone
            distance = -j.expand_as(seen)
        factor = 1 - (capped / softcap) ** 2 if softcap else 1.0
        if slopes is not None:
            assert slopes.shape == q.shape[:2] and slopes.dtype == torch.float32
            capped = capped - slopes.double()[..., None, None] * distance
        assert seen.any(1).all()  # of an empty row its lse is +inf
        return torch.where(seen, capped, -torch.inf), factor

    def _flash_attn_forward(
        self, q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax, longest=None,
    ):  # fmt: skip
        assert not dropout_p and not return_softmax
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and q.shape[-1] % 8 == 0
        told = softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
        scores, _ = self._probabilities(q, k, *told, longest)
        group = q.shape[2] // k.shape[2]
        values = v.transpose(1, 2).double().repeat_interleave(group, 1)
        out = (scores.softmax(-1) @ values).transpose(1, 2)
        return out.to(q.dtype), scores.logsumexp(-1).float(), None, None

    def _flash_attn_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
        longest=None,
    ):  # fmt: skip
        told = softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
        scores, slope = self._probabilities(q, k, *told, longest)
        group = q.shape[2] // k.shape[2]
        wide = [x.transpose(1, 2).double() for x in (dout, q, k, v, out)]
        dout, q, k, v, out = (
            x if x.shape[1] == wide[1].shape[1] else x.repeat_interleave(group, 1) for x in wide
        )
        p = torch.exp(scores - softmax_lse.double()[..., None])
        ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * slope * softmax_scale

        def grouped(x):
            return x.unflatten(1, (-1, group)).sum(2)

        dq.copy_((ds @ k).transpose(1, 2))
        dk.copy_(grouped(ds.mT @ q).transpose(1, 2))
        dv.copy_(grouped(p.mT @ dout).transpose(1, 2))

    def _sequences(self, q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, slopes):
        """Of those that have queries and keys: both as slices, and their slopes."""
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q > 1 or (cu_seqlens_q.diff() == 1).all()  # it is believed
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= cu_seqlens_k.diff().max()
        both = (
            [slice(*x) for x in cu.unfold(0, 2, 1).tolist()] for cu in (cu_seqlens_q, cu_seqlens_k)
        )
        for n, (i, j) in enumerate(zip(*both, strict=True)):
            if i.start < i.stop and j.start < j.stop:
                yield i, j, None if slopes is None else slopes[n : n + 1]

    def _flash_attn_varlen_forward(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        out = torch.full_like(q, 0 if zero_tensors else torch.nan)
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf if zero_tensors else torch.nan)
        told = dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        for i, j, slopes in self._sequences(q, *ends, alibi_slopes):
            arrays = (x[None] for x in (q[i], k[j], v[j]))
            of_it = self._flash_attn_forward(*arrays, *told, slopes, return_softmax, max_seqlen_k)
            out[i], lse[:, i] = of_it[0][0], of_it[1][0]
        return out, lse, None, None

    def _flash_attn_varlen_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert softmax_lse.is_contiguous()
        for x in (dq, dk, dv):
            x.fill_(0 if zero_tensors else torch.nan)
        told = dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap
        ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        for i, j, slopes in self._sequences(q, *ends, alibi_slopes):
            arrays = (x[None] for x in (dout[i], q[i], k[j], v[j], out[i], softmax_lse[:, i]))
            gradients = (x[None] for x in (dq[i], dk[j], dv[j]))
            self._flash_attn_backward(
                *arrays, *gradients, *told, slopes, deterministic, longest=max_seqlen_k
            )


@pytest.fixture
def played(monkeypatch):
    package = ModuleType("flash_attn")
    package.flash_attn_interface = FlashAttnInterface("flash_attn.flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(
        sys.modules, "flash_attn.flash_attn_interface", package.flash_attn_interface
    )


OPTIONS = [
    {},
    {"causal": True},
    {"causal": "top_left"},
    {"causal": True, "q_offset": 3},
    {"window": (5, 2)},
    {"window": (None, 4)},
    {"window": (6, None), "causal": True},
    {"window": (9, 1), "q_offset": 0},
    {"softcap": 2.0, "causal": True},
    {"softcap": 3.0, "window": (4, 4)},
    {"scale": -0.7},
    {"scale": 0.0},
]
LENGTHS = [(24, 24), (17, 30), (30, 17)]


def agrees_with_the_reference(kernel, takes, options, lengths, with_lse):
    primals = qkv(Sq=lengths[0], Sk=lengths[1], D=12)
    call = Call.of(*primals, **options, return_lse=with_lse)
    assert not limits(kernel, call.problem, takes)
    out, lse = attend(kernel, call.problem, call.operands)
    assert (lse is not None) == with_lse
    dout, dlse = torch.randn_like(out), torch.randn(out.shape[:3])
    arrays = [x.detach().numpy() for x in (*primals, dout, *([dlse] if with_lse else []))]
    right = reference.attention(*arrays, **options)
    loss = (out * dout).sum()
    if with_lse:
        loss = loss + (torch.where(lse.isfinite(), lse, 0) * dlse).sum()
    gradients = torch.autograd.grad(loss, primals)
    got = (out, lse, *gradients) if with_lse else (out, *gradients)
    wanted = right[:5] if with_lse else (right[0], *right[2:5])
    for ours, want in zip(got, wanted, strict=True):
        ours = ours.detach().double()
        torch.testing.assert_close(ours, torch.from_numpy(want), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_cuda_kernels_are_told_what_is_asked(options, lengths):
    agrees_with_the_reference(two.CUDA, two.FlashAttn2.takes, options, lengths, with_lse=True)


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        (options, lengths)
        for options in (
            {}, {"causal": True}, {"causal": "top_left"}, {"window": (5, 2)},
            {"softcap": 2.0, "causal": True},
        )
        for lengths in LENGTHS
        # Another diagonal does not end in a corner, and is refused.
        if options.get("causal") != "top_left" or lengths[0] <= lengths[1]
    ],
    ids=str,
)  # fmt: skip
def test_cuda_kernels_are_told_slopes_so_that_their_lse_is_right(options, lengths):
    slopes = torch.tensor([[0.5, -0.2, 0.1, 0.0]])
    asked = options | {"alibi_slopes": slopes.requires_grad_()}
    primals = qkv(Sq=lengths[0], Sk=lengths[1], D=12)
    call = Call.of(*primals, **asked, return_lse=True)
    assert not limits(two.CUDA, call.problem, two.FlashAttn2.takes)
    results = attend(two.CUDA, call.problem, call.operands)
    right = heedful.attention(*primals, **asked, return_lse=True, backend="jax:plain")
    cotangents = tuple(torch.randn_like(x) for x in results)
    if not results[1].isfinite().all():
        cotangents = cotangents[0], torch.where(results[1].isfinite(), cotangents[1], 0)
    for ours, want in zip(
        (*results, *torch.autograd.grad(results, (*primals, slopes), cotangents)),
        (*right, *torch.autograd.grad(right, (*primals, slopes), cotangents)),
        strict=True,
    ):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=2e-5)


PADDED = [  # of 9 queries and 14 keys
    {"q_lengths": (9, 5, 0)},
    {"kv_lengths": (14, 4, 0)},
    {"q_lengths": (3, 9, 8), "kv_lengths": (14, 5, 11)},
]
ABOUT_THE_CORNER = [
    {},
    {"causal": True},
    {"window": (5, 2)},
    {"window": (6, None), "causal": True},
    {"softcap": 3.0, "window": (None, 4)},
    {"scale": -3.0, "causal": True},
    {"alibi_slopes": True},
    {"alibi_slopes": True, "causal": True},
    {"alibi_slopes": True, "window": (5, 2)},
]
WHERE_A_ROW_ENDS = [
    {"causal": "top_left"},
    {"causal": True, "q_offset": -3, "alibi_slopes": True},
    {"window": (3, 1), "q_offset": 4},
]


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize(
    ("options", "lengths"),
    [(options, lengths) for options in ABOUT_THE_CORNER for lengths in PADDED]
    + [(options, PADDED[0]) for options in WHERE_A_ROW_ENDS]
    + [({"causal": True}, {"q_lengths": (1, 0, 1), "kv_lengths": (14, 4, 9)})],
    ids=str,
)
def test_cuda_kernels_are_told_lengths(options, lengths):
    """As packed sequences. What sees nothing, or nobody sees, may be NaN."""
    Sq = max(lengths.get("q_lengths", (9,)))
    q, k, v = (x.detach() for x in qkv(B=3, Sq=Sq, Sk=14, D=12))
    primals, options = {"q": q, "k": k, "v": v}, dict(options)
    if options.pop("alibi_slopes", None):
        primals["alibi_slopes"] = torch.tensor([[0.5, -0.2, 0.1, 0.0]] * 3)
    options |= {name: torch.tensor(x).int() for name, x in lengths.items()}
    dout, dlse = torch.randn_like(q), torch.randn(q.shape[:3])
    arrays = {"out_cotangent": dout, "lse_cotangent": dlse, **primals, **options}
    right = reference.attention(
        **{n: x.numpy() if torch.is_tensor(x) else x for n, x in arrays.items()}
    )
    right = [torch.from_numpy(x) for x in right if x is not None]

    q[right[1].isinf()] = torch.nan
    unseen = (right[4] == 0).all(-1)  # of v
    k[unseen], v[unseen] = torch.nan, torch.nan
    primals = {name: x.requires_grad_() for name, x in primals.items()}
    call = Call.of(**primals, **options, return_lse=True)
    assert not limits(two.CUDA, call.problem, two.FlashAttn2.takes)
    out, lse = attend(two.CUDA, call.problem, call.operands)
    loss = (out * dout).sum() + (torch.where(lse.isfinite(), lse, 0) * dlse).sum()
    got = out, lse, *torch.autograd.grad(loss, list(primals.values()))
    for ours, want in zip(got, right, strict=True):
        torch.testing.assert_close(ours.detach().double(), want, rtol=1e-5, atol=2e-5)


def test_rows_of_a_part_sum_to_what_they_sum_to_alone():
    q, k, _ = (x.detach() for x in qkv(B=3, Sq=20, Sk=30, Hkv=4))
    slopes = torch.tensor([0.5, -0.2, 0.1, 0.0]).view(1, 4, 1, 1)
    lse = torch.full(
        (3, 4, 20), 5.0
    )  # harmless; but beside ‖q‖ ‖k‖ as large as here, rows are summed
    parts = torch.tensor([[[0, 20, 0, 30]], [[3, 11, 2, 25]], [[4, 4, 9, 9]]]).int()
    found = torch.ones_like(lse)
    for b, (q_begin, q_end, k_begin, k_end) in enumerate(parts[:, 0].tolist()):
        if q_begin < q_end:
            corner = (k_end - k_begin) - (q_end - q_begin)
            band = corner - 6, corner + 1, corner
            query, of_part = (x[b : b + 1, :, q_begin:q_end] for x in (q, lse))
            key = k[b : b + 1, :, k_begin:k_end]
            alone = row_sums(query, key, slopes, None, 9.0, 2.0, *band, of_part, True)
            found[b, :, q_begin:q_end] = alone[0]
        for x, begin, end in ((q, q_begin, q_end), (k, k_begin, k_end)):
            x[b, :, :begin], x[b, :, end:] = torch.nan, torch.nan
    got = row_sums(q, k, slopes, parts, 9.0, 2.0, 4, 11, 10, lse, True)
    assert (found[:2] != 1).any(-1).all()
    torch.testing.assert_close(got, found)


@pytest.mark.usefixtures("played")
def test_lengths_hold_under_vmap():
    arrays = [x.detach().unflatten(0, (2, 2)) for x in qkv(B=4, Sq=9, Sk=12, D=8)]
    lengths = torch.tensor([[9, 4], [0, 7]])

    def loss(q, k, v, lengths):
        call = Call.of(q, k, v, causal=True, q_lengths=lengths, return_lse=True)
        out, lse = attend(two.CUDA, call.problem, call.operands)
        return out.sin().sum() + torch.where(lse.isfinite(), lse, 0).sum()

    gradient = torch.func.grad(loss, (0, 1, 2))
    mapped = torch.func.vmap(gradient)(*arrays, lengths)
    for n in range(2):
        one_by_one = gradient(*(x[n] for x in arrays), lengths[n])
        for ours, want in zip(mapped, one_by_one, strict=True):
            torch.testing.assert_close(ours[n], want)


def test_slopes_about_another_diagonal_are_refused_by_name():
    problem = Call.of(*qkv(), alibi_slopes=torch.ones(4), q_offset=3).problem
    assert limits(two.CUDA, problem, two.FlashAttn2.takes) == [
        "this kernel counts ALiBi's distances from a diagonal that ends in the lower right corner, "
        "not with a q_offset 3"
    ]


@needs_flash_attn
def test_slopes_below_zero_do_not_overflow_beyond_the_last_query_and_key():
    arrays = (*qkv(), torch.tensor([-3.0, -5.0, 2.0, -0.3], requires_grad=True))

    def gradients(backend):
        out = heedful.attention(*arrays[:3], alibi_slopes=arrays[3], backend=backend)
        return torch.autograd.grad(out.sin().sum(), arrays)

    for ours, want in zip(gradients(NAME), gradients("torch:sdpa-math"), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=2e-5)


def attention_of_four(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0,
    return_lse=False,
):  # fmt: skip
    """flash-attn 4's public function by its documentation, differentiable, in float64."""
    assert q.shape[-1] % 32 == 0  # else its dq is wrong on Hopper
    return attention_differentiable(
        q, k, v, softmax_scale, causal, window_size, softcap, return_lse
    )


def attention_differentiable(q, k, v, softmax_scale, causal, window_size, softcap, return_lse):
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    sides = [-1 if side is None else side for side in window_size]
    assert all(side is None or side >= 0 for side in window_size)
    scores, _ = FlashAttnInterface("")._probabilities(q, k, softmax_scale, causal, *sides, softcap)
    values = v.transpose(1, 2).double().repeat_interleave(q.shape[2] // k.shape[2], 1)
    out = (scores.softmax(-1) @ values).transpose(1, 2).to(q.dtype)
    return out, scores.logsumexp(-1).float() if return_lse else None


def attention_of_three(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0,
):  # fmt: skip
    """flash-attn 3's: out alone."""
    assert all(side >= -1 for side in window_size)
    sides = tuple(None if side == -1 else side for side in window_size)
    return attention_differentiable(q, k, v, softmax_scale, causal, sides, softcap, False)[0]


@pytest.fixture
def newer_played(monkeypatch):
    for name, function in (
        ("flash_attn_interface", attention_of_three),
        ("flash_attn.cute", attention_of_four),
    ):
        module = ModuleType(name)
        module.flash_attn_func = function
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))


@pytest.mark.usefixtures("newer_played")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("backend", [three.backend, four.backend], ids=lambda b: b.name)
def test_newer_generations_are_told_what_is_asked(backend, options, lengths):
    with_lse = "return_lse" in backend.takes
    agrees_with_the_reference(backend.cuda, backend.takes, options, lengths, with_lse)


@pytest.mark.usefixtures("newer_played")
@pytest.mark.parametrize("backend", [three.backend, four.backend], ids=lambda b: b.name)
def test_a_second_derivative_of_newer_generations_is_refused_not_lost(backend):
    """Their backward passes fill tensors, which autograd takes for constants."""
    q, k, v = qkv()
    problem, operands = (call := Call.of(q, k, v)).problem, call.operands
    out, _ = attend(backend.cuda, problem, operands)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    for of in (q, k, v):
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            torch.autograd.grad(dq.square().sum(), of, retain_graph=True)


@pytest.mark.usefixtures("newer_played")
@pytest.mark.parametrize("backend", [three.backend, four.backend], ids=lambda b: b.name)
def test_newer_generations_hold_under_torch_func(backend):
    q, k, v = (x.detach() for x in qkv())

    def loss(function, q, k, v):
        return function(q, k, v).sin().sum()

    def ours(q, k, v):
        call = Call.of(q, k, v)
        return attend(backend.cuda, call.problem, call.operands)[0]

    def torchs(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    got, want = (torch.func.grad(partial(loss, f), (0, 1, 2))(q, k, v) for f in (ours, torchs))
    for ours_, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours_, theirs)


@pytest.mark.parametrize("name", [three.backend.name, four.backend.name])
def test_newer_generations_say_all_that_keeps_them_from_running_here(name):
    said = next(v for v in heedful.explain(*qkv()).verdicts if v.name == name).reasons
    # And nothing of the package, which is not imported then.
    assert said == (
        "this kernel needs a CUDA GPU; the arrays lie on cpu",
        "this kernel takes float16 and bfloat16, not float32",
        "this torch sees no CUDA GPU",
    )


@pytest.mark.parametrize(
    ("capability", "D", "said"),
    [
        ((9, 0), 256, []),
        ((9, 0), 264, ["this kernel takes head sizes up to 256, not 264"]),
        ((10, 0), 128, []),
        (
            (10, 3),
            136,
            ["this kernel takes head sizes up to 128 on a GPU of compute capability 10.3, not 136"],
        ),
    ],
)
def test_four_takes_the_head_sizes_of_the_gpu_that_is_here(monkeypatch, capability, D, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    problem = Call.of(*qkv(D=D, dtype=torch.bfloat16)).problem
    only_here = "this kernel needs a CUDA GPU; the arrays lie on cpu"
    assert four.backend.reasons(problem) == [only_here, *said]


# Its process


@needs_flash_attn
def test_its_process_killed_during_a_call_is_one_line_and_the_next_call_is_right():
    q, k, v = (x.detach() for x in qkv(B=2, Sq=512, Sk=512))  # for seconds
    right = heedful.attention(q, k, v, backend=NAME)
    pid = two._worker.call("pid")
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(WorkerError, match=r"was ended by signal 9 during forward$"):
        heedful.attention(q, k, v, backend=NAME)
    assert torch.equal(heedful.attention(q, k, v, backend=NAME), right)


@needs_flash_attn
def test_nothing_of_it_is_imported_where_the_user_is():
    said = in_a_process(f"""
        import sys, torch, heedful
        q = torch.ones(1, 1, 4, 8)
        heedful.attention(q, q, q, backend="{NAME}")
        print([name for name in ("flash_attn", "triton") if name in sys.modules])
    """)
    assert said == "[]\n"
