"""The contract of attention, checked once.

A call is checked here, turned into a `Problem` (what is asked, no array data) and `Operands` (the
arrays, in one canonical form). Nothing behind this file looks at user options again.
"""

import math
import numbers
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self, TypedDict, Unpack

import jax
import numpy as np

Array = Any  # a JAX array, a NumPy array or a torch tensor: core never imports torch

FLOATS = ("float64", "float32", "float16", "bfloat16")
LAYOUTS = ("bhsd", "bshd")
MAX_RANK = 64
FAR = 2**29  # more than any length; sums of three such numbers still fit an int32


class Options(TypedDict, total=False):
    """The options of an attention call: every name, once. `Problem` says what each means."""

    mask: Array | None
    bias: Array | None
    causal: bool | Literal["top_left"]
    window: tuple[int | None, int | None] | None
    q_offset: int | Array | None
    q_lengths: Array | None
    kv_lengths: Array | None
    scale: float | None
    softcap: float | None
    layout: Literal["bhsd", "bshd"]
    return_lse: bool


# What the same thing is called elsewhere, so that the error for an unknown option can teach.
PEER_NAMES = {
    "is_causal": 'causal="top_left" (SDPA and jax.nn align the diagonal top-left) or causal=True',
    "attn_mask": "mask= for a boolean mask, bias= for a float one",
    "key_padding_mask": "mask= of shape (B, Sk), True = visible",
    "attn_bias": "bias=",
    "enable_gqa": "not needed: grouped heads need no switch",
    "sm_scale": "scale=",
    "softmax_scale": "scale=",
    "logits_soft_cap": "softcap=",
    "window_size": "window=(left, right), None for an open side",
    "local_window_size": "window=(left, right), None for an open side",
    "query_seq_lengths": "q_lengths=",
    "key_value_seq_lengths": "kv_lengths=",
    "return_attn_probs": "return_lse=True",
    "return_residual": "return_lse=True",
}


