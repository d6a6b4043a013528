"""What a backend answered on some machine, kept in a file, and judged beside today's answers elsewhere.

A record is a safetensors file: the answers to some cases, by `<case>/<dtype>/<tensor>`, as the call
returned them; in its metadata the backend, what computed, where and when, the seed, and a hash of each
case's inputs, which are made again. So a machine without a GPU is held to what a kernel answered on one.
"""

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from msgspec import Struct

from heedful.dispatch.registry import in_a_line
from heedful_crosscheck.ask import Refused, about, ask, float64_where_asked
from heedful_crosscheck.cases import Case, everything
from heedful_crosscheck.explanation import Explainer
from heedful_crosscheck.files import InputError
from heedful_crosscheck.question import Question
from heedful_crosscheck.report.saved import Count, Dtype
from heedful_crosscheck.run import Outcome, concluded, dtypes_of, judge_by
from heedful_crosscheck.tolerance import Standard
from heedful_crosscheck.yardstick import Tensors

FORMAT = "heedful record 1"


@dataclass(frozen=True)
class Run:
    """One answer of a record.

    Attributes:
        case, dtype: the question.
        inputs: a hash of its arrays and options.
        with_lse: whether LSE was asked for, and differentiated.
        answer: the tensors, as called.
    """

    case: str
    dtype: str
    inputs: str
    with_lse: bool
    answer: Tensors


@dataclass(frozen=True)
class Record:
    """The answers of one backend, as they were on some machine.

    Attributes:
        backend: its name.
        kernel: what computed, in its words.
        seed: of the questions.
        environment: versions, machine and date.
        runs: the answers.
    """

    backend: str
    kernel: str
    seed: int
    environment: Mapping[str, Any]
    runs: tuple[Run, ...]


def record(
    backend: str,
    cases: Sequence[Case],
    dtypes: Sequence[str] | None,
    seed: int,
    environment: Mapping[str, Any],
) -> Record:
    """Asks a backend, and keeps what it answers; what it refuses is left out.

    Raises:
        InputError: it refused everything.
        Whatever the backend raises.
    """
    runs, reasons, kernel = [], dict[str, None](), ""
    for case in cases:
        for dtype in dtypes_of(case, dtypes):
            question = Question.of(case, seed, dtype)
            for with_lse in (True, False) if case.return_lse else (False,):
                try:
                    with float64_where_asked(dtype):
                        answer = ask(backend, question, question.inputs, with_lse)
                except Refused as refusal:
                    reasons |= dict.fromkeys(refusal.reasons)
                    continue
                kernel = about(backend, question)[0]
                runs.append(Run(case.name, dtype, question.inputs.fingerprint, with_lse, answer))
                break
    if not runs:
        raise InputError(f"{backend} refused every case: {'; '.join(reasons)}")
    return Record(backend, kernel, seed, environment, tuple(runs))


def save(found: Record, path: str | Path) -> None:
    """Writes a record, the whole file or none of it."""
    tensors = {
        f"{run.case}/{run.dtype}/{name}": np.ascontiguousarray(x)
        for run in found.runs
        for name, x in run.answer.items()
    }
    facts = {
        "format": FORMAT,
        "backend": found.backend,
        "kernel": found.kernel,
        "seed": found.seed,
        "environment": dict(found.environment),
        "runs": [
            {"case": r.case, "dtype": r.dtype, "inputs": r.inputs, "with_lse": r.with_lse}
            for r in found.runs
        ],
    }
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    safetensors.numpy.save_file(tensors, part, {"heedful": json.dumps(facts)})
    part.replace(path)


class _Asked(Struct):
    """What of a run stands in the metadata."""

    case: str
    dtype: Dtype
    inputs: str
    with_lse: bool


class _Facts(Struct):
    """The metadata."""

    format: str
    backend: str
    kernel: str
    seed: Count
    environment: dict[str, Any]
    runs: tuple[_Asked, ...]


