"""A report in each of its forms: what it says, that text stays text, and what is read again."""

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from heedful_crosscheck import Report
from heedful_crosscheck.cli import app
from heedful_crosscheck.report.saved import ReportError
from reports import AGREES, IMAGE, LOSSY, SCRIPT, STRANGE, WRONG, everything, ran, refused


class Page(HTMLParser):
    """Elements, ids, links and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.ids, self.links, self.loaded, self.text = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name == "href" and tag == "a":
                self.links.append(value)
            elif name in ("src", "srcset", "action", "data") or (name == "href" and tag != "use"):
                self.loaded.append(value)
            assert not name.startswith("on"), (tag, name)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page():
    return Page(everything().as_html())


@pytest.fixture
def saved(tmp_path):
    def save(report, name="crosscheck.json"):
        (tmp_path / name).write_text(json.dumps(report.as_json()))
        return str(tmp_path / name)

    return save


def test_html_holds_no_element_that_a_name_or_a_message_asked_for(page):
    assert not {"script", "img", "iframe", "object", "base"} & set(page.elements)
    assert page.text.count(SCRIPT) > 5 and IMAGE in page.text
    assert "\x1b" not in page.text


def test_html_loads_nothing(page):
    assert page.loaded == ["data:,"]
    styles = everything().as_html().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in styles and "@import" not in styles


def test_every_link_of_html_leads_somewhere_in_it(page):
    assert len(page.ids) == len(set(page.ids))
    assert page.links and {link.removeprefix("#") for link in page.links} <= set(page.ids)


def test_html_says_who_and_why(page):
    for said in (
        "1 of the 4 backends that ran disagrees with the float64 reference, 1 crashed, "
        "1 loses more digits than it has to.",
        "dq is lossy, 3 times its limit",
        "crashed with signal 11",
        "last words",
        "LSE alone: returns none",
        "takes no window of 9",
        "Where out is off: heads by rows, 2 a cell; the darkest is 0.2; black is not finite.",
        "heedful crosscheck --backend torch:lossy --cases full --dtype bfloat16 --seed 3",
    ):
        assert said in " ".join(page.text.split()), said


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        (
            [ran("a", "x", out=AGREES)],
            "The one backend that ran agrees with the float64 reference.",
        ),
        (
            [ran("a", "x", out=AGREES), ran("b", "x", out=AGREES), refused("c", "x", "no")],
            "All 2 backends that ran agree with the float64 reference.",
        ),
        ([ran("a", "x", dq=LOSSY)], "The one backend that ran loses more digits than it has to."),
        (
            [ran("a", "x", out=WRONG), ran("b", "x", out=WRONG), ran("c", "x", dq=LOSSY)],
            "2 of the 3 backends that ran disagree with the float64 reference, "
            "1 loses more digits than it has to.",
        ),
        ([refused("a", "x", "no")], "No backend ran anything."),
    ],
)
def test_the_headline_is_a_sentence(outcomes, said):
    assert replace(everything(), outcomes=tuple(outcomes)).headline == said
    early = replace(everything(), outcomes=tuple(outcomes), complete=False).headline
    assert early.startswith(said)


def test_html_draws_what_was_measured():
    whole = everything()
    drawn = Page(whole.as_html()).elements.count("svg")
    measured = [
        name for name, found in whole.by_backend.items() if any(o.judgements for o in found)
    ]
    assert drawn == len(measured) + 1  # and one map of an error


def test_a_page_of_seventeen_backends_can_be_mailed():
    backends = ["torch:one", "torch:other"]
    outcomes = tuple(
        ran(backend, f"case {n}", dtype, f"group {n % 10}", out=AGREES, lse=AGREES, dq=AGREES)
        for backend in backends
        for n in range(25)
        for dtype in ("float32", "bfloat16", "float16", "float64")
    )
    wrong = tuple(ran(backends[0], f"wrong {n}", out=WRONG) for n in range(200))
    report = replace(everything(), outcomes=outcomes + wrong)
    assert len(report.as_html().encode()) * 17 / len(backends) < 1e6


def test_markdown_fits_a_comment_and_its_text_stays_text():
    outcomes = tuple(
        ran(f"{STRANGE} {b}", f"case {IMAGE} {n}", out=WRONG) for b in range(200) for n in range(9)
    )
    text = ""
    for report in (everything(), replace(everything(), outcomes=outcomes)):
        text = report.as_markdown()
        assert len(text) < 65536
        page = Page(MarkdownIt("gfm-like", {"linkify": False}).render(text))
        assert not {"script", "img", "code", "a"} & set(page.elements)
        assert SCRIPT in page.text and "@everyone" not in page.text
    assert "does not fit" in text


def test_markdown_tells_of_each_run_once():
    text = everything().as_markdown()
    assert "| jax:good | ✓ agree |" in text and "– 1" in text
    assert text.count("out is wrong") == 1 and "; also dv" in text


def test_junit_has_a_suite_a_backend_and_a_test_a_run():
    root = ElementTree.fromstring(everything().as_junit())
    suites = {suite.get("name"): suite for suite in root}
    counts = {
        name: tuple(suite.get(x) for x in ("tests", "failures", "errors", "skipped"))
        for name, suite in suites.items()
    }
    assert counts["jax:good"] == ("3", "0", "0", "1")
    assert counts["torch:lossy"] == ("1", "0", "0", "0")
    assert counts["jax:dies"] == ("1", "0", "1", "0")
    (strange,) = (suite for name, suite in suites.items() if SCRIPT in name)
    assert strange.get("failures") == "1"
    (skipped,) = suites["jax:good"].iter("skipped")
    assert skipped.text == "takes no window of 9\nnor of 7"
    (failure,) = strange.iter("failure")
    assert IMAGE in failure.get("message") and "dv has NaN" in failure.text
    assert f"; agrees once {SCRIPT} is read, or with the mask inverted" in failure.text
    (said,) = suites["torch:lossy"].iter("system-out")
    assert "dq is lossy" in said.text
    assert "last words" in next(suites["jax:dies"].iter("error")).text


def test_junit_fails_what_is_lossy_where_the_report_is_strict():
    root = ElementTree.fromstring(replace(everything(), strict=True).as_junit())
    assert [x.get("type") for x in root.iter("failure")].count("lossy") == 1


def test_runs_of_several_seeds_are_told_apart():
    outcomes = tuple(replace(ran("jax:mine", "full", out=WRONG), seed=seed) for seed in (0, 7))
    command = "heedful crosscheck --import my.kernels --full"
    report = replace(everything(), outcomes=outcomes, command=command)
    names = [x.get("name") for x in ElementTree.fromstring(report.as_junit()).iter("testcase")]
    assert names == ["full[float32, seed 0]", "full[float32, seed 7]"]
    assert "full, float32, seed 7: out is wrong" in report.as_markdown()
    again = (
        "crosscheck --import my.kernels --backend jax:mine --cases full --dtype float32 --seed 7"
    )
    assert again in Page(report.as_html()).text


def test_a_saved_report_is_read_as_it_was(saved):
    report = everything()
    again = Report.read(saved(report))
    assert again.as_json() == Report.read(saved(again)).as_json()
    assert [o.judgements for o in again.outcomes] == [o.judgements for o in report.outcomes]
    clean = replace(report, outcomes=report.outcomes[:4], declined={})
    assert Report.read(saved(clean)) == clean


def _without(x):
    del x["seed"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_without, "missing required field `seed`"),
        (lambda x: x.update(format="another"), "Invalid enum value 'another'"),
        (lambda x: x.update(seed=-1), "Expected `int` >= 0 - at `$.seed`"),
        (lambda x: x["runs"][0].update(dtype="int8"), "`$.runs[0].dtype`"),
        (lambda x: x["runs"][0].update(verdict="disagree"), "says 'disagree'"),
        (lambda x: x["runs"].append(x["runs"][0]), "there twice"),
        (lambda x: x["runs"][4]["tensors"]["out"]["heat"].update(cells=["1"]), "a heat map"),
        (lambda x: x["runs"][4]["tensors"]["out"]["heat"]["cells"].append("nan x"), "nan"),
        (lambda x: x["runs"][4]["tensors"]["out"]["error"].update(rms="1"), "error.rms"),
    ],
)
def test_what_is_no_report_is_one_clear_error(saved, spoil, says):
    found = everything().as_json()
    spoil(found)
    path = saved(everything())
    with open(path, "w") as file:
        json.dump(found, file)
    with pytest.raises(ReportError, match=r"crosscheck\.json") as error:
        Report.read(path)
    assert says in str(error.value)


@given(st.data())
def test_a_spoiled_file_is_refused_or_read_and_shown(tmp_path_factory, data):
    text = bytearray(json.dumps(everything().as_json()).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "spoiled.json"
    path.write_bytes(text)
    try:
        report = Report.read(path)
    except ReportError:
        return
    assert str(report) and report.as_markdown()
    ElementTree.fromstring(report.as_junit())


def test_the_command_line_shows_a_saved_report(saved, tmp_path):
    forms = {form: str(tmp_path / f"report.{form}") for form in ("html", "markdown", "junit")}
    options = [x for form, path in forms.items() for x in (f"--{form}", path)]
    path = saved(everything())
    assert CliRunner().invoke(app, ["report", path, *options]).exit_code == 0
    read = Report.read(path)
    for form, file in forms.items():
        with open(file) as shown:
            assert shown.read() == getattr(read, f"as_{form}")()
    assert "torch:lossy" in CliRunner().invoke(app, ["report", path]).output


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"runs": 1e999}', "\x00"])
def test_the_command_line_says_in_a_line_what_is_no_report(tmp_path, saved, text):
    (tmp_path / "bad.json").write_text(text)
    for arguments in (["report"], ["compare", saved(everything())]):
        done = CliRunner().invoke(app, [*arguments, str(tmp_path / "bad.json")])
        assert done.exit_code == 2
        assert done.output.startswith(f"heedful: {tmp_path / 'bad.json'} is no report")
        assert done.output.count("\n") == 1


def test_two_forms_are_two_files(saved, tmp_path):
    one = str(tmp_path / "one")
    done = CliRunner().invoke(app, ["report", saved(everything()), "--html", one, "--junit", one])
    assert done.exit_code == 2 and "name one file" in done.output


def test_nothing_to_draw_or_to_fill_in_with_is_imported_before_it_is_asked_for():
    code = (
        "import sys, heedful_crosscheck.cli, heedful_crosscheck\n"
        "assert not {'matplotlib', 'jinja2', 'torch', 'msgspec'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
