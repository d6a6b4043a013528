"""One case in one dtype: what every backend is asked, and what is right.

Between the caller's rank and layout and (B, H, S, D) it goes its own way, not by `Call.operands` and
`Call.restore`: a fault of theirs that undid itself on the way back would stay unseen.
"""

import math
import numbers
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from heedful import Operands, Problem, oracle
from heedful.call import Call
from heedful_crosscheck.callers import Caller
from heedful_crosscheck.cases import Case, Inputs
from heedful_crosscheck.factors import AXES
from heedful_crosscheck.files import InputError
from heedful_crosscheck.location import edges
from heedful_crosscheck.recipes import Given
from heedful_crosscheck.tolerance import Standard
from heedful_crosscheck.yardstick import Arithmetic, Tensors, attend, best, lossy


@dataclass(frozen=True)
class Answers:
    """What is right, and what honest arithmetic makes of it.

    Attributes:
        right: the oracle's tensors, float64.
        best: the yardstick's, once for each honest order of operations.
        lossy: the same, by arithmetic that loses what kernels are known to lose.
    """

    right: Tensors
    best: tuple[Tensors, ...]
    lossy: tuple[Tensors, ...]


def described(case: str, seed: int) -> str:
    """What a case's own description leaves out: a seed that is not everybody's."""
    return ", ".join(filter(None, (case, f"seed {seed}" if seed else "")))


