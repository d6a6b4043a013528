"""flash-attn 4 without a GPU: its kernels compile, for every kind of call that the backend makes.

They are compiled when they are first called, for the shapes and dtypes of that call, and torch's fake
tensors have those. What the kernels compute is another matter, for a machine that has the GPU.
"""

import os
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from heedful.call import Call
from heedful.dispatch.packages import why_not_imported
from heedful_torch.backends.flash_attn import four
from heedful_torch.backends.kernel import attend, limits

ARCH = os.environ.get("FLASH_ATTENTION_ARCH", "")

pytestmark = [
    pytest.mark.skipif(
        not ARCH, reason="it runs in the nox session compile-flash-attn-4, which has flash-attn 4"
    ),
    # What flash-attn 4 hands its compiler, the names it still uses, and torch's of fake data's address.
    pytest.mark.filterwarnings("ignore:Argument aux_data .* cannot be converted:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning"),
]


class SlicedByOperator(TorchFunctionMode):
    """Indexing by slices as an operator: `Tensor.__getitem__` wants CUDA in torch itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, index = args
        if index[0] is Ellipsis:
            index = (slice(None),) * (x.dim() - len(index) + 1) + index[1:]
        for axis, part in enumerate(index):
            x = torch.ops.aten.slice(x, axis, part.start, part.stop)
        return x


class Recorded:
    """flash-attn 4's autograd function outside of autograd, which wants CUDA in torch itself too."""

    def __init__(self, function):
        self.function = function

    def apply(self, *arguments):
        self.ctx = SimpleNamespace(set_materialize_grads=lambda value: None)
        self.ctx.save_for_backward = lambda *saved: setattr(self.ctx, "saved_tensors", saved)
        self.results = self.function.forward(self.ctx, *arguments)
        return self.results

    def gradients(self, with_lse):
        """dq, dk, dv, of cotangents laid out as the backend's transpositions leave them."""
        out, lse = self.results
        dout = torch.empty_like(out.transpose(1, 2), memory_format=torch.contiguous_format)
        dlse = torch.empty_like(lse) if with_lse else None
        return self.function.backward(self.ctx, dout.transpose(1, 2), dlse)[:3]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """flash-attn 4, whose compiler keeps what it makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUTE_DSL_KEEP", "ptx,cubin")
        patch.setenv("CUTE_DSL_DUMP_DIR", str(tmp_path_factory.mktemp("kernels")))
        assert four.backend.version().startswith("flash-attn-4 4.")  # it is not flash-attn 2's
        assert not why_not_imported(four.backend.module)
        from flash_attn.cute import interface

        yield interface


@pytest.fixture
def call(package, monkeypatch):
    """Calls the backend forward and back; gives the PTX of each kernel that was compiled for that."""
    recorded = Recorded(package.FlashAttnFunc)
    monkeypatch.setattr(package, "FlashAttnFunc", recorded)
    caches = [x.compile_cache for x in vars(package).values() if hasattr(x, "compile_cache")]
    assert caches
    for cache in caches:
        cache.clear()

    def call(
        B=2, Hq=4, Hkv=4, Sq=200, Sk=300, D=64, Dv=None, dtype=torch.bfloat16, lse=False,
        expanded=False, **options,
    ):  # fmt: skip
        with FakeTensorMode(), SlicedByOperator():
            rows = 1 if expanded else B
            shapes = (B, Hq, Sq, D), (rows, Hkv, Sk, D), (rows, Hkv, Sk, Dv or D)
            q, k, v = (torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes)
            k, v = (x.expand(B, -1, -1, -1) for x in (k, v))
            asked = Call.of(q, k, v, return_lse=lse, **options)
            assert not limits(four.backend.cuda, asked.problem, four.backend.takes)

            out, found = attend(four.backend.cuda, asked.problem, asked.operands)
            assert out.shape == (B, Hq, Sq, Dv or D)
            assert out.dtype == dtype
            assert found.shape == (B, Hq, Sq)
            assert found.dtype == torch.float32
            primals = recorded.ctx.saved_tensors[:3]
            for gradient, primal in zip(recorded.gradients(lse), primals, strict=True):
                assert gradient.shape == primal.shape
                assert gradient.dtype == dtype
        artifacts = [kernel.artifacts for cache in caches for kernel in cache.cache.values()]
        for made in artifacts:
            assert f".target {os.environ['CUTE_DSL_ARCH']}\n" in made.PTX
            assert made.CUBIN.startswith(b"\x7fELF")
            assert int.from_bytes(made.CUBIN[18:20], "little") == 190  # the machine is CUDA
        return [made.PTX for made in artifacts]

    return call


def assert_compiled(kernels):
    """A forward kernel and a backward one for this architecture, and what stands around the latter."""
    generation = ARCH.replace("sm_", "Sm")
    for part in ("Forward", "Backward"):
        (main,) = (ptx for ptx in kernels if f"FlashAttention{part}{generation}" in ptx)
        assert main.count(".entry") == 1
    for part in ("BackwardPreprocess", "BackwardPostprocess"):
        assert any(f"FlashAttention{part}" in ptx for ptx in kernels)


KINDS = [
    {},
    {"causal": True},
    {"window": (9, None)},
    {"window": (None, 7)},
    {"window": (9, 7)},
    {"window": (9, None), "causal": True},
    {"softcap": 3.0},
    {"softcap": 3.0, "causal": True},
    {"softcap": 3.0, "window": (9, 7)},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("D", [20, 64, 96, 128])
@pytest.mark.parametrize(
    "heads",
    [
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "Hkv": 2, "lse": True},
    ],
    ids=["float16", "bfloat16 grouped, with LSE"],
)
def test_every_kind_of_call_compiles_forward_and_back(call, options, D, heads):
    assert_compiled(call(D=D, **heads, **options))


@pytest.mark.parametrize(
    "shapes",
    [
        {"Hq": 6, "Hkv": 2},
        {"Hq": 71, "Hkv": 1, "D": 128},
        {"Hq": 256, "Hkv": 1},
        {"Sq": 1},
        {"Sk": 1},
        {"Sq": 300, "Sk": 200},
        {"B": 1, "Hq": 1, "Hkv": 1, "Sq": 1, "Sk": 1},
        {"D": 1},
        {"D": 100, "Dv": 40},
        {"D": 192},
        {"D": 256, "Hkv": 2, "softcap": 3.0},
        {"expanded": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
def test_every_shape_compiles_forward_and_back(call, shapes, causal):
    assert_compiled(call(**shapes, causal=causal))


@pytest.mark.parametrize("empty", ["B", "Sq", "Sk"])
def test_of_no_elements_nothing_is_compiled(call, empty):
    assert call(**{empty: 0}) == []