class Operands(NamedTuple):
    """The arrays of one call in canonical form, all of one framework; a JAX pytree.

    Attributes:
        q: (B, Hq, Sq, D).
        k: (B, Hkv, Sk, D).
        v: (B, Hkv, Sk, Dv).
        mask: boolean, rank 4, each axis full or 1 of (B, Hq, Sq, Sk); True = visible.
        bias: floating, rank 4, each axis full or 1 of (B, Hq, Sq, Sk).
        q_lengths: int32, (B,).
        kv_lengths: int32, (B,).
        q_offset: int32, (B,) or (1,); only where the problem holds no number.
    """

    q: Array
    k: Array
    v: Array
    mask: Array | None = None
    bias: Array | None = None
    q_lengths: Array | None = None
    kv_lengths: Array | None = None
    q_offset: Array | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What one attention call asks for: shapes, dtypes and options, no array data. Hashable.

    This docstring is the home of the contract. B batch, Hq and Hkv heads, Sq and Sk lengths, D head
    size, Dv value head size; Hq is a multiple of Hkv, and query head h reads key head h // (Hq/Hkv).

        s_ij  = scale · q_i · k_j                    scale defaults to D^-½
        s_ij  = softcap · tanh(s_ij / softcap)       where softcap is given
        s_ij  = s_ij + bias_ij                       after softcap
        p_ij  = softmax over the keys j that query i sees
        out_i = Σ_j p_ij v_j
        lse_i = log Σ_j exp(s_ij)                    natural log, over the keys seen

    Position: query i stands at p_i = i + q_offset. By default q_offset = kv_length − q_length: the
    last query is aligned with the last key ("bottom-right"), per batch row where lengths are given.
    `causal="top_left"` means q_offset = 0. An explicit q_offset wins over both; without causal or a
    window it would change nothing, and is refused.

    Visibility: query i sees key j when all of these say so:
        causal                     j ≤ p_i
        window=(left, right)       p_i − left ≤ j ≤ p_i + right, a side that is None is open
        q_lengths, kv_lengths      i < q_lengths[b], j < kv_lengths[b]
        mask                       True; broadcastable to (B, Hq, Sq, Sk), or, beside q of rank 4,
                                   (B, Sk) for keys alone

    Leading axes: q of rank 5 and more has several batch axes, and B is their product. Mask, bias,
    lengths and q_offset broadcast over each of them by itself: beside q (B, N, H, S, D) a mask may be
    (B, N, 1, 1, Sk), a bias (B, 1, H, Sq, Sk) and lengths (B, 1).

    A query that sees no key gives out 0, lse −inf and no gradient, whatever stands in K and V. So does
    one whose every visible key has a bias of −inf, if K and V are finite there.

    Precision: products accumulate in float32 (float64 for float64); out has q's dtype, lse is float32
    (float64) of shape (B, Hq, Sq) in either layout. out and lse are both differentiable in q, k, v
    and bias.

    Compilation: a problem is what JAX backends compile for. New values of arrays, lengths among them,
    and of q_offset, a number or an array, never compile anew. A new scale, softcap or window does:
    they are constants of a model rather than values of a call, the first two are folded into each
    tile's arithmetic, and the window says which tiles there are. (On a GPU, a JAX call of a torch
    backend compiles anew for a new number q_offset too: torch would have to wait for the value.)

    Attributes:
        framework: whose arrays the caller passed: "numpy", "jax" or "torch".
        platform: where they lie: "cpu", "gpu" or "tpu" (under a JAX trace: JAX's default).
        dtype: of q, k, v and out.
        lead: the caller's leading axes, of which B is the product; () for rank 2 and 3.
        rank: of the caller's q, k and v.
        layout: of the caller's q, k, v and out: "bhsd" or "bshd".
        batch, q_heads, kv_heads, q_length, kv_length, head_dim, value_dim: B, Hq, Hkv, Sq, Sk, D, Dv.
        scale, softcap: of the scores.
        causal: whether j ≤ p_i is asked; which alignment is q_offset's business.
        window: (left, right), or None.
        q_offset: the offset where it is one number known beforehand; None where it comes from the
            operand `q_offset` or from the lengths. 0 where neither causal nor window asks for it.
        q_offset_given: whether it is the caller's own number, which `compiled` makes an operand.
        mask_shape, bias_shape: of the operands in canonical form, or None.
        bias_dtype: of bias, or None.
        q_lengths, kv_lengths: whether they are given.
        return_lse: whether lse is asked for.
    """

    framework: str
    platform: str
    dtype: str
    lead: tuple[int, ...]
    rank: int
    layout: str
    batch: int
    q_heads: int
    kv_heads: int
    q_length: int
    kv_length: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    q_offset: int | None = 0
    q_offset_given: bool = False
    mask_shape: tuple[int, ...] | None = None
    bias_shape: tuple[int, ...] | None = None
    bias_dtype: str | None = None
    q_lengths: bool = False
    kv_lengths: bool = False
    return_lse: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one key head: Hq / Hkv."""
        return self.q_heads // self.kv_heads

    @property
    def score_count(self) -> int:
        """How many scores there are, B · Hq · Sq · Sk: what materialised attention holds."""
        return self.batch * self.q_heads * self.q_length * self.kv_length

    @property
    def band(self) -> tuple[int | None, int | None]:
        """(left, right): p_i − left ≤ j ≤ p_i + right is what causal and window ask together."""
        left, right = self.window or (None, None)
        return left, 0 if self.causal else right

    @property
    def positional(self) -> bool:
        """Whether the place of a query matters at all: causal or a window."""
        return self.band != (None, None)

    @property
    def accumulator(self) -> str:
        """The dtype that products accumulate in, which is also the dtype of lse."""
        return "float64" if self.dtype == "float64" else "float32"

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, **options: Unpack[Options]) -> Self:
        """Checks a call and says what it asks for. Reads shapes and dtypes, never values.

        Raises:
            TypeError: a wrong kind of thing: no array, mixed frameworks, a dtype, an unknown option.
            ValueError: a wrong size or value.
        """
        _check_names(options)
        framework = _check_frameworks(q, k, v, options)
        dtype = _check_dtypes(q, k, v, framework)
        layout = options.get("layout", "bhsd")
        sizes = _check_shapes(q, k, v, layout)
        scores = (sizes["batch"], sizes["q_heads"], sizes["q_length"], sizes["kv_length"])
        lead = sizes["lead"]

        mask, bias = options.get("mask"), options.get("bias")
        if mask is not None and dtype_of(mask) != "bool":
            raise TypeError(
                "mask must be boolean, True = visible. "
                f"Got {dtype_of(mask)}. An additive float mask is bias=; for 0/1 use mask != 0."
            )
        accumulator = "float64" if dtype == "float64" else "float32"
        if bias is not None and dtype_of(bias) not in (dtype, accumulator):
            raise TypeError(
                f"bias must be {' or '.join(sorted({dtype, accumulator}))} for {dtype} q, k, v. "
                f"Got {dtype_of(bias)}. "
                + (
                    "A boolean mask is mask=."
                    if dtype_of(bias) == "bool"
                    else "Cast it: nothing here casts silently."
                )
            )
        for name in ("q_lengths", "kv_lengths"):
            _check_lengths(name, options.get(name), lead)

        causal = options.get("causal", False)
        top_left = isinstance(causal, str) and causal == "top_left"
        if not (isinstance(causal, bool | np.bool_) or top_left):
            raise ValueError(
                'causal must be False, True (bottom-right) or "top_left". '
                f"Got {_shown(causal)}. For any other alignment pass causal=True and q_offset=."
            )
        causal_asked = bool(causal)
        window = _check_window(options.get("window"))
        explicit = options.get("q_offset")
        positional = causal_asked or window is not None
        _check_offset(explicit, lead, positional)
        if not positional:
            q_offset: int | None = 0  # positions play no part: equal problems compare equal
        elif isinstance(explicit, numbers.Integral):
            q_offset = int(explicit)
        elif explicit is not None:
            q_offset = None
        elif top_left:
            q_offset = 0
        elif options.get("q_lengths") is not None or options.get("kv_lengths") is not None:
            q_offset = None
        else:
            q_offset = sizes["kv_length"] - sizes["q_length"]

        return_lse = options.get("return_lse", False)
        if not isinstance(return_lse, bool):
            raise TypeError(
                f"return_lse must be True or False. Got {_shown(return_lse)}. "
                "It decides what is returned, so it cannot be an array."
            )

        return cls(
            framework=framework,
            platform=platform_of(q),
            dtype=dtype,
            rank=len(q.shape),
            layout=layout,
            **sizes,
            scale=_check_scale(options.get("scale"), sizes["head_dim"] ** -0.5, accumulator),
            softcap=_check_softcap(options.get("softcap"), accumulator),
            causal=causal_asked,
            window=window,
            q_offset=q_offset,
            q_offset_given=explicit is not None and positional and q_offset is not None,
            mask_shape=None if mask is None else _mask_shape(mask, scores, lead),
            bias_shape=None if bias is None else _score_shape("bias", bias, scores, lead),
            bias_dtype=None if bias is None else dtype_of(bias),
            q_lengths=options.get("q_lengths") is not None,
            kv_lengths=options.get("kv_lengths") is not None,
            return_lse=return_lse,
        )

    def canonical(self, q: Array, k: Array, v: Array, **options: Unpack[Options]) -> Operands:
        """The arrays of the call this problem was made of, in canonical form: views, if strides allow.

        Lengths and offsets alone are converted, to int32: in the narrow or unsigned types that they
        may come in, their differences would wrap. Where a mask or bias has some of several leading
        axes and not the others, those are materialised; its gradient comes back in its own shape.

        Raises:
            ValueError: a length that is negative or longer than its sequence, or an offset out of
                range, where the values can be read without waiting for a device: CPU arrays outside
                of a trace.
        """
        if isinstance(q, jax.ShapeDtypeStruct):
            raise TypeError(
                "attention computes, and needs arrays. Got jax.ShapeDtypeStruct. "
                "To ask what would happen call heedful.explain; for shapes, jax.eval_shape."
            )
        mask, bias = options.get("mask"), options.get("bias")
        q_lengths, kv_lengths = options.get("q_lengths"), options.get("kv_lengths")
        q_offset: Any = options.get("q_offset") if self.q_offset is None else None
        _check_length_values("q_lengths", q_lengths, self.q_length)
        _check_length_values("kv_lengths", kv_lengths, self.kv_length)
        _check_offset_values(q_offset)
        return Operands(
            q=self._canonical_heads(q),
            k=self._canonical_heads(k),
            v=self._canonical_heads(v),
            mask=None if mask is None else self._canonical_scores(mask, self.mask_shape),
            bias=None if bias is None else self._canonical_scores(bias, self.bias_shape),
            q_lengths=None if q_lengths is None else self._a_batch_row(q_lengths),
            kv_lengths=None if kv_lengths is None else self._a_batch_row(kv_lengths),
            q_offset=None if q_offset is None else self._a_batch_row(q_offset, or_one=True),
        )

    @property
    def compiled(self) -> Self:
        """This problem as JAX compiles it: without the number that `as_operand` makes an operand."""
        return replace(self, q_offset=None) if self.q_offset_given else self

    def as_operand(self, operands: Operands) -> Operands:
        """The operands of `compiled`: the caller's own q_offset is a value, and none compiles anew.

        It is a NumPy array, which is a plain argument to JAX and on no device.
        """
        if not self.q_offset_given or self.q_offset is None:
            return operands
        return operands._replace(q_offset=np.array([self.q_offset], np.int32))

    def as_number(self, operands: Operands) -> tuple[Self, Operands]:
        """Undoes `compiled` and `as_operand`, for a backend that reads values and compiles nothing.

        It waits for the operand, so that should lie in the host's memory.
        """
        if not self.q_offset_given or operands.q_offset is None:
            return self, operands
        number = int(operands.q_offset[0])
        return replace(self, q_offset=number), operands._replace(q_offset=None)

    def _canonical_scores(self, x: Array, shape: tuple[int, ...] | None) -> Array:
        """Something broadcastable to (*lead, Hq, Sq, Sk) → its canonical shape."""
        assert shape is not None  # that of x, worked out with the problem
        if shape[0] != 1 and math.prod(x.shape[:-3]) != shape[0] and x.shape != shape[::3]:
            x = broadcast_to(x, (*self.lead, *shape[1:]))
        return x.reshape(shape)

    def _a_batch_row(self, x: Array, or_one: bool = False) -> Array:
        """Something broadcastable to the leading axes → int32 (B,), or (1,) where one stands for all."""
        if not (or_one and math.prod(x.shape) == 1):
            x = broadcast_to(x, self.lead or (1,))
        return _int32(x.reshape(-1))

    def _canonical_heads(self, x: Array) -> Array:
        """(*lead, H, S, D), (*lead, S, H, D) or (S, D) → (B, H, S, D)."""
        if self.rank == 2:
            return x.reshape(1, 1, *x.shape)
        if self.layout == "bshd":
            x = x.swapaxes(-3, -2)
        return x if self.rank == 4 else x.reshape(self.batch, *x.shape[-3:])

    def restore(self, out: Array, lse: Array | None) -> Array | tuple[Array, Array]:
        """Canonical out (and lse, where it was asked for) → what the caller gets."""
        if self.rank == 2:
            out = out.reshape(out.shape[-2:])
        elif self.rank != 4:
            out = out.reshape(*self.lead, *out.shape[-3:])
        if self.rank != 2 and self.layout == "bshd":
            out = out.swapaxes(-3, -2)
        if not self.return_lse:
            return out
        assert lse is not None  # a backend without an LSE refuses the problem
        if self.rank != 4:
            lse = lse.reshape(*self.lead, *lse.shape[(2 if self.rank == 2 else 1) :])
        return out, lse