def load(path: str | Path) -> Record:
    """Reads a record.

    Raises:
        InputError: the file cannot be read, or is no record.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            facts = msgspec.json.decode((file.metadata() or {}).get("heedful", "null"), type=_Facts)
            if facts.format != FORMAT:
                raise ValueError(f"its format is {facts.format!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path} is no {FORMAT!r}, which `heedful record` writes: {error}"
        ) from error
    runs = []
    for run in facts.runs:
        prefix = f"{run.case}/{run.dtype}/"
        answer = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        runs.append(Run(run.case, run.dtype, run.inputs, run.with_lse, answer))
    return Record(facts.backend, facts.kernel, facts.seed, facts.environment, tuple(runs))


def replay(found: Record, backends: Sequence[str]) -> list[Outcome]:
    """Judges the recorded answers by the oracle, and each backend's by the recorded ones.

    By the recorded ones as by the oracle, but that both may be off: a backend agrees where it is no
    farther from them than two who agree with the oracle may be from each other.

    Raises:
        InputError: a case is unknown here, its inputs are not those that were asked, or what was
            answered is no answer to it.
    """
    known = {case.name: case for case in everything()}
    explainers: defaultdict[str, Explainer] = defaultdict(Explainer)
    outcomes = []
    for run in found.runs:
        if run.case not in known:
            raise InputError(
                f"the record has a case {run.case!r}, which is none here. Record again."
            )
        question = Question.of(known[run.case], found.seed, run.dtype)
        if question.inputs.fingerprint != run.inputs:
            raise InputError(
                f"the inputs of {run.case} in {run.dtype} are not those that were recorded: the case, "
                "or how NumPy draws, has changed. Record again."
            )
        recorded = f"recorded {found.backend}"
        of_oracle = question.standards(run.with_lse)
        if "out" not in run.answer or run.answer.keys() - of_oracle.keys():
            raise InputError(
                f"the record's {run.case} in {run.dtype} must be of out, and of {', '.join(of_oracle)} "
                f"alone. Got {', '.join(run.answer) or 'nothing'}."
            )
        asked = _Posed(question, run.with_lse, explainers[found.backend])
        outcomes.append(_judged(recorded, asked, of_oracle, run.answer))
        if question.misshapen(run.answer):
            continue  # which was said, and nobody can be held to it
        answer = question.canonical(run.answer)
        of_record = {tensor: of_oracle[tensor].beside(x) for tensor, x in answer.items()}
        for name in backends:
            asked = _Posed(question, run.with_lse, explainers[name])
            outcomes.append(_answered(name, asked, of_record))
    return outcomes


class _Posed(NamedTuple):
    """A question, whether LSE is asked for, and who knows what explained the one who is asked so far."""

    question: Question
    with_lse: bool
    explainer: Explainer


def _answered(backend: str, asked: _Posed, standards: dict[str, Standard]) -> Outcome:
    question, with_lse, _ = asked
    lacking: dict[str, tuple[str, ...]] = {}
    started = time.perf_counter()
    try:
        with float64_where_asked(question.dtype):
            try:
                answer = ask(backend, question, question.inputs, with_lse)
            except Refused as refusal:
                if not with_lse:
                    raise
                answer = ask(backend, question, question.inputs, with_lse=False)
                lacking["LSE"] = refusal.reasons
                standards = {"out": standards["out"]}  # gradients were recorded with LSE's
                asked = asked._replace(with_lse=False)
        found = _judged(backend, asked, standards, answer)
        seconds, kernel = time.perf_counter() - started, about(backend, question)[0]
        return replace(found, lacking=lacking, seconds=seconds, kernel=kernel)
    except Refused as refusal:
        return replace(_blank(backend, question), reasons=refusal.reasons)
    except Exception as error:  # whatever a backend raises, the others are judged
        return concluded(
            _blank(backend, question), question, [(None, f"raised {in_a_line(error)}")]
        )


def _judged(name: str, asked: _Posed, standards: dict[str, Standard], answer: Tensors) -> Outcome:
    question, with_lse, explainer = asked
    judgements, faults = judge_by(standards, question, answer)
    causes: tuple[str, ...] = ()
    if any(judgement.verdict != "agree" for judgement in judgements.values()):
        causes = explainer.causes(lambda: answer, question, with_lse)
    result = replace(_blank(name, question), judgements=judgements)
    return concluded(result, question, faults, causes)


def _blank(name: str, question: Question) -> Outcome:
    return Outcome(name, question.case.name, question.case.group, question.dtype)
