"""A convention error is named, and nothing else is; what is no convention error is given no name."""

from functools import partial

import jax
import numpy as np
import pytest
from planted import TAKES, attend

import heedful
from heedful import Operands
from heedful_crosscheck import Function, crosscheck, explanation
from heedful_crosscheck.cases import select
from heedful_crosscheck.causes import CAUSES, LOSSES
from heedful_crosscheck.contract.cases import CASES, FORMS, case, hidden, normal
from heedful_crosscheck.question import Question


def described(function, framework="numpy", **more):
    own = {"takes": TAKES, "causal": "bottom_right", "lse": "natural", "framework": framework}
    return Function(function, **{**own, "declines": ["hidden_nan"], "name": "mine", **more})


def causes(function, asked, **more):
    """What explains the failures of one case, one way."""
    asked = list(select([asked], CASES + FORMS)) if isinstance(asked, str) else [asked]
    report = crosscheck([described(function, **more)], asked, ["float32"])
    (outcome,) = report.outcomes
    assert outcome.verdict == "disagree", str(report)
    (found,) = {failure.causes for failure in outcome.failures}
    assert not found or f"; agrees {', or '.join(found)}" in str(outcome.failures[0])
    return set(found)


SHORTER = case("x", "y", causal=True, kv_lengths=np.array([5, 3]))
FORWARD = [
    ("top-left", "causal: fewer queries", "once causal is aligned top-left"),
    ("top-left", "window: fewer queries", "once the window is aligned top-left"),
    ("whole", SHORTER, "once causal is aligned bottom-right, lengths aside"),
    ("offset ignored", case("x", "y", causal=True, q_offset=4), "if q_offset is ignored"),
    ("one back", "causal: fewer queries", "if causal hides a query's own key"),
    ("causal ignored", "causal: fewer queries", "if causal is ignored"),
    ("causal unasked", "basic: cross attention", "if it is causal unasked"),
    ("wider", "window: both sides", "with a window one wider on its left"),
    ("narrower", "window: both sides", "with a window one narrower on its left"),
    ("window ignored", "window: both sides", "if the window is ignored"),
    ("sides swapped", "window: both sides", "with the window's sides swapped"),
    ("q_lengths ignored", "lengths: queries", "if q_lengths are ignored"),
    ("kv_lengths ignored", case("x", "y", kv_lengths=np.array([5, 3])), "if kv_lengths are ignored"),
    ("segments ignored", "segments: packed", "if segments are ignored"),
    ("mask ignored", "mask: full", "if the mask is ignored"),
    ("mask inverted", "mask: full", "with the mask inverted"),
    ("-1e9", "causal: more queries: empty rows", "if a query that sees nothing averages all of V"),
    ("bias ignored", "bias: full", "if the bias is ignored"),
    ("bias scaled", "bias: full", "with the bias scaled as the product is"),
    ("bias subtracted", "bias: full", "with the bias subtracted"),
    ("softcap after bias", "softcap: before bias", "with softcap after bias"),
    ("softcap ignored", "softcap: tight", "if softcap is ignored"),
    ("softcap before scale", "softcap: tight", "with softcap before scale"),
    ("tanh alone", "softcap: tight", "with tanh(s / softcap), not multiplied by softcap again"),
    ("sinks ignored", "sinks: of each head", "if the sinks are ignored"),
    ("alibi ignored", "alibi: of each head", "if ALiBi is ignored"),
    ("alibi's sign", "alibi: of each head", "with ALiBi's slopes of the other sign"),
    ("signed", "alibi: of each head", "with ALiBi's distance signed, p_i − j"),
    ("scale 1", "scale: given", "with a scale of 1"),
    ("default", "scale: given", "with a scale of D^-½, whatever is asked"),
    ("1/D", "scale: given", "with a scale of D^-1"),
    ("Dv", "value size: wider than D", "with a scale of Dv^-½"),
    ("twice", "scale: given", "with the scale applied twice"),
    ("h % Hkv", "heads: grouped", "with heads mapped h % Hkv"),
    ("head 0", "heads: grouped", "with key head 0 for all query heads"),
    ("q and k", "basic: self attention", "with q and k exchanged"),
    ("base 2", "basic: cross attention", "once LSE is read in base 2"),
    ("of the sum", "basic: cross attention", "if LSE is the sum itself, without a logarithm"),
    ("less the largest", "basic: cross attention", "if LSE is of scores less their largest"),
    ("unscaled lse", "scale: given", "with a scale of 1, in LSE alone"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "asked", "cause"), FORWARD, ids=[f"{x[0]}: {x[2]}" for x in FORWARD]
)
def test_a_convention_error_is_named_and_no_other(wrong, asked, cause):
    assert causes(partial(attend, wrong), asked) == {cause}