# Facts about arrays of any framework, without importing torch


def framework_of(x: Array) -> str | None:
    """Whose array: "numpy", "jax" (tracers and ShapeDtypeStruct too), "torch"; None for no array."""
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return "jax"
    # A masked array's mask would be lost, and a matrix is of rank 2 whatever is done with it.
    if isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray | np.matrix):
        return "numpy"
    if any(t.__module__ == "torch" and t.__name__ == "Tensor" for t in type(x).__mro__):
        return "torch"
    return None


def dtype_of(x: Array) -> str:
    """The dtype's name, the same in every framework."""
    return str(x.dtype).removeprefix("torch.")


def shape_of(x: Array) -> tuple[Any, ...]:
    """Its sizes; what is a symbol to torch, while it records a graph, becomes the number it stands for.

    torch remembers that it was asked, and records another graph for other sizes.
    """
    return tuple(map(int, x.shape)) if framework_of(x) == "torch" else tuple(x.shape)


def platform_of(x: Array) -> str:
    """Where it lies: "cpu", "gpu" or "tpu"; a JAX tracer has no place yet and takes JAX's default."""
    match framework_of(x):
        case "jax" if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            return next(iter(x.devices())).platform
        case "jax":
            default = jax.config.jax_default_device  # type: ignore[attr-defined]  # untyped config
            return getattr(default, "platform", default) or jax.default_backend()
        case "torch":
            return {"cuda": "gpu", "xla": "tpu"}.get(x.device.type, x.device.type)
    return "cpu"


