"""The three distributions are one release."""

import tomllib
from pathlib import Path

import pytest

import heedful

PACKAGES = Path(__file__).parents[2] / "packages"


def project(folder: str) -> dict:
    return tomllib.loads((PACKAGES / folder / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("folder", ["bridge-torch", "crosscheck"])
def test_the_others_have_the_version_of_heedful_and_ask_for_it(folder):
    other = project(folder)
    assert other["version"] == heedful.__version__
    assert f"heedful=={heedful.__version__}" in other["dependencies"]


def test_the_crosscheck_needs_no_torch():
    assert not [name for name in project("crosscheck")["dependencies"] if "torch" in name]


def test_heedful_needs_jax_and_numpy_only():
    dependencies = project("core-jax")["dependencies"]
    assert [requirement.partition(">")[0] for requirement in dependencies] == ["jax", "numpy"]
