"""A file holds whole calls: options and cotangents beside q, k and v."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from heedful_crosscheck import InputError, crosscheck, load, save
from heedful_crosscheck.question import Question

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.standard_normal(shape, dtype=np.float32)


def call(**more):
    return {"q": normal(2, 6, 4, 8), "k": normal(2, 9, 2, 8), "v": normal(2, 9, 2, 5)} | {
        "layout": "bshd",
        **more,
    }


EVERYTHING = {
    "causal": "top_left",
    "window": (np.int64(3), None),
    "scale": np.float32(0.5),
    "softcap": 4,
    "bias": normal(1, 4, 6, 9),
    "mask": RANDOM.random((2, 1, 6, 9)) < 0.9,
    "kv_lengths": np.array([9, 7]),
    "sinks": normal(4),
    "q_segment_ids": np.array([[0, 0, 0, 1, 1, 1]]),
    "kv_segment_ids": np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]]),
    "dropout_rate": 0.25,
    "dropout_seed": 3,
}


def test_what_is_saved_is_asked(tmp_path):
    saved = call(**EVERYTHING, alibi_slopes=None)
    saved["out_cotangent"], saved["lse_cotangent"] = normal(2, 6, 4, 5), normal(2, 4, 6)
    from_jax = {n: jnp.asarray(saved[n]) for n in "qkv"} | {"layout": "bshd"}
    save(tmp_path / "calls.safetensors", {"mine": saved, "jax.plain": from_jax})
    mine, plain = load(tmp_path / "calls.safetensors")
    assert (mine.name, plain.name) == ("mine", "jax.plain")
    question = Question.of(mine, 0, "float32")
    for name in "qkv":
        np.testing.assert_array_equal(getattr(question.inputs, name), saved[name])
    assert question.inputs.options.keys() == EVERYTHING.keys() | {"layout"}
    for name, x in EVERYTHING.items():
        np.testing.assert_array_equal(question.inputs.options[name], x)
    assert question.inputs.options["window"] == (3, None)
    np.testing.assert_array_equal(question.out_cotangent, saved["out_cotangent"].swapaxes(1, 2))
    np.testing.assert_array_equal(question.lse_cotangent, saved["lse_cotangent"])
    assert plain.options == {"layout": "bshd"} and not plain.cotangents
    report = crosscheck(["numpy:oracle"], [mine, plain], ["float32"])
    assert report.agree and len(report.outcomes) == 2, str(report)


def test_lse_need_not_be_asked_for_and_a_wide_bias_stays_wide(tmp_path):
    half = {n: x.astype("bfloat16") for n, x in call().items() if n in "qkv"}
    saved = half | {"layout": "bshd", "return_lse": False, "bias": normal(4, 6, 9)}
    save(tmp_path / "one.safetensors", {"one": saved})
    (case,) = load(tmp_path / "one.safetensors")
    assert not case.return_lse and "return_lse" not in case.options
    inputs = case.inputs(0, "bfloat16")
    assert inputs.q.dtype == "bfloat16" and inputs.options["bias"].dtype == "float32"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"causal": "bottom"}, "case mine: causal must be False, True"),
        ({"casual": True}, "case mine: unknown option 'casual'"),
        ({"out_cotangent": normal(2, 4, 6, 5)}, r"must be \(2, 6, 4, 5\). Got \(2, 4, 6, 5\)"),
        (
            {"lse_cotangent": np.full((2, 4, 6), np.inf)},
            "lse_cotangent of case mine must be finite",
        ),
        ({"q": normal(6, 4, 8)}, r"q of case mine must be \(B, S, H, D\)"),
        ({"v": None}, "case mine lacks v"),
        ({"mask_mod": lambda b, h, i, j: i >= j}, "mask_mod of case mine is a function"),
    ],
)
def test_what_is_no_call_is_not_saved(tmp_path, changed, message):
    with pytest.raises(InputError, match=message):
        save(tmp_path / "mine.safetensors", {"mine": call(**changed)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ([1], "must be of format 'heedful input 1'"),
        ({"format": "heedful input 2", "options": {}}, "Got 'heedful input 2'"),
        ({"format": "heedful input 1"}, "with options"),
        ({"format": "heedful input 1", "options": {"mine": 3}}, "must be by name. Got 3"),
        ({"format": "heedful input 1", "options": {"yours": {}}}, r"options of \['yours'\]"),
        (
            {"format": "heedful input 1", "options": {"mine": {"bias": 3}}},
            "as tensor and as number",
        ),
        ({"format": "heedful input 1", "options": {"mine": {"scale": []}}}, "scale must be"),
        ({"format": "heedful input 1", "options": {"mine": {"layout": {}}}}, "layout must be"),
        ({"format": "heedful input 1", "options": {"mine": {"mask": [1]}}}, "mask must be"),
        ({"format": "heedful input 1", "options": {"mine": {"return_lse": 3}}}, "return_lse"),
    ],
)
def test_malformed_metadata_is_refused_with_the_reason(tmp_path, facts, message):
    shapes = {"q": (2, 4, 6, 8), "k": (2, 4, 9, 8), "v": (2, 4, 9, 5), "bias": (6, 9)}
    tensors = {f"mine.{name}": normal(*shape) for name, shape in shapes.items()}
    text = facts if isinstance(facts, str) else json.dumps(facts)
    safetensors.numpy.save_file(tensors, tmp_path / "bad.safetensors", {"heedful": text})
    with pytest.raises(InputError, match=message):
        load(tmp_path / "bad.safetensors")