def broadcast_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The array broadcast to a shape, as a view where the framework has views; differentiable."""
    match framework_of(x):
        case "jax":
            return jax.numpy.broadcast_to(x, shape)
        case "torch":
            return x.expand(shape)
    return np.broadcast_to(x, shape)


def _int32(x: Array) -> Array:
    return x.int() if framework_of(x) == "torch" else x.astype("int32")


def _is_concrete_on_cpu(x: Array) -> bool:
    if isinstance(x, jax.core.Tracer) or platform_of(x) != "cpu":
        return False
    if framework_of(x) != "torch":
        return True
    # Inside torch.func's transforms, or torch.compile, a tensor has no data to read.
    torch, fakes = sys.modules["torch"], sys.modules.get("torch._subclasses.fake_tensor")
    return not (torch._C._functorch.is_functorch_wrapped_tensor(x) or (fakes and fakes.is_fake(x)))


# The checks, in the order in which a caller meets them


def _check_names(options: Options) -> None:
    for name in options:
        if name not in Options.__annotations__:
            known = ", ".join(Options.__annotations__)
            peer = PEER_NAMES.get(name)
            raise TypeError(
                f"unknown option {name!r}. "
                + (f"Here it is {peer}." if peer else f"The options are {known}.")
            )


def _why_not_dense(name: str, x: Array) -> str | None:
    """What is wrong with a torch tensor that is no dense memory; None where nothing is."""
    layout = str(x.layout)
    if x.is_nested:
        return (
            f"{name} must be a dense tensor. Got a nested one. Pass {name}.to_padded_tensor(0.0) and "
            "its rows' lengths as q_lengths= or kv_lengths=."
        )
    if layout != "torch.strided":
        return f"{name} must be a dense tensor. Got the layout {layout}. Pass {name}.to_dense()."
    return None


def _check_frameworks(q: Array, k: Array, v: Array, options: Options) -> str:
    arrays = {"q": q, "k": k, "v": v}
    for name in ("mask", "bias", "q_lengths", "kv_lengths", "q_offset"):
        given = options.get(name)
        if given is not None and not (name == "q_offset" and isinstance(given, numbers.Number)):
            arrays[name] = given
    kinds = {name: framework_of(x) for name, x in arrays.items()}
    for name, kind in kinds.items():
        if kind is None:
            raise TypeError(
                f"{name} must be a JAX array, a NumPy array or a torch tensor. "
                f"Got {type(arrays[name]).__name__}. Convert it first, for example with numpy.asarray."
            )
        if kind == "torch" and (mend := _why_not_dense(name, arrays[name])):
            raise TypeError(mend)
        if isinstance(arrays[name], jax.Array) and _is_deleted(arrays[name]):
            raise ValueError(
                f"{name} is a JAX array whose memory was given back: it was deleted, or donated to a "
                "jitted function. Use what that function returned, or do not donate it."
            )
    framework = kinds["q"]
    for name, kind in kinds.items():
        # To JAX a NumPy mask or length is a constant; q, k and v themselves are never converted.
        if kind != framework and not (framework == "jax" and kind == "numpy" and name not in "qkv"):
            raise TypeError(
                f"all arrays of a call must be of one framework. Got q of {framework} and {name} of "
                f"{kind}. Convert one of them: nothing here moves silently between frameworks."
            )
    devices = {name: _devices(x) for name, x in arrays.items() if kinds[name] == framework}
    for name, place in devices.items():
        if place is not None and devices["q"] is not None and place != devices["q"]:
            raise ValueError(
                f"all arrays of a call must lie on one device. Got q on {devices['q']} and {name} on "
                f"{place}. Move one of them: nothing here moves silently between devices."
            )
    assert framework is not None
    return framework


def _is_deleted(x: jax.Array) -> bool:
    return not isinstance(x, jax.core.Tracer) and x.is_deleted()


def _devices(x: Array) -> str | None:
    """Where x lies, as text to compare; None where it has no place yet (a tracer, NumPy)."""
    if framework_of(x) == "torch":
        return str(x.device)
    if framework_of(x) == "jax" and isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        if not x.committed:  # JAX moves it to where the others are, as it does a number
            return None
        return ", ".join(sorted(str(d) for d in x.devices()))
    return None


def _check_dtypes(q: Array, k: Array, v: Array, framework: str) -> str:
    names = {"q": dtype_of(q), "k": dtype_of(k), "v": dtype_of(v)}
    for name, dtype in names.items():
        if dtype not in FLOATS:
            raise TypeError(
                f"q, k and v must be one of {', '.join(FLOATS)}. Got {name} of {dtype}. "
                "Cast it: nothing here casts silently."
            )
    if len(set(names.values())) > 1:
        raise TypeError(
            "q, k and v must have one dtype. Got "
            + ", ".join(f"{name} of {dtype}" for name, dtype in names.items())
            + ". Cast them: nothing here casts silently."
        )
    return names["q"]


def _check_shapes(q: Array, k: Array, v: Array, layout: str) -> dict[str, Any]:
    if layout not in LAYOUTS:
        raise ValueError(
            f'layout must be "bhsd" or "bshd". Got {_shown(layout)}. '
            "It is never guessed: say where the head axis stands."
        )
    shapes = {"q": shape_of(q), "k": shape_of(k), "v": shape_of(v)}
    got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    rank = len(shapes["q"])
    if rank < 2 or len({len(s) for s in shapes.values()}) > 1:
        forms = (
            "(S, D), (H, S, D) or (B, H, S, D)"
            if layout == "bhsd"
            else "(S, D), (S, H, D) or (B, S, H, D)"
        )
        raise ValueError(
            f"q, k and v must have the same rank, at least 2: {forms}. Got {got}. "
            "Add the missing axes: they are never guessed."
        )

    if rank > MAX_RANK:
        raise ValueError(
            f"q, k and v may have {MAX_RANK} axes, as many as NumPy's arrays. Got {rank}. "
            "Join the leading ones by reshape: all are batch."
        )

    def split(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int, int]:
        if rank == 2:
            return (), 1, shape[0], shape[1]
        lead, (a, b, d) = shape[:-3], shape[-3:]
        return (lead, a, b, d) if layout == "bhsd" else (lead, b, a, d)

    q_lead, q_heads, q_length, head_dim = split(shapes["q"])
    k_lead, kv_heads, kv_length, k_dim = split(shapes["k"])
    v_lead, v_heads, v_length, value_dim = split(shapes["v"])
    where = f"in layout {layout!r}"
    if not q_lead == k_lead == v_lead:
        raise ValueError(
            f"q, k and v must have the same batch axes {where}. Got {got}. "
            "Broadcast them first: they are never repeated silently."
        )
    if k_dim != head_dim:
        raise ValueError(
            f"q and k must have the same head size, their last axis. Got {got}. "
            "Only v may have a head size of its own."
        )
    if v_length != kv_length:
        raise ValueError(
            f"k and v must have the same length {where}. Got {got}. "
            "If the axes are in the other order, pass the other layout=."
        )
    if v_heads != kv_heads:
        raise ValueError(
            f"k and v must have the same number of heads {where}. Got {got}. "
            "If the axes are in the other order, pass the other layout=."
        )
    if kv_heads == 0 or q_heads == 0 or q_heads % kv_heads:
        raise ValueError(
            f"q's heads must be a multiple of k's {where}. Got {q_heads} and {kv_heads} from {got}. "
            "If the axes are in the other order, pass the other layout=."
        )
    if head_dim == 0 or value_dim == 0:
        raise ValueError(f"head sizes must be at least 1. Got {got}. Check the last axis.")
    return {
        "lead": q_lead,
        "batch": math.prod(q_lead),
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "q_length": q_length,
        "kv_length": kv_length,
        "head_dim": head_dim,
        "value_dim": value_dim,
    }


def _score_shape(
    name: str, x: Array, scores: tuple[int, ...], lead: tuple[int, ...]
) -> tuple[int, ...]:
    """The canonical rank-4 shape of an array broadcastable to (*lead, Hq, Sq, Sk)."""
    full = (*(lead or (1,)), *scores[1:])
    given = shape_of(x)
    if not _broadcasts(given, full):
        axes = "B, " if len(full) == 4 else "".join(f"B{n}, " for n in range(1, len(full) - 2))
        forms = f"be broadcastable to ({axes}Hq, Sq, Sk) = {full}"
        if name == "mask" and len(lead) == 1:
            forms += f", or be (B, Sk) = {(scores[0], scores[3])}"
        raise ValueError(f"{name} must {forms}. Got {given}. Each axis is full or 1.")
    padded = (1,) * (len(full) - len(given)) + given
    one = all(axis == 1 for axis in padded[:-3])
    return (1 if one else scores[0], *padded[-3:])


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether each axis, counted from the last, is full or 1."""
    return len(shape) <= len(full) and all(
        axis in (1, whole) for axis, whole in zip(shape[::-1], full[::-1], strict=False)
    )


