"""Torch's backends through the contract, and every crossing between torch, JAX and NumPy."""

from callers import JaxCaller, NumpyCaller, TorchCaller
from contract import EVERYTHING, ONE_OF_EACH_GROUP, REQUIRED, Contract


class TestSdpaMath(Contract, examples=100):
    backend = "torch:sdpa-math"
    caller = TorchCaller()
    accepts = EVERYTHING - {"lse", "sinks", "softcap", "together"}


class TestSdpaFlash(Contract, examples=100):
    backend = "torch:sdpa-flash"
    caller = TorchCaller()
    accepts = EVERYTHING - {"sinks", "softcap", "together"}


class TestSdpaEfficient(Contract, examples=100, needs_gpu=True):
    backend = "torch:sdpa-efficient"
    caller = TorchCaller(on_gpu=True)
    accepts = frozenset({"lse", "bfloat16", "float16"})


class TestSdpaCudnn(Contract, examples=100, needs_gpu=True):
    backend = "torch:sdpa-cudnn"
    caller = TorchCaller(on_gpu=True)
    accepts = frozenset({"lse"})


class TestSdpaMathFromJax(Contract):
    backend = "torch:sdpa-math"
    caller = JaxCaller()
    accepts = TestSdpaMath.accepts
    cases = ONE_OF_EACH_GROUP


class TestSdpaFlashFromJax(Contract):
    backend = "torch:sdpa-flash"
    caller = JaxCaller()
    accepts = TestSdpaFlash.accepts
    cases = ONE_OF_EACH_GROUP


class TestSdpaFlashFromNumpy(Contract):
    backend = "torch:sdpa-flash"
    caller = NumpyCaller()
    accepts = TestSdpaFlash.accepts
    cases = ONE_OF_EACH_GROUP


class TestFlashFromTorch(Contract, examples=3):
    backend = "jax:flash"
    caller = TorchCaller()
    cases = ONE_OF_EACH_GROUP


class TestOracleFromTorch(Contract):
    backend = "numpy:oracle"
    caller = TorchCaller()
    cases = ONE_OF_EACH_GROUP


def test_every_required_backend_is_tested():
    required = {name for name in REQUIRED or () if name.startswith("torch:")}
    assert required <= {contract.backend for contract in Contract.__subclasses__()}
