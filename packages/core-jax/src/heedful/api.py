"""The public functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Never

import jax
import numpy as np

from heedful import dispatch, torch_compile
from heedful.call import Call
from heedful.call.arrays import Array, as_int32, dtype_of, framework_of
from heedful.call.checks import check_integers, framework_of_all, is_integral
from heedful.call.functions import BlockMask
from heedful.call.options import check_dropout_rate
from heedful.dispatch import Explanation, ambient
from heedful.explicit_mesh import spread_like_its_arrays
from heedful.repeats import of_each_once, once
from heedful.rules.dropout import keeps


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    backend: str | Sequence[str] | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    causal: bool | Literal["top_left"] = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Array | None = None,
    q_offset: int | Array | None = None,
    q_lengths: Array | None = None,
    kv_lengths: Array | None = None,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | BlockMask | None = None,
    sinks: Array | None = None,
    dropout_rate: float | None = None,
    dropout_seed: int | Array | None = None,
    layout: Literal["bhsd", "bshd"] = "bhsd",
    return_lse: bool = False,
    **unknown: Never,
) -> Array | tuple[Array, Array]:
    """Attention on any array by any backend: softmax(scale · q kᵀ + bias) v over the keys seen.

    The contract, with every formula, is the docstring of `heedful.Problem`.

    Args:
        q: queries, (B, Hq, Sq, D), or (B, Sq, Hq, D) in layout "bshd"; also (H, S, D) and (S, D).
            A JAX array, a NumPy array or a torch tensor of float64, float32, float16 or bfloat16.
        k: keys, (B, Hkv, Sk, D), Hq a multiple of Hkv; framework, dtype and device of q.
        v: values, (B, Hkv, Sk, Dv).
        backend: a name such as "jax:flash", which runs or raises; a list of names, of which the first
            able one runs; or None: the innermost `use_backend`, else the environment variable
            HEEDFUL_BACKEND as it was when heedful was imported, else the automatic choice.
        mask: boolean, True = visible, broadcastable to (B, Hq, Sq, Sk), or (B, Sk) for keys alone;
            where q has several batch axes, over each of them by itself, as bias and lengths too.
        bias: added to the scores, broadcastable to (B, Hq, Sq, Sk); differentiable.
        causal: False, True (the last query sees the last key) or "top_left" (query i sees keys ≤ i).
        window: (left, right): how many keys each side of its own place a query sees, None for open.
        alibi_slopes: (Hq,) or (B, Hq), of each query head the slope m of ALiBi: m · |p_i − j| is taken
            off the scores, p_i the place of query i among the keys; differentiable.
        q_offset: the place of query 0 among the keys, an integer or one for each batch row; no new value
            compiles anew.
        q_lengths: (B,) integers, how many queries of each batch row are real.
        kv_lengths: (B,) integers, how many keys of each batch row are real.
        q_segment_ids: (B, Sq) integers, of which segment each query is; it sees that one's keys alone,
            as of several sequences that are packed into one row.
        kv_segment_ids: (B, Sk) integers, of which segment each key is.
        scale: factor of the scores, D^-½ by default.
        softcap: c of c·tanh(s/c), applied before score_mod and bias.
        score_mod: (score, b, h, q_idx, kv_idx) → score, of numbers, as in FlexAttention: written in JAX
            beside JAX and NumPy arrays, in torch beside tensors. Floating arrays that it closes over
            have gradients. The same text compiles once.
        mask_mod: (b, h, q_idx, kv_idx) → boolean, True = visible, likewise; or a `heedful.block_mask` of
            it, made beforehand, by which what is hidden costs no time.
        sinks: (Hq,), a logit for each query head that takes weight and gives nothing, as in gpt-oss;
            differentiable.
        dropout_rate: probability with which each softmax weight is dropped; the others are multiplied by
            1 / (1 − dropout_rate). lse is that of all.
        dropout_seed: which are dropped: an integer of 0 to 2**31 − 1, or one for each batch row; no new
            value compiles anew. The same seed drops the same, see `heedful.dropout_mask`.
        layout: "bhsd" (PyTorch SDPA, ONNX) or "bshd" (jax.nn, flash-attn), for q, k, v and out.
        return_lse: whether to return the log-sum-exp of the scores too.

    Returns:
        out, shaped like q with v's head size, in q's framework, dtype and device and differentiable
        there; with `return_lse` also lse (B, Hq, Sq), float32 (float64 for float64), natural log.

    Raises:
        TypeError, ValueError: the call breaks the contract; says what came and how to mend it.
        Refusal: no backend that was asked can honour the call; says every reason.
    """
    options = {
        "mask": mask,
        "bias": bias,
        "causal": causal,
        "window": window,
        "alibi_slopes": alibi_slopes,
        "q_offset": q_offset,
        "q_lengths": q_lengths,
        "kv_lengths": kv_lengths,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "scale": scale,
        "softcap": softcap,
        "score_mod": score_mod,
        "mask_mod": mask_mod,
        "sinks": sinks,
        "dropout_rate": dropout_rate,
        "dropout_seed": dropout_seed,
        "layout": layout,
        "return_lse": return_lse,
        **unknown,  # which the checks refuse by name
    }
    _tell_torch_compile()
    # torch.compile would make a tensor of NumPy's array.
    attend = _attend if isinstance(q, np.ndarray) else _attend_in_graph
    return attend(q, k, v, backend, options, ambient.asked())


def _attend(
    q: Array,
    k: Array,
    v: Array,
    backend: str | Sequence[str] | None,
    options: dict[str, Any],
    _ambient: Any,  # on which torch.compile guards: a graph is for one of them
) -> Array | tuple[Array, Array]:
    if backend is None:
        ambient.keep_for_recomputation()
        if any(isinstance(x, jax.core.Tracer) for x in (q, k, v)):
            ambient.check_trace()
    call = Call.of(q, k, v, **options)
    chosen = dispatch.choose(call.problem, backend)

    def compute(arrays: Mapping[str, Array]) -> Array | tuple[Array, Array]:
        operands = call._replace(arrays=arrays).operands
        return call.restore(*dispatch.run(chosen, *once(chosen, call.problem, operands)))

    return spread_like_its_arrays(compute, call)


_attend_in_graph = _attend


@torch_compile.run_while_tracing
def _tell_torch_compile() -> None:
    global _attend, _attend_in_graph, _explain
    if _attend_in_graph is _attend and torch_compile.is_there():
        _attend_in_graph = torch_compile.one_operation(_attend)
        _attend = torch_compile.left_out(_attend, "a graph of torch holds no NumPy array")
        _explain = torch_compile.left_out(_explain, "an explanation is no operation on tensors")


def explain(
    q: Array,
    k: Array,
    v: Array,
    *,
    backend: str | Sequence[str] | None = None,
    **options: Any,
) -> Explanation:
    """Which backend `attention` would take for this call and why, and what every other one says.

    Computes nothing. Takes what `attention` takes, and `jax.ShapeDtypeStruct` in place of arrays.
    """
    _tell_torch_compile()
    return _explain(q, k, v, backend, options)


def _explain(
    q: Array, k: Array, v: Array, backend: str | Sequence[str] | None, options: dict[str, Any]
) -> Explanation:
    return dispatch.explain_choice(Call.of(q, k, v, **options).problem, backend)


def dropout_mask(
    dropout_rate: float,
    dropout_seed: int | Array,
    b: int | Array,
    h: int | Array,
    i: int | Array,
    j: int | Array,
) -> Array:
    """Which softmax weights `dropout_rate` with `dropout_seed` keeps, in every framework the same ones.

        key_bh  = threefry((dropout_seed, 0), (b, h))
        word_ij = threefry(key_bh, (i, j))[0]           kept where word_ij ≥ dropout_rate · 2³²

    threefry is Threefry-2x32 of 20 rounds (Salmon et al. 2011), as `jax.random` has it. All are integers
    or integer arrays of one framework, which broadcast: for all of a call, `b[:, None, None, None]`,
    `h[None, :, None, None]`, `i[:, None]` and `j`, each counted from 0.

    Args:
        dropout_rate: at least 0 and below 1.
        dropout_seed: 0 to 2**31 − 1.
        b, h, i, j: the numbers of batch row, query head, query and key.

    Returns:
        booleans of their shape, True = kept, of their framework; NumPy's where all are integers.

    Raises:
        TypeError, ValueError: an argument is none of those above.
    """
    check_dropout_rate(dropout_rate)
    given: dict[str, Any] = {"dropout_seed": dropout_seed, "b": b, "h": h, "i": i, "j": j}
    arrays = {name: x for name, x in given.items() if not is_integral(x)}
    framework = framework_of_all(arrays) if arrays else None
    for name, x in arrays.items():
        check_integers(name, x)

    rank = max((len(x.shape) for x in arrays.values()), default=1)

    def array(x: Any) -> Array:
        """int32 of the rank that all have: JAX can be told to promote none."""
        if not is_integral(x):
            return as_int32(x.reshape((1,) * (rank - len(x.shape)) + tuple(x.shape)))
        if framework == "torch":
            return next(iter(arrays.values())).new_full((1,) * rank, x).int()
        return np.full((1,) * rank, x, np.int32)

    return keeps(dropout_rate, *map(array, given.values()))


def flash_attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, **options: Any
) -> tuple[Array, Array]:
    """(out, lse) by the JAX flash core: memory linear in Sq + Sk. Options as in `attention`.

    A mask may also hold integers 0 and 1, as it may in flash-attention-jax.
    """
    return _pair("jax:flash", q, k, v, mask, options)


def causal_flash_attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, **options: Any
) -> tuple[Array, Array]:
    """`flash_attention` with `causal=True`: the last query sees the last key."""
    return _pair("jax:flash", q, k, v, mask, {"causal": True, **options})


def plain_attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, **options: Any
) -> tuple[Array, Array]:
    """(out, lse) with the score matrix materialised, in JAX; takes what `flash_attention` takes."""
    return _pair("jax:plain", q, k, v, mask, options)


def _pair(
    name: str, q: Array, k: Array, v: Array, mask: Array | None, options: dict[str, Any]
) -> tuple[Array, Array]:
    if "return_lse" in options:
        raise TypeError(
            "these functions always return (out, lse): leave return_lse out. "
            "For out alone call heedful.attention."
        )
    if "backend" in options:
        raise TypeError(
            f"this function is {name} itself and takes no backend=. Got {options['backend']!r}. "
            "To choose one call heedful.attention(..., backend=..., return_lse=True)."
        )
    if framework_of(mask) is not None and dtype_of(mask).removeprefix("u").startswith("int"):
        mask = of_each_once(lambda x: x != 0, mask)
    return attention(q, k, v, backend=name, mask=mask, **options, return_lse=True)
