"""Every backend of the core package through the contract, called with JAX and with NumPy arrays."""

import sys

import jax
import pytest

from heedful import attention
from heedful_crosscheck.callers import QUICKLY, JaxCaller, NumpyCaller
from heedful_crosscheck.contract import REQUIRED, Contract
from heedful_crosscheck.contract.cases import CASES, EVERYTHING, ONE_OF_EACH_GROUP


class TestOracle(Contract, examples=60):
    backend = "numpy:oracle"
    strict = True


class TestOnnxRuntime(Contract, examples=60):
    backend = "numpy:onnxruntime"
    accepts = EVERYTHING - {
        "score_mod",
        "lse",
        "gradients",
        "sinks",
        "alibi",
        "dropout",
        "float64",
        "float16",
        "bfloat16",
        "float32 bias",
    }


# Each case is compiled: all of them by the older JAX, one of each group by the newer.
COMPILED = CASES if jax.__version_info__ < (0, 11) else ONE_OF_EACH_GROUP


class TestPlain(Contract):
    backend = "jax:plain"
    cases = COMPILED
    strict = True


class TestFlash(Contract):
    backend = "jax:flash"
    cases = COMPILED
    strict = True


class Promoting(Contract):
    """Where JAX is strict, what promotes half dtypes refuses them."""

    @pytest.fixture(autouse=True)
    def lenient(self):
        with jax.numpy_dtype_promotion("standard"):
            yield


class Tokamax(Promoting):
    caller = JaxCaller()  # hardly optimised, XLA gives the bias of xla_chunked a gradient of NaN
    cases = ONE_OF_EACH_GROUP  # which takes time
    accepts = EVERYTHING - {
        "score_mod",
        "lse",
        "sinks",
        "alibi",
        "dropout",
        "softcap",
        "together",
        "float16",
        "float32 bias",
        "no rows",
    }


class TestTokamaxXla(Tokamax, examples=5):
    backend = "jax:tokamax-xla"

    def test_a_programs_own_options_are_not_tokamaxs(self, monkeypatch):
        from absl import flags

        monkeypatch.setattr(sys, "argv", ["program", "-q", "--of-its-own"])
        flags.FLAGS.unparse_flags()
        q = jax.numpy.ones((1, 1, 3, 8))
        assert attention(q, q, q, backend=self.backend).shape == q.shape


class TestTokamaxXlaChunked(Tokamax, examples=5):
    backend = "jax:tokamax-xla-chunked"
    accepts = Tokamax.accepts - {"float64"}


class TestSplash(Contract, examples=3):
    backend = "jax:splash"
    cases = ONE_OF_EACH_GROUP
    accepts = EVERYTHING - {
        "score_mod",
        "alibi",
        "dropout",
        "lse",
        "bias",
        "infinite bias",
        "together",
        "no rows",
        "float64",
        "float32 bias",
    }


class TestPallasGpu(Contract, examples=5):
    backend = "jax:pallas-gpu"
    cases = ONE_OF_EACH_GROUP
    accepts = EVERYTHING - {
        "score_mod",
        "mask_mod",
        "gradients",
        "bias",
        "infinite bias",
        "softcap",
        "q_offset",
        "q_offset array",
        "window",
        "mask",
        "lengths, causal",
        "sinks",
        "alibi",
        "dropout",
        "segments",
        "together",
        "no rows",
        "float64",
        "float32 bias",
    }


class TestTokamaxTriton(Tokamax, needs_gpu=True):
    backend = "jax:tokamax-triton"
    accepts = frozenset({"gradients"})


class TestTokamaxMosaic(Tokamax, needs_gpu=True):
    backend = "jax:tokamax-mosaic"
    accepts = frozenset({"gradients"})


class TestTokamaxCudnn(Tokamax, needs_gpu=True):
    backend = "jax:tokamax-cudnn"
    accepts = frozenset({"gradients"})


class TestNnXla(Promoting):
    backend = "jax:nn-xla"
    cases = COMPILED
    accepts = EVERYTHING - {
        "score_mod",
        "lse",
        "sinks",
        "alibi",
        "dropout",
        "softcap",
        "value size",
        "together",
        "float64",
        "float16",
        "float32 bias",
    }


class TestNnCudnn(Contract, needs_gpu=True):
    backend = "jax:nn-cudnn"
    accepts = frozenset({"float16", "bfloat16"})


class TestOracleFromJax(Contract, examples=3):
    backend = "numpy:oracle"
    caller = JaxCaller(QUICKLY)
    cases = ONE_OF_EACH_GROUP
    accepts = EVERYTHING - {"score_mod", "mask_mod"}


class TestFlashFromNumpy(Contract, examples=3):
    backend = "jax:flash"
    caller = NumpyCaller()
    cases = ONE_OF_EACH_GROUP


def every_contract(contract):
    for of_it in contract.__subclasses__():
        yield of_it
        yield from every_contract(of_it)


def test_every_required_backend_is_tested():
    required = {name for name in REQUIRED or () if not name.startswith("torch:")}
    assert required <= {getattr(contract, "backend", None) for contract in every_contract(Contract)}
