"""Agreement with ONNX: cases and answers that nobody here wrote, judged by ONNX's own runner.

`pytest -rA -k every_case tests/conformance/test_onnx.py` prints what is compared and what is not.
"""

from collections import Counter

import jax
import numpy as np
import onnx
import pytest
from onnx.backend.test.runner import Runner

import heedful
from conformance.onnx_attention import ADAPTATIONS, LEFT_OUT, built, cases, is_attention
from heedful_crosscheck.callers import QUICKLY, JaxCaller, NumpyCaller
from heedful_crosscheck.layouts import LAYOUTS
from heedful_crosscheck.torch_caller import TorchCaller

CASES = cases()
BACKENDS = {
    "numpy:oracle": NumpyCaller(),
    "jax:plain": JaxCaller(),
    "jax:flash": JaxCaller(),
    "torch:sdpa-flash": TorchCaller(on_gpu=False),
    "torch:sdpa-math": TorchCaller(on_gpu=False),
}
# The one option of all those in the cases that a backend refuses.
REFUSED = {"torch:sdpa-flash": "softcap", "torch:sdpa-math": "softcap"}
# Where ONNX's rtol of 1e-3 is not the judge. It is one or two ULPs of float16, and ONNX's answers, whose
# scores and probabilities are rounded too, are off by more than one. A kernel that rounds probabilities
# itself gets two whole ULPs, which is what ONNX's runner grants bfloat16.
RTOL = {("torch:sdpa-flash", "float16"): 2**-9}


def attention(case, backend, dtype):
    """What the backend answers to the case, its floating arrays in `dtype`."""
    caller = BACKENDS[backend]
    qkv = (case.q, case.k, case.v)
    arrays = {name: x for name, x in case.options.items() if isinstance(x, np.ndarray)}
    plain = {name: x for name, x in case.options.items() if name not in arrays}

    def call(qkv, arrays):
        return heedful.attention(*qkv, **arrays, **plain, backend=backend)

    def array(x):
        return caller.array(x if x.dtype.kind in "bi" else x.astype(dtype), LAYOUTS["packed"])

    run = jax.jit(call, compiler_options=dict(QUICKLY)) if caller.framework == "jax" else call
    with jax.enable_x64(dtype == np.float64):
        out = caller.to_numpy(
            run([array(x) for x in qkv], {n: array(x) for n, x in arrays.items()})
        )
        assert out.dtype == dtype
        return case.answers(out)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_or_refuses_with_a_reason(backend, case):
    dtype, refused = case.q.dtype, REFUSED.get(backend)
    if case.options.get(refused) is not None:
        with pytest.raises(heedful.Refusal) as refusal:
            attention(case, backend, dtype)
        (reason,) = refusal.value.reasons[backend]
        assert refused in reason
        return

    answers = attention(case, backend, dtype)
    Runner.assert_similar_outputs(
        list(case.expected.values()),
        [answers[name].astype(x.dtype) for name, x in case.expected.items()],
        rtol=RTOL.get((backend, str(dtype)), case.onnx_case.rtol),
        atol=case.onnx_case.atol,
    )


@pytest.mark.parametrize(("backend", "dtype"), RTOL)
def test_who_gets_a_wider_tolerance_is_nearer_to_the_truth_than_onnx(backend, dtype):
    def worst(answer, truth):
        return np.abs(answer - truth).max() / np.abs(truth).max()

    of_onnx, of_backend = [], []
    for case in CASES:
        if case.q.dtype == dtype:
            truth = attention(case, "numpy:oracle", np.dtype(np.float64))["Y"]
            of_onnx.append(worst(case.expected["Y"], truth))
            of_backend.append(worst(attention(case, backend, case.q.dtype)["Y"], truth))
    assert 0 < max(of_backend) < max(of_onnx)


def test_every_case_is_accounted_for():
    as_they_are = [case for case in CASES if not case.adapted and not case.left_out]
    adapted = Counter(name for case in CASES for name in case.adapted)
    left_out = Counter(name for case in CASES for name in case.left_out)
    compared = Counter(name for case in CASES for name in case.expected)
    softcapped = [case for case in CASES if case.options["softcap"] is not None]

    print(f"ONNX {onnx.__version__} has {len(CASES)} cases; {len(as_they_are)} run as they are.")
    print(f"Adapted are {sum(bool(case.adapted) for case in CASES)}, some in two ways:")
    for name, how in ADAPTATIONS.items():
        print(f"  {adapted[name]:2} {name}: {how}")
    print("No case is left out. Of some, one output is not compared:")
    for name, why in LEFT_OUT.items():
        print(f"  {left_out[name]:2} {name}: {why}")
    print(f"Compared: {dict(compared)}")
    print(f"Refused, for their softcap: {len(softcapped)} by each of {', '.join(REFUSED)}")

    assert len(CASES) == 93 and len(as_they_are) == 43
    assert adapted == {"3-D": 25, "cache": 21, "short mask": 3, "probabilities": 6, "float64": 1}
    assert left_out == {"scores": 12}
    assert compared == {"Y": 93, "present_key": 21, "present_value": 21, "qk_matmul_output": 6}
    assert len(softcapped) == 11
    # Besides, ONNX has each case once more, spelled out in smaller operators. There is nothing else.
    twins = [case.name for case in built if not is_attention(case)]
    assert sorted(twins) == sorted(f"test_{case}_expanded" for case in CASES)
