"""flash-attn 2's Triton kernels on CPU tensors: run by `python -m`, this serves them.

The package has, beside its CUDA kernels, the same in Triton, written for AMD's GPUs. Triton can
interpret them with NumPy, but neither the package nor the interpreter is ready for that. What is
patched here, from outside and in this process alone, and why:

- The package registers its operators for "cuda" alone: `_for_every_device`.
- In Triton's interpreter bfloat16 lies as its raw bits: `tl.dot` multiplies those, and a cast to it
  cuts off instead of rounding. So its operands are widened to float32, and results rounded to the
  nearest: `_mend_bfloat16`.
- The backward kernels also take exp of the scores of queries and keys beyond the last, and multiply it
  by 0. Slopes of ALiBi below 0 let it grow to inf, and inf · 0 is NaN: `_bound_exp`.
- The package insists that ALiBi's slopes lie on a GPU: `_let_slopes_lie_anywhere`.
- The backward kernels read dout by out's strides, and write dk and dv by k's: `_backward`.
- Of packed sequences, one that sees no key gets an LSE for whole tiles of queries, over that of the next
  ones and beyond the last, if causal is asked. And the LSE is (tokens, heads), where that of the CUDA
  kernels, which the calls are written for, is (heads, tokens): `_mend_packed`.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from heedful_torch.backends.flash_attn import calls_2
from heedful_torch.backends.kernel import Arguments, Results
from heedful_torch.worker import serve

VERSIONS = {"flash-attn": "2.8.3", "triton": "3.7."}  # those that the patches are for


def load() -> Mapping[str, Callable[..., Any]]:
    """The functions, once all is patched."""
    # Both are read when the packages are imported.
    os.environ |= {"TRITON_INTERPRET": "1", "FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE"}
    _check_versions()
    _mend_bfloat16()
    _bound_exp()
    with _for_every_device():
        import flash_attn  # type: ignore[import-not-found]  # noqa: F401  # an extra, imported to be patched
    _let_slopes_lie_anywhere()
    _mend_packed()
    return {"forward": calls_2.forward, "backward": _backward}


def _backward(
    dout: torch.Tensor, asked: Arguments, results: Results, mask_wanted: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    def laid_out(x: torch.Tensor) -> torch.Tensor:
        """(B, H, S, D) as (B, S, H, D) in memory, all alike."""
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    q, k, v = map(laid_out, asked[:3])
    asked = asked._replace(q=q, k=k, v=v)
    results = results._replace(out=laid_out(results.out))
    return calls_2.backward(laid_out(dout), asked, results, mask_wanted)


def _check_versions() -> None:
    from importlib.metadata import version

    for package, tried in VERSIONS.items():
        if not (found := version(package)).startswith(tried):
            raise ImportError(
                f"its interpreted kernels were tried with {package} {tried}, not {found}"
            )


@contextmanager
def _for_every_device() -> Iterator[None]:
    custom_op = torch.library.custom_op

    def registered(name: str, function: Any = None, /, **options: Any) -> Any:
        return custom_op(name, function, **options | {"device_types": None})

    torch.library.custom_op = registered
    try:
        yield
    finally:
        torch.library.custom_op = custom_op


def _let_slopes_lie_anywhere() -> None:
    from flash_attn.flash_attn_triton_amd.utils import MetaData  # type: ignore[import-not-found]  # an extra

    def need_alibi(self: Any, alibi_slopes: torch.Tensor, batch: int, nheads: int) -> None:
        assert alibi_slopes.shape == (batch, nheads)
        self.alibi_slopes = alibi_slopes

    MetaData.need_alibi = need_alibi


def _mend_packed() -> None:
    from flash_attn import flash_attn_interface

    forward = flash_attn_interface._flash_attn_varlen_forward
    backward = flash_attn_interface._flash_attn_varlen_backward

    def of_tokens(
        cu_q: torch.Tensor, cu_k: torch.Tensor, slopes: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Without the sequences of no tokens. Those that there are have queries and keys, both."""
        some = cu_q.diff() > 0
        cu_q, cu_k = (torch.cat([cu[:1], cu[1:][some]]) for cu in (cu_q, cu_k))
        return cu_q, cu_k, slopes if slopes is None else slopes[some]

    def mended_forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        *told: Any,
        alibi_slopes: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        cu_q, cu_k, slopes = of_tokens(cu_q, cu_k, alibi_slopes)
        if len(cu_q) == 1:
            return torch.zeros_like(q), torch.zeros(q.shape[1], len(q)), None, None
        options["alibi_slopes"] = slopes
        out, lse, *others = forward(q, k, v, cu_q, cu_k, *told, **options)
        return out, lse.T, *others

    def mended_backward(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        *told: Any,
        alibi_slopes: torch.Tensor | None,
        **options: Any,
    ) -> None:
        cu_q, cu_k, slopes = of_tokens(cu_q, cu_k, alibi_slopes)
        if len(cu_q) == 1:
            for gradient in (dq, dk, dv):
                gradient.zero_()
            return
        lse, options["alibi_slopes"] = lse.T.contiguous(), slopes
        backward(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, *told, **options)

    flash_attn_interface._flash_attn_varlen_forward = mended_forward
    flash_attn_interface._flash_attn_varlen_backward = mended_backward


def _mend_bfloat16() -> None:
    import triton.language as tl  # type: ignore[import-not-found]  # an extra
    from triton.runtime.interpreter import (  # type: ignore[import-not-found]  # an extra
        InterpreterBuilder,
        TensorHandle,
    )

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(x: np.ndarray) -> Any:
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        to_even = 0x7FFF + ((bits >> 16) & 1)
        bits = np.where(np.isnan(x), 0x7FC0, (bits + to_even) >> 16)
        return TensorHandle(bits.astype(np.uint16), tl.bfloat16)

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    fp_to_fp, binary = InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.binary_op

    def create_dot(self: Any, a: Any, b: Any, to: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), to, *rest)

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        if x.dtype.scalar == to.scalar:
            return x
        return rounded(widened(x).data) if to.scalar == tl.bfloat16 else cast(self, widened(x), to)

    def create_fp_to_fp(self: Any, x: Any, to: Any, mode: Any) -> Any:
        if tl.bfloat16 in (x.dtype.scalar, to.scalar):
            return cast_impl(self, x, to)
        return fp_to_fp(self, x, to, mode)

    def binary_op(self: Any, a: Any, b: Any, operation: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return binary(self, a, b, operation)
        found = operation(widened(a).data, widened(b).data)
        return TensorHandle(found, tl.int1) if found.dtype == bool else rounded(found)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.binary_op = create_fp_to_fp, binary_op


def _bound_exp() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    def bounded(function: Callable[[np.ndarray], np.ndarray], most: float) -> Any:
        return lambda builder, x: builder.unary_op(x, lambda y: function(np.minimum(y, most)))

    # A probability, all that the kernels take exp of, is 1 or hardly more: 2^10 is beyond all of them.
    InterpreterBuilder.create_exp = bounded(np.exp, 10 * math.log(2))
    InterpreterBuilder.create_exp2 = bounded(np.exp2, 10)


if __name__ == "__main__":
    serve(load)
