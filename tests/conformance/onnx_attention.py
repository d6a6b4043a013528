"""ONNX's own cases of its operator `Attention`, each as one call of `heedful.attention`.

The operator (https://onnx.ai/onnx/operators/onnx__Attention.html) agrees with the contract about what
is computed, and in which order: scale, softcap, bias and visibility, softmax; an empty row is 0. So
most of a case is only spelled otherwise here:

    attn_mask                      mask where boolean, bias where floating
    softcap=0                      softcap=None
    left_ and right_window_size    window=(left, right), -1 is None
    nonpad_kv_seqlen               kv_lengths, and the default q_offset: the last query stands at the
                                   last real key, in each batch row
    is_causal, or a window         q_offset = 0: top-left; without nonpad_kv_seqlen

What takes more than spelling is named in `ADAPTATIONS`, and what has no place in the contract in
`LEFT_OUT`; a case says which of them it met. An attribute or input that nobody here knows is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx.backend.test.case.node.attention  # builds the cases and their answers, in memory
from onnx.backend.test.case.node import _NodeTestCases as built
from onnx.backend.test.case.test_case import TestCase
from onnx.helper import get_attribute_value

ADAPTATIONS = {
    "3-D": "the heads lie in the last axis: they are split off, and the layout is bshd",
    "cache": "past and new keys (values) are joined to one K (V), and q_offset is the past's length",
    "short mask": "a mask shorter than the keys hides the rest: it is filled up",
    "probabilities": "out = P V, so identity columns beside V bring out P, the operator's mode 3",
    "float64": "a softmax more precise than the contract's: the whole call is made in float64",
}
LEFT_OUT = {
    "scores": "modes 0 to 2 give out the scores before the softmax; the contract gives out and LSE, "
    "since a flash kernel never holds the scores. Every other output of the case is compared.",
}
SCORES, PROBABILITIES = (0, 1, 2), 3  # what qk_matmul_output_mode stands for


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case of ONNX's as a call of `heedful.attention`, and how to compare what comes of it.

    Attributes:
        name: ONNX's, without its "test_".
        q, k, v, options: of the call, as NumPy arrays.
        onnx_case: where it comes from; its rtol and atol are ONNX's judgement.
        expected: ONNX's answers by the operator's names, without those left out.
        adapted: the keys of `ADAPTATIONS` that the case needs; empty where it runs as it is.
        left_out: the keys of `LEFT_OUT` that it asks for.
    """

    name: str
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: Mapping[str, Any]
    onnx_case: TestCase
    expected: Mapping[str, np.ndarray]
    adapted: frozenset[str]
    left_out: frozenset[str]

    def __str__(self) -> str:
        return self.name

    def answers(self, out: np.ndarray) -> dict[str, np.ndarray]:
        """What the call gives, as the outputs that the case expects."""
        bshd = self.options["layout"] == "bshd"

        def heads_first(x: np.ndarray) -> np.ndarray:
            return x.swapaxes(1, 2) if bshd else x

        value_dim = self.v.shape[-1] - self.kv_length * ("probabilities" in self.adapted)
        y, probabilities = out[..., :value_dim], out[..., value_dim:]
        everything = {
            "Y": y.reshape(*y.shape[:2], -1) if bshd else y,
            "present_key": heads_first(self.k),
            "present_value": heads_first(self.v[..., :value_dim]),
            "qk_matmul_output": heads_first(probabilities),
        }
        return {name: everything[name] for name in self.expected}

    @property
    def kv_length(self) -> int:
        return self.k.shape[1 if self.options["layout"] == "bshd" else 2]


def cases() -> list[Case]:
    """Every case but its twin, in which the same is spelled out in smaller operators."""
    return [adapt(case) for case in built if is_attention(case)]


def is_attention(case: TestCase) -> bool:
    return [node.op_type for node in case.model.graph.node] == ["Attention"]


