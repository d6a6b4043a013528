"""A JAX kernel's author needs no torch to be judged."""

import os
import subprocess
import sys

CODE = """
import sys

sys.modules["torch"] = None  # as if it were not installed
import importlib.util

importlib.util.find_spec = lambda name, *_, find=importlib.util.find_spec: (
    None if name == "torch" else find(name, *_)
)
import heedful
from heedful.backends.jax_plain import PlainBackend
from heedful_crosscheck import crosscheck
from heedful_crosscheck.cases import combined


class Mine(PlainBackend):
    name = "jax:mine"


heedful.register(Mine())
from_torch = [case for case in combined() if case.caller == "torch"][:1]
report = crosscheck(["jax:mine"], ["full", "mask-causal", "from-torch", "minilm-layer0", *from_torch])
assert report.verdict == "agree", str(report)
said = {o.case: o.reasons for o in report.outcomes}
assert not said["full"] and not said["minilm-layer0"]
for case in ("from-torch", from_torch[0].name):
    assert said[case] == ("the case calls from torch, which is not installed here",), said[case]
assert report.as_json()["environment"]["torch"] is None
assert not [name for name in sys.modules if name.startswith(("torch.", "heedful_torch"))]
"""


def test_a_jax_backend_is_judged_where_there_is_none(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
