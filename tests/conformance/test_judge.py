"""The crosscheck judges: every broken backend is caught and named, every honest one passes."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import broken
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from judged import judge
from typer.testing import CliRunner

import heedful
from heedful import oracle
from heedful.backends.numpy_oracle import backend as numpy_oracle
from heedful.oracle import FEATURES
from heedful_crosscheck import InputError, cli, crosscheck, load
from heedful_crosscheck import run as crosscheck_run
from heedful_crosscheck.cases import Case, everything, named, normal, select
from heedful_crosscheck.question import Question
from heedful_crosscheck.respondent import Here
from heedful_torch.dlpack import x64_is_enabled

# One case or two of every group: each distinct one costs every JAX backend a compilation.
REDUCED = (
    ("full", "window-causal"),
    ("mask-causal",),
    ("lengths-causal",),
    ("causal-tall", "mask-empty"),
    ("gqa-bshd",),
    ("softcap-bias", "large-logits"),
    ("tiny", "one-key"),
    ("from-torch", "from-jax-masked"),
    ("combination-077", "combination-163"),
    ("minilm-layer0", "smollm2-layer0"),
    ("peaked", "padded", "head-size-1", "views-strided"),
)


@pytest.fixture
def registered():
    """Registers backends for the length of a test."""
    names = []

    def register(backend):
        heedful.register(backend)
        names.append(backend.name)
        return backend.name

    yield register
    for name in names:
        heedful.unregister(name)


# Who is broken is caught, who is honest passes


@pytest.mark.parametrize("backend", broken.BROKEN, ids=lambda b: b.name)
def test_a_broken_backend_is_caught_and_named_for_the_right_tensor(backend, registered):
    registered(backend)
    report = crosscheck([backend.name], [backend.caught_in], backend.dtypes, strict=True)
    assert not report.agree
    for outcome in report.outcomes:
        assert outcome.verdict == backend.verdict, str(report)
        found = outcome.losses if backend.verdict == "lossy" else outcome.failures
        assert {f.tensor for f in found} == backend.wrong, str(report)
        assert any(backend.says in f.message for f in found), str(report)
        named = {cause for f in found for cause in f.causes}
        assert bool(named) == (backend.name in broken.CAUSES), str(report)
        assert not named or any(x.startswith(broken.CAUSES[backend.name]) for x in named), named


@pytest.mark.parametrize("names", REDUCED, ids=" ".join)
def test_every_honest_backend_passes_with_three_seeds(names):
    for seed in range(3):
        report = crosscheck(None, names, ("float32", "bfloat16"), seed)
        assert report.agree, str(report)


def test_the_reduced_cases_are_of_every_group():
    names = [name for group in REDUCED for name in group]
    assert {case.group for case in select(names, everything())} == {c.group for c in everything()}


def test_a_backend_that_needs_no_gradients_of_its_own_is_judged_by_what_it_returns(registered):
    """A NumPy backend without `gradients`."""

    @dataclass(frozen=True)
    class OutOnly:
        name: str = "numpy:out-only"

        takes = FEATURES

        def reasons(self, problem):
            return ("it returns no LSE",) if problem.return_lse else ()

        def run(self, problem, operands):
            return oracle.forward(problem, operands)[0].astype(problem.dtype), None

    report = crosscheck([registered(OutOnly())], ["causal"], ["float32"])
    assert report.agree
    (outcome,) = report.outcomes
    assert set(outcome.judgements) == {"out"}
    assert outcome.lacking["LSE"] == ("it returns no LSE",)


def test_float64_is_judged_by_float64():
    report = crosscheck(["jax:plain", "torch:sdpa-math"], ["causal"], ["float64"])
    assert report.agree, str(report)
    assert all(
        judgement.errors.rms < 1e-13 for o in report.outcomes for judgement in o.judgements.values()
    )


# Whatever a backend does, the others are judged and everything known is said


def _raise(error):
    raise error


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")


MISDEEDS = {
    "raises what has no text": lambda: _raise(Mute()),
    "exits": lambda: sys.exit(0),
    "exits without a word": lambda: _raise(SystemExit),
    "interrupts": lambda: _raise(KeyboardInterrupt),
    "closes a generator": lambda: _raise(GeneratorExit),
    "refuses for another": lambda: _raise(heedful.Refusal("no", {"jax:other": ("why",)})),
    "refuses too late": lambda: _raise(heedful.Refusal("no", {"numpy:misbehaves": ("why",)})),
    "recurses": lambda: _raise(RecursionError("too deep")),
    "has no memory": lambda: _raise(MemoryError()),
    "warns": lambda: _raise(UserWarning("beware")),
    "returns nothing": lambda: None,
    "returns text": lambda: "ab",
}


@dataclass(eq=False)
class Misbehaves:
    """Does something else than to answer, in `run` or in `reasons`."""

    what: str
    where: str
    name: str = "numpy:misbehaves"

    takes = FEATURES

    def reasons(self, problem):
        return MISDEEDS[self.what]() if self.where == "reasons" else ()

    def run(self, problem, operands):
        return MISDEEDS[self.what]() if self.where == "run" else None


@pytest.mark.parametrize("where", ["run", "reasons"])
@pytest.mark.parametrize("what", MISDEEDS)
def test_whatever_a_backend_does_is_its_own_failure(what, where, registered):
    name = registered(Misbehaves(what, where))
    report = crosscheck([name, "numpy:oracle"], ["causal"], ["float32"])
    assert report.verdicts == {name: "disagree", "numpy:oracle": "agree"}


class Half:
    """The oracle, whose dq is half too large where nothing flows back through LSE."""

    name = "numpy:half"
    takes, reasons, run = numpy_oracle.takes, numpy_oracle.reasons, numpy_oracle.run

    def gradients(self, problem, operands, dout, dlse):
        found = numpy_oracle.gradients(problem, operands, dout, dlse)
        return found if dlse.any() else found._replace(q=found.q * 1.5)


def test_what_is_wrong_of_out_alone_is_not_blamed_on_what_nobody_sees(registered):
    report = crosscheck([registered(Half())], ["causal-tall"], ["float32"])
    (failure, *_) = report.failures
    assert failure.tensor == "dq" and failure.message.endswith("; without a cotangent of LSE")
    assert "nobody sees" not in failure.message


def test_an_interrupt_is_no_failure_of_a_backend(registered):
    question = Question.of(select(["causal"], named())[0], 0, "float32")
    with pytest.raises(KeyboardInterrupt):
        crosscheck_run.outcome(Here(registered(Misbehaves("interrupts", "run"))), question)


ENDING = """
    import os, signal, heedful
    from heedful.backends.numpy_oracle import backend as oracle

    class Ending:
        name = "numpy:ending"
        calls = 0
        takes, reasons, gradients = oracle.takes, oracle.reasons, oracle.gradients

        def run(self, problem, operands):
            Ending.calls += 1
            if Ending.calls == 3:
                os.kill(os.getppid(), signal.{signal})
            return oracle.run(problem, operands)

    heedful.register(Ending())
