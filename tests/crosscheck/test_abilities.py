"""What `heedful backends` and `heedful doctor` say, of a backend whose limits are known."""

import json
import re

import pytest
from typer.testing import CliRunner

import heedful
from heedful_crosscheck import abilities, asking, cli, doctor
from heedful_crosscheck.recipes import Sizes


class Narrow:
    """Narrow on purpose."""

    name = "jax:narrow"
    takes = frozenset({"causal", "scale", "return_lse"})

    def reasons(self, problem):
        found = ["needs a licence"]
        if problem.platform != "gpu":
            found.append(f"runs on GPUs; q lies on {problem.platform}")
        if problem.dtype not in ("bfloat16", "float16"):
            found.append(f"no {problem.dtype}")
        if problem.head_dim % 8 or problem.head_dim > 128:
            found.append(f"no head size {problem.head_dim}")
        return found

    def forward_only(self, problem):
        return "nobody wrote it"

    def score_bytes(self, problem):
        return problem.score_count

    def run(self, problem, operands):
        raise AssertionError("nothing is computed")


@pytest.fixture
def _narrow():
    heedful.register(Narrow())
    yield
    heedful.unregister("jax:narrow")


@pytest.mark.usefixtures("_narrow")
def test_a_backend_is_asked_what_it_can_do():
    gpu, cpu = (abilities.abilities("jax:narrow", platform) for platform in ("gpu", "cpu"))
    assert gpu.unable == ("needs a licence",) and not gpu.misplaced
    assert cpu.unable == ("needs a licence", "runs on GPUs; q lies on cpu") and cpu.misplaced
    assert gpu.row[:5] == ("bfloat16, float16", "multiples of 8 up to 128", "yes", "no", "Sq · Sk")
    assert gpu.dtypes["float64"] == ("no float64",)
    assert gpu.features["dropout"] == ("does not take dropout_rate", "does not take dropout_seed")
    assert {"causal", "scale", "return_lse"}.isdisjoint(gpu.not_taken)
    assert len(gpu.not_taken) == len(gpu.features) - 3
    assert abilities.about("jax:narrow") == "Narrow on purpose."


def test_what_takes_everything_is_said_to():
    found = abilities.abilities("jax:flash", "cpu")
    dtypes = "float32, bfloat16, float16, float64"
    assert found.row == (dtypes, "any", "yes", "yes", "Sq + Sk", "nothing")
    assert not found.unable and not found.misplaced


def test_what_a_call_asks_is_what_the_problem_has():
    asked = asking.asked(
        ["window=256,0", "mask=qk", "segments", "dropout", "softcap=30", "q_offset=-4"]
    )
    call = asking.call("jax", Sizes(2, 8, 4, 16, 32, 64, 48), "bfloat16", asked)
    problem = heedful.explain(**call).problem
    assert (problem.window, problem.mask_shape, problem.softcap) == ((256, 0), (1, 1, 16, 32), 30)
    assert problem.causal and problem.q_offset == -4
    assert problem.features == {
        *("causal", "window", "q_offset", "mask", "q_segment_ids", "kv_segment_ids"),
        *("dropout_rate", "dropout_seed", "softcap", "grouped_heads", "value_dim"),
    }


SHAPE = ("backends", "--shape", "2,16,64,32")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("backends", "--shape", "2,16"), "B,Hq,Sq,D"),
        ((*SHAPE, "--dtype", "half"), "dtype must be one of"),
        ((*SHAPE, "--from", "cupy"), "Got 'cupy'"),
        ((*SHAPE, "--with", "rope"), "what can be asked is causal"),
        ((*SHAPE, "--with", "mask=xy"), "bhqk"),
        ((*SHAPE, "--with", "dropout=0.5"), "has no value"),
        ((*SHAPE, "--with", "sinks=3"), "has no value"),
        ((*SHAPE, "--with", "score_mod=f"), "is a function"),
        ((*SHAPE, "--with", "window=wide"), "window must be a pair"),
        ((*SHAPE, "--kv-heads", "3"), "must be a multiple"),
    ],
)
def test_what_is_no_call_is_refused(arguments, said):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == cli.COULD_NOT_RUN
    assert said in result.stderr


@pytest.mark.usefixtures("_narrow")
def test_the_command_says_who_takes_a_call_and_who_is_chosen():
    arguments = (*SHAPE, "--dtype", "float64", "--causal", "--kv-heads", "4", "--json")
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["chosen"], found["why"]) == ("jax:flash", "the automatic choice")
    assert found["backends"]["jax:plain"]["accepted"]
    assert (
        "does not take grouped_heads: 16 query heads on 4 key heads"
        in (found["backends"]["jax:narrow"]["reasons"])
    )


@pytest.mark.usefixtures("_narrow")
def test_a_bug_report_has_versions_and_settings_and_no_secrets(monkeypatch):
    monkeypatch.setenv("XLA_DUMP_FOR_TEST", "here")
    monkeypatch.setenv("HEEDFUL_API_KEY", "hidden")
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    said = result.stdout
    assert re.search(rf"^  heedful +{re.escape(heedful.__version__)}$", said, re.MULTILINE)
    assert re.search(r"^  XLA_DUMP_FOR_TEST +here$", said, re.MULTILINE)
    assert "hidden" not in said
    assert re.search(r"^  jax:narrow +needs a licence; runs on GPUs", said, re.MULTILINE)
    assert re.search(r"^  jax:flash +float32, bfloat16, float16, float64$", said, re.MULTILINE)


def test_packages_are_those_that_heedful_names(monkeypatch):
    known = dict(doctor.packages())
    assert known["jaxlib"] and known["safetensors"]
    assert {"tokamax", "onnxruntime"} <= known.keys()  # extras, installed or not
    monkeypatch.setattr(doctor, "version", _none_installed)
    assert set(doctor.packages().values()) == {None}


def _none_installed(name):
    raise doctor.PackageNotFoundError(name)
