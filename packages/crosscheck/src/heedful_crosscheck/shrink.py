"""The smallest part of a failing case that still fails: Hypothesis leaves out what it can.

A part has some of the batch rows, heads, queries, keys and numbers, from the first on, and some of the
options; its numbers may be small integers, or ones. It fails where the same tensor is wrong, of those
that are wrong of the whole the first. The same part is found each time, unless the seconds run out.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np

from heedful_crosscheck.ask import Refused
from heedful_crosscheck.cases import Case, Inputs
from heedful_crosscheck.factors import AXES
from heedful_crosscheck.files import InputError
from heedful_crosscheck.question import Question
from heedful_crosscheck.recipes import Given
from heedful_crosscheck.respondent import Crashed, Raised, Respondent
from heedful_crosscheck.run import judge_all
from heedful_crosscheck.tolerance import Judgement
from heedful_crosscheck.yardstick import Tensors

ASKED = 400  # parts, at most
SECONDS = 60.0

# What is left out together.
TOGETHER = (("q_segment_ids", "kv_segment_ids"), ("dropout_rate", "dropout_seed"))


class Sizes(NamedTuple):
    """Of a part: B, Hkv, Hq / Hkv, Sq, Sk, D, Dv."""

    batch: int
    kv_heads: int
    group: int
    q_length: int
    kv_length: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True)
class Part:
    """What is left of a case.

    Attributes:
        sizes: how much of each axis.
        options: which options.
        numbers: of q, k, v and the cotangents: as they are, rounded to whole ones, or all 1.
    """

    sizes: Sizes
    options: frozenset[str]
    numbers: Literal["ones", "whole", "given"]


@dataclass(frozen=True)
class Failing:
    """A question that is answered wrongly.

    Attributes:
        inputs: of the question, or its poisoned ones where only those show it.
        with_lse: whether LSE is asked for.
        tensors: which are wrong, the first one first; None where the backend raises or crashes.
        judgements: of what came; of nothing where nothing did.
        answer: what came, canonical.
        raised: what it raised, or how it crashed.
    """

    question: Question
    inputs: Inputs
    with_lse: bool
    tensors: tuple[str | None, ...]
    judgements: Mapping[str, Judgement]
    answer: Tensors
    raised: str = ""


def shrunk(
    respondent: Respondent, question: Question, with_lse: bool, seconds: float = SECONDS
) -> Failing | None:
    """The smallest part of a question that a backend answers wrongly in the same tensor.

    Args:
        respondent: the backend.
        question: what it answers wrongly.
        with_lse: whether LSE was asked for; without it, it is asked where it refuses that.
        seconds: after which the smallest that is known by then is taken.

    Returns:
        the part; the question itself where nothing can be left out; None where it does not fail again.
    """
    from hypothesis import HealthCheck, Phase, find, settings
    from hypothesis.errors import NoSuchExample

    whole = _first(respondent, question, with_lse)
    if whole is None:
        return None
    poisoned = whole.inputs is not whole.question.inputs
    end = time.monotonic() + seconds
    known: dict[Part, Failing | None] = {}

    def fails(part: Part) -> bool:
        if part not in known:
            if time.monotonic() > end:
                return False
            of_it = _asked(whole.question, part)
            found = None if of_it is None else _tried(respondent, of_it, whole.with_lse, poisoned)
            alike = found is not None and whole.tensors[0] in found.tensors
            known[part] = found if alike else None
        return known[part] is not None

    bounded = settings(
        max_examples=ASKED,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    try:
        part = find(_parts(whole.question), fails, settings=bounded, random=Random(0))
    except NoSuchExample:
        return whole
    return known[part]


def _first(respondent: Respondent, question: Question, with_lse: bool) -> Failing | None:
    """How it is asked most simply, and is answered wrongly still."""
    alone = replace(question, lse_cotangent=np.zeros_like(question.lse_cotangent))
    for of_lse in dict.fromkeys((with_lse, False)):
        for asked, poisoned in ((alone, False), (question, False), (alone, True), (question, True)):
            found = _tried(respondent, asked, of_lse, poisoned)
            if found is not None:
                return found
    return None


def _tried(
    respondent: Respondent, question: Question, with_lse: bool, poisoned: bool
) -> Failing | None:
    inputs = question.poisoned if poisoned else question.inputs
    if inputs is None:
        return None
    try:
        respondent.start(question)
        answer = respondent.answer(question, inputs, with_lse)
    except Refused:
        return None
    except Raised as raised:  # where it says which tensor is no result, nothing of its own did
        return Failing(question, inputs, with_lse, (raised.tensor,), {}, {}, str(raised))
    except Crashed as crash:
        return Failing(question, inputs, with_lse, (None,), {}, {}, str(crash))
    judgements, faults = judge_all(question, answer, with_lse)
    if not faults:
        return None
    canonical = question.canonical(answer) if judgements else {}
    wrong = tuple(dict.fromkeys(tensor for tensor, _ in faults))
    return Failing(question, inputs, with_lse, wrong, judgements, canonical)


# Parts


def _parts(question: Question) -> Any:
    """A strategy: of all parts, those first that have less of everything."""
    from hypothesis import strategies as st

    whole = _sizes(question)
    options = [name for name in question.inputs.options if name != "layout"]
    droppable = [n for n in options if not any(n in names[1:] for names in TOGETHER)]

    def at_most(size: int) -> Any:
        return st.integers(1, 2 * size - 1).map(
            lambda n: min(n, size)
        )  # all of it, half of the time

    @st.composite
    def parts(draw: Callable[..., Any]) -> Part:
        kept = {name for name in droppable if draw(st.integers(0, 5))}  # most, most of the time
        kept |= {
            other for names in TOGETHER if names[0] in kept for other in names if other in options
        }
        sizes = Sizes(*(draw(at_most(size)) for size in whole))
        return Part(sizes, frozenset(kept), draw(st.sampled_from(("ones", "whole", "given"))))

    return parts()


def _sizes(question: Question) -> Sizes:
    p = question.problem
    sizes = p.batch, p.kv_heads, p.group, p.q_length, p.kv_length, p.head_dim, p.value_dim
    return Sizes(*sizes)


def _asked(question: Question, part: Part) -> Question | None:
    """The question of a part; None where there is none."""
    b, hkv, group, sq, sk, d, dv = part.sizes
    whole = question.problem.group
    heads = [h * whole + g for h in range(hkv) for g in range(group)]
    x = question.operands
    arrays = {
        "q": x.q[:b][:, heads][:, :, :sq, :d],
        "k": x.k[:b, :hkv, :sk, :d],
        "v": x.v[:b, :hkv, :sk, :dv],
    }
    cotangents = {
        "out": question.out_cotangent[:b][:, heads][:, :, :sq, :dv],
        "lse": question.lse_cotangent[:b][:, heads][:, :, :sq],
    }
    if part.numbers != "given":
        arrays = {n: _simpler(a, part.numbers) for n, a in arrays.items()}
        if cotangents["lse"].any():
            cotangents["lse"] = _simpler(cotangents["lse"], part.numbers)
        cotangents["out"] = _simpler(cotangents["out"], part.numbers)
    given = {n: a for n, a in question.inputs.options.items() if n in part.options or n == "layout"}
    options = {n: a for n, a in given.items() if not isinstance(a, np.ndarray)}
    for name in given.keys() - options.keys():
        arrays[name] = _of_part(name, getattr(x, name), part.sizes, heads)
    case = Case(
        name=f"a part of {question.case.name}",
        group=question.case.group,
        make=Given({n: _wide(a) for n, a in arrays.items()}),
        options=options,
        dtype=question.dtype,
        wide_bias=question.case.wide_bias,
        return_lse=question.case.return_lse,
        caller=question.case.caller,
        cotangents={n: _wide(a) for n, a in cotangents.items()},
    )
    try:
        found = Question.of(case, 0, question.dtype, question.caller, question.declines)
        found.check_range()
    except (InputError, ValueError):  # an option that goes with another, or numbers too large
        return None
    return None if found.unpromised else found


def _of_part(name: str, x: np.ndarray, sizes: Sizes, heads: list[int]) -> np.ndarray:
    """An option's canonical array, cut to a part, as `Case.make` has it."""
    x = np.asarray(x)
    if name in ("q_lengths", "kv_lengths", "q_offset", "dropout_seed"):
        longest = {"q_lengths": sizes.q_length, "kv_lengths": sizes.kv_length}.get(name)
        cut = x[: sizes.batch].astype(np.int32)
        return cut if longest is None else np.minimum(cut, longest)
    whole = {0: range(sizes.batch), 1: heads, 2: range(sizes.q_length), 3: range(sizes.kv_length)}
    for axis, places in whole.items():
        if x.shape[axis] > 1:
            x = np.take(x, places, axis)
    if AXES.get(name, "").startswith("b") and name.endswith("segment_ids"):
        return x.reshape(len(x), -1)
    return x


def _simpler(x: np.ndarray, numbers: str) -> np.ndarray:
    wide = x.astype(np.float64)
    return np.ones_like(wide) if numbers == "ones" else np.clip(np.round(wide), -3, 3) + 0.0


def _wide(x: np.ndarray) -> np.ndarray:
    return x if x.dtype.kind in "biu" else x.astype(np.float64)
