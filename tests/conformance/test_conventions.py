"""What `docs/conventions.md` says of functions that need no extra is what they do today."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "packages" / "crosscheck" / "tools" / "conventions"))

from document import THEMES, lines  # noqa: E402  # found by the line above
from published import PUBLISHED  # noqa: E402  # as well

POSITION, LOG_SUM_EXP = "Position and empty rows", "Log-sum-exp"
# All of it takes minutes; this, seconds.
ASKED = [
    ("torch SDPA, math", POSITION),
    ("torch SDPA, CPU flash", POSITION),
    ("torch SDPA, CPU flash", LOG_SUM_EXP),
    ("FlexAttention, eager", LOG_SUM_EXP),
    ("jax.nn, xla", POSITION),
    ("jax.nn, xla", LOG_SUM_EXP),
    ("heedful, jax:flash", LOG_SUM_EXP),
]


@pytest.mark.parametrize(("name", "title"), ASKED)
def test_measured_anew_it_is_the_same(name, title):
    (function,) = (f for f in PUBLISHED if f.name == name)
    (theme,) = (theme for theme in THEMES if theme.title == title)
    header, _, row = lines(theme.rows([function]))
    document = (ROOT / "docs" / "conventions.md").read_text().splitlines()
    start = document.index(header)
    assert row in document[start : document.index("", start)]
