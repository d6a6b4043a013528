"""The Python in a document, run as a reader would run it."""

from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]


def run_snippets(name: str, *, but_compile: int = 0) -> int:
    """Runs all of a document's snippets in one scope; of the first so many, that they compile is enough.

    Returns:
        how many there are.
    """
    tokens = MarkdownIt().parse((ROOT / name).read_text())
    found = [token for token in tokens if token.type == "fence" and token.info == "python"]
    scope = {"__name__": "snippet"}
    for number, snippet in enumerate(found):
        # As many line breaks before it as in the file, so that a traceback names the file's own line.
        code = compile("\n" * (snippet.map[0] + 1) + snippet.content, name, "exec")
        if number >= but_compile:
            exec(code, scope)
    return len(found)
