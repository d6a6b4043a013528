"""What the README and docs/ promise: snippets run, and what was measured is as measured."""

import importlib
import re
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt

import heedful
from documents import ROOT, run_snippets


@pytest.fixture
def registry():
    before = set(heedful.backends())
    yield
    for name in set(heedful.backends()) - before:
        heedful.unregister(name)


RUN = ("README.md", "docs/index.md", "docs/judging.md", "docs/writing_a_backend.md")
# The figures are compared below; models.md needs other people's libraries (tests/ecosystems).
RUN_ELSEWHERE = ("docs/algorithm.md", "docs/models.md")


def test_every_document_with_snippets_is_run():
    with_snippets = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"))
        if "```python\n" in path.read_text()
    }
    assert with_snippets == {*RUN, *RUN_ELSEWHERE}


@pytest.mark.parametrize("name", RUN)
@pytest.mark.usefixtures("registry")
def test_snippets_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for those that write a file
    # The one line at the top of the README shows a call, and names nothing it defines.
    assert run_snippets(name, but_compile=name == "README.md") >= 1


def test_the_noxfile_for_other_repositories_asks_for_what_there_is(monkeypatch, pytestconfig):
    tokens = MarkdownIt().parse((ROOT / "docs/judging.md").read_text())
    (recipe,) = (token for token in tokens if token.info == "python noxfile")
    said, scope = {}, {}
    monkeypatch.setitem(sys.modules, "nox", SimpleNamespace(session=lambda function: function))
    exec(compile(recipe.content, "noxfile.py", "exec"), scope)
    parts = {n: lambda *words, n=n: said.setdefault(n, words) for n in ("install", "run")}
    scope["attention"](SimpleNamespace(**parts))
    assert all(version(package) for package in said["install"] if package != ".")
    options = [word for word in said["run"] if word.startswith("--")]
    assert options
    for option in options:  # unknown, it raises
        pytestconfig.getoption(option)


def test_the_reference_lists_every_public_name():
    found = {}
    for line in (ROOT / "docs/reference.md").read_text().split("\n::: ")[1:]:
        module, _, options = line.partition("\n")
        if members := re.search(r"members: \[(.*?)\]", options, re.DOTALL):
            found[module] = members[1].replace(",", " ").split()
    assert {*found} >= {"heedful", "heedful_torch", "heedful_crosscheck"}
    for module, names in found.items():
        assert names == importlib.import_module(module).__all__


def test_the_figures_are_those_that_the_code_draws(capsys):
    tokens = MarkdownIt().parse((ROOT / "docs/algorithm.md").read_text())
    fences = [token for token in tokens if token.type == "fence"]
    scope = {}
    assert len(fences) == 12
    for snippet, figure in zip(fences[::2], fences[1::2], strict=True):
        exec(compile(snippet.content, "algorithm.md", "exec"), scope)
        assert capsys.readouterr().out == figure.content


def cells(name):
    """By function and column, of all tables whose rows are functions."""
    found, header = {}, ()
    for line in (ROOT / name).read_text().splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = ()
        elif not header:
            header = row
        elif header[0] == "function" and row[0].strip("-"):
            found |= {(row[0], column): cell for column, cell in zip(header, row, strict=True)}
    return found


def test_what_the_readme_says_of_others_was_measured():
    """Or stands by a source, or is a dash where nothing was there to be measured."""
    measured, said = cells("docs/conventions.md"), cells("README.md")
    asked = {where: cell for where, cell in said.items() if "by its source" not in where[0]}
    assert len(asked) > 20
    assert asked == {where: measured.get(where, "—") for where in asked}
