"""Agreement with ONNX: cases and answers that nobody here wrote, judged by ONNX's own tolerance."""

from collections import Counter

import heedful
import jax
import numpy as np
import onnx
import pytest
from callers import DTYPES, JaxCaller, NumpyCaller, TorchCaller
from conformance import onnx_attention
from onnx.backend.test.runner import Runner

CASES = onnx_attention.cases()
BACKENDS = {
    "numpy:oracle": NumpyCaller(),
    "jax:plain": JaxCaller(),
    "jax:flash": JaxCaller(),
    "torch:sdpa-flash": TorchCaller(),
    "torch:sdpa-math": TorchCaller(),
}
# The options that a backend refuses, by the word its reasons name them with; every other case it takes.
REFUSED = {"torch:sdpa-flash": {"softcap"}, "torch:sdpa-math": {"softcap"}}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_or_refuses_with_a_reason(backend, case):
    caller = BACKENDS[backend]
    options = {
        name: caller.array(x) if isinstance(x, np.ndarray) else x
        for name, x in case.options.items()
    }
    with jax.enable_x64(case.q.dtype == np.float64):
        q, k, v = map(caller.array, (case.q, case.k, case.v))

        asked = {name for name, x in case.options.items() if x is not None}
        if refused := asked & REFUSED.get(backend, set()):
            with pytest.raises(heedful.Refusal) as refusal:
                heedful.attention(q, k, v, **options, backend=backend)
            reasons = refusal.value.reasons[backend]
            assert len(reasons) == len(refused)
            assert all(any(option in reason for reason in reasons) for option in refused)
            return

        out = heedful.attention(q, k, v, **options, backend=backend)
    assert caller.dtype(out) == str(case.q.dtype)
    answers = case.answers(caller.float64(out).astype(DTYPES[caller.dtype(out)]))
    Runner.assert_similar_outputs(
        list(case.expected.values()),
        [answers[name] for name in case.expected],
        rtol=case.onnx_case.rtol,
        atol=case.onnx_case.atol,
    )
