"""Anybody's attention function, and what it calls things.

A kernel's author writes `attend(q, k, v, causal=False)`. Where its heads stand, which corner its causal
mask is aligned with, and what else it takes, is said here; what it does not take is refused for it, as
for any backend (`function_backend`).
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from heedful import Problem
from heedful.call.options import OPTIONS
from heedful_crosscheck.factors import FUNCTIONS

# What of the contract a function may decline by name, and what it says then.
PROMISES: Mapping[str, str] = MappingProxyType(
    {
        "hidden_nan": "K and V that nobody sees hold zeros, where others have NaN and infinities there",
        "empty_rows": "it is not asked where a query sees no key",
        "empty_arrays": "it is not asked with no batch row, no query or no key",
        "strides": "it is asked with arrays that are contiguous alone",
        "wide_bias": "it is not asked with a bias in float32 beside q in half precision",
        "lse": "the log-sum-exp that it returns is left aside",
        "lse_gradient": "nothing is differentiated through its log-sum-exp",
        "gradients": "its gradients are left aside",
        "second_derivatives": "its second derivatives are left aside",
    }
)

# Names that others use for features.
ALSO: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gqa": ("grouped_heads",),
        "lse": ("return_lse",),
        "segments": ("q_segment_ids", "kv_segment_ids"),
    }
)
OF_SHAPES = ("grouped_heads", "value_dim")  # what a call asks for without an argument
# What no argument says: dropout's mask and functions of scores are each kernel's own.
NOT_JUDGED = ("dropout_rate", "dropout_seed", "layout", *FUNCTIONS)
FEATURES = (*OF_SHAPES, *(o.name for o in OPTIONS if o.name not in NOT_JUDGED))
POSITIONAL = ("causal", "window", "alibi_slopes")

Alignment = Literal["bottom_right", "top_left", "square"]
MaskForm = Literal["visible", "hidden", "additive", "visible_keys", "hidden_keys"]
WindowForm = Literal["pair", "pair_minus_one", "last"]


@dataclass(frozen=True, eq=False)
class Function:
    """An attention function of (q, k, v, …), and its conventions.

        Function(attend, layout="bshd", causal="top_left", takes=["causal", "gqa"])
        Function(sdpa, causal="top_left", takes=["causal=is_causal", "gqa=enable_gqa"])

    It is called with q, k, v by position and with what else is asked by name, and returns out, or a
    tuple that begins with out and lse.

    Attributes:
        function: JAX's, torch's or NumPy's.
        layout: of q, k, v and out: "bhsd" (B, H, S, D), or "bshd".
        takes: what it takes beyond q, k and v: options of `heedful.attention`, "gqa" (fewer key heads
            than query heads), "value_dim" (a head size of v's own), "segments" (both segment ids) and
            "lse". An argument that is called otherwise there stands behind it, "scale=sm_scale".
        causal: where the queries stand, for causal, windows and ALiBi: the last query at the last key
            ("bottom_right"; of the row's lengths, where it takes them), the first at the first
            ("top_left"), or "square": it takes that only where there are as many queries as keys.
        always_causal: it is causal without being asked.
        mask: what it takes for a mask, over (B, Hq, Sq, Sk), each axis full or 1: True is "visible" or
            "hidden", or numbers are added, 0 and −inf ("additive"); or "visible_keys", "hidden_keys"
            of shape (B, Sk). Where mask and bias are one argument, a mask beside a bias is added to it.
        window: "pair" (left, right), None for an open side; "pair_minus_one", −1 for one; "last": how
            many keys a causal query sees, its own among them.
        lse: what logarithm it returns beside out: "natural", "base2", or None, none. It is returned
            where the argument of "lse" asks for it, or, where there is none, always.
        lse_layout: "bhs" (B, H, S), or "bsh".
        declines: which of `PROMISES` it does not make.
        head_dims: the only D and Dv that it has; None: any.
        multiple_of: what Sq and Sk must be multiples of.
        reasons: from a `heedful.Problem` to what else keeps it from that, a list of strings.
        framework: whose arrays it takes; None: it is asked for a shape, and whoever's arrays it answers
            with its own kind, they are.
        name: in reports; None: the function's own.

    Raises:
        TypeError, ValueError: the description contradicts itself, or the function's signature.
    """

    function: Callable[..., Any]
    _: KW_ONLY
    layout: Literal["bhsd", "bshd"] = "bhsd"
    takes: Collection[str] = ()
    causal: Alignment | None = None
    always_causal: bool = False
    mask: MaskForm = "visible"
    window: WindowForm = "pair"
    lse: Literal["natural", "base2"] | None = None
    lse_layout: Literal["bhs", "bsh"] = "bhs"
    declines: Collection[str] = ()
    head_dims: Collection[int] | None = None
    multiple_of: int = 1
    reasons: Callable[[Problem], Sequence[str]] | None = None
    framework: Literal["jax", "torch", "numpy"] | None = None
    name: str | None = None
    arguments: Mapping[str, str | None] = field(init=False, repr=False)
    required: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"a function is due. Got {self.function!r}.")
        for what, allowed in _ALLOWED.items():
            if getattr(self, what) not in allowed:
                expected = ", ".join(map(repr, allowed))
                raise ValueError(f"{what} must be one of {expected}. Got {getattr(self, what)!r}.")
        for what in ("takes", "declines"):
            if isinstance(getattr(self, what), str):
                raise TypeError(
                    f"{what} must be a list of names. Got {getattr(self, what)!r}. Pass a list of it."
                )
        for promise in self.declines:
            if promise not in PROMISES:
                promises = ", ".join(PROMISES)
                raise ValueError(
                    f"declines must be of {promises}. Got {promise!r}. An option that is not in takes "
                    "is declined already."
                )
        object.__setattr__(self, "arguments", _arguments(self.takes))
        object.__setattr__(self, "required", self._required())
        if self.always_causal and "causal" in self.arguments:
            raise ValueError(
                "always_causal=True is a function without an argument for it. Leave 'causal' out of "
                "takes."
            )
        positional = [name for name in POSITIONAL if name in self.arguments]
        if self.causal is None and (positional or self.always_causal):
            raise ValueError(
                f"{self.title} takes {', '.join(positional) or 'causal'}, and where its queries stand "
                'is not said. Pass causal="bottom_right" (the last query at the last key: flash-attn), '
                '"top_left" (the first at the first: SDPA, jax.nn), or "square" (only where Sq = Sk).'
            )
        if ("return_lse" in self.arguments) and self.lse is None:
            raise ValueError('a function that takes "lse" says which: lse="natural" or "base2".')

    def _required(self) -> frozenset[str]:
        """Arguments beside q, k and v that have no default; what is taken is held to the signature."""
        try:
            parameters = list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):  # what is no Python has none
            return frozenset()
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        for feature, argument in self.arguments.items():
            if argument is not None and not takes_any and argument not in {p.name for p in named}:
                has = ", ".join(p.name for p in named)
                raise ValueError(
                    f"{self.title} has no argument {argument!r} for {feature}. It has {has}. Say "
                    f'"{feature}=" and the name that it has there.'
                )
        behind = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)][3:]
        required = frozenset(p.name for p in behind if p.default is p.empty)
        if unsaid := required.difference(filter(None, self.arguments.values())):
            raise ValueError(
                f"{self.title} needs {', '.join(sorted(unsaid))} too, which nobody says. Name in takes "
                "which option that is, or pass functools.partial with a value for it."
            )
        return required

    @property
    def title(self) -> str:
        """What it is called."""
        if self.name is not None:
            return self.name
        inner = self.function
        while isinstance(inner, partial):
            inner = inner.func
        found = getattr(inner, "__name__", type(inner).__name__)
        return str(found).strip("<>")


_ALLOWED: dict[str, tuple[Any, ...]] = {
    "layout": ("bhsd", "bshd"),
    "causal": (None, "bottom_right", "top_left", "square"),
    "mask": ("visible", "hidden", "additive", "visible_keys", "hidden_keys"),
    "window": ("pair", "pair_minus_one", "last"),
    "lse": (None, "natural", "base2"),
    "lse_layout": ("bhs", "bsh"),
    "framework": (None, "jax", "torch", "numpy"),
}


def _arguments(takes: Collection[str]) -> dict[str, str | None]:
    """By feature the argument that says it; None where there is none."""
    found: dict[str, str | None] = {}
    for said in takes:
        name, renamed, argument = said.partition("=")
        features = ALSO.get(name, (name,))
        for feature in features:
            if feature not in FEATURES:
                why = ", which is not asked of functions" if feature in NOT_JUDGED else ""
                raise ValueError(f"takes must be of {', '.join(_known())}. Got {name!r}{why}.")
            found[feature] = argument or (None if feature in OF_SHAPES else feature)
        if renamed and (len(features) > 1 or not argument):
            mend = f"Say {' and '.join(features)}, each with its own." if argument else "Name it."
            raise ValueError(f"takes has {said!r}, which is not one argument. {mend}")
    return found


def _known() -> Iterable[str]:
    renamed = {feature for features in ALSO.values() for feature in features}
    return [*(name for name in FEATURES if name not in renamed), *ALSO]