def _mask_shape(mask: Array, scores: tuple[int, ...], lead: tuple[int, ...]) -> tuple[int, ...]:
    """Canonical shape of a mask, which for rank-4 input may also be the key-padding form (B, Sk)."""
    shape = shape_of(mask)
    batch, _, q_length, kv_length = scores
    key_padding = len(lead) == 1 and shape == (batch, kv_length)
    if not key_padding:
        return _score_shape("mask", mask, scores, lead)
    if batch > 1 and batch == q_length:
        raise ValueError(
            f"mask of shape {shape} could be (B, Sk) or (Sq, Sk), since B = Sq = {batch}. Say which: "
            "mask[:, None, None, :] for (B, Sk), mask[None, None] for (Sq, Sk)."
        )
    return (batch, 1, 1, kv_length)


def _check_lengths(name: str, x: Array | None, lead: tuple[int, ...]) -> None:
    if x is None:
        return
    if not dtype_of(x).removeprefix("u").startswith("int"):
        raise TypeError(f"{name} must hold integers. Got {dtype_of(x)}. Cast it to int32.")
    if not _broadcasts(tuple(x.shape), lead or (1,)):
        raise ValueError(
            f"{name} must have one length for each batch row, shape {_rows(lead)}. "
            f"Got {tuple(x.shape)}. Pass one number for each sequence of the batch."
        )


