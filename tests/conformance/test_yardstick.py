"""Hard inputs: the honest pass on them, and what is lossy, or beyond its ceiling, is said so."""

import ast
import inspect
import json

import hard
import numpy as np
import pytest
from judged import judge

import heedful
from heedful import oracle, pairs
from heedful.call import Call
from heedful.call.form import Form
from heedful_crosscheck import crosscheck, memory_needed, question, tolerance, yardstick
from heedful_crosscheck.cases import combined, named, select
from heedful_crosscheck.hard import SMALL
from heedful_crosscheck.question import Question
from heedful_crosscheck.tolerance import CEILING

HONEST = (
    "jax:flash",
    "jax:plain",
    "jax:nn-xla",
    "torch:sdpa-math",
    "torch:sdpa-flash",
    "numpy:oracle",
)
OURS = ("jax:flash", "jax:plain", "numpy:oracle")


ASKED = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}")
    for case in hard.OF_NUMBERS
    for dtype in case.usual
    if dtype != "float16"
]


@pytest.mark.parametrize(("case", "dtype"), ASKED)
def test_honest_backends_pass_where_it_is_hard_and_ours_lose_nothing(case, dtype):
    for seed in range(2):
        report = crosscheck(HONEST, [case], [dtype], seed)
        assert report.agree, str(report)
        assert all(report.verdicts[name] == "agree" for name in OURS), str(report)


def test_float64_is_no_better_than_float64():
    """The oracle's own scores are off by 2e-12 beside a bias of −30000, and plain attention's alike."""
    for seed in range(3):
        report = crosscheck(OURS, [hard.FAR_AND_PADDED], ["float64"], seed)
        assert set(report.verdicts.values()) == {"agree"}, str(report)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_hard_cases_stay_beneath_the_ceilings_but_for_values_that_cancel(dtype):
    """A ceiling that is reached takes away what tells good from bad."""
    report = crosscheck(["numpy:oracle"], hard.OF_NUMBERS, [dtype])
    assert {c.case for c in report.ceilings} <= {"values-that-cancel", "keys-that-cancel"}
    assert not any(c.case in str(report) for c in report.ceilings) or "ceiling" in str(report)


def test_what_is_lost_of_out_is_seen_beneath_what_flows_back_through_lse():
    """With a cotangent of LSE dq is 3000 times what it is of out alone, and hid that all was lost."""
    report = crosscheck(["torch:sdpa-flash", *OURS], [hard.FAR_APART], ["bfloat16"])
    assert report.verdicts == {"torch:sdpa-flash": "lossy"} | dict.fromkeys(OURS, "agree"), str(
        report
    )


# The verdicts


@pytest.fixture(scope="module")
def tensors():
    """What is right, the same rounded to bfloat16, and the same with one part in five lost."""
    want = np.random.default_rng(0).standard_normal((2, 4, 50, 64))
    lost = want * (1 + 0.2 * np.random.default_rng(1).standard_normal((2, 4, 50, 64)))
    return want, want.astype("bfloat16").astype(float), lost


def test_what_is_within_the_second_limit_alone_is_lossy_and_says_how_far(tensors):
    want, plain, lost = tensors
    judgement = judge("dq", lost, want, plain, "bfloat16", lossy=[lost])
    assert judgement.verdict == "lossy"
    assert judgement.faults == ()
    (said,) = judgement.losses
    assert f"dq is lossy, {judgement.strain:.2g} times its limit: rms 0.2 over 0.0" in said
    assert judgement.strain > 10
    assert judge("dq", lost, want, plain, "bfloat16").verdict == "disagree"
    assert judge("dq", want + 3 * (lost - want), want, plain, "bfloat16", lossy=[lost]).faults


def test_of_several_readings_the_largest_error_counts(tensors):
    want, plain, _ = tensors
    twice = want + 2 * (plain - want)
    assert (
        judge("dq", want + 4 * (plain - want), want, [want, twice], "bfloat16").verdict == "agree"
    )
    assert judge("dq", want + 8 * (plain - want), want, [want, twice], "bfloat16").faults


@pytest.mark.parametrize("dtype", CEILING)
def test_however_bad_the_yardstick_an_error_beyond_the_ceiling_is_no_agreement(tensors, dtype):
    want, _, lost = tensors
    judgement = judge("dq", lost, want, lost, dtype)
    assert judgement.ceiling
    assert judgement.verdict == "lossy"  # no farther off than plain attention, and yet
    assert judgement.limits.rms == CEILING[dtype]
    assert judge("dq", want, want, lost, dtype).verdict == "agree"
    for wrong in (-want, 14 * want, want[..., ::-1]):  # where nothing is a yardstick any more
        assert judge("dq", wrong, want, 50 * want, dtype, lossy=[50 * want]).verdict == "disagree"