def adapt(case: TestCase) -> Case:
    inputs, expected, attributes = read(case)
    adapted, left_out = set(), set()
    q, k, v = inputs.pop("Q"), inputs.pop("K"), inputs.pop("V")

    bshd = q.ndim == 3
    length_axis = 1 if bshd else 2
    if bshd:
        adapted.add("3-D")
        q_heads, kv_heads = attributes.pop("q_num_heads"), attributes.pop("kv_num_heads")
        q, k, v = (
            x.reshape(*x.shape[:2], heads, -1)
            for x, heads in ((q, q_heads), (k, kv_heads), (v, kv_heads))
        )

    q_offset = 0
    if "past_key" in inputs:
        adapted.add("cache")
        past_k, past_v = inputs.pop("past_key"), inputs.pop("past_value")
        q_offset = past_k.shape[2]
        if bshd:  # the cache has its heads first even where the rest is 3-D
            past_k, past_v = past_k.swapaxes(1, 2), past_v.swapaxes(1, 2)
        k = np.concatenate((past_k, k), length_axis)
        v = np.concatenate((past_v, v), length_axis)
    kv_length = k.shape[length_axis]

    mask = inputs.pop("attn_mask", None)
    if mask is not None and mask.shape[-1] < kv_length:
        adapted.add("short mask")
        hidden = False if mask.dtype == bool else -np.inf
        rest = (*mask.shape[:-1], kv_length - mask.shape[-1])
        mask = np.concatenate((mask, np.full(rest, hidden, mask.dtype)), -1)

    # Without an output to hold it, the mode says nothing.
    mode = attributes.pop("qk_matmul_output_mode", 0)
    if "qk_matmul_output" in expected and mode in SCORES:
        left_out.add("scores")
        del expected["qk_matmul_output"]
    elif "qk_matmul_output" in expected:
        assert mode == PROBABILITIES, mode
        adapted.add("probabilities")
        identity = np.eye(kv_length, dtype=v.dtype)
        identity = identity[:, None] if bshd else identity
        v = np.concatenate((v, np.broadcast_to(identity, (*v.shape[:-1], kv_length))), -1)

    # Any other precision is met as it is: the contract's softmax is in float32 at least.
    if attributes.pop("softmax_precision", None) == onnx.TensorProto.DOUBLE:
        adapted.add("float64")
        q, k, v = (x.astype(np.float64) for x in (q, k, v))
        mask = mask if mask is None or mask.dtype == bool else mask.astype(np.float64)

    sides = (attributes.pop(f"{side}_window_size", -1) for side in ("left", "right"))
    window = tuple(None if side == -1 else side for side in sides)
    causal = bool(attributes.pop("is_causal", 0))
    kv_lengths = inputs.pop("nonpad_kv_seqlen", None)
    positional = causal or window != (None, None)
    options = {
        "layout": "bshd" if bshd else "bhsd",
        "mask": mask if mask is not None and mask.dtype == bool else None,
        "bias": mask if mask is not None and mask.dtype != bool else None,
        "causal": causal,
        "window": window,
        "q_offset": q_offset if positional and kv_lengths is None else None,
        "kv_lengths": kv_lengths,
        "scale": attributes.pop("scale", None),
        "softcap": attributes.pop("softcap", 0) or None,
    }
    assert not inputs and not attributes, f"{case.name}: nobody here knows {inputs, attributes}"
    return Case(
        name=case.name.removeprefix("test_"),
        q=q,
        k=k,
        v=v,
        options=options,
        onnx_case=case,
        expected=expected,
        adapted=frozenset(adapted),
        left_out=frozenset(left_out),
    )


def read(
    case: TestCase,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """A case's inputs, expected outputs and attributes, each by the operator's own name for it."""
    (node,) = case.model.graph.node
    ((inputs, outputs),) = case.data_sets
    operator = onnx.defs.get_schema("Attention")

    def named(formal, used, arrays):
        # An input or output that is left out has an empty name, and no array.
        names = [parameter.name for parameter, name in zip(formal, used, strict=False) if name]
        return dict(zip(names, arrays, strict=True))

    attributes = {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}
    return (
        named(operator.inputs, node.input, inputs),
        named(operator.outputs, node.output, outputs),
        attributes,
    )
