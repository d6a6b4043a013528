"""Keras's layer with heedful inside, on each of Keras's backends that heedful has arrays of."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_layer_agrees(backend: str) -> None:
    # Keras's own code promotes, which heedful's tests forbid themselves.
    loose = {"JAX_NUMPY_RANK_PROMOTION": "allow", "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kerased.py"))],
        env=os.environ | loose | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    differences = [float(line) for line in ran.stdout.split()]
    assert len(differences) == 3
    assert max(differences) < 1e-4