def test_one_row_beyond_the_ceiling_is_no_agreement(tensors):
    want, plain, _ = tensors
    got = want.copy()
    got[0, 0, 0] *= 2
    assert judge("dq", got, want, got, "bfloat16").verdict == "lossy"
    assert judge("dq", got, want, plain, "bfloat16").verdict == "disagree"


def test_a_rounded_lse_may_lose_digits_in_float32_not_the_scale(tensors):
    """Twice the gradient, in one row of four hundred."""
    want, _, _ = tensors
    got = want.copy()
    got[0, 0, 0] *= 2
    assert judge("dq", got, want, want, "float32", lossy=[got]).verdict == "disagree"
    got = want * (1 + 1e-4)
    assert judge("dq", got, want, want, "float32", lossy=[got]).verdict == "lossy"


def test_a_padded_row_is_not_the_measure_of_every_lse():
    want = np.random.default_rng(0).standard_normal((2, 4, 50)) + 3
    want[0, 0, 0] = np.finfo(np.float32).min
    got = want.astype(np.float32).astype(float)
    assert judge("lse", got, want, got, "float32").verdict == "agree"
    got[1, 1, 1] += 1e-4
    assert "(b 1, h 1, row 1)" in judge("lse", got, want, want, "float32").faults[0]


def test_an_lse_near_zero_is_measured_in_ones():
    want = np.full((1, 1, 20), 1e-4)
    assert judge("lse", want + 1e-6, want, want, "float32").verdict == "agree"
    assert judge("lse", want + 1e-4, want, want, "float32").faults


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e150, 1e300])
def test_size_alone_changes_no_judgement(tensors, scale):
    want, plain, _ = tensors
    expected = judge("dq", plain, want, plain, "bfloat16", uncancelled=1.0)
    found = judge("dq", plain * scale, want * scale, plain * scale, "bfloat16", uncancelled=scale)
    np.testing.assert_allclose(found.errors, expected.errors, rtol=1e-9)
    wrong = judge("dq", 2 * want * scale, want * scale, plain * scale, "bfloat16")
    assert "nan" not in wrong.faults[0]


# The report


@pytest.fixture
def lossy(monkeypatch):
    """A report in which torch's flash kernel is lossy."""

    def report(strict):
        return crosscheck(
            ["jax:plain", "torch:sdpa-flash"], [hard.PEAKED], ["bfloat16"], strict=strict
        )

    return report


def test_lossy_is_said_everywhere_and_counts_where_it_is_asked_to(lossy):
    report, strict = lossy(False), lossy(True)
    assert report.verdicts == {"jax:plain": "agree", "torch:sdpa-flash": "lossy"}
    assert (report.agree, report.verdict, report.failures) == (True, "lossy", ())
    assert (strict.agree, strict.verdict, strict.failures) == (False, "lossy", ())
    (outcome,) = (o for o in report.outcomes if o.losses)
    assert {loss.tensor for loss in outcome.losses} == {"dq", "dk"}

    text = str(report)
    factor = max(j.strain for j in outcome.judgements.values())
    assert f"lossy ×{factor:.2g}" in text
    assert "~ torch:sdpa-flash, peaked, bfloat16: dq is lossy" in text
    assert "1 lossy, which --strict counts as disagreement: torch:sdpa-flash." in " ".join(
        text.split()
    )

    written = json.loads(json.dumps(report.as_json()))
    assert (written["verdict"], written["agree"], written["strict"]) == ("lossy", True, False)
    assert {loss["tensor"] for loss in written["losses"]} == {"dq", "dk"}
    (row,) = (row for row in written["table"] if row["verdict"] == "lossy")
    assert row["factor"] == factor
    assert row["worst"]["dq"]["verdict"] == "lossy"
    assert row["worst"]["out"]["factor"] is None


def test_a_ceiling_is_said():
    report = crosscheck(["jax:plain"], [hard.hard("giant", giant_logits)], ["float32"])
    assert report.agree
    reached = {c.tensor for c in report.ceilings}
    assert "out" in reached
    assert "! giant, float32: out reaches the ceiling: plain attention itself is off by" in str(
        report
    )
    assert {c["tensor"] for c in report.as_json()["ceilings"]} == reached


