"""A report as JSON: everything in the table, every run behind it, and what it ran on."""

import math
from dataclasses import asdict, replace
from typing import Any

from heedful_crosscheck.location import HeatMap
from heedful_crosscheck.report.model import Reason, Report, Row
from heedful_crosscheck.run import Failure, Outcome
from heedful_crosscheck.tolerance import Judgement

FORMAT = "heedful report 1"  # another one whenever `saved` could not read what this one writes


def render(report: Report) -> dict[str, Any]:
    """JSON types only."""
    return {
        "format": FORMAT,
        "verdict": "nothing ran" if report.verdict == "refused" else report.verdict,
        "agree": report.agree,
        "strict": report.strict,
        "complete": report.complete,
        "backends": report.verdicts,
        "kernels": report.kernels,
        "declined": {name: list(promises) for name, promises in report.declined.items()},
        "command": report.command,
        "seed": report.seed,
        "seconds": round(report.seconds, 1),
        "environment": dict(report.environment),
        "table": [_row_as_json(row) for row in report.rows],
        "refusals": [_reason_as_json(reason) for reason in report.refusals],
        "failures": [_failure_as_json(failure) for failure in report.failures],
        "losses": [_failure_as_json(loss) for loss in report.losses],
        "ceilings": [asdict(ceiling) for ceiling in report.ceilings],
        "runs": [run_as_json(outcome) for outcome in report.outcomes],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    return {
        "backend": row.backend,
        "group": row.group,
        "dtype": row.dtype,
        "verdict": row.verdict,
        "factor": _number(row.factor) if row.verdict == "lossy" else None,
        "ran": len(row.ran),
        "refused": len(row.outcomes) - len(row.ran),
        "worst": {
            tensor: {"case": o.case, **_judgement_as_json(o.judgements[tensor])}
            for tensor, o in row.worst.items()
        },
    }


def _reason_as_json(reason: Reason) -> dict[str, Any]:
    return {
        "backend": reason.backend,
        "reason": reason.reason,
        "part": reason.part or "everything",
        "runs": [[o.case, o.dtype] for o in reason.outcomes],
    }


def run_as_json(o: Outcome) -> dict[str, Any]:
    """One outcome, as it stands in a report and in a journal."""
    return {
        "backend": o.backend,
        "case": o.case,
        "group": o.group,
        "dtype": o.dtype,
        "verdict": o.verdict,
        "reasons": list(o.reasons),
        "lacking": {part: list(reasons) for part, reasons in o.lacking.items()},
        "tensors": {
            tensor: _judgement_as_json(judgement) | _faults_as_json(judgement)
            for tensor, judgement in o.judgements.items()
        },
        "failures": list(map(_said_as_json, o.failures)),
        "losses": list(map(_said_as_json, o.losses)),
        "seconds": round(o.seconds, 3),
        "kernel": o.kernel,
        "lengths": o.lengths and list(o.lengths),
        "crashed": o.crashed,
        "output": o.output,
        "seed": o.seed,
        "inputs": o.inputs,
        "description": o.description,
    }


def _said_as_json(failure: Failure) -> dict[str, Any]:
    return {"tensor": failure.tensor, "message": failure.message, "causes": list(failure.causes)}


def _failure_as_json(failure: Failure) -> dict[str, Any]:
    """Where it is stands with the run."""
    return asdict(replace(failure, heat=None))


def _faults_as_json(judgement: Judgement) -> dict[str, Any]:
    """What is said of a tensor that does not agree; nothing of one that does."""
    said = {
        "faults": list(judgement.faults),
        "losses": list(judgement.losses),
        "heat": _heat_as_json(judgement.heat),
    }
    return {what: x for what, x in said.items() if x}


def _heat_as_json(heat: HeatMap | None) -> dict[str, Any] | None:
    """A line of cells is one string: as numbers they would be most of the file."""
    if heat is None:
        return None
    cells = [" ".join("-" if x is None else f"{x:.3g}" for x in line) for line in heat.cells]
    return asdict(replace(heat, cells=())) | {"cells": cells}


def _judgement_as_json(judgement: Judgement) -> dict[str, Any]:
    measures = {"error": judgement.errors, "plain": judgement.plain, "limit": judgement.limits}
    return {
        "verdict": judgement.verdict,
        "factor": _number(judgement.strain) if judgement.losses else None,
        "ceiling": judgement.ceiling,
    } | {
        name: {measure: _number(x) for measure, x in errors._asdict().items()}
        for name, errors in measures.items()
    }


def _number(x: float) -> float | None:
    """JSON has no infinity: what could not be measured is null."""
    return float(x) if math.isfinite(x) else None
