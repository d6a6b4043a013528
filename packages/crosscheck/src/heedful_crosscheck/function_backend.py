"""A described function as a backend, for as long as it is judged.

The function is called as its users call it: with arrays in its own layout, and options by its own names
and in its own forms. Its result comes back as the contract has it, and nothing is mended on the way.
"""

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

import heedful
from heedful import Operands, Problem
from heedful.call import Call
from heedful.call.arrays import Array, broadcast_to, framework_of
from heedful.dispatch.registry import names
from heedful_crosscheck.callers import Caller, found_framework
from heedful_crosscheck.function import Function
from heedful_crosscheck.layouts import LAYOUTS

# What an argument without a default is told where nothing is asked; None of all others.
NOTHING: Mapping[str, Any] = MappingProxyType({"grouped_heads": False, "return_lse": False})


class FunctionBackend:
    """What a described function is to the dispatcher.

    Attributes:
        of: the description.
    """

    automatic = None

    def __init__(self, of: Function, framework: str):
        self.of, self.framework = of, framework
        self.name = f"{framework}:{of.title}"
        self.declines = frozenset(of.declines)
        taken = set(of.arguments)
        if of.lse is not None and "lse" not in self.declines:
            taken.add("return_lse")
        else:
            taken.discard("return_lse")
        if of.always_causal:
            taken.add("causal")
        if of.causal is not None:  # top-left is an offset; `reasons` says which there are
            taken.add("q_offset")
        self.takes = frozenset(taken)

    lacks: Mapping[str, str] = MappingProxyType(
        {
            "return_lse": "is not said to return a log-sum-exp",
            "grouped_heads": "is not said to take grouped heads",
            "value_dim": "is not said to take a head size of v's own",
        }
    )

    def forward_only(self, problem: Problem) -> str | None:
        return "declines gradients" if "gradients" in self.declines else None

    # What keeps it from a problem

    def reasons(self, problem: Problem) -> list[str]:
        of = self.of
        found = [self._why_not_there(problem), self._why_no_such_mask(problem)]
        if of.always_causal and not problem.causal:
            found.append("is always causal")
        dims = {problem.head_dim, problem.value_dim}
        if of.head_dims is not None and not dims <= set(of.head_dims):
            has = ", ".join(map(str, of.head_dims))
            found.append(f"has head sizes of {has} alone, not {', '.join(map(str, sorted(dims)))}")
        lengths = problem.q_length, problem.kv_length
        if any(length % of.multiple_of for length in lengths):
            found.append(f"takes lengths that are multiples of {of.multiple_of}, not {lengths}")
        if of.window == "last" and problem.window is not None:
            left, right = problem.band
            if left is None or right != 0 or not problem.causal:
                found.append("has windows over a causal query's last keys alone")
        if "wide_bias" in self.declines and problem.bias_dtype not in (None, problem.dtype):
            found.append(
                f"declines wide_bias: a bias of {problem.bias_dtype} beside {problem.dtype}"
            )
        return [*filter(None, found), *(of.reasons(problem) if of.reasons is not None else ())]

    def _why_not_there(self, problem: Problem) -> str | None:
        """Why the queries do not stand where the function puts them, nor where it can be told to."""
        if not problem.positional or self._stands_there(problem):
            return None
        if "q_offset" in self.of.arguments and (
            problem.q_offset_given or problem.q_offset is not None
        ):
            return None
        if problem.q_offset_given:
            return "does not take q_offset"
        if self.of.causal == "square":
            return "takes causal, windows and ALiBi where Sq = Sk, without lengths"
        return (
            f"aligns {str(self.of.causal).replace('_', '-')}, and the call asks for another place"
        )

    def _stands_there(self, problem: Problem) -> bool:
        if problem.q_offset_given:
            return False
        q_length, kv_length = problem.q_length, problem.kv_length
        match self.of.causal:
            case "top_left":
                return problem.q_offset == 0
            case "square":
                return problem.q_offset == 0 and q_length == kv_length
        if problem.q_lengths or problem.kv_lengths:
            return problem.q_offset is None
        return problem.q_offset == kv_length - q_length

    def _why_no_such_mask(self, problem: Problem) -> str | None:
        if problem.mask_shape is None or not self.of.mask.endswith("_keys"):
            return None
        own = problem.mask_shape[1:3] == (1, 1)
        return None if own else "takes a mask of keys alone, (B, Sk)"

    # The call

    def run(self, problem: Problem, operands: Operands) -> tuple[Array, Array | None]:
        arrays = map(self._turned, operands[:3])
        answer = self.of.function(*arrays, **self.told(problem, operands))
        out, lse = self._read(answer, problem.return_lse)
        return self._turned(out), lse

    def told(self, problem: Problem, operands: Operands) -> dict[str, Any]:
        """The arguments beside q, k and v."""
        asked = self._asked(problem, operands)
        told = {}
        for feature, argument in self.of.arguments.items():
            if argument is None or argument in told:
                continue
            if feature in asked:
                told[argument] = asked[feature]
            elif argument in self.of.required and argument not in self._names_of(asked):
                told[argument] = problem.scale if feature == "scale" else NOTHING.get(feature)
        return told

    def _names_of(self, asked: Collection[str]) -> set[str | None]:
        return {self.of.arguments.get(feature) for feature in asked}

    def _asked(self, problem: Problem, operands: Operands) -> dict[str, Any]:
        """What is asked, by feature, in the forms that the function has for it."""
        asked: dict[str, Any] = {"causal": problem.causal}
        if problem.window is not None:
            asked["window"] = self._window(problem)
        if problem.positional and not self._stands_there(problem):
            given = operands.q_offset
            asked["q_offset"] = problem.q_offset if given is None else _one_or_each(given)
        for name in ("q_lengths", "kv_lengths"):
            asked[name] = getattr(operands, name)
        for name, axis in (("q_segment_ids", 2), ("kv_segment_ids", 3)):
            ids = getattr(operands, name)
            asked[name] = None if ids is None else ids.reshape(ids.shape[0], ids.shape[axis])
        if operands.sinks is not None:
            asked["sinks"] = operands.sinks.reshape(problem.q_heads)
        if (slopes := operands.alibi_slopes) is not None:
            asked["alibi_slopes"] = (
                slopes[0, :, 0, 0] if slopes.shape[0] == 1 else slopes[:, :, 0, 0]
            )
        asked |= self._mask_and_bias(operands)
        asked["softcap"] = problem.softcap
        if "scale" in problem.features:
            asked["scale"] = problem.scale
        asked["grouped_heads"] = True if problem.group != 1 else None
        asked["return_lse"] = True if problem.return_lse else None
        return {name: x for name, x in asked.items() if x is not None}

    def _window(self, problem: Problem) -> Any:
        left, right = problem.window or (None, None)
        match self.of.window:
            case "pair_minus_one":
                return tuple(-1 if side is None else side for side in (left, right))
            case "last":
                return None if left is None else left + 1
        return left, right

    def _mask_and_bias(self, operands: Operands) -> dict[str, Any]:
        seen, bias = operands.mask, operands.bias
        arguments = self.of.arguments
        if seen is None:
            return {"bias": bias}
        if bias is not None and arguments["mask"] == arguments["bias"]:
            return {"mask": self._added(seen, operands.q, bias)}
        if self.of.mask == "additive":
            return {"mask": self._added(seen, operands.q, None), "bias": bias}
        if self.of.mask.startswith("hidden"):
            seen = ~seen
        if self.of.mask.endswith("_keys"):
            b, length = operands.q.shape[0], operands.k.shape[2]
            seen = broadcast_to(seen, (b, 1, 1, length)).reshape(b, length)
        return {"mask": seen, "bias": bias}

    def _added(self, seen: Array, q: Array, bias: Array | None) -> Array:
        """What is added to the scores: bias, or 0, and −inf where nothing is seen."""
        if self.framework == "torch":
            torch = sys.modules["torch"]
            added = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
            return torch.where(seen, added, -math.inf)
        library: Any = jax.numpy if self.framework == "jax" else np
        added = library.zeros((), q.dtype) if bias is None else bias
        return library.where(seen, added, library.asarray(-math.inf, added.dtype))

    def _turned(self, x: Any) -> Any:
        """(B, H, S, D) ↔ the function's layout."""
        if self.of.layout == "bhsd" or framework_of(x) is None or len(x.shape) != 4:
            return x  # what is no such array is told its caller by the dispatcher
        return x.swapaxes(1, 2)

    def _read(self, answer: Any, with_lse: bool) -> tuple[Any, Any]:
        if self.of.lse is None or "lse" in self.declines:
            if not isinstance(answer, tuple | list):
                return answer, None
            if "lse" not in self.declines:
                raise TypeError(
                    f"{self.of.title} returned a {type(answer).__name__} of {len(answer)}, and is not "
                    'said to return more than out. Pass lse="natural" or "base2", or declines=["lse"].'
                )
            return answer[0], None
        if not with_lse and not isinstance(answer, tuple | list):
            return answer, None
        if not isinstance(answer, tuple | list) or len(answer) < 2:
            raise TypeError(
                f"{self.of.title} is said to return out and lse. Got {type(answer).__name__}."
            )
        out, lse = answer[0], answer[1]
        if framework_of(lse) is not None and len(lse.shape) == 3 and self.of.lse_layout == "bsh":
            lse = lse.swapaxes(1, 2)
        return out, lse if self.of.lse == "natural" else lse * math.log(2)