def giant_logits(random):
    """Of 1e6, in pairs that differ by 1: float32 tells tenths there."""
    q, k = (1000 * hard.normal(random)[n] for n in "qk")
    k[:, :, 1::2] = k[:, :, :-1:2] + 1e-3 * random.standard_normal(k[:, :, 1::2].shape)
    return hard.normal(random) | {"q": q, "k": k}


# What cannot be judged is said to be so, and blamed on nobody


@pytest.mark.parametrize("empty", ["B", "Sq", "Sk"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"layout": "bshd"}], ids=str)
def test_axes_without_length_are_judged(empty, options):
    def make(random):
        b, sq, sk = (0 if axis == empty else n for axis, n in (("B", 2), ("Sq", 5), ("Sk", 7)))
        shapes = {"q": (b, 4, sq, 8), "k": (b, 2, sk, 8), "v": (b, 2, sk, 8)}
        return {n: random.standard_normal(shape) for n, shape in shapes.items()}

    report = crosscheck(OURS, [hard.hard("empty", make, **options)], ["float32"])
    assert set(report.verdicts.values()) == {"agree"}, str(report)


def near_the_end(largest, *names):
    def make(random):
        made = hard.normal(random)
        return made | {n: made[n] * (largest / np.abs(made[n]).max()) for n in names}

    return hard.hard("near-the-end", make)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_overflows_in_honest_arithmetic_is_asked_of_nobody(dtype):
    report = crosscheck(["jax:plain", "jax:flash"], [near_the_end(3e38, "q")], [dtype])
    assert report.verdict == "refused"
    assert not report.failures
    (reason, _) = report.refusals
    assert f"out overflows in {dtype}, in honest arithmetic too" in reason.reason


def test_numbers_near_the_end_are_judged_while_honest_arithmetic_holds_them():
    case = near_the_end(6e4, "v")
    report = crosscheck(["jax:plain", "torch:sdpa-math", "numpy:oracle"], [case], ["float16"])
    assert set(report.verdicts.values()) == {"agree"}, str(report)


def test_a_bias_of_minus_infinity_is_asked_and_a_finite_one_that_does_not_fit_is_not():
    for dtype in ("float32", "float16", "bfloat16"):
        report = crosscheck(["jax:plain"], [hard.MINUS_INFINITE], [dtype])
        assert report.verdict == "agree", str(report)
    asked = Question.of(hard.MINUS_INFINITE, 0, "float32")
    assert asked.hidden["out"][:, :, ::5].all()  # exactly 0 where nothing has weight
    assert asked.hidden["dk"][:, :, -7:].all()
    assert asked.poisoned is None  # but seen: the contract wants K and V finite there

    (outcome,) = crosscheck(["jax:plain"], ["padded-to-float32s-end"], ["bfloat16"]).outcomes
    assert "beyond bfloat16" in outcome.reasons[0]


def test_what_is_left_beside_a_sink_far_above_all_keys_is_nothing_to_judge_by():
    """out is of size 1e-44, where float32 has no digits: one processor keeps some, another none."""

    def make(random):
        made = hard.normal(random)
        made["q"][..., 0], made["k"][..., 0] = -20, 20
        return made | {"sinks": np.zeros((1, SMALL.q_heads, 1, 1))}

    report = crosscheck(["jax:plain"], [hard.hard("far-below-a-sink", make)], ["float32"])
    assert "below the normal numbers of float32" in report.outcomes[0].reasons[0]


# The judge shares nothing with what it judges


def test_the_oracle_and_the_judge_import_no_rule_of_the_kernels():
    """Problem says what is asked; everything else of heedful is on trial."""
    allowed = {
        oracle: {
            "heedful.call.arrays",
            "heedful.call.operands",
            "heedful.call.problem",
            "heedful.pairs",
        },
        # What the caller's own functions are is no rule.
        pairs: {"heedful.call.functions", "heedful.call.operands", "heedful.compiled"},
        yardstick: {"heedful", "heedful.oracle", "heedful.rules.scores"},
        tolerance: set(),
        question: {"heedful", "heedful.call"},
    }
    names = {
        "Array",
        "Call",
        "Operands",
        "Problem",
        "Part",
        "Pairs",
        "Program",
        "compiled",
        "modified",
        "pull_back_added",
        "added",
        "capped",
        "parts",
        "oracle",
    }
    for module, modules in allowed.items():
        imported = [n for n in ast.walk(ast.parse(inspect.getsource(module))) if is_import(n)]
        assert {n.module for n in imported} == modules, module
        assert {alias.name for n in imported for alias in n.names} <= names, module


def is_import(node):
    return isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "heedful"


