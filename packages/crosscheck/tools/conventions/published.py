"""The attention functions that are asked, raw, as they are published.

Each is one record: how it is called, with which layout, and what it calls the options it has. Run by
`python -m`, this file serves flash-attn's public function, which needs a process of its own.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
from answers import Answer, Arrays, Function, jax_answer, swapped, torch_answer

LSE = "with_lse"
ABSENT = "—"  # there is no such thing there


@dataclass(frozen=True, eq=False)
class Published:
    """A function, and how it is asked.

    Attributes:
        name: the row.
        calls: what is called, as the document names it.
        package: the distribution it comes in.
        layout: of q, k, v, as documented; "BHSD" or "BSHD".
        call: (arrays, dtype, differentiate, options), in its own layout and names, to out, LSE and
            gradients.
        names: what it calls each option that it has.
        differentiated: whether anything differentiates it.
    """

    name: str
    calls: str
    package: str
    layout: str
    call: Callable[..., tuple]
    names: Mapping[str, str] = field(default_factory=dict)
    differentiated: bool = True

    def ask(
        self, arrays: Arrays, dtype: str, differentiate: bool, options: dict[str, Any]
    ) -> Answer:
        """What it answers to (B, H, S, D) arrays and our names of options; raises as it does."""
        turn = swapped if self.layout == "BSHD" else np.asarray
        *tensors, dlse = arrays
        told = {self.names[name]: x for name, x in options.items() if name in self.names}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out, lse, gradients = self.call((*map(turn, tensors), dlse), dtype, differentiate, told)
        warned = any("backprop" in str(warning.message) for warning in said)
        return Answer(turn(out), lse, gradients and tuple(map(turn, gradients)), warned)


# torch


def sdpa(kernel: str) -> Function:
    def attention(q: Any, k: Any, v: Any, with_lse: bool = False, **options: Any) -> Any:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if with_lse:  # SDPA itself returns none
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    return attention


def flex(
    q: Any, k: Any, v: Any, scale: float | None = None, causal: bool = False, mask: Any = None,
    softcap: float | None = None, bias: Any = None, grouped: bool = False, with_lse: bool = False,
) -> Any:  # fmt: skip
    """Masks and scores are functions, written as its documentation writes them."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
        by_mask = True if mask is None else mask[b, h, i, j]
        return (i >= j if causal else i >= 0) & by_mask

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        s = s if softcap is None else softcap * (s / softcap).tanh()
        return s if bias is None else s + bias[b, h, i, j]

    sizes = (*q.shape[:3], k.shape[2])
    hides = causal or mask is not None
    found = flex_attention(
        *(q, k, v),
        score_mod=None if softcap is None and bias is None else score,
        block_mask=create_block_mask(sees, *sizes, device="cpu") if hides else None,
        scale=scale,
        enable_gqa=grouped,
        return_aux=AuxRequest(lse=True) if with_lse else None,
    )
    return (found[0], found[1].lse) if with_lse else found


def zentorch(q: Any, k: Any, v: Any, with_lse: bool = False, **options: Any) -> Any:
    import torch
    import zentorch  # noqa: F401  # registers it

    out, second = torch.ops.zentorch.zentorch_sdpa(q, k, v, **options)
    return (out, second) if with_lse else out


def flash_attn(*asked: Any) -> tuple:
    return _flash_attn_process().call("flash_attn_func", *asked)


@cache
def _flash_attn_process() -> Any:
    from heedful_torch.worker import Worker

    return Worker("published")


# JAX


def jax_nn(*arrays: Any, **options: Any) -> Any:
    import jax

    return jax.nn.dot_product_attention(*arrays, implementation="xla", **options)


def tokamax(implementation: str) -> Function:
    def attention(*arrays: Any, **options: Any) -> Any:
        import tokamax

        return tokamax.dot_product_attention(*arrays, implementation=implementation, **options)

    return attention


def pallas_mha(q: Any, k: Any, v: Any, segment_ids: Any = None, **options: Any) -> Any:
    from jax.experimental.pallas.ops.gpu.attention import mha

    return mha(q, k, v, segment_ids, interpret=True, **options)


def splash(
    q: Any, k: Any, v: Any, scale: float = 1.0, causal: bool = False, window: Any = None,
    mask: Any = None, softcap: float | None = None, segments: Any = None, sinks: Any = None,
    with_lse: bool = False,
) -> Any:  # fmt: skip
    """Masks are objects of its own module; it knows no batch, and the caller scales q."""
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = q.shape[2], k.shape[2]
    seen = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    if window is not None:
        seen &= masks.LocalMask(shape, window, offset=0)
    heads = [seen] * q.shape[1]
    if mask is not None:  # the same for every batch row
        heads = [seen & masks.NumpyMask(head) for head in np.asarray(mask)[0]]
    attention = kernels.make_splash_mha(
        masks.MultiHeadMask(heads),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        save_residuals=with_lse,
        interpret=True,
    )
    ids = None if segments is None else kernels.SegmentIds(segments, segments)
    found = jax.vmap(partial(attention, sinks=sinks))(q * scale, k, v, ids)
    return (found[0], found[1][0]) if with_lse else found


# ONNX


