"""Torch's backends through the contract, and every crossing between torch, JAX and NumPy."""

import pytest

from heedful_crosscheck.callers import QUICKLY, JaxCaller, NumpyCaller
from heedful_crosscheck.contract import REQUIRED, Contract
from heedful_crosscheck.contract.cases import EVERYTHING, ONE_OF_EACH_GROUP
from heedful_crosscheck.torch_caller import TorchCaller

FUNCTIONS = {"score_mod", "mask_mod"}  # which cross to no other framework


class TestSdpaMath(Contract, examples=60):
    backend = "torch:sdpa-math"
    caller = TorchCaller(on_gpu=False)
    accepts = EVERYTHING - {"lse", "score_mod", "sinks", "softcap", "dropout", "together"}


class TestSdpaFlash(Contract, examples=60):
    backend = "torch:sdpa-flash"
    caller = TorchCaller(on_gpu=False)
    accepts = EVERYTHING - {"score_mod", "sinks", "softcap", "dropout", "together"}


class TestSdpaEfficient(Contract, examples=100, needs_gpu=True):
    backend = "torch:sdpa-efficient"
    accepts = frozenset({"lse", "bfloat16", "float16"})


class TestSdpaCudnn(Contract, examples=100, needs_gpu=True):
    backend = "torch:sdpa-cudnn"
    accepts = frozenset({"lse"})


class TestFlex(Contract, examples=10):
    backend = "torch:flex"
    caller = TorchCaller(on_gpu=False)
    accepts = EVERYTHING - {"gradients", "sinks", "dropout"}


class TestFlexCompiled(Contract, examples=1):
    backend = "torch:flex-compiled"
    caller = TorchCaller(on_gpu=False)
    accepts = TestFlex.accepts - {"lse", "float64"}
    # torch.compile's own use of torch.jit
    pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
    # Each is compiled, which takes seconds.
    cases = tuple(case for case in ONE_OF_EACH_GROUP if case.group == "together")


class TestZentorch(Contract, examples=30):
    backend = "torch:zentorch"
    caller = TorchCaller(on_gpu=False)
    accepts = EVERYTHING - {
        "gradients", "lse", "score_mod", "sinks", "softcap", "dropout", "together", "float16",
        "float32 bias",
    }  # fmt: skip


class TestFlashAttn2(Contract, examples=5):
    backend = "torch:flash-attn-2"
    caller = TorchCaller(on_gpu=False)
    accepts = frozenset({"lse", "basic", "scale", "value size", "causal", "lengths"})


class TestFlashAttn3(Contract, needs_gpu=True):
    backend = "torch:flash-attn-3"
    accepts = frozenset({"gradients"})


class TestFlashAttn4(Contract, needs_gpu=True):
    backend = "torch:flash-attn-4"
    accepts = frozenset({"gradients", "lse"})


class TestSdpaMathFromJax(Contract):
    backend = "torch:sdpa-math"
    caller = JaxCaller(QUICKLY)
    accepts = TestSdpaMath.accepts - FUNCTIONS
    cases = ONE_OF_EACH_GROUP


class TestSdpaFlashFromJax(Contract):
    backend = "torch:sdpa-flash"
    caller = JaxCaller(QUICKLY)
    accepts = TestSdpaFlash.accepts - FUNCTIONS
    cases = ONE_OF_EACH_GROUP


class TestSdpaFlashFromNumpy(Contract):
    backend = "torch:sdpa-flash"
    caller = NumpyCaller()
    accepts = TestSdpaFlash.accepts - FUNCTIONS
    cases = ONE_OF_EACH_GROUP


class TestFlashFromTorch(Contract, examples=3):
    backend = "jax:flash"
    caller = TorchCaller(on_gpu=False)
    cases = ONE_OF_EACH_GROUP
    accepts = EVERYTHING - FUNCTIONS


class TestOracleFromTorch(Contract):
    backend = "numpy:oracle"
    caller = TorchCaller(on_gpu=False)
    cases = ONE_OF_EACH_GROUP
    accepts = EVERYTHING - FUNCTIONS


def test_every_required_backend_is_tested():
    required = {name for name in REQUIRED or () if name.startswith("torch:")}
    assert required <= {contract.backend for contract in Contract.__subclasses__()}
