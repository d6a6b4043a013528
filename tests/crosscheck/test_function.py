"""Anybody's function: what it calls things is said in a line, and it is judged as its users call it."""

import json
from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import heedful
from heedful_crosscheck import Function, cli, crosscheck
from heedful_crosscheck.cases import combined, select
from heedful_crosscheck.combinations import is_possible
from heedful_crosscheck.contract.cases import CASES, FORMS
from heedful_crosscheck.factors import FACTORS
from heedful_crosscheck.fitting import fitted
from heedful_crosscheck.function_backend import backend_of


def some(*names):
    """Of the contract's cases, which are tiny."""
    return list(select(names, CASES + FORMS))


# A JAX function in five lines


def attend(q, k, v, causal=False):
    """(B, S, H, D), aligned top-left; knows nothing of NaN in hidden keys, nor of empty rows."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[2:], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


DESCRIBED = {"layout": "bshd", "causal": "top_left", "takes": ["causal", "gqa"]}


def test_a_function_is_judged_in_a_line_and_says_what_it_declines():
    cases = some("heads: grouped", "top left: fewer queries", "mask: full")
    for _ in range(2):  # in one process
        report = crosscheck(attend, cases, declines=["hidden_nan"], **DESCRIBED)
        assert report.agree, str(report)
        assert report.verdicts == {"jax:attend": "agree"}
    assert "jax:attend" not in heedful.backends()
    judged = {o.case: set(o.judgements) for o in report.outcomes if not o.reasons}
    assert judged.keys() == {case.name for case in cases} - {"mask: full"}
    assert set().union(*judged.values()) == {"out", "dq", "dk", "dv"}
    assert "jax:attend: declines hidden_nan: K and V that nobody sees hold zeros" in str(report)
    assert report.as_json()["declined"] == {"jax:attend": ["hidden_nan"]}
    reasons = {reason.reason for reason in report.refusals}
    assert reasons == {"is not said to return a log-sum-exp", "does not take mask"}


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"causal": "bottom_right", "declines": ["hidden_nan"]}, "causal: fewer queries"),
        ({"layout": "bhsd"}, "basic: cross attention"),
        ({}, "top left: fewer queries"),  # NaN in keys that nobody sees
        ({"takes": ["causal", "value_dim", "gqa", "lse"], "lse": "natural"}, "basic: self attention"),
    ],
)  # fmt: skip
def test_what_is_said_and_is_not_so_is_disagreement(changed, name):
    call = attend
    if "lse" in changed:

        def call(q, k, v, causal=False, return_lse=False):
            return attend(q, k, v, causal)

    report = crosscheck(call, some(name), **(DESCRIBED | changed))
    assert report.verdict == "disagree", str(report)
    if not changed:
        assert "it may decline by name: hidden_nan, empty_rows" in str(report)


# NumPy: every option in every form


@np.errstate(divide="ignore", invalid="ignore")
def numpy_attention(
    q, k, v, bias=None, sees=True, cap=None, scale=None, sinks=None, slopes=None, offset=0
):
    """(B, H, S, D) → out and LSE, in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.swapaxes(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    s = s if cap is None else cap * np.tanh(s / cap)
    s = s if bias is None else s + bias
    i, j = np.indices(s.shape[2:])
    if slopes is not None:
        s = s - np.asarray(slopes, np.float64)[..., None, None] * np.abs(i + offset - j)
    s = np.where(sees, s, -np.inf)
    top = s.max(-1, keepdims=True, initial=-1e30)
    p = np.exp(s - top)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks, np.float64)[:, None, None] - top)
    out = np.where(total > 0, np.nan_to_num(p / total) @ np.nan_to_num(v, posinf=0), 0)
    return out.astype(np.float32), (top + np.log(total))[..., 0].astype(np.float32)


def of_mask(turn, q, k, v, mask=None):
    return numpy_attention(q, k, v, sees=True if mask is None else turn(mask))[0]


