"""What the README and CONTRIBUTING promise: every Python snippet runs, from top to bottom."""

from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import heedful

ROOT = Path(__file__).parents[2]


def snippets(name):
    tokens = MarkdownIt().parse((ROOT / name).read_text())
    return [token for token in tokens if token.type == "fence" and token.info == "python"]


@pytest.fixture
def registry():
    before = set(heedful.backends())
    yield
    for name in set(heedful.backends()) - before:
        heedful.unregister(name)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
@pytest.mark.usefixtures("registry")
def test_snippets_run(name):
    found = snippets(name)
    assert len(found) >= 2
    scope = {"__name__": "snippet"}
    if name == "README.md":
        opening, *found = (
            found  # the one line at the top shows a call, and names nothing it defines
        )
        compile(opening.content, name, "exec")
    for snippet in found:
        # As many line breaks before it as in the file, so that a traceback names the file's own line.
        exec(compile("\n" * (snippet.map[0] + 1) + snippet.content, name, "exec"), scope)