def onnxruntime(arrays: Arrays, dtype: str, differentiate: bool, options: dict[str, Any]) -> tuple:
    """One node `Attention` of opset 23; a mask or bias is its fourth input."""
    import onnx
    import onnxruntime

    mask = options.pop("attn_mask", None)
    inputs = dict(zip("QKV", (x.astype(dtype) for x in arrays[:3]), strict=True))
    if mask is not None:
        inputs["attn_mask"] = mask if mask.dtype == bool else mask.astype(dtype)

    def value(name: str, x: Any) -> Any:
        kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
        return onnx.helper.make_tensor_value_info(name, kind, [None] * 4)

    attributes = {name: int(x) if x is True else x for name, x in options.items() if x is not None}
    node = onnx.helper.make_node("Attention", list(inputs), ["Y"], **attributes)
    graph = onnx.helper.make_graph(
        [node], "attention", [value(*x) for x in inputs.items()], [value("Y", inputs["Q"])]
    )
    opset = [onnx.helper.make_opsetid("", 23)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    told = onnxruntime.SessionOptions()
    told.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), told, providers=["CPUExecutionProvider"]
    )
    (out,) = session.run(None, {name: np.ascontiguousarray(x) for name, x in inputs.items()})
    return out.astype(np.float64), None, None


# and heedful


def heedful_flash(
    *arrays: Any, segments: Any = None, with_lse: bool = False, **options: Any
) -> Any:
    import heedful

    if segments is not None:
        options |= {"q_segment_ids": segments, "kv_segment_ids": segments}
    return heedful.attention(*arrays, backend="jax:flash", return_lse=with_lse, **options)


SDPA = {"scale": "scale", "causal": "is_causal", "mask": "attn_mask", "bias": "attn_mask"}
JAX_NN = {"scale": "scale", "causal": "is_causal", "mask": "mask", "bias": "bias"}
JAX_NN |= {"window": "local_window_size", "lengths": "key_value_seq_lengths"}
MHA = {"scale": "sm_scale", "causal": "causal", "segments": "segment_ids", LSE: "return_residuals"}
FLASH_ATTN = {"scale": "softmax_scale", "causal": "causal", "window": "window_size"}
FLASH_ATTN |= {"softcap": "softcap", "ALiBi": "alibi_slopes", LSE: "return_attn_probs"}
FLEX = {name: name for name in ("scale", "causal", "mask", "softcap", "bias", "grouped", LSE)}
SPLASH = {
    name: name
    for name in ("scale", "causal", "window", "mask", "softcap", "segments", "sinks", LSE)
}
HEEDFUL = SPLASH | {"bias": "bias", "lengths": "kv_lengths"}

PUBLISHED = (
    Published(
        "torch SDPA, math",
        "`torch.nn.functional.scaled_dot_product_attention`",
        "torch",
        "BHSD",
        partial(torch_answer, sdpa("MATH")),
        SDPA | {"grouped": "enable_gqa"},
    ),
    Published(
        "torch SDPA, CPU flash",
        "the same; for its LSE `torch.ops.aten._scaled_dot_product_flash_attention_for_cpu`",
        "torch",
        "BHSD",
        partial(torch_answer, sdpa("FLASH_ATTENTION")),
        SDPA | {"grouped": "enable_gqa", LSE: LSE},
    ),
    Published(
        "FlexAttention, eager",
        "`torch.nn.attention.flex_attention.flex_attention`",
        "torch",
        "BHSD",
        partial(torch_answer, flex),
        FLEX,
    ),
    Published(
        "zentorch",
        "`torch.ops.zentorch.zentorch_sdpa`, whose second output is taken for an LSE",
        "zentorch",
        "BHSD",
        partial(torch_answer, zentorch),
        SDPA | {LSE: LSE},
    ),
    Published(
        "flash-attn 2, interpreted",
        "`flash_attn.flash_attn_func`, its Triton kernels",
        "flash-attn",
        "BSHD",
        flash_attn,
        FLASH_ATTN,
    ),
    Published(
        "jax.nn, xla",
        "`jax.nn.dot_product_attention`",
        "jax",
        "BSHD",
        partial(jax_answer, jax_nn),
        JAX_NN | {LSE: "return_residual"},
    ),
    *(
        Published(
            f"tokamax, {implementation}",
            "`tokamax.dot_product_attention`",
            "tokamax",
            "BSHD",
            partial(jax_answer, tokamax(implementation)),
            JAX_NN | {"softcap": "logits_soft_cap"},
        )
        for implementation in ("xla", "xla_chunked")
    ),
    Published(
        "Pallas mha, interpreted",
        "`jax.experimental.pallas.ops.gpu.attention.mha`",
        "jax",
        "BSHD",
        partial(jax_answer, pallas_mha),
        MHA,
    ),
    Published(
        "Pallas splash, interpreted",
        "`make_splash_mha` of `jax.experimental.pallas.ops.tpu.splash_attention`, under `jax.vmap`",
        "jax",
        "BHSD",
        partial(jax_answer, splash),
        SPLASH,
    ),
    Published(
        "ONNX Runtime",
        "one node `Attention` of opset 23",
        "onnxruntime",
        "BHSD",
        onnxruntime,
        SDPA | {"softcap": "softcap"},
        differentiated=False,
    ),
    Published(
        "heedful, jax:flash",
        '`heedful.attention`, `backend="jax:flash"`',
        "heedful",
        "BHSD",
        partial(jax_answer, heedful_flash),
        HEEDFUL,
    ),
)

NEED_A_GPU = (
    "flash-attn 2's CUDA kernels",
    "flash-attn 3",
    "flash-attn 4",
    "SDPA's flash kernel for CUDA, memory-efficient and cuDNN kernels",
    "jax.nn with cudnn",
    "tokamax with triton, mosaic and cudnn",
)


def _flash_attn() -> dict[str, Callable[..., tuple]]:
    from heedful_torch.backends.flash_attn.interpreted_2 import load

    load()
    from flash_attn import flash_attn_func

    return {"flash_attn_func": partial(torch_answer, flash_attn_func)}


if __name__ == "__main__":
    from heedful_torch.worker import serve

    serve(_flash_attn)
