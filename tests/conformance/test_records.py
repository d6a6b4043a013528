"""Records: what a backend answered elsewhere is kept, told from anything else, and judged by."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import heedful
from heedful.backends.numpy_oracle import backend as numpy_oracle
from heedful_crosscheck import InputError, Report, chosen_cases, cli, records

HERE = sorted((Path(__file__).parent / "records").glob("*.safetensors"))
LOCAL = ["numpy:oracle", "jax:plain", "jax:flash", "torch:sdpa-flash", "torch:sdpa-math"]


@pytest.mark.parametrize("path", HERE, ids=lambda path: path.stem)
def test_backends_here_agree_with_what_was_recorded(path):
    found = records.load(path)
    report = Report(tuple(records.replay(found, LOCAL)), found.seed, 0.0)
    assert set(report.verdicts.values()) <= {"agree", "lossy"}, str(report)
    assert report.verdicts["jax:flash"] == "agree", str(report)
    assert path.stat().st_size < 2**20


def test_what_was_recorded_of_the_official_flash_attn_is_there():
    recorded = [records.load(path) for path in HERE]
    assert {"flash-attn 2.8.3.post2, Triton kernels, interpreted"} == {r.kernel for r in recorded}
    assert {run.dtype for r in recorded for run in r.runs} == {"float32", "float16", "bfloat16"}


def made(dtype="float32", backend="numpy:oracle"):
    cases = chosen_cases(["tiny", "mask-empty"])
    return records.record(backend, cases, [dtype], 3, {"date": "2026-11-25"})


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_record_is_read_as_it_was_written(tmp_path, dtype):
    found = made(dtype)
    records.save(found, tmp_path / "r.safetensors")
    again = records.load(tmp_path / "r.safetensors")
    assert replace(again, runs=()) == replace(found, runs=())
    for ours, theirs in zip(found.runs, again.runs, strict=True):
        assert ours.answer.keys() == theirs.answer.keys() >= {"out", "lse", "dq", "dk", "dv"}
        for name, x in ours.answer.items():
            assert x.dtype == theirs.answer[name].dtype
            np.testing.assert_array_equal(x, theirs.answer[name])
    report = Report(tuple(records.replay(again, ["jax:plain", "numpy:oracle"])), 3, 0.0)
    assert set(report.verdicts.values()) == {"agree"}, str(report)


@pytest.mark.parametrize("tensor", ["out", "dq", "dv"])
def test_a_wrong_record_is_wrong_by_the_oracle_and_nobody_agrees_with_it(tensor):
    found = made()
    wrong = [
        replace(run, answer=run.answer | {tensor: run.answer[tensor] * np.float32(1.02)})
        for run in found.runs
    ]
    outcomes = records.replay(replace(found, runs=tuple(wrong)), ["jax:plain"])
    assert {f.tensor for o in outcomes for f in o.failures} == {tensor}
    assert {o.backend for o in outcomes if o.failures} == {"recorded numpy:oracle", "jax:plain"}


class Off:
    """The oracle, off by a hundredth."""

    name = "numpy:off"
    takes, reasons, gradients = numpy_oracle.takes, numpy_oracle.reasons, numpy_oracle.gradients

    def run(self, problem, operands):
        out, lse = numpy_oracle.run(problem, operands)
        return (out * 1.01).astype(out.dtype), lse


@pytest.fixture
def off():
    heedful.register(Off())
    yield Off.name
    heedful.unregister(Off.name)


def test_who_is_wrong_here_disagrees_with_the_record_alone(off):
    report = Report(tuple(records.replay(made(), [off, "jax:plain"])), 3, 0.0)
    assert report.verdicts == {
        "recorded numpy:oracle": "agree",
        off: "disagree",
        "jax:plain": "agree",
    }


def test_what_explains_a_wrong_record_and_a_wrong_backend_is_said():
    class Aligned:
        """Causal by the other corner."""

        name = "numpy:aligned"
        takes, reasons = numpy_oracle.takes, numpy_oracle.reasons

        def other(self, problem):
            return replace(problem, q_offset=0)

        def run(self, problem, operands):
            return numpy_oracle.run(self.other(problem), operands)

        def gradients(self, problem, *arrays):
            return numpy_oracle.gradients(self.other(problem), *arrays)

    heedful.register(Aligned())
    try:
        cases = chosen_cases(["causal"])
        there = records.record(Aligned.name, cases, ["float32"], 3, {})
        right = records.record("numpy:oracle", cases, ["float32"], 3, {})
        outcomes = records.replay(there, ["jax:plain"]) + records.replay(right, [Aligned.name])
    finally:
        heedful.unregister(Aligned.name)
    explained = {o.backend: {c for f in o.failures for c in f.causes} for o in outcomes}
    assert explained == {
        "recorded numpy:aligned": {"once causal is aligned top-left"},
        "jax:plain": set(),  # which is right, and disagrees with the record
        "recorded numpy:oracle": set(),
        "numpy:aligned": {"once causal is aligned top-left"},
    }


def test_other_inputs_than_were_asked_are_told(tmp_path):
    found = made()
    with pytest.raises(InputError, match="in float32 are not those that were recorded"):
        records.replay(replace(found, seed=4), ["numpy:oracle"])
    unknown = replace(found, runs=(replace(found.runs[0], case="gone"),))
    with pytest.raises(InputError, match="a case 'gone', which is none here"):
        records.replay(unknown, ["numpy:oracle"])
    (tmp_path / "not.safetensors").write_bytes(b"no record")
    with pytest.raises(InputError, match="is no 'heedful record 1'"):
        records.load(tmp_path / "not.safetensors")
    with pytest.raises(InputError, match=r"refused every case: .*softcap"):
        records.record("torch:sdpa-flash", chosen_cases(["softcap"]), ["float32"], 0, {})


@pytest.mark.parametrize("answer", [{}, {"out": 0, "d2q": 0}, {"dq": 0}], ids=str)
def test_what_is_no_answer_is_no_agreement(answer):
    run, *_ = made().runs
    no_answer = dict.fromkeys(answer, run.answer["out"])
    with pytest.raises(InputError, match="must be of out, and of out, lse, dq, dk, dv alone"):
        records.replay(replace(made(), runs=(replace(run, answer=no_answer),)), [])


def test_an_answer_of_another_shape_is_wrong_and_nobody_is_held_to_it():
    run, *_ = made().runs
    other = replace(run, answer=run.answer | {"dq": run.answer["dq"][:1]})
    (only,) = records.replay(replace(made(), runs=(other,)), ["jax:plain"])
    assert only.backend == "recorded numpy:oracle" and "expected float32" in str(only.failures[0])


def test_on_the_command_line(tmp_path, off):
    path = str(tmp_path / "r.safetensors")
    run = CliRunner().invoke
    told = ["--backend", "torch:sdpa-flash", "--cases", "tiny", "--dtype", "float32"]
    done = run(cli.app, ["record", path, *told])
    assert done.exit_code == 0 and "1 answers of torch:sdpa-flash, in" in done.output
    done = run(cli.app, ["replay", path, "--backend", "jax:plain"])
    assert done.exit_code == 0 and "2 agree: recorded torch:sdpa-flash, jax:plain" in done.output
    assert run(cli.app, ["replay", path, "--backend", off]).exit_code == 1
    for wrong in (["replay", path, "--backend", "no:such"], ["replay", str(tmp_path / "none")]):
        done = run(cli.app, wrong)
        assert done.exit_code == 2 and "Traceback" not in done.output