"""


INTERRUPTIBLE = """
import signal
from heedful_crosscheck.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
main()
"""


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_what_is_known_when_a_run_is_ended_is_written(tmp_path, name, status):
    (tmp_path / "ending.py").write_text(textwrap.dedent(ENDING).replace("{signal}", name))
    command = "crosscheck --import ending --backend numpy:ending --cases positions --dtype float32"
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTIBLE, *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == status, run.stderr
    report = json.loads((tmp_path / "crosscheck.json").read_text())
    assert report["complete"] is False
    assert 1 <= len(report["runs"]) < 8
    assert "numpy:ending" in run.stdout
    kept = sorted(path.name for path in tmp_path.glob("crosscheck.json*"))
    assert kept == ["crosscheck.json", "crosscheck.json.journal"]


LEAVING = """
    import os, sys, heedful
    from heedful.backends.numpy_oracle import backend as oracle

    class Leaving:
        name = "numpy:leaving"
        takes, reasons, gradients = oracle.takes, oracle.reasons, oracle.gradients

        def run(self, problem, operands):
            os.chdir("/")
            sys.stdout.close()
            return oracle.run(problem, operands)

    heedful.register(Leaving())
"""


def test_the_report_is_where_it_was_asked_for_whatever_a_backend_does_to_the_process(tmp_path):
    (tmp_path / "leaving.py").write_text(textwrap.dedent(LEAVING))
    kept = tmp_path / "kept.json"
    (tmp_path / "crosscheck.json").symlink_to(kept)
    command = "crosscheck --import leaving --backend numpy:leaving --cases full --dtype float32"
    command += " --in-process"
    subprocess.run(
        [sys.executable, "-c", "from heedful_crosscheck.cli import main; main()", *command.split()],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert json.loads(kept.read_text())["complete"] is True
    assert (tmp_path / "crosscheck.json").is_symlink()


def test_what_a_backend_sets_for_the_process_is_set_back(registered, tmp_path):
    @dataclass(frozen=True)
    class Unsettling:
        name: str = "numpy:unsettling"

        takes = FEATURES

        def reasons(self, problem):
            return ()

        def run(self, problem, operands):
            os.chdir(tmp_path)
            np.seterr(all="raise")
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)
            jax.config.update("jax_enable_x64", True)
            return None

    def settings():
        return (
            *(os.getcwd(), np.geterr(), torch.get_default_dtype()),
            *(torch.is_grad_enabled(), x64_is_enabled()),
        )

    before = settings()
    report = crosscheck(
        [registered(Unsettling()), "torch:sdpa-math", "jax:plain"], ["causal"], ["float32"]
    )
    assert report.verdicts == {
        "numpy:unsettling": "disagree",
        "torch:sdpa-math": "agree",
        "jax:plain": "agree",
    }
    assert settings() == before


def test_who_says_so_is_asked_by_name_alone(registered):
    class Slow:
        name = "numpy:slow"
        unasked = "it takes a year"
        takes = FEATURES | {"grouped_heads", "return_lse", "value_dim"}

        def reasons(self, problem):
            return ()

        def run(self, problem, operands):
            return heedful.backends()["numpy:oracle"].run(problem, operands)

        def gradients(self, *asked):
            return heedful.backends()["numpy:oracle"].gradients(*asked)

    name = registered(Slow())
    report = crosscheck(None, ["causal"], ["float32"])
    said = {r.backend: r.reason for r in report.refusals if not r.part}
    assert said[name] == "left out: it takes a year; name it to ask it"
    assert report.verdicts[name] == "refused" and report.agree
    assert crosscheck([name], ["causal"], ["float32"]).verdicts == {name: "agree"}


@pytest.mark.parametrize("asked", ["backends", "cases", "dtypes"])
def test_one_name_is_no_list_of_names(asked):
    with pytest.raises(TypeError, match=rf"{asked} must be a list of names\. Got 'full'"):
        crosscheck(**{asked: "full"})


def test_the_report_may_not_replace_its_input(file, tmp_path, monkeypatch):
    path = file(tensors())
    before = path.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for other in (path, link, path.name, f"../{tmp_path.name}/{path.name}"):
        arguments = ["crosscheck", "--input", str(path), "--json", str(other)]
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 2
        assert "is the file of --input" in result.output
    assert path.read_bytes() == before


def test_quick_is_a_selection_of_its_own():
    result = CliRunner().invoke(cli.app, ["crosscheck", "--quick", "--cases", "full"])
    assert result.exit_code == 2
    assert "--quick is a selection" in result.output


# Tolerance


@pytest.fixture(scope="module")
def noisy():
    """A tensor of 4000 rows, and the same rounded to bfloat16."""
    want = np.random.default_rng(0).standard_normal((2, 4, 500, 64))
    return want, want.astype("bfloat16").astype(float)


def judged(got, want, plain, dtype="bfloat16", tensor="out", **rest):
    return judge(tensor, got, want, plain, dtype, **rest)


def test_rounding_passes(noisy):
    want, rounded = noisy
    judgement = judged(rounded, want, rounded)
    assert judgement.faults == ()
    assert judgement.errors == judgement.plain
    assert judgement.strain < 0.5


def test_a_scale_wrong_by_a_thousandth_shows_in_the_projection_alone(noisy):
    want, rounded = noisy
    judgement = judged((want * 1.001).astype("bfloat16").astype(float), want, rounded)
    (fault,) = judgement.faults
    assert "projection" in fault
    assert "rms" not in fault
    assert "worst row" not in fault


def test_one_wrong_row_shows_in_the_worst_row_alone_and_is_located(noisy):
    want, rounded = noisy
    got = rounded.copy()
    got[1, 2, 300] *= 1.05
    (fault,) = judged(got, want, rounded).faults
    assert "worst row" in fault
    assert "rms" not in fault
    assert "worst at (b 1, h 2, row 300), column " in fault
    assert "in the tile of rows 256-383; wrong only in head 2 of batch row 1, in row 300" in fault


def test_drift_shows_in_the_rms(noisy):
    want, rounded = noisy
    drift = np.random.default_rng(1).standard_normal(want.shape) * 0.01
    (fault,) = judged(rounded + drift, want, rounded).faults
    assert "rms 0.01 over" in fault


def test_a_row_that_cancels_is_measured_by_the_tensor():
    want = np.random.default_rng(0).standard_normal((1, 1, 100, 16))
    want[0, 0, 7] *= 1e-6
    got = want.copy()
    got[0, 0, 7] += 1e-6
    assert judged(got, want, want, "float32").faults == ()


def test_a_tensor_that_cancels_is_measured_by_its_terms():
    want = np.full((1, 1, 10, 4), 1e-17)
    got = np.full((1, 1, 10, 4), 1e-7)
    assert judged(got, want, want, "float32", "dq").faults
    assert judged(got, want, want, "float32", "dq", uncancelled=1.0).faults == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_may_be_nan_or_infinite(noisy, bad):
    want, rounded = noisy
    got = rounded.copy()
    got[0, 3, 499, 1] = bad
    (fault,) = judged(got, want, rounded).faults
    assert fault == f"out has {bad} at (b 0, h 3, row 499), and so in 1 of 4000 rows"


def test_infinities_of_lse_stand_exactly_where_they_should():
    want = np.array([[[1.0, -np.inf, 2.0]]])
    assert judged(want, want, want, tensor="lse").faults == ()
    for wrong in (0.0, np.inf, np.nan):
        assert judged(np.array([[[1.0, wrong, 2.0]]]), want, want, tensor="lse").faults
    assert judged(np.array([[[-np.inf, -np.inf, 2.0]]]), want, want, tensor="lse").faults


def test_what_is_hidden_is_exactly_zero(noisy):
    want, rounded = noisy
    hidden = np.zeros((2, 4, 500, 1), bool)
    hidden[0, 1, 5] = True
    want, rounded = np.where(hidden, 0, want), np.where(hidden, 0, rounded)
    assert judged(rounded, want, rounded, hidden=hidden).faults == ()
    got = np.where(hidden, 1e-30, rounded)
    (fault,) = judged(got, want, rounded, hidden=hidden).faults
    assert "out is 1e-30, not 0, where nothing is seen at (b 0, h 1, row 5)" in fault


def test_a_wrong_shape_is_a_fault(noisy):
    want, rounded = noisy
    assert judged(rounded[:1], want, rounded).faults == (
        "out has shape (1, 4, 500, 64), expected (2, 4, 500, 64)",
    )


# Questions and cases


def test_case_names_are_distinct():
    names = [case.name for case in everything()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", [c for c in named() if c.name != "tiny"], ids=lambda c: c.name)
def test_lengths_are_no_multiples_of_a_tile(case):
    q = Question.of(case, 0, "float32").operands.q
    assert q.shape[2] % 8


def test_a_case_depends_on_its_seed_and_name_alone():
    (case,) = select(["mask"], named())
    first, again, other = (case.inputs(seed, "bfloat16") for seed in (0, 0, 1))
    assert first.q.dtype.name == "bfloat16"
    assert (first.q == again.q).all()
    assert (first.options["mask"] == again.options["mask"]).all()
    assert (first.q != other.q).any()


def test_the_same_numbers_are_rounded_to_each_dtype():
    (case,) = select(["full"], named())
    exact = case.inputs(0, "float64").q
    for dtype in ("float32", "float16", "bfloat16"):
        assert (case.inputs(0, dtype).q == exact.astype(dtype)).all()


def test_what_nobody_sees_is_poisoned_and_nothing_else():
    question = Question.of(*select(["key-padding"], named()), 0, "float16")
    mask = question.inputs.options["mask"]
    for clean, poisoned in (
        (question.inputs.k, question.poisoned.k),
        (question.inputs.v, question.poisoned.v),
    ):
        finite = np.isfinite(poisoned).all((1, 3))
        assert (finite == mask).all()
        assert (poisoned.swapaxes(1, 2)[mask] == clean.swapaxes(1, 2)[mask]).all()
    assert Question.of(*select(["full"], named()), 0, "float16").poisoned is None


def test_plain_attention_is_near_the_oracle_and_knows_no_backend():
    for name in ("softcap-bias", "lengths-causal", "gqa-bshd"):
        answers = Question.of(*select([name], named()), 0, "float64").answers(True)
        for plain in (*answers.best, *answers.lossy):
            assert answers.right.keys() == plain.keys()
            for tensor, want in answers.right.items():
                np.testing.assert_allclose(plain[tensor], want, rtol=1e-10, atol=1e-12)


def test_selection_goes_by_name_or_group_with_wildcards():
    cases = named()
    assert [c.name for c in select(["causal"], cases)] == ["causal"]
    assert {c.group for c in select(["masks"], cases)} == {"masks"}
    assert {c.name for c in select(["long*"], cases)} == {
        "long",
        "long-causal",
        "long-window",
        "long-mask",
    }
    with pytest.raises(InputError, match=r"no case is 'casual'\. The groups are positions, masks"):
        select(["casual"], cases)


def test_numbers_beyond_a_dtype_are_refused_not_infinite():
    case = Case(name="huge", group="huge", make=normal(queries_times=1e6))
    report = crosscheck(["jax:plain"], [case], ["float16"])
    (outcome,) = report.outcomes
    assert outcome.verdict == "refused"
    assert "beyond float16" in outcome.reasons[0]


# Files


def tensors(**changes):
    random = np.random.default_rng(0)
    shapes = {"q": (2, 4, 6, 8), "k": (2, 2, 9, 8), "v": (2, 2, 9, 8)}
    made = {f"mine.{n}": random.standard_normal(s).astype("float16") for n, s in shapes.items()}
    made["mine.mask"] = np.arange(9) < np.array([[9], [5]])
    return {n: x for n, x in (made | changes).items() if x is not None}


@pytest.fixture
def file(tmp_path):
    def save(contents):
        path = tmp_path / "mine.safetensors"
        safetensors.numpy.save_file(contents, path)
        return path

    return save


def test_a_file_is_read_as_cases(file):
    (case,) = load(file(tensors()))
    assert (case.name, case.group) == ("mine", "input")
    inputs = case.inputs(0, "float32")
    assert (inputs.q == tensors()["mine.q"]).all()
    assert (inputs.options["mask"] == tensors()["mine.mask"]).all()


def test_a_file_of_one_case_may_leave_out_its_name(file):
    bare = {name.removeprefix("mine."): x for name, x in tensors().items()}
    (case,) = load(file(bare))
    assert case.name == "mine"  # as the file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mine.k": None}, "case mine lacks k"),
        ({"mine.weight": np.ones(3)}, "Got 'mine.weight'"),
        ({"mine.q": np.ones((4, 6, 8))}, r"q of case mine must be \(B, H, S, D\)"),
        ({"mine.q": np.ones((2, 4, 6, 8), "int64")}, "Got mine.q of I64"),
        ({"mine.mask": np.ones((2, 9))}, "Got mine.mask of F64"),
        ({"mine.mask": np.ones((2, 8), bool)}, "mask must be broadcastable"),
        ({"mine.q": np.ones((2, 3, 6, 8))}, "q's heads must be a multiple of k's"),
        ({"mine.v": np.full((2, 2, 9, 8), np.nan)}, "v of case mine must be finite"),
        (dict.fromkeys(tensors()), "holds no tensors"),
    ],
)
def test_a_malformed_file_is_refused_with_the_reason(file, changes, message):
    with pytest.raises(InputError, match=message):
        load(file(tensors(**changes)))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "text").write_text("not safetensors")
    for name in ("text", "missing"):
        with pytest.raises(InputError, match="cannot be read as safetensors"):
            load(tmp_path / name)


# The command line


def command(tmp_path, *arguments):
    path = tmp_path / "report.json"
    told = ["crosscheck", "--in-process", "--json", str(path), *map(str, arguments)]
    result = CliRunner().invoke(cli.app, told)
    return result, json.loads(path.read_text()) if path.exists() else None


def test_agreement_is_status_0(tmp_path):
    result, written = command(
        tmp_path, "--backend", "jax:plain", "--backend", "torch:sdpa-math", "--cases", "causal",
        "--dtype", "float32", "--seed", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "2 agree: jax:plain, torch:sdpa-math." in result.output
    assert written["verdict"] == "agree"
    assert written["backends"] == {"jax:plain": "agree", "torch:sdpa-math": "agree"}
    assert written["seed"] == 3
    assert {"heedful", "jax", "torch", "platform", "XLA_FLAGS"} <= written["environment"].keys()
    (plain_row, torch_row) = written["table"]
    assert plain_row["worst"].keys() == {"out", "lse", "dq", "dk", "dv"}
    assert torch_row["worst"].keys() == {"out", "dq", "dk", "dv"}
    assert plain_row["worst"]["dk"]["error"]["rms"] < 1e-6
    assert written["refusals"][0]["part"] == "LSE"


def test_disagreement_is_status_1(tmp_path, registered):
    (wrong,) = (b for b in broken.BROKEN if b.name == "jax:tile-of-dv-lost")
    registered(wrong)
    result, written = command(
        tmp_path, "--backend", wrong.name, "--cases", "long", "--dtype", "float32"
    )
    assert result.exit_code == 1
    assert "✗ jax:tile-of-dv-lost, long, float32: dv is wrong" in result.output
    assert written["verdict"] == "disagree"
    (failure,) = written["failures"]
    assert failure["tensor"] == "dv"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "jax:mine"), "no backend is named 'jax:mine'"),
        (("--cases", "casual"), "no case is 'casual'"),
        (("--dtype", "float8"), "Got 'float8'"),
        (("--input", "missing.safetensors"), "cannot be read as safetensors"),
        (("--json", "no/such/folder/report.json"), "cannot be written"),
        (("--import", "no_such_module"), "No module named 'no_such_module'"),
        (("--seed", "-1"), "Invalid value"),
    ],
)
def test_what_cannot_run_is_status_2(tmp_path, arguments, message):
    result, written = command(tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert written is None


def test_a_backend_asked_for_that_runs_nothing_is_status_2(tmp_path):
    result, written = command(
        tmp_path, "--backend", "torch:sdpa-math", "--cases", "softcap", "--dtype", "float32"
    )
    assert result.exit_code == 2
    assert written["verdict"] == "nothing ran"
    assert "softcap" in written["refusals"][0]["reason"]


def test_a_file_is_run_in_place_of_the_cases(tmp_path, file):
    result, written = command(
        tmp_path, "--input", file(tensors()), "--backend", "jax:plain", "--dtype", "bfloat16"
    )
    assert result.exit_code == 0, result.output
    assert [run["case"] for run in written["runs"]] == ["mine"]


def test_a_module_that_registers_is_imported_first(tmp_path):
    """In a process of its own, through the console script's function."""
    (tmp_path / "my_kernel.py").write_text(
        "import heedful\n"
        "from heedful.plain import plain\n"
        "class Mine:\n"
        "    name = 'jax:mine'\n"
        "    takes = {'return_lse'}\n"
        "    def reasons(self, problem):\n"
        "        return ()\n"
        "    def run(self, problem, operands):\n"
        "        return plain(problem, operands)\n"
        "heedful.register(Mine())\n"
    )
    arguments = "crosscheck --import my_kernel --backend jax:mine --cases tiny --dtype float32"
    code = (
        f"import sys, heedful_crosscheck.cli as cli; sys.argv[1:] = {arguments.split()}; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 agree: jax:mine" in done.stdout
    assert (tmp_path / "crosscheck.json").exists()