def _one_or_each(offsets: Array) -> Array:
    """(B,), or a number's array of no axis."""
    return offsets.reshape(()) if tuple(offsets.shape) == (1,) else offsets


def backend_of(function: Function) -> FunctionBackend:
    """The backend of a description.

    Raises:
        TypeError: its framework is not said, and cannot be found out.
    """
    if function.framework is not None:
        return FunctionBackend(function, function.framework)
    size = function.multiple_of * -(-32 // function.multiple_of)
    dim = 64 if function.head_dims is None else next(iter(function.head_dims))

    def asked(caller: Caller) -> tuple[Callable[..., Any], list[Any]]:
        backend = FunctionBackend(function, caller.framework)
        x = np.zeros((1, 2, size, dim), np.float32)
        arrays = [caller.array(x, LAYOUTS["packed"]) for _ in range(3)]
        problem = Call.of(*arrays, causal=function.always_causal).problem
        return lambda *qkv: backend.run(problem, Operands(*qkv))[0], arrays

    return FunctionBackend(function, found_framework(function.title, asked))


@contextmanager
def registered(backend: FunctionBackend) -> Iterator[str]:
    """The backend's name, which is known for as long as this is open.

    Raises:
        ValueError: there is a backend of that name.
    """
    if backend.name in names():
        raise ValueError(
            f"there is a backend named {backend.name!r}. Pass name= to call yours otherwise."
        )
    heedful.register(backend)
    try:
        yield backend.name
    finally:
        heedful.unregister(backend.name)
