"""One case in one dtype: what every backend is asked, and what is right."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from heedful import Operands, Problem, oracle
from heedful_torch.crosscheck.cases import Case, Inputs
from heedful_torch.crosscheck.yardstick import Tensors, plain, seen_keys, sum_to


@dataclass(frozen=True)
class Question:
    """One case in one dtype: inputs, cotangents, and, once somebody needs them, the answers.

    Attributes:
        problem: of the inputs as NumPy arrays, LSE asked for.
        out_cotangent, lse_cotangent: NumPy, (B, Hq, Sq, Dv) and (B, Hq, Sq).
    """

    case: Case
    dtype: str
    inputs: Inputs
    problem: Problem
    out_cotangent: np.ndarray
    lse_cotangent: np.ndarray

    @classmethod
    def of(cls, case: Case, seed: int, dtype: str) -> "Question":
        """The question that a case asks in a dtype.

        Raises:
            InputError: the case's numbers do not fit the dtype.
        """
        inputs = case.inputs(seed, dtype)
        problem = Problem.of(inputs.q, inputs.k, inputs.v, **inputs.options, return_lse=True)
        random = case.random(seed, "cotangents")
        rows = (problem.batch, problem.q_heads, problem.q_length)
        out_cotangent = random.standard_normal((*rows, problem.value_dim)).astype(dtype)
        lse_cotangent = random.standard_normal(rows).astype(problem.accumulator)
        return cls(case, dtype, inputs, problem, out_cotangent, lse_cotangent)

    @cached_property
    def operands(self) -> Operands:
        x = self.inputs
        return self.problem.canonical(x.q, x.k, x.v, **x.options)

    # What is right

    @cached_property
    def _forward(self) -> Tensors:
        out, lse = oracle.forward(self.problem, self.operands)
        return {"out": out, "lse": lse}

    @cached_property
    def _with_lse(self) -> tuple[Tensors, Tensors]:
        return self._answers(self.lse_cotangent)

    @cached_property
    def _without_lse(self) -> tuple[Tensors, Tensors]:
        return self._answers(np.zeros_like(self.lse_cotangent))

    def answers(self, with_lse: bool) -> tuple[Tensors, Tensors]:
        """The oracle's tensors and plain attention's; the gradients with or without that of LSE."""
        return self._with_lse if with_lse else self._without_lse

    def _answers(self, lse_cotangent: np.ndarray) -> tuple[Tensors, Tensors]:
        cotangents = self.out_cotangent, lse_cotangent
        dq, dk, dv, dbias = oracle.gradients(self.problem, self.operands, *cotangents)
        right = self._forward | {"dq": dq, "dk": dk, "dv": dv}
        if dbias is not None:
            right["dbias"] = dbias
        return right, plain(self.problem, self.operands, *cotangents)

    # What plays no part

    @cached_property
    def _seen(self) -> np.ndarray:
        return seen_keys(self.problem, self.operands)

    @cached_property
    def hidden(self) -> Tensors:
        """What of each tensor belongs to a query that sees nothing, or to a key that nobody sees."""
        queries = np.logical_not(self._seen.any(-1, keepdims=True))
        b, _, sq, sk = self._seen.shape
        by_key_head = self._seen.reshape(b, self.problem.kv_heads, -1, sq, sk)
        keys = np.logical_not(by_key_head.any((2, 3)))[..., None]
        hidden = {"out": queries, "lse": queries, "dq": queries, "dk": keys, "dv": keys}
        if self.operands.bias is not None:
            hidden["dbias"] = ~sum_to(self._seen, self.operands.bias.shape).astype(bool)
        return hidden

    @cached_property
    def poisoned(self) -> Inputs | None:
        """The inputs with inf and NaN in the K and V that nobody sees; None where all are seen."""
        hidden = self.hidden["dk"]
        if not hidden.any():
            return None
        poison = np.where(np.arange(hidden.shape[2]) % 2, np.nan, np.inf)[:, None]
        k, v = (
            self.as_called(np.where(hidden, poison, x.astype(np.float64)).astype(x.dtype))
            for x in (self.operands.k, self.operands.v)
        )
        return replace(self.inputs, k=k, v=v)

    @cached_property
    def uncancelled(self) -> dict[str, float]:
        """RMS of the terms that dq, dk and dbias are sums of; out, LSE and dv do not cancel."""
        q, k, v = (_rms(x) for x in self.operands[:3])
        d_weight = _rms(self.out_cotangent) * v * self.problem.value_dim**0.5
        d_product = d_weight * self.problem.scale
        return {"dq": d_product * k, "dk": d_product * q, "dbias": d_weight}

    # Between the layout of the call and (B, H, S, D)

    def as_called(self, x: np.ndarray) -> np.ndarray:
        """(B, H, S, D) → the rank and layout of the call."""
        called, _ = self.problem.restore(x, self.lse_cotangent)
        return called

    def canonical(self, tensors: Tensors) -> Tensors:
        """Tensors in the rank and layout of the call → (B, H, S, D), LSE (B, H, S)."""
        shapes = {"lse": self.lse_cotangent.shape, "dbias": self.problem.bias_shape}
        straight = {n: x.reshape(shapes[n]) for n, x in tensors.items() if n in shapes}
        heads = {
            n: self.problem.canonical(x, x, x).q for n, x in tensors.items() if n not in shapes
        }
        return straight | heads

    def misshapen(self, tensors: Tensors) -> list[tuple[str, str]]:
        """Tensors whose shape or dtype breaks the contract, and how."""
        out, lse = self.problem.restore(self.out_cotangent, self.lse_cotangent)
        x = self.inputs
        like = {"out": out, "lse": lse, "dq": x.q, "dk": x.k, "dv": x.v}
        like["dbias"] = x.options.get("bias")
        return [
            (
                name,
                f"{name} is {got.dtype} {got.shape}, expected {like[name].dtype} {like[name].shape}",
            )
            for name, got in tensors.items()
            if (got.dtype, got.shape) != (like[name].dtype, like[name].shape)
        ]


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean())) if x.size else 0.0