@dataclass(frozen=True)
class Question:
    """One case in one dtype: inputs, cotangents, and, once somebody needs them, the answers.

    Attributes:
        out_cotangent, lse_cotangent: NumPy, (B, Hq, Sq, Dv) and (B, Hq, Sq).
        caller: whose arrays call; None: the case's, or else the backend's own framework's.
        declines: promises of the contract that whoever is asked does not make, of `function.PROMISES`.
        seed: of inputs and cotangents.
    """

    case: Case
    dtype: str
    inputs: Inputs
    out_cotangent: np.ndarray
    lse_cotangent: np.ndarray
    caller: Caller | None = None
    declines: frozenset[str] = frozenset()
    seed: int = 0

    @classmethod
    def of(
        cls,
        case: Case,
        seed: int,
        dtype: str,
        caller: Caller | None = None,
        declines: frozenset[str] = frozenset(),
    ) -> "Question":
        """The question that a case asks in a dtype.

        Raises:
            InputError: the case's numbers do not fit the dtype.
        """
        inputs = case.inputs(seed, dtype)
        problem = _problem(inputs)
        random = case.random(seed, "cotangents")
        rows = (problem.batch, problem.q_heads, problem.q_length)
        drawn = random.standard_normal((*rows, problem.value_dim))
        out_cotangent = case.cotangent("out", drawn, dtype)
        lse_cotangent = case.cotangent("lse", random.standard_normal(rows), problem.accumulator)
        if "lse_gradient" in declines:
            lse_cotangent = np.zeros_like(lse_cotangent)
        cotangents = out_cotangent, lse_cotangent
        return cls(case, dtype, inputs, *cotangents, caller, declines, seed)

    @cached_property
    def problem(self) -> Problem:
        """Of the inputs as NumPy arrays, LSE asked for."""
        return _problem(self.inputs)

    @property
    def calls_from(self) -> str | None:
        """The framework of the arrays; None: the backend's own."""
        return self.case.caller if self.caller is None else self.caller.framework

    @property
    def description(self) -> str:
        """What is asked, where the case's name does not say it."""
        return described(self.case.description, self.seed)

    def alone(self, inputs: Inputs) -> "Question":
        """What whoever is asked is told: these inputs, nothing of what is right or how they are made."""
        case = replace(self.case, make=Given({}), cotangents={})
        return replace(self, case=case, inputs=inputs)

    # What is right

    @cached_property
    def _forward(self) -> Tensors:
        out, lse = oracle.forward(self.problem, self.operands)
        return {"out": out, "lse": lse}

    @cached_property
    def _with_lse(self) -> Answers:
        return self._answers(self.lse_cotangent)

    @cached_property
    def _without_lse(self) -> Answers:
        return self._answers(np.zeros_like(self.lse_cotangent))

    def answers(self, with_lse: bool) -> Answers:
        """The right tensors and the yardsticks'; the gradients with or without that of LSE."""
        return self._with_lse if with_lse else self._without_lse

    def _answers(self, lse_cotangent: np.ndarray) -> Answers:
        cotangents = self.out_cotangent, lse_cotangent
        gradients = oracle.gradients(self.problem, self.operands, *cotangents).differentiable
        right = self._forward | {f"d{n}": self.as_came(n, x) for n, x in gradients.items()}

        def by(arithmetic: Arithmetic) -> Tensors:
            tensors = attend(arithmetic, self.problem, self.operands, *cotangents)
            return {n: self.as_came(n.removeprefix("d"), x) for n, x in tensors.items()}

        return Answers(right, *(tuple(map(by, orders(self.dtype))) for orders in (best, lossy)))

    def standards(self, with_lse: bool) -> dict[str, Standard]:
        """What each tensor is judged by."""
        return self._standards_with_lse if with_lse else self._standards_without_lse

    @cached_property
    def _standards_with_lse(self) -> dict[str, Standard]:
        return self._standards(self._with_lse)

    @cached_property
    def _standards_without_lse(self) -> dict[str, Standard]:
        return self._standards(self._without_lse)

    def _standards(self, answers: Answers) -> dict[str, Standard]:
        of_queries, of_keys = edges(self.problem, self.operands)
        by_rows = {
            "out": of_queries,
            "lse": of_queries,
            "dq": of_queries,
            "dk": of_keys,
            "dv": of_keys,
        }
        return {
            tensor: Standard.of(
                tensor,
                right,
                [reading[tensor] for reading in answers.best],
                self.dtype,
                self.hidden[tensor],
                self.uncancelled.get(tensor, 0.0),
                [reading[tensor] for reading in answers.lossy],
                by_rows.get(tensor, {}),
            )
            for tensor, right in answers.right.items()
        }

    def check_range(self) -> None:
        """Whether the question can be answered in its dtype at all.

        Raises:
            InputError: a number on the way or a result lies beyond the dtype, for honest arithmetic
                and so for every backend; or a whole tensor below the normal numbers, where digits are
                lost one by one, and processors may take one for 0.
        """
        answers = self.answers(self.case.return_lse)
        smallest = np.finfo(self.problem.accumulator).tiny
        for name, want in answers.right.items():
            if name != "lse" and 0 < np.abs(want).max(initial=0) < smallest:
                raise InputError(
                    f"{self.case.name}: {name} reaches {np.abs(want).max():.2g}, below the normal "
                    f"numbers of {self.problem.accumulator}: there is nothing to judge by. Scale the "
                    "inputs."
                )
            nothing_seen = np.isneginf(want) if name == "lse" else np.False_
            for tensors in (answers.right, *answers.best):
                if not (np.isfinite(tensors[name]) | nothing_seen).all():
                    raise InputError(
                        f"{self.case.name}: {name} overflows in {self.dtype}, in honest arithmetic "
                        f"too: there is nothing to judge by. Leave {self.dtype} out, or scale the "
                        "inputs down."
                    )

    @property
    def unpromised(self) -> str | None:
        """Why whoever declines what he declines is not asked this; None where he is."""
        if "strides" in self.declines and self.case.memory != "packed":
            return f"declines strides: arrays that are {self.case.memory}"
        if "empty_rows" in self.declines and self.hidden["out"].any():
            return "declines empty_rows: a query sees no key"
        if "empty_arrays" in self.declines and 0 in self.inputs.q.shape + self.inputs.k.shape:
            return "declines empty_arrays: an axis has no length"
        return None

    # What plays no part

    @cached_property
    def hidden(self) -> Tensors:
        """What of each tensor has no weight: queries without any, keys without any; exactly 0.

        A bias of −inf takes a key's weight as a mask does.
        """
        weighed, _, _ = self._reached
        return {n: np.logical_not(x) for n, x in weighed.items()}

    @cached_property
    def _reached(self) -> tuple[Tensors, np.ndarray, np.ndarray]:
        """Where there is weight, by tensor; which queries see anything, and which keys are seen.

        The last two (B, Hq, Sq, 1) and (B, Hkv, Sk, 1).
        """
        p = self.problem
        queries = np.zeros((p.batch, p.q_heads, p.q_length), bool)
        keys = np.zeros((p.batch, p.kv_heads, p.kv_length), bool)
        seeing, seen_keys = queries.copy(), keys.copy()
        reached = {
            f"d{n}": np.zeros(x.shape) if n not in AXES else np.ones(x.shape)
            for n, x in self.operands.differentiable.items()
            if n not in "qkv"
        }
        for part in oracle.parts(p, self.operands, p.accumulator):
            weighed = part.seen if part.bias is None else part.seen & (part.bias != -np.inf)
            queries[part.queries] = weighed.any(-1)
            keys[part.keys] |= weighed.any(0)
            seeing[part.queries] = part.seen.any(-1)
            seen_keys[part.keys] |= part.seen.any(0)
            if "dbias" in reached:
                oracle.add_over_broadcast(reached["dbias"], part, weighed.astype(np.float64))
        reached = {n: self.as_came(n.removeprefix("d"), x) > 0 for n, x in reached.items()}
        queries, keys = queries[..., None], keys[..., None]
        reached |= {"out": queries, "dq": queries, "dk": keys, "dv": keys}
        reached["lse"] = np.isfinite(self._forward["lse"])[..., None]
        return reached, seeing[..., None], seen_keys[..., None]

    @cached_property
    def poisoned(self) -> Inputs | None:
        """The inputs with inf and NaN in the q that see nothing, and in the K and V that nobody sees.

        None where all see and are seen, or where that is no promise.
        """
        _, seeing, seen = self._reached
        if (seeing.all() and seen.all()) or "hidden_nan" in self.declines:
            return None

        def poison(x: np.ndarray, used: np.ndarray) -> np.ndarray:
            bad = np.where(np.arange(x.shape[2]) % 2, np.nan, np.inf)[:, None]
            return self.as_called(np.where(used, x.astype(np.float64), bad).astype(x.dtype))

        q, k, v, *_ = self.operands
        return replace(self.inputs, q=poison(q, seeing), k=poison(k, seen), v=poison(v, seen))

    @cached_property
    def uncancelled(self) -> dict[str, float]:
        """RMS of the terms that gradients are sums of; out, LSE and dv do not cancel."""
        q, k, v = (_rms(x) for x in self.operands[:3])
        d_weight = _rms(self.out_cotangent) * v * self.problem.value_dim**0.5
        d_product = d_weight * abs(self.problem.scale)
        options = (n for n in self.operands.differentiable if n not in "qkv")
        found = {f"d{n}": d_weight for n in options}
        return found | {"dq": d_product * k, "dk": d_product * q}

    # Between the call's rank and layout and (B, H, S, D)

    @property
    def _lead(self) -> tuple[int, ...]:
        """The leading axes of the call's q, of which B is the product."""
        return self.inputs.q.shape[:-3]

    @property
    def _heads_last(self) -> bool:
        return self.inputs.options.get("layout") == "bshd" and self.inputs.q.ndim > 2

    @cached_property
    def operands(self) -> Operands:
        """The arrays of the call in canonical form."""
        q, k, v = (self._from_called(x) for x in (self.inputs.q, self.inputs.k, self.inputs.v))
        arrays = self.inputs.arrays
        rows = {n: self._each_row(x) for n, x in arrays.items() if AXES.get(n) == "b"}
        others = {n: self.over_scores(n, x) for n, x in arrays.items() if n not in rows}
        offset = rows.pop("q_offset", None)
        number = self.inputs.options.get("q_offset")
        if offset is None and isinstance(number, numbers.Integral):
            offset = self._each_row(number)
        if offset is None and self.inputs.options.get("causal") == "top_left":
            offset = self._each_row(0)
        if offset is None:
            real_keys = rows.get("kv_lengths", self._each_row(k.shape[2]))
            offset = real_keys - rows.get("q_lengths", self._each_row(q.shape[2]))
        return Operands(q, k, v, **others, **rows, q_offset=offset)

    def over_scores(self, name: str, x: np.ndarray) -> np.ndarray:
        """An array option → rank 4, each axis full or 1 of (B, Hq, Sq, Sk)."""
        if axes := AXES.get(name):
            return self._by_axes(axes, x)
        if name == "mask" and len(self._lead) == 1 and x.shape == (*self._lead, self._kv_length):
            return x[:, None, None, :]
        x = x.reshape(*self._lead_of(x), *((1, 1, 1, *x.shape)[-3:]))
        if set(x.shape[:-3]) == {1}:
            return x.reshape(1, *x.shape[-3:])
        whole = np.broadcast_to(x, (*(self._lead or (1,)), *x.shape[-3:]))
        return whole.reshape(math.prod(self._lead), *x.shape[-3:])

    def _by_axes(self, axes: str, x: np.ndarray) -> np.ndarray:
        """An array that has some axes of "bhqk" and no others."""
        if "b" in axes:
            own = x.shape[-(len(axes) - 1) :]
            x = np.broadcast_to(x, (*self._lead, *own)).reshape(math.prod(self._lead), *own)
        return np.expand_dims(x, [n for n, axis in enumerate("bhqk") if axis not in axes])

    @property
    def _kv_length(self) -> int:
        return self.inputs.k.shape[-3 if self._heads_last else -2]

    def _lead_of(self, x: np.ndarray) -> tuple[int, ...]:
        """The leading axes of a mask or bias as it came, each full or 1."""
        return ((1,) * max(len(self._lead), 1) + x.shape[:-3])[-max(len(self._lead), 1) :]

    def _each_row(self, x: np.ndarray | numbers.Integral | int) -> np.ndarray:
        """Lengths or offsets → (B,), wide enough to be subtracted."""
        wide = np.asarray(x).astype(np.int64)
        flat = np.broadcast_to(wide, self._lead) if wide.ndim == len(self._lead) else wide
        return np.broadcast_to(flat.reshape(-1), math.prod(self._lead))

    def as_came(self, name: str, x: np.ndarray) -> np.ndarray:
        """A canonical gradient of an option → rank 4, summed where the option was repeated to fill B.

        Of q, k and v, and of what is no operand, as it is.
        """
        if name not in self.inputs.options:
            return x
        if name in AXES:
            return x if x.size == self.inputs.options[name].size else x.sum(0, keepdims=True)
        lead = self._lead_of(self.inputs.options[name])
        if x.shape[0] == math.prod(lead):
            return x
        x = x.reshape(*self._lead, *x.shape[1:])
        x = x.sum(tuple(axis for axis, size in enumerate(lead) if size == 1), keepdims=True)
        return x.reshape(math.prod(lead), *x.shape[-3:])

    def gradient_as_called(self, name: str, x: np.ndarray) -> np.ndarray:
        """A canonical gradient → the shape of what it is of, as called."""
        if name in "qkv":
            return self.as_called(x)
        return self.as_came(name, x).reshape(self.inputs.options[name].shape)

    def as_called(self, x: np.ndarray) -> np.ndarray:
        """(B, H, S, D) → the rank and layout of the call."""
        if self._heads_last:
            x = x.swapaxes(1, 2)
        return x.reshape(*self._lead, *x.shape[1:]) if self.inputs.q.ndim > 2 else x[0, 0]

    def rows_as_called(self, x: np.ndarray) -> np.ndarray:
        """(B, H, S) → the rank of the call; LSE knows no layout."""
        return x.reshape(*self._lead, *x.shape[1:]) if self.inputs.q.ndim > 2 else x[0, 0]

    def _from_called(self, x: np.ndarray) -> np.ndarray:
        if x.ndim == 2:
            return x[None, None]
        x = x.reshape(math.prod(self._lead), *x.shape[-3:])
        return x.swapaxes(1, 2) if self._heads_last else x

    def canonical(self, tensors: Tensors) -> Tensors:
        """Tensors in the rank and layout of the call → (B, H, S, D), LSE (B, H, S)."""
        shapes = {"lse": self.lse_cotangent.shape}
        for name, x in self.operands.differentiable.items():
            if name not in "qkv":
                shapes[f"d{name}"] = self.as_came(name, np.broadcast_to(0.0, x.shape)).shape
        return {
            n: x.reshape(shapes[n]) if n in shapes else self._from_called(x)
            for n, x in tensors.items()
        }

    def misshapen(self, tensors: Tensors) -> list[tuple[str, str]]:
        """Tensors whose shape or dtype breaks the contract, and how."""
        x = self.inputs
        like: Tensors = {"dq": x.q, "dk": x.k, "dv": x.v}
        like |= {f"d{name}": option for name, option in x.arrays.items()}
        like["out"] = self.as_called(self.out_cotangent)
        like["lse"] = self.rows_as_called(self.lse_cotangent)
        return [
            (
                name,
                f"{name} is {got.dtype} {got.shape}, expected {like[name].dtype} {like[name].shape}",
            )
            for name, got in tensors.items()
            if (got.dtype, got.shape) != (like[name].dtype, like[name].shape)
        ]


def _problem(inputs: Inputs) -> Problem:
    return Call.of(inputs.q, inputs.k, inputs.v, **inputs.options, return_lse=True).problem


def _rms(x: np.ndarray) -> float:
    """Root of the mean square, of numbers whose squares may overflow."""
    largest = float(np.abs(x.astype(np.float64)).max(initial=0.0))
    if not largest:
        return 0.0
    return largest * float(np.sqrt(((x / np.float64(largest)) ** 2).mean()))
