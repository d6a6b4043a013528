"""`numpy:onnxruntime`: the operator Attention of ONNX, as ONNX Runtime computes it on a CPU."""

from functools import lru_cache
from importlib.metadata import version
from typing import Any

import numpy as np

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.dispatch.packages import why_not_imported
from heedful.rules.place import Place
from heedful.rules.visibility import FEATURES, hiding, of_key_heads, visible

OPSET, IR_VERSION = 23, 10  # the first that has Attention, and the oldest file format that has it


class OnnxRuntimeBackend:
    """ONNX Runtime's Attention. Memory grows with Sq · Sk."""

    name = "numpy:onnxruntime"
    automatic = None
    takes = FEATURES | {"bias", "grouped_heads", "scale", "softcap", "value_dim"}

    def reasons(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.dtype == "bfloat16":
            reasons.append("ONNX Runtime computes no Attention of bfloat16 on a CPU")
        if problem.dtype == "float16":
            reasons.append(
                "ONNX Runtime rounds scores and weights to float16: out is three times as far off as "
                "plain attention's"
            )
        if problem.dtype == "float64":
            reasons.append("ONNX holds the scale of Attention in float32")
        if problem.bias_dtype not in (None, problem.dtype):
            reasons.append(
                f"a mask of ONNX has q's dtype, {problem.dtype}, not {problem.bias_dtype}"
            )
        return reasons or [why for why in [why_not_imported("onnx", "onnxruntime")] if why]

    def kernel(self, problem: Problem) -> str:
        return f"ONNX Runtime {version('onnxruntime')}, Attention of opset {OPSET}, CPU"

    def forward_only(self, problem: Problem) -> str:
        return "ONNX Runtime differentiates nothing"

    def score_bytes(self, problem: Problem) -> int:
        return np.dtype(problem.dtype).itemsize * problem.score_count

    def run(self, problem: Problem, operands: Operands) -> tuple[np.ndarray, None]:
        q, k, v, *_ = operands
        if 0 in (*q.shape, *k.shape):
            return np.zeros((*q.shape[:3], problem.value_dim), q.dtype), None
        # Its own is_causal, where that is all that is asked; anything else is a mask.
        causal = problem.band == (None, 0) and problem.q_offset == 0 and not hiding(problem)
        seen = None
        if causal:  # nobody sees the keys behind the queries
            k, v = k[:, :, : problem.q_length], v[:, :, : problem.q_length]
        else:
            seen = visible(problem, operands, Place.whole(problem, np.arange))
        if seen is not None:
            # What stands in what nobody sees is multiplied by 0, and 0 · NaN is NaN.
            scores = (*seen.shape[:2], problem.q_length, problem.kv_length)
            seen = np.broadcast_to(np.asarray(seen), scores)
            is_seen = np.asarray(of_key_heads(problem, seen.any(axis=2)))[..., None]
            q = np.where(seen.any(axis=3, keepdims=True), q, 0)
            k, v = np.where(is_seen, k, 0), np.where(is_seen, v, 0)
        mask = _mask(operands.bias, seen, (problem.q_length, k.shape[2]))
        # ONNX multiplies q and k by √scale each, so that it must be positive.
        q = q * q.dtype.type(np.sign(problem.scale))
        arrays = {"Q": q, "K": k, "V": v} | ({} if mask is None else {"mask": mask})
        kind = None if mask is None else mask.dtype.name
        session = _session(problem.dtype, kind, causal, abs(problem.scale) or 1.0, problem.softcap)
        (out,) = session.run(None, {name: np.ascontiguousarray(x) for name, x in arrays.items()})
        return out, None


def _mask(
    bias: np.ndarray | None, seen: np.ndarray | None, lengths: tuple[int, int]
) -> np.ndarray | None:
    """What is seen, or, where there is a bias, what is added; its last axes as long as it wants them."""
    mask = seen
    if bias is not None:
        bias = bias if bias.shape[3] == 1 else bias[..., : lengths[1]]
        mask = bias if seen is None else np.where(seen, bias, bias.dtype.type(-np.inf))
        mask = _above_the_lowest(mask)
    return None if mask is None else np.broadcast_to(mask, (*mask.shape[:2], *lengths))


def _above_the_lowest(bias: np.ndarray) -> np.ndarray:
    """The bias without finfo.min, at which ONNX Runtime hides a key, and gives 0 where all are so.

    There it becomes the next number, beside which q · k is lost as well; beside any larger one it weighs
    nothing.
    """
    lowest = np.finfo(bias.dtype).min
    at = bias == lowest
    if not at.any():
        return bias
    alone = bias.max(axis=-1, keepdims=True) == lowest
    next_one = np.nextafter(lowest, bias.dtype.type(0))
    return np.where(at, np.where(alone, next_one, bias.dtype.type(-np.inf)), bias)


@lru_cache(64)
def _session(
    dtype: str, mask: str | None, causal: bool, scale: float, softcap: float | None
) -> Any:
    """A session with one Attention, of any sizes."""
    import onnx
    import onnxruntime  # type: ignore[import-not-found]  # an extra

    def value(name: str, kind: str) -> Any:
        number = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        return onnx.helper.make_tensor_value_info(name, number, [None] * 4)

    inputs = [value(name, dtype) for name in "QKV"] + ([value("mask", mask)] if mask else [])
    node = onnx.helper.make_node(
        "Attention",
        [x.name for x in inputs],
        ["Y"],
        is_causal=int(causal),
        scale=scale,
        softcap=softcap or 0.0,
    )
    graph = onnx.helper.make_graph([node], "attention", inputs, [value("Y", dtype)])
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; nothing is printed
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


backend = OnnxRuntimeBackend()
