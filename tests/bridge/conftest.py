"""JAX's wide dtypes; and for tests of flash-attn the package, interpreted, in a process of its own."""

import jax
import pytest

from heedful_torch.worker import Worker

PACKAGE = """
import inspect
import torch
from heedful_torch.backends.flash_attn.interpreted_2 import load
from heedful_torch.worker import serve

def signature(name):
    import flash_attn
    from flash_attn import bert_padding

    function, skipped = getattr(flash_attn, name, None) or getattr(bert_padding, name), 0
    if hasattr(function, "__self__"):  # the `apply` of an autograd function, whose `forward` has a ctx
        function, skipped = function.__self__.forward, 1
    return [(x.name, x.default) for x in inspect.signature(function).parameters.values()][skipped:]

def answer(name, arrays, dout, options):
    import flash_attn
    from flash_attn.flash_attn_triton_amd.utils import MetaData

    # Its own asserts that the slopes are on a GPU.
    MetaData.need_alibi = lambda self, slopes, batch, heads: setattr(self, "alibi_slopes", slopes)
    arrays = [x.requires_grad_() for x in arrays]
    out, lse, S_dmask = getattr(flash_attn, name)(*arrays, **options, return_attn_probs=True)
    assert S_dmask is None
    return [x.detach() for x in (out, lse, *torch.autograd.grad(out, arrays, dout))]

def cached(arrays, options):
    import contextlib
    import flash_attn

    # Its rotary kernel asks for the GPU of its arrays.
    torch.cuda.device = contextlib.nullcontext
    found = flash_attn.flash_attn_with_kvcache(*arrays, **options, return_softmax_lse=True)
    return [*found, *arrays[1:3]]

def padding(name, *arguments):
    from flash_attn import bert_padding

    return getattr(bert_padding, name)(*arguments)

if __name__ == "__main__":
    own = {"signature": signature, "answer": answer, "cached": cached, "padding": padding}
    serve(lambda: load() | own)
"""


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """Calls of the package's own functions, (B, S, H, D)."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "package_functions.py").write_text(PACKAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        worker = Worker("package_functions")
        yield worker.call
        worker.stop()