def test_a_fault_of_visibility_is_seen(monkeypatch):
    """One that every kernel shares."""
    right = heedful.plain.visible

    def off_by_one(problem, operands, place):
        return right(problem, operands, place._replace(columns=place.columns + 1))

    monkeypatch.setattr("heedful.plain.visible", off_by_one)
    report = crosscheck(
        ["jax:plain"], [hard.hard("window", hard.normal, window=(5, 3))], ["float32"]
    )
    assert {failure.tensor for failure in report.failures} >= {"out", "lse", "dq"}


@pytest.mark.parametrize("rule", ["added", "capped"])
def test_a_fault_of_the_scores_is_seen_in_float64(monkeypatch, rule):
    """One that every kernel and the yardsticks share, in rows of the table that ask for it."""
    right = getattr(heedful.rules.scores, rule)

    def off(*asked):
        found = right(*asked)
        if rule == "capped":
            scores, slope = found
            return found if slope is None else (scores * (1 + 1e-4), slope)
        return found + 1e-4 * (found - asked[-1])

    for user in ("heedful.plain", yardstick.__name__):
        monkeypatch.setattr(f"{user}.{rule}", off)
    option = {"added": "bias", "capped": "softcap"}[rule]
    mine = (c for c in combined() if c.dtype == "float64" and c.caller in (None, "jax"))
    asked = [c for c in mine if c.row[option] != "none" and c.row["scale"] != "0" and c.return_lse]
    report = crosscheck(["jax:plain"], asked[:6])
    assert not any("raised" in failure.message for failure in report.failures)
    assert not [o.case for o in report.outcomes if o.verdict == "agree"]
    assert report.failures


def test_a_fault_that_undoes_itself_on_the_way_back_is_seen(monkeypatch):
    """The call's own rank and layout are read by the judge for itself."""
    heads, out, lse = Form.heads, Form.out, Form.lse
    monkeypatch.setattr(Form, "heads", lambda self, x: heads(self, x)[..., ::-1, :])
    monkeypatch.setattr(Form, "out", lambda self, x: out(self, x)[..., ::-1, :])
    monkeypatch.setattr(Form, "lse", lambda self, x: lse(self, x)[..., ::-1])
    report = crosscheck(
        ["jax:plain"], [hard.hard("flipped", hard.normal, causal=True)], ["float32"]
    )
    assert report.verdict == "disagree"


@pytest.mark.parametrize(
    "name", ["offset-each", "lengths-causal", "window-tall", "gqa-bshd", "tiny"]
)
def test_the_judge_reads_a_call_as_problem_does(name):
    (case,) = select([name], named())
    asked = Question.of(case, 0, "float32")
    x = asked.inputs
    expected = Call.of(x.q, x.k, x.v, **x.options).operands
    for found, wanted in zip(asked.operands[:5], expected[:5], strict=True):
        if wanted is None:
            assert found is None
        else:
            np.testing.assert_array_equal(found, wanted)
    for b in range(asked.problem.batch):
        at = b, 0, slice(0, asked.problem.q_length)
        seen = (oracle.sees(asked.problem, operands, at) for operands in (asked.operands, expected))
        np.testing.assert_array_equal(*seen)


# Memory


def test_memory_is_said_beforehand_and_the_judge_takes_none_for_scores(capsys):
    def of_length(n):
        return hard.hard(
            f"long-{n}", lambda random: {x: np.zeros((1, 8, n, 64), np.float32) for x in "qkv"}
        )

    short, long = memory_needed([of_length(4096), of_length(16384)], ["jax:plain", "jax:flash"])
    assert long.judge < 4 * short.judge + 1
    assert short.judge / (8 * 4096**2) < 4  # bytes a score; it was 61
    assert long.backends.keys() == {"jax:plain"}
    assert long.backends["jax:plain"] == 16 * short.backends["jax:plain"]
    assert "8 × 16384 × 16384 scores take up to" in str(long)


def test_the_oracle_takes_any_number_of_scores_at_once(monkeypatch):
    (case,) = select(["softcap-bias"], named())
    asked = Question.of(case, 0, "float32")
    whole = asked.answers(True)
    monkeypatch.setattr(oracle, "SCORES_AT_ONCE", 1000)  # seven queries
    parts = Question.of(case, 0, "float32").answers(True)
    for name, x in whole.right.items():
        np.testing.assert_allclose(parts.right[name], x, rtol=1e-11, atol=1e-12)
    for some, all_at_once in zip(parts.best, whole.best, strict=True):
        for name, x in all_at_once.items():
            np.testing.assert_allclose(some[name], x, rtol=1e-4, atol=1e-5)