class Backwards:
    """Attention in NumPy, whose backward pass has one thing wrong with it, of the words below."""

    name, takes = "numpy:backwards", frozenset({"return_lse", "grouped_heads", "softcap", "causal"})

    def __init__(self, wrong):
        self.wrong = wrong

    def reasons(self, problem):
        return ()

    def run(self, problem, x):
        out, lse = attend("", *x[:3], causal=problem.causal, softcap=problem.softcap)
        return out, lse

    def gradients(self, problem, x, dout, dlse):
        wrong, group, cap = self.wrong, problem.group, problem.softcap
        q, k, v = (a.astype(np.float64) for a in x[:3])
        k, v = (np.repeat(a, group, 1) for a in (k, v))
        s = problem.scale * q @ k.swapaxes(2, 3)
        slope = 1 if cap is None or wrong == "slope" else 1 - np.tanh(s / cap) ** 2
        s = s if cap is None else cap * np.tanh(s / cap)
        if problem.causal:
            p = np.arange(s.shape[2])[:, None] + (wrong != "top-left") * (s.shape[3] - s.shape[2])
            s = np.where(np.arange(s.shape[3]) <= p, s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        dp = dout @ v.swapaxes(2, 3)
        delta = 0 if wrong == "delta" else (p * dp).sum(-1, keepdims=True)
        ds = slope * p * (dp - delta + (wrong != "dlse") * dlse[..., None])
        dq, dk, dv = ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout
        dq, dk = (
            a * {"unscaled": 1, "twice": problem.scale**2}.get(wrong, problem.scale)
            for a in (dq, dk)
        )
        dk, dv = (a.reshape(len(a), -1, group, *a.shape[2:]) for a in (dk, dv))
        dk, dv = dk[:, :, 0] if wrong == "first" else dk.sum(2), dv.sum(2)
        if wrong == "mean":
            dk, dv = dk / group, dv / group
        if wrong == "dv":
            dv = 0 * dv
        return Operands(*(a.astype(problem.dtype) for a in (dq, dk, dv)))


BACKWARD = {
    "dlse": ("basic: cross attention", "if the gradient of LSE is dropped"),
    "delta": ("basic: cross attention", "if delta, rowsum(dO ∘ O), is left out of the backward pass"),
    "dv": ("basic: cross attention", "if no gradient comes back to v"),
    "unscaled": ("basic: cross attention", "with dq and dk without the scale"),
    "twice": ("basic: cross attention", "with dq and dk scaled twice"),
    "slope": ("softcap: tight", "if softcap's slope is left out of the backward pass"),
    "first": ("heads: grouped", "with dk of a group's first query head, not summed"),
    "mean": ("heads: grouped", "with dk and dv averaged over a group's query heads, not summed"),
    "top-left": ("causal: fewer queries", "once causal is aligned top-left, in the backward pass alone"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", ["", *BACKWARD])
def test_what_is_wrong_in_the_backward_pass_is_named(wrong):
    heedful.register(Backwards(wrong))
    try:
        names = [BACKWARD[wrong][0]] if wrong else {name for name, _ in BACKWARD.values()}
        report = crosscheck(["numpy:backwards"], select(names, CASES), ["float32"])
    finally:
        heedful.unregister("numpy:backwards")
    assert {f.causes for f in report.failures} == ({(BACKWARD[wrong][1],)} if wrong else set())


def test_gradients_must_agree_too():
    with jax.disable_jit():
        softcap = partial(attend, "softcap after bias")
        assert causes(softcap, "softcap: before bias", framework="jax") == {
            "with softcap after bias"
        }


# No convention error


def one_off(where, by, q, k, v, **options):
    out, lse = attend("", q, k, v, **options)
    out[where] *= by
    return out, lse


def jittered(size, q, k, v, **options):
    """By what no arithmetic loses."""
    out, lse = attend("", q, k, v, **options)
    random = np.random.default_rng(0)
    return (out * (1 + size * random.standard_normal(out.shape))).astype(np.float32), lse


BUGS = {
    "a row": partial(one_off, np.s_[0, 1, 2], 1.5),
    "a number": partial(one_off, np.s_[1, 0, 3, 5], -1),
    "a head": partial(one_off, np.s_[:, 1], 1.01),
    "all, by a thousandth": partial(one_off, np.s_[:], 1.001),
    "noise": partial(jittered, 0.01),
    "rows in another order": lambda *x, **options: [a[:, :, ::-1] for a in attend("", *x, **options)],
    "another seed": lambda q, k, v, **options: attend("", q, k, v[:, :, ::-1], **options),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize(
    "asked", ["causal: square", "mask: full", "heads: grouped", "softcap: before bias"]
)
def test_what_is_no_convention_error_gets_no_name(bug, asked):
    assert causes(BUGS[bug], asked) == set()


def test_an_honest_function_agrees():
    """Else what is found above might be its own fault."""
    names = {x[1] for x in FORWARD if isinstance(x[1], str)}
    report = crosscheck([described(partial(attend, ""))], select(names, CASES), ["float32"])
    assert report.agree, str(report)


# What a case cannot tell apart, what is one's own part, how often it is tried


def test_what_the_case_cannot_tell_apart_is_said_together():
    both = {"if kv_lengths are ignored", "with the kv_lengths of batch row 0 for all"}
    assert causes(partial(attend, "kv_lengths ignored"), "lengths: keys") == both


def test_a_layout_that_is_read_as_the_other_is_named():
    def of_heads_last(*arrays):
        """(B, S, H, D), which its description does not say."""
        return attend("", *(x.swapaxes(1, 2) for x in arrays))[0].swapaxes(1, 2)

    exchanged = "with heads and positions exchanged, (B, S, H, D) read as (B, H, S, D)"
    asked = "basic: self attention"
    assert causes(of_heads_last, asked, takes=[], lse=None, causal=None) == {exchanged}


def test_a_scale_of_one_over_d_twice_has_one_name():
    assert causes(partial(attend, "twice"), "basic: cross attention") == {"with a scale of D^-1"}


def test_nothing_is_said_of_what_is_wrong_in_two_ways():
    def attend_twice_wrong(q, k, v, **options):
        return attend("mask inverted", q, k, v[:, ::-1], **options)

    assert causes(attend_twice_wrong, "mask: full") == set()


def test_each_kind_of_failure_is_tried_once_and_then_what_explained_it(monkeypatch):
    tried = []
    parts = explanation._Trial._parts
    monkeypatch.setattr(
        explanation._Trial, "_parts", lambda self, cause: tried.append(cause) or parts(self, cause)
    )
    alike = [case("x", f"{n}", mask=hidden(2, 2, 5, n), Sk=n) for n in (6, 7, 8)]
    report = crosscheck([described(partial(attend, "mask inverted"))], alike, ["float32"])
    assert {f.causes for f in report.failures} == {("with the mask inverted",)}
    assert len(tried) == len(CAUSES) + 2
    assert len(report.failures) == 6 and "with the mask inverted" in str(report)


def test_digits_that_narrower_products_lose_are_named():
    def rounded(q, k, v, **options):
        out, lse = attend(
            "", *(x.astype("bfloat16").astype("float32") for x in (q, k, v)), **options
        )
        return out.astype("bfloat16").astype("float32"), lse

    asked = case("x", "y", Sq=40, Sk=50, D=32, Dv=32)
    assert causes(rounded, asked) == {"within what products of bfloat16 numbers lose"}


def test_every_entry_answers_what_is_asked_or_is_no_other_question():
    """Whatever is asked, of every option beside others: no entry breaks, and shapes stay."""
    cases = [
        case(
            "all", "of it", Hq=4, causal=True, window=(2, 1), q_lengths=np.array([5, 4]),
            kv_lengths=np.array([6, 7]), mask=hidden(2, 1, 5, 7), bias=normal(1, 4, 5, 7),
            softcap=4.0, scale=0.5, sinks=normal(4), alibi_slopes=normal(4), dropout_rate=0.3,
            dropout_seed=1,
        ),
        *select(["infinite bias: a query hidden", "segments: mixed, causal"], CASES),
        *select(["layout: rank 5, each *"], FORMS),
    ]  # fmt: skip
    answered = set()
    for asked in cases:
        question = Question.of(asked, 0, "float32")
        right = question.answers(True).right
        trial = explanation._Trial(
            question,
            {"out": question.as_called(right["out"].astype(np.float32))}
            | {"lse": question.rows_as_called(right["lse"].astype(np.float32))},
            True,
        )
        assert not trial.wrong, "it is the right one"
        for cause in CAUSES:
            found = cause.answer(explanation._oracle, trial.posed)
            if found is None:
                continue
            answered.add(cause.words)
            assert {n: x.shape for n, x in trial._as_came(found).items()} == {
                n: x.shape for n, x in trial.got.items()
            }
            shapes = {f"d{n}": x.shape for n, x in question.operands.differentiable.items()}
            assert {n: x.shape for n, x in found.items() if n in shapes}.items() <= shapes.items()
    assert len(answered) > 60
    assert len({cause.words for cause in CAUSES}) == len(CAUSES) and LOSSES
    assert heedful.__version__