def _rows(lead: tuple[int, ...]) -> str:
    if len(lead) < 2:
        return f"(B,) = {lead or (1,)}"
    return (
        f"({', '.join(f'B{n}' for n, _ in enumerate(lead, start=1))}) = {lead}, each axis full or 1"
    )


def _check_length_values(name: str, lengths: Array | None, longest: int) -> None:
    if lengths is None or 0 in lengths.shape or not _is_concrete_on_cpu(lengths):
        return
    values = np.asarray(
        lengths
    )  # of a JAX array too: within a trace, its own min() would be traced
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > longest:
        axis = "Sq" if name == "q_lengths" else "Sk"
        raise ValueError(
            f"{name} must lie between 0 and {axis} = {longest}. Got {low if low < 0 else high}. "
            "A length counts the tokens of a row that are real."
        )


def _check_window(window: Any) -> tuple[int | None, int | None] | None:
    if window is None:
        return None
    if not (isinstance(window, Sequence) and len(window) == 2):
        raise ValueError(
            f"window must be a pair (left, right). Got {_shown(window)}. "
            "Write (w, 0) to see w keys back, (w, w) for both sides, None for an open side."
        )
    for side in window:
        if side is None:
            continue
        if not isinstance(side, numbers.Integral) or isinstance(side, bool) or side < 0:
            raise ValueError(
                f"window must hold integers of at least 0, or None. Got {_shown(tuple(window))}. "
                "An open side is None here, not -1."
            )
    # A side as long as two FARs is open, wherever the offset puts the query.
    left, right = (None if side is None or side >= 2 * FAR else int(side) for side in window)
    return None if left is None and right is None else (left, right)


