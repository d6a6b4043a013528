"""Every backend of the core package through the contract, called with JAX and with NumPy arrays."""

import pytest
from callers import JaxCaller, NumpyCaller
from contract import EVERYTHING, ONE_OF_EACH_GROUP, Contract


class TestOracle(Contract):
    backend = "numpy:oracle"
    caller = NumpyCaller()


class TestPlain(Contract):
    backend = "jax:plain"


class TestFlash(Contract):
    backend = "jax:flash"


class TestNnXla(Contract):
    backend = "jax:nn-xla"
    accepts = EVERYTHING - {"lse", "softcap", "value size", "together", "float64", "float16", "float32 bias"}


@pytest.mark.gpu
class TestNnCudnn(Contract):
    backend = "jax:nn-cudnn"
    accepts = {"bfloat16", "float16"}


class TestOracleFromJax(Contract):
    backend = "numpy:oracle"
    caller = JaxCaller()
    cases = ONE_OF_EACH_GROUP


class TestFlashFromNumpy(Contract):
    backend = "jax:flash"
    caller = NumpyCaller()
    cases = ONE_OF_EACH_GROUP


class TestNnXlaFromNumpy(Contract):
    backend = "jax:nn-xla"
    caller = NumpyCaller()
    accepts = TestNnXla.accepts
    cases = ONE_OF_EACH_GROUP
