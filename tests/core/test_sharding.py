"""Sharded arrays, on 8 virtual devices of a process of its own: by batch and heads no device talks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"


@pytest.mark.parametrize("mesh", ["auto", "explicit", "shard_map"])
def test_no_device_talks_and_each_holds_its_part(mesh):
    script = Path(__file__).with_name("sharded.py")
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, script, mesh], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout
