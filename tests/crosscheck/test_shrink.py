"""A failing case is made small, and a script of it fails without heedful, until it is mended."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted import TAKES, attend
from typer.testing import CliRunner

import heedful
from heedful.backends.numpy_oracle import backend as oracle
from heedful_crosscheck import Function, cli
from heedful_crosscheck.cases import select
from heedful_crosscheck.contract.cases import CASES, FORMS, case
from heedful_crosscheck.function_backend import backend_of, registered
from heedful_crosscheck.question import Question
from heedful_crosscheck.respondent import Here
from heedful_crosscheck.run import judge_all
from heedful_crosscheck.script import script
from heedful_crosscheck.shrink import Failing, shrunk

MENDED = partial(attend, "")


def judged(q, k, v, **options):
    """What the scripts import."""
    return judged.asked(q, k, v, **options)


def described(**more):
    own = {"takes": TAKES, "causal": "bottom_right", "lse": "natural", "framework": "numpy"}
    return backend_of(Function(judged, declines=["hidden_nan"], **{**own, **more}))


def question(name, backend):
    (case,) = select([name], CASES + FORMS)
    return Question.of(case, 0, "float32", None, backend.declines)


def fails(text):
    """Whether a script ends as it says, of whatever `judged` is now."""
    assert "heedful." not in text
    try:
        exec(compile(text, "script", "exec"), {})
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(
    ("wrong", "name", "sizes", "options"),
    [
        ("mask inverted", "together: everything", (1, 1, 1, 1, 1), {"mask"}),
        ("softcap after bias", "together: everything", (1, 1, 1, 2, 1), {"bias", "softcap"}),
        ("top-left", "lengths, causal: window", (1, 1, 1, 3, 1), {"window"}),
        ("h % Hkv", "heads: grouped", (1, 4, 1, 1, 1), set()),
        ("segments ignored", "segments: grouped, mask", None, {"q_segment_ids", "kv_segment_ids"}),
    ],
)
def test_a_case_is_made_small_and_a_script_of_it_fails_until_it_is_mended(
    wrong, name, sizes, options
):
    judged.asked, backend = partial(attend, wrong), described()
    with registered(backend) as registered_as:
        found = shrunk(Here(registered_as), question(name, backend), with_lse=True)
    p = found.question.problem
    if sizes is not None:
        assert (p.batch, p.q_heads, p.q_length, p.kv_length, p.head_dim) == sizes
    assert found.question.inputs.options.keys() - {"layout"} == options
    text = script(found, backend.name, backend)
    assert "from test_shrink import judged\n" in text
    assert len(text.splitlines()) < 60
    assert fails(text)
    judged.asked = MENDED
    assert not fails(text)


def test_the_same_part_is_found_again():
    judged.asked, backend = partial(attend, "mask inverted"), described()
    with registered(backend) as name:
        parts = [shrunk(Here(name), question("mask: keys", backend), True) for _ in range(2)]
    assert len({part.question.inputs.fingerprint for part in parts}) == 1


class Off:
    """What is registered: right but for an LSE that is larger by `by`."""

    name, by = "numpy:off", 1
    takes, reasons, gradients = oracle.takes, oracle.reasons, oracle.gradients

    def run(self, problem, operands):
        out, lse = oracle.run(problem, operands)
        return out, (lse + self.by).astype(lse.dtype)


def test_a_backend_is_asked_through_heedful_and_the_script_says_so():
    backend = Off()
    heedful.register(backend)
    try:
        names = "together: everything", "alibi: of each row and head", "segments: packed"
        for (asked,) in (select([name], CASES) for name in names):
            backend.by, whole = 1, Question.of(asked, 0, "float32")
            answer = Here(backend.name).answer(whole, whole.inputs, with_lse=True)
            judgements, _ = judge_all(whole, answer, with_lse=True)
            failing = Failing(whole, whole.inputs, True, ("lse",), judgements, answer)
            text = script(failing, backend.name, imports=["numpy.linalg"])
            assert "import numpy.linalg  # which registers backends\n" in text
            assert text.count("heedful.") == 1 and "answer = heedful.attention(" in text
            with pytest.raises(AssertionError):
                exec(text, {})
            backend.by = 0
            exec(text, {})
    finally:
        heedful.unregister(backend.name)


def test_what_does_not_fail_is_not_shrunk():
    judged.asked, backend = MENDED, described()
    with registered(backend) as name:
        assert shrunk(Here(name), question("mask: full", backend), True) is None


def test_what_raises_is_made_small_too_and_the_script_raises():
    def raises(q, k, v, window=None, **options):
        if window is not None and q.shape[2] > 2:
            raise RuntimeError("out of registers")
        return attend("", q, k, v, window=window, **options)

    judged.asked, backend = raises, described()
    with registered(backend) as name:
        found = shrunk(Here(name), question("window: causal", backend), True)
    assert found.question.problem.q_length == 3
    with pytest.raises(RuntimeError, match="out of registers"):
        exec(script(found, backend.name, backend), {})


def test_a_result_of_the_wrong_dtype_is_shown_as_one():
    def wide(q, k, v, **options):
        out, lse = attend("", q, k, v, **options)
        return out.astype(np.float64), lse

    judged.asked, backend = wide, described()
    with registered(backend) as name:
        found = shrunk(Here(name), question("mask: full", backend), True)
    assert found.tensors == ("out",) and not found.question.inputs.options
    text = script(found, backend.name, backend)
    assert fails(text)
    judged.asked = MENDED
    assert not fails(text)


OPTIONS = [
    "scale: negative", "softcap: with scale and causal", "bias: with mask",
    "infinite bias: a query hidden",
    "causal: more queries: empty rows", "q_offset array: a batch row", "window: with an offset",
    "lengths, causal: window", "sinks: of each head", "sinks: with bias, softcap and mask",
    "alibi: lengths, window and bias", "segments: mixed, causal", "together: everything",
    "heads: grouped by three", "layout: bshd, grouped, one query",
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_a_script_says_attention_rightly_whatever_is_asked(name):
    """Of a function that is half as large again in one row; mended, it passes."""
    backend = described()
    asked = question(name, backend)
    out, lse = (asked.answers(True).right[t].astype(np.float32) for t in ("out", "lse"))
    row = np.unravel_index(np.isfinite(lse).argmax(), lse.shape)
    for tensor, answer in (
        ("out", {"out": out.copy(), "lse": lse}),
        ("lse", {"out": out, "lse": lse.copy()}),
    ):
        answer[tensor][row] = answer[tensor][row] * 1.5 + 1
        judgements = {tensor: asked.standards(True)[tensor].judge(answer[tensor])}
        failing = Failing(asked, asked.inputs, True, (tensor,), judgements, answer)
        text = script(failing, backend.name, backend)

        def wrong(*arrays, answer=answer, **options):
            return answer["out"], answer["lse"]

        judged.asked = wrong
        assert fails(text), text
        judged.asked = MENDED
        assert not fails(text), text


def halved(q, k, v, causal=False):
    """(B, S, H, D), top-left; dk is half of what it should be."""
    k = k / halved.by + jax.lax.stop_gradient(k - k / halved.by)
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
    if causal:
        s = jnp.where(jnp.tri(*s.shape[2:], dtype=bool), s, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v)


def test_a_gradient_is_held_to_central_differences():
    halved.by = 2
    conventions = {"layout": "bshd", "causal": "top_left"}
    own = {"takes": ["causal"], "declines": ["hidden_nan"], "framework": "jax"}
    backend = backend_of(Function(halved, **conventions, **own))
    whole = case("x", "y", B=1, Hq=1, Hkv=1, Sq=2, Sk=2, D=2, Dv=2, **conventions)
    asked = Question.of(whole, 0, "float32", None, backend.declines)
    with registered(backend) as name, jax.disable_jit():
        answer = Here(name).answer(asked, asked.inputs, with_lse=False)
        judgements, faults = judge_all(asked, answer, with_lse=False)
        assert {tensor for tensor, _ in faults} == {"dk"}
        text = script(
            Failing(asked, asked.inputs, False, ("dk",), judgements, answer), name, backend
        )
        assert fails(text)
        halved.by = 1
        assert not fails(text)


KERNEL = """
import numpy as np


def attend(q, k, v, causal=False):
    '(B, S, H, D), and of 8 keys and more the last ones are lost.'
    k, v = (x[:, : max(7, x.shape[1] // 8 * 8)] for x in (k, v))
    s = np.einsum("bqhd,bkhd->bhqk", q, k) * q.dtype.type(q.shape[3] ** -0.5)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", p / p.sum(-1, keepdims=True), v)
"""


def test_the_command_prints_a_script_that_runs_by_itself(tmp_path, monkeypatch):
    (tmp_path / "tiled.py").write_text(KERNEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = "--layout bshd --framework numpy --in-process --shrink --cases full --dtype float32"
    result = CliRunner().invoke(cli.app, f"crosscheck tiled:attend {asked}".split())
    assert result.exit_code == 1, result.output
    text = result.output[result.output.index('"""numpy:attend, float32: out is wrong') :]
    assert "b, h, i, j = np.ogrid[:1, :1, :1, :9]" in text
    (tmp_path / "script.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "AssertionError" in done.stderr, done.stderr
    assert "out is [" in done.stdout and "heedful." not in text
