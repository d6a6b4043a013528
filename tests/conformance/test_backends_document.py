"""docs/backends.md is what the backends say today, and nothing that this machine says."""

import sys
from pathlib import Path

import pytest

from heedful_crosscheck.abilities import platform_here

sys.path.append(str(Path(__file__).parents[2] / "packages" / "crosscheck" / "tools"))

from describe_backends import DOCUMENT, document, own  # found by the line above


@pytest.mark.skipif(platform_here("torch:sdpa-flash") != "cpu", reason="it is made without a GPU")
def test_it_is_what_the_backends_say():
    made = document()
    assert made == DOCUMENT.read_text(), "python packages/crosscheck/tools/describe_backends.py"
    assert all(f"## `{name}`" in made for name in own())
    for of_this_machine in ("cannot be imported", "not installed", "sees no", "lies on cpu;"):
        assert of_this_machine not in made