def _check_offset(q_offset: Any, lead: tuple[int, ...], positional: bool) -> None:
    if q_offset is None:
        return
    if not positional:
        raise ValueError(
            "q_offset places the queries for causal and window, and this call has neither. "
            f"Got {_shown(q_offset) if isinstance(q_offset, numbers.Number) else 'an array'}. "
            "Leave it out, or pass causal= or window= too: no option is ignored."
        )
    if isinstance(q_offset, numbers.Integral) and not isinstance(q_offset, bool):
        return _check_offset_range(int(q_offset))
    if isinstance(q_offset, numbers.Number) or not dtype_of(q_offset).startswith("int"):
        kind = dtype_of(q_offset) if hasattr(q_offset, "dtype") else _shown(q_offset)
        raise TypeError(
            f"q_offset must be an integer or a signed integer array. Got {kind}. "
            "Cast it to int32: it counts keys."
        )
    if not _broadcasts(tuple(q_offset.shape), lead or (1,)):
        raise ValueError(
            f"q_offset must be one integer, or one for each batch row: {_rows(lead)}. "
            f"Got {tuple(q_offset.shape)}. It is the place of the first query among the keys."
        )


def _check_offset_values(q_offset: Array | None) -> None:
    if q_offset is not None and _is_concrete_on_cpu(q_offset):
        for value in np.asarray(q_offset).flat:
            _check_offset_range(int(value))


