"""A report as JSON: everything in the table, every run behind it, and what it ran on."""

import math
from dataclasses import asdict
from typing import Any

from heedful_crosscheck.report.model import Reason, Report, Row
from heedful_crosscheck.run import Outcome


def render(report: Report) -> dict[str, Any]:
    """JSON types only."""
    return {
        "verdict": "nothing ran" if report.verdict == "refused" else report.verdict,
        "agree": report.agree,
        "strict": report.strict,
        "complete": report.complete,
        "backends": report.verdicts,
        "kernels": report.kernels,
        "declined": {name: list(promises) for name, promises in report.declined.items()},
        "seed": report.seed,
        "seconds": round(report.seconds, 1),
        "environment": dict(report.environment),
        "table": [_row_as_json(row) for row in report.rows],
        "refusals": [_reason_as_json(reason) for reason in report.refusals],
        "failures": [asdict(failure) for failure in report.failures],
        "losses": [asdict(loss) for loss in report.losses],
        "ceilings": [asdict(ceiling) for ceiling in report.ceilings],
        "runs": [_run_as_json(outcome) for outcome in report.outcomes],
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
            tensor: {"case": o.case, **_judgement_as_json(o, tensor)}
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


def _run_as_json(o: Outcome) -> dict[str, Any]:
    return {
        "backend": o.backend,
        "case": o.case,
        "group": o.group,
        "dtype": o.dtype,
        "verdict": o.verdict,
        "reasons": list(o.reasons),
        "lacking": {part: list(reasons) for part, reasons in o.lacking.items()},
        "tensors": {tensor: _judgement_as_json(o, tensor) for tensor in o.judgements},
        "failures": [{"tensor": f.tensor, "message": f.message} for f in o.failures],
        "losses": [{"tensor": f.tensor, "message": f.message} for f in o.losses],
        "seconds": round(o.seconds, 3),
    }


def _judgement_as_json(o: Outcome, tensor: str) -> dict[str, Any]:
    judgement = o.judgements[tensor]
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
