"""Mutants, of which `nox -s judgement` holds all: one of each kind is caught, and nothing else is."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "packages" / "crosscheck" / "tools" / "judgement"))

from hold import hold  # noqa: E402  # found by the line above
from mutants import Mutant, mutants  # noqa: E402  # as well

from heedful_crosscheck.cases import named, select  # noqa: E402  # as well

FAULTS = (
    "causal aligned top-left",
    "softcap not made up for",
    "key heads by h % Hkv",
    "bias ignored beside grouped heads",
    "the scale a thousandth off",
    "lse's gradient dropped",
    "dk without its last, partial tile of 64",
    "dk a fiftieth off in bfloat16",
    "v a twentieth too large where Hq > Hkv > 1",
)
NOTHING = Mutant("none", "nothing")


def test_one_of_each_kind_is_caught_and_nothing_else_is():
    asked = [m for m in mutants() if m.fault in FAULTS]
    assert {m.kind for m in asked} == {m.kind for m in mutants()} and len(asked) == len(FAULTS)
    held = hold([*asked, NOTHING], select(["gqa-bshd", "softcap-bias"], named()), lambda *_: None)
    assert held.left == (NOTHING,) and set(held.caught) == set(asked)
    assert not held.lossy and not held.unmet


def test_there_are_as_many_as_are_said_and_each_has_a_name_of_its_own():
    assert len({m.name for m in mutants()}) == len(mutants()) > 400