def added(q, k, v, attn_mask=None):
    """SDPA's argument: boolean, or numbers that are added."""
    if attn_mask is not None and attn_mask.dtype == bool:
        return numpy_attention(q, k, v, sees=attn_mask)[0]
    return numpy_attention(q, k, v, bias=attn_mask)[0]


def windowed(form, q, k, v, causal, window=None):
    i, j = np.indices((q.shape[2], k.shape[2]))
    p = i + k.shape[2] - q.shape[2]
    sees = (j <= p) | (not causal)
    if window is not None:
        left, right = (window - 1, None) if form == "last" else window
        sees = sees & ((left in (None, -1)) | (j >= p - (left or 0)))
        sees = sees & ((right in (None, -1)) | (j <= p + (right or 0)))
    return numpy_attention(q, k, v, sees=sees)[0]


def with_lse(base, axes, q, k, v):
    out, lse = numpy_attention(q, k, v)
    return out, (lse if axes == "bhs" else lse.swapaxes(1, 2)) / np.float32(np.log(base))


def lengthy(q, k, v, seq_lens=None, q_ids=None, kv_ids=None):
    sees = np.True_
    if seq_lens is not None:
        sees = np.arange(k.shape[2]) < seq_lens[:, None, None, None]
    if q_ids is not None:
        sees = sees & (q_ids[:, None, :, None] == kv_ids[:, None, None, :])
    return numpy_attention(q, k, v, sees=sees)[0]


def scored(q, k, v, sm_scale, softcap=None, sinks=None, alibi=None, start=None, enable_gqa=False):
    assert enable_gqa == (q.shape[1] != k.shape[1])
    start = k.shape[2] - q.shape[2] if start is None else start
    start = start if np.ndim(start) == 0 else start[:, None, None, None]
    own = {"cap": softcap, "scale": sm_scale, "sinks": sinks, "slopes": alibi, "offset": start}
    return numpy_attention(q, k, v, **own)[0]


def numpy_always_causal(q, k, v):
    return windowed("pair", q, k, v, causal=True)


