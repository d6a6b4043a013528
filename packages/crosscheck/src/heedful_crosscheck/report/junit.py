"""A report as JUnit's XML, which CI systems show: a suite a backend, a test a case and dtype."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from heedful_crosscheck.report.model import Report, printable
from heedful_crosscheck.run import Outcome


def render(report: Report) -> str:
    """The file's text, without a byte that XML forbids.

    Refused is skipped. Lossy passes, and the test's output says so; where the report is strict it fails.
    """
    suites = Element("testsuites", {"name": "heedful crosscheck"} | _sums(report, report.outcomes))
    for name, outcomes in report.by_backend.items():
        suite = SubElement(suites, "testsuite", {"name": printable(name)} | _sums(report, outcomes))
        properties = SubElement(suite, "properties")
        said = {"seed": report.seed, "command": report.command or "", **report.environment}
        for key, value in said.items():
            SubElement(properties, "property", name=printable(key), value=printable(str(value)))
        for outcome in outcomes:
            _test(report, suite, outcome)
    indent(suites)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{tostring(suites, encoding="unicode")}\n'


def _test(report: Report, suite: Element, o: Outcome) -> None:
    test = SubElement(
        suite,
        "testcase",
        classname=printable(f"{o.backend}.{o.group}"),
        name=printable(f"{o.case}[{report.asked(o)}]"),
        time=f"{o.seconds:.3f}",
    )
    kind, said = _result(report, o)
    text = printable("\n".join(said))
    if kind:
        first = printable(said[0]) if said else o.verdict
        SubElement(test, kind, message=first, type=o.verdict).text = text
    elif text:
        SubElement(test, "system-out").text = text


def _result(report: Report, o: Outcome) -> tuple[str, Sequence[str]]:
    """What JUnit calls it, "" where it passes, and what there is to say."""
    if o.verdict == "refused":
        return "skipped", o.reasons
    asked = [f"what was asked: {o.description}"] if o.description else []
    found = [f.said for f in (*o.failures, *o.losses)]
    fails = o.verdict == "disagree" or (report.strict and o.verdict == "lossy")
    kind = "error" if o.verdict == "crashed" else "failure" if fails else ""
    return kind, [*found, *asked, *([o.output] if o.output else [])] if found else []


def _sums(report: Report, outcomes: Sequence[Outcome]) -> dict[str, str]:
    kinds = [_result(report, o)[0] for o in outcomes]
    return {
        "tests": str(len(outcomes)),
        "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
        "skipped": str(kinds.count("skipped")),
        "time": f"{sum(o.seconds for o in outcomes):.3f}",
    }