def _check_offset_range(q_offset: int) -> None:
    if abs(q_offset) > FAR:
        raise ValueError(
            f"q_offset must lie between -2**29 and 2**29. Got {_shown(q_offset)}. "
            "It counts keys: it is the place of the first query among them."
        )


def _check_scale(scale: Any, default: float, accumulator: str) -> float:
    if scale is None:
        return default
    if not _is_number(scale):
        raise TypeError(
            f"scale must be a Python number. Got {_shown(scale)}. "
            "To learn it, multiply q by it instead."
        )
    limits, value = np.finfo(accumulator), _as_float(scale)
    largest, smallest = float(limits.max), float(limits.tiny)
    if not abs(value) <= largest:
        raise ValueError(
            f"scale must be finite, in {accumulator} too. Got {_shown(scale)}. "
            "For the default, D**-0.5, pass None."
        )
    if abs(value) < smallest and scale != 0:  # processors take such a number for 0
        raise ValueError(
            f"scale must be 0, or at least {smallest:.2g}, the smallest normal {accumulator}. "
            f"Got {_shown(scale)}. Scale q, or pass 0."
        )
    return value


def _check_softcap(softcap: Any, accumulator: str) -> float | None:
    """A softcap c such that in the accumulator s/c does not overflow, and c·tanh(s/c) is s at most.

    Beyond eps/tiny, s/c falls below the normal numbers for scores that count, and c·0 is 0; below
    tiny/eps, s/c is infinite for scores that come about.
    """
    if softcap is None:
        return None
    if not _is_number(softcap):
        raise TypeError(
            f"softcap must be a Python number. Got {_shown(softcap)}. For no softcap pass None."
        )
    value = _as_float(softcap)
    if not 0 < value < math.inf:
        raise ValueError(
            f"softcap must be positive and finite. Got {_shown(softcap)}. For no softcap pass None."
        )
    limits = np.finfo(accumulator)
    largest = float(limits.eps) / float(limits.tiny)
    if not 1 / largest <= value <= largest:
        raise ValueError(
            f"softcap must lie between {1 / largest:.2g} and {largest:.2g}, so that {accumulator} "
            f"can divide by it. Got {_shown(softcap)}. For no softcap pass None."
        )
    return value


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _as_float(x: Any) -> float:
    """The number, infinite where no float is so large."""
    try:
        return float(x)
    except OverflowError:
        return math.copysign(math.inf, x > 0 or -1)


def _shown(x: Any) -> str:
    """What came, for an error: in short, and whatever came."""
    try:
        text = repr(x)
    except ValueError:  # Python writes no integer of more than some thousand digits
        return "an integer of thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}…"
