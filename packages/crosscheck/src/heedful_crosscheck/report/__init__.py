"""What came of a crosscheck: `model` is what is known, each other file one way to show it."""

from heedful_crosscheck.report.environment import environment
from heedful_crosscheck.report.model import VERDICTS, WIDTH, Ceiling, Reason, Report, Row

__all__ = ["VERDICTS", "WIDTH", "Ceiling", "Reason", "Report", "Row", "environment"]