ALIBI = ["alibi_slopes=alibi", "q_offset=start"]
FORMS_OF = {
    "visible": (partial(of_mask, lambda x: x), {"takes": ["mask"]}, ["mask: full", "mask: keys"]),
    "hidden": (
        partial(of_mask, np.logical_not),
        {"takes": ["mask"], "mask": "hidden"},
        ["mask: full", "mask: some rows hidden"],
    ),
    "keys": (
        partial(of_mask, lambda x: x[:, None, None]),
        {"takes": ["mask"], "mask": "visible_keys"},
        ["mask: keys", "mask: keys, (B, Sk)"],
    ),
    "hidden keys": (
        partial(of_mask, lambda x: ~x[:, None, None]),
        {"takes": ["mask"], "mask": "hidden_keys"},
        ["mask: keys"],
    ),
    "one argument": (
        added,
        {"takes": ["mask=attn_mask", "bias=attn_mask"]},
        ["mask: full", "bias: full", "bias: with mask"],
    ),
    "additive": (
        lambda q, k, v, attn_mask=None: numpy_attention(q, k, v, bias=attn_mask)[0],
        {"takes": ["mask=attn_mask"], "mask": "additive", "name": "additive"},
        ["mask: full"],
    ),
    "pair": (
        partial(windowed, "pair"),
        {"takes": ["causal", "window"], "causal": "bottom_right"},
        ["window: left alone", "window: causal", "window: fewer queries", "basic: cross attention"],
    ),
    "pair_minus_one": (
        partial(windowed, "pair_minus_one"),
        {"takes": ["causal", "window"], "causal": "bottom_right", "window": "pair_minus_one"},
        ["window: left alone", "window: right alone", "window: causal"],
    ),
    "last": (
        partial(windowed, "last"),
        {"takes": ["causal", "window"], "causal": "bottom_right", "window": "last"},
        ["window: causal"],
    ),
    "always causal": (
        numpy_always_causal,
        {"always_causal": True, "causal": "bottom_right"},
        ["causal: fewer queries", "causal: square"],
    ),
    "natural": (partial(with_lse, np.e, "bhs"), {"lse": "natural"}, ["basic: cross attention"]),
    "base 2": (
        partial(with_lse, 2, "bsh"),
        {"lse": "base2", "lse_layout": "bsh"},
        ["basic: cross attention"],
    ),
    "lengths": (
        lengthy,
        {"takes": ["kv_lengths=seq_lens", "q_segment_ids=q_ids", "kv_segment_ids=kv_ids"]},
        ["lengths: keys", "segments: packed"],
    ),
    "scores": (
        scored,
        {
            "takes": ["scale=sm_scale", "softcap", "sinks", "gqa=enable_gqa", *ALIBI],
            "causal": "bottom_right",
        },
        [
            "scale: given", "softcap: tight", "sinks: of each head", "alibi: of each row and head",
            "alibi: of each head", "alibi: with an offset", "heads: multi-query",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS_OF)
def test_options_come_in_the_forms_that_a_function_has_for_them(form):
    call, described, names = FORMS_OF[form]
    report = crosscheck(call, some(*names), **described)
    assert report.agree, str(report)
    assert {o.case for o in report.outcomes if not o.reasons} == set(names), str(report)
    tensors = {"out", "lse"} if "lse" in described else {"out"}
    assert all(set(o.judgements) == tensors for o in report.outcomes)


REFUSED = {
    "mask: full": ("takes a mask of keys alone, (B, Sk)", "keys"),
    "causal: fewer queries": ("does not take causal", "keys"),
    "basic: self attention": ("is always causal", "always causal"),
    "top left: fewer queries": (
        "aligns bottom-right, and the call asks for another place",
        "always causal",
    ),
    "q_offset: one number": ("does not take q_offset", "always causal"),
    "window: both sides": ("has windows over a causal query's last keys alone", "last"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take_is_refused_with_the_reason(name):
    said, form = REFUSED[name]
    call, described, _ = FORMS_OF[form]
    (outcome,) = crosscheck(call, some(name), **described).outcomes
    assert said in outcome.reasons


def test_sizes_that_it_does_not_have_are_refused():
    limits = {"head_dims": (64, 128), "multiple_of": 64}
    limits["reasons"] = lambda problem: ["no Tuesdays"] if problem.batch == 2 else []
    (outcome,) = crosscheck(numpy_always_causal, some("causal: square"), causal="square",
                            always_causal=True, framework="numpy", **limits).outcomes  # fmt: skip
    sizes = "has head sizes of 64, 128 alone, not 8"
    lengths = "takes lengths that are multiples of 64, not (7, 7)"
    assert outcome.reasons == (sizes, lengths, "no Tuesdays")


# Promises


def forgetful(q, k, v, mask=None):
    """NaN where a query sees no key; LSE and out, the latter of a third thing."""
    out, lse = numpy_attention(q, k, v, sees=True if mask is None else mask)
    empty = False if mask is None else ~np.broadcast_to(mask, (*lse.shape, k.shape[2])).any(-1)
    return np.where(np.asarray(empty)[..., None], np.float32(np.nan), out), lse, None


def test_a_promise_that_is_declined_is_not_asked_for():
    cases = some("mask: some rows hidden", "mask: full")
    described = {"takes": ["mask"], "lse": "natural"}
    assert not crosscheck(forgetful, cases, **described).agree
    report = crosscheck(forgetful, cases, declines=["empty_rows", "lse"], **described)
    assert report.agree, str(report)
    said = {o.case: o.reasons for o in report.outcomes}
    assert said["mask: some rows hidden"] == ("declines empty_rows: a query sees no key",)
    assert [o.judgements.keys() for o in report.outcomes if not o.reasons] == [{"out"}]


def test_what_flows_through_lse_may_be_declined():
    def without(q, k, v):
        scores = q @ k.swapaxes(2, 3) * q.shape[3] ** -0.5
        out = jax.nn.softmax(scores) @ v
        return out, jax.lax.stop_gradient(jax.nn.logsumexp(scores, -1))

    cases = some("basic: cross attention")
    assert crosscheck(without, cases, lse="natural").verdict == "disagree"
    report = crosscheck(without, cases, lse="natural", declines=["lse_gradient"])
    (outcome,) = report.outcomes
    assert report.agree and outcome.judgements.keys() == {"out", "lse", "dq", "dk", "dv"}
    report = crosscheck(without, cases, lse="natural", declines=["gradients"])
    (outcome,) = report.outcomes
    assert report.agree and outcome.judgements.keys() == {"out", "lse"}


def test_more_than_out_is_no_out():
    report = crosscheck(
        partial(with_lse, np.e, "bhs"), some("basic: cross attention"), framework="numpy"
    )
    (failure,) = report.failures
    assert 'returned a tuple of 2, and is not said to return more than out. Pass lse="natural"' in (
        failure.message
    )


# What is said of it


def test_its_framework_is_found_out_or_asked_for():
    assert backend_of(Function(attend, **DESCRIBED)).name == "jax:attend"
    assert backend_of(Function(lengthy, name="mine")).name == "numpy:mine"
    with pytest.raises(
        TypeError, match=r"answers arrays of jax and numpy.* alike. Pass framework="
    ):
        backend_of(Function(lambda q, k, v: q @ k.mT @ v))
    with pytest.raises(
        TypeError, match=r"cannot be found out: jax: KeyError: 'no'; numpy: .* Pass"
    ):
        backend_of(Function(lambda q, k, v: {}["no"]))


@pytest.mark.parametrize(
    ("described", "error", "message"),
    [
        ({"layout": "sbhd"}, ValueError, "layout must be one of 'bhsd', 'bshd'. Got 'sbhd'"),
        ({"takes": ["causal"]}, ValueError, "where its queries stand is not said"),
        ({"takes": "causal"}, TypeError, "takes must be a list of names. Got 'causal'"),
        ({"takes": ["casual"]}, ValueError, "takes must be of value_dim, mask, .* Got 'casual'"),
        (
            {"takes": ["dropout_rate"]},
            ValueError,
            "Got 'dropout_rate', which is not asked of functions",
        ),
        ({"takes": ["scale"]}, ValueError, "no argument 'scale' for scale. It has q, k, v, causal"),
        ({"takes": ["segments=ids"]}, ValueError, "which is not one argument"),
        ({"takes": ["gqa", "lse=causal"]}, ValueError, "says which: lse="),
        ({"declines": ["bias"]}, ValueError, "declines must be of hidden_nan, .* Got 'bias'"),
        ({"always_causal": True, **DESCRIBED}, ValueError, "Leave 'causal' out of takes"),
    ],
)
def test_a_description_that_cannot_be_is_refused(described, error, message):
    with pytest.raises(error, match=message):
        Function(attend, **described)


def test_an_argument_that_nobody_gives_is_asked_for():
    def tiled(q, k, v, tile):
        return q

    with pytest.raises(ValueError, match="tiled needs tile too, which nobody says"):
        Function(tiled)
    Function(partial(tiled, tile=128))


def test_a_name_that_is_taken_is_refused_and_conventions_are_of_one_function():
    with pytest.raises(ValueError, match=r"there is a backend named 'jax:plain'. Pass name="):
        crosscheck(attend, ["tiny"], name="plain", **DESCRIBED)
    with pytest.raises(TypeError, match="layout describe one function"):
        crosscheck(["jax:plain"], ["tiny"], layout="bshd")


def test_functions_are_judged_beside_backends():
    mine = Function(numpy_always_causal, always_causal=True, causal="bottom_right")
    report = crosscheck([mine, "numpy:oracle"], some("causal: square"))
    assert report.verdicts == {"numpy:oracle": "agree", "numpy:numpy_always_causal": "agree"}


# The combinations, fitted


def fits(cases, **described):
    backend = backend_of(Function(attend, framework="jax", **(DESCRIBED | described)))
    return [case.row for case in fitted(backend, cases, None)]


def test_the_table_is_fitted_to_what_a_function_takes():
    rows = fits(combined())
    asked = {name: {row[name] for row in rows} for name in FACTORS}
    assert asked["causal"] == {"no", "top_left", "yes"} and asked["layout"] == {"bshd"}
    square = [len(set(row["lengths"].split("x"))) == 1 for row in rows if row["causal"] == "yes"]
    assert all(square)  # where top-left is bottom-right
    for nothing in ("bias", "window", "mask", "softcap", "q_offset", "value_dim", "memory"):
        assert len(asked[nothing]) == 1
    varied = ("causal", "heads", "dtype", "head_dim", "batch", "logits")
    pairs = {pair for row in rows for pair in combinations([(n, row[n]) for n in varied], 2)}
    possible = {
        ((one, x), (other, y))
        for one, other in combinations(varied, 2)
        for x in FACTORS[one]
        for y in FACTORS[other]
        if is_possible({one: x, other: y})
    }
    assert possible - pairs == set()
    assert all(map(is_possible, rows))


def test_the_table_is_fitted_to_sizes():
    rows = fits(combined()[:40], head_dims=(64, 128), multiple_of=64)
    assert {row["head_dim"] for row in rows} == {"64", "128"}
    assert {row["lengths"] for row in rows} == {"64x64", "128x128", "256x256", "64x192"}


# The command line


def test_the_command_line_says_the_same(tmp_path, monkeypatch):
    (tmp_path / "my_numpy_kernel.py").write_text(
        "import numpy as np\n"
        "class kernels:\n"
        "    @staticmethod\n"
        "    def attend(q, k, v, sm_scale=None):\n"
        "        s = np.einsum('bqhd,bkhd->bhqk', q, k) * (sm_scale or q.shape[3] ** -0.5)\n"
        "        p = np.exp(s - s.max(-1, keepdims=True))\n"
        "        return np.einsum('bhqk,bkhd->bqhd', p / p.sum(-1, keepdims=True), v)\n"
    )
    with (tmp_path / "my_numpy_kernel.py").open("a") as module:
        module.write("from heedful_crosscheck import Function\n")
        module.write("mine = Function(kernels.attend, layout='bshd', name='mine')\n")
    monkeypatch.chdir(tmp_path)
    arguments = (
        "my_numpy_kernel:kernels.attend --layout bshd --takes scale=sm_scale --declines strides"
    )
    arguments += " --cases full --cases scale --dtype float32 --cases softcap"
    result = CliRunner().invoke(cli.app, ["crosscheck", *arguments.split()])
    assert result.exit_code == 0, result.output
    assert "1 agree: numpy:attend. 2 runs" in result.output
    written = json.loads((tmp_path / "crosscheck.json").read_text())
    assert written["backends"] == {"numpy:attend": "agree"}
    assert written["declined"] == {"numpy:attend": ["strides"]}
    assert [r["reason"] for r in written["refusals"] if r["part"] == "everything"] == [
        "does not take softcap"
    ]
    described = "my_numpy_kernel:mine --cases tiny --dtype float32 --in-process"
    result = CliRunner().invoke(cli.app, ["crosscheck", *described.split()])
    assert result.exit_code == 0 and "1 agree: numpy:mine. 1 runs" in result.output, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layout bshd", "--layout describes a function, and none is named"),
        ("json", "a function is named package.module:function. Got 'json'"),
        ("json:attend", "json has no attend"),
        ("no_such_module:attend", "No module named 'no_such_module'"),
        ("json:dumps --takes casual", "Got 'casual'"),
        ("json:dumps --framework jax --head-dims x", "takes whole numbers"),
    ],
)
def test_what_names_no_function_is_status_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["crosscheck", "--in-process", *arguments.split()])
    assert result.exit_code == 2
    assert message in result.output
