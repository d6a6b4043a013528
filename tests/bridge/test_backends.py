"""Torch's backends through the contract, and every crossing between torch, JAX and NumPy."""

import pytest
from callers import JaxCaller, NumpyCaller, TorchCaller
from contract import EVERYTHING, ONE_OF_EACH_GROUP, Contract


class TestSdpaMath(Contract, examples=100):
    backend = "torch:sdpa-math"
    caller = TorchCaller()


class TestSdpaFlash(Contract, examples=100):
    backend = "torch:sdpa-flash"
    caller = TorchCaller()
    accepts = EVERYTHING - {"softcap", "together"}


@pytest.mark.gpu
class TestSdpaEfficient(Contract, examples=100):
    backend = "torch:sdpa-efficient"
    caller = TorchCaller("cuda")
    accepts = frozenset({"float16", "bfloat16"})


@pytest.mark.gpu
class TestSdpaCudnn(Contract, examples=100):
    backend = "torch:sdpa-cudnn"
    caller = TorchCaller("cuda")
    accepts = frozenset({"float16", "bfloat16"})


class TestSdpaMathFromJax(Contract):
    backend = "torch:sdpa-math"
    caller = JaxCaller()
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


class TestFlashFromTorch(Contract):
    backend = "jax:flash"
    caller = TorchCaller()
    cases = ONE_OF_EACH_GROUP


class TestOracleFromTorch(Contract):
    backend = "numpy:oracle"
    caller = TorchCaller()
    cases = ONE_OF_EACH_GROUP
