"""The two distributions are one release."""

import tomllib
from pathlib import Path

import heedful

PACKAGES = Path(__file__).parents[2] / "packages"


def project(folder: str) -> dict:
    return tomllib.loads((PACKAGES / folder / "pyproject.toml").read_text())["project"]


def test_heedful_torch_has_the_version_of_heedful_and_asks_for_it():
    bridge = project("bridge-torch")
    assert bridge["version"] == heedful.__version__
    assert f"heedful=={heedful.__version__}" in bridge["dependencies"]


def test_heedful_needs_jax_and_numpy_only():
    dependencies = project("core-jax")["dependencies"]
    assert [requirement.partition(">")[0] for requirement in dependencies] == ["jax", "numpy"]
