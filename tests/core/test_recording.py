"""`recording`: what ran, in which part of a model, and why."""

import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heedful
from heedful import Refusal, attention, part, recording, use_backend
from heedful.dispatch.by_module import Choices

Q = jnp.ones((1, 4, 3, 8))
K = jnp.ones((1, 2, 5, 8))


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch):
    monkeypatch.delenv("HEEDFUL_BACKEND", raising=False)
    monkeypatch.setattr(heedful.dispatch.ambient, "_environment", None)


def model(x):
    for layer in range(3):
        with part(f"layers.{layer}"):
            x = attention(x, x, x, causal=True)
    with part("head"), part("pool"), use_backend("jax:plain"):
        x = attention(x, K, K, backend=["jax:nn-cudnn", "jax:flash"])
        x = attention(x, K, K)
    return attention(x, x, x, backend="jax:plain")


def test_each_call_is_noted_with_what_ran_where_and_why():
    with recording() as record:
        model(Q)
    assert [(choice.part, choice.backend, choice.why) for choice in record[3:]] == [
        ("head.pool", "jax:flash", "asked for by backend=; jax:nn-cudnn refused"),
        ("head.pool", "jax:plain", "asked for by use_backend"),
        ("", "jax:plain", "asked for by backend="),
    ]
    assert [choice.part for choice in record[:3]] == ["layers.0", "layers.1", "layers.2"]
    for choice in record:
        assert choice.problem.q_length == 3
        assert choice.explanation.chosen == choice.backend
        assert choice.explanation.why == choice.why
        assert choice.explanation.problem == choice.problem


def test_printed_it_is_a_table_which_counts_equal_calls():
    with recording() as record:
        for _ in range(2):
            with part("decoder"):
                attention(Q, K, K, mask=jnp.ones((3, 5), bool), causal=True, backend="jax:plain")
        attention(np.ones((3, 8)), *[np.ones((3, 8))] * 2, backend="numpy:oracle")
    assert str(record) == (
        "decoder  2 × jax:plain  jax float32 (1, 4, 3, 8) on 2 × 5, causal, mask"
        "  asked for by backend=\n"
        "-        numpy:oracle   numpy float64 (1, 1, 3, 8)"
        "                       asked for by backend="
    )


def test_nothing_recorded_is_said():
    with recording() as record:
        pass
    assert str(record).startswith("no call of heedful was recorded")


def test_what_is_compiled_is_recorded_when_it_is_traced():
    call = jax.jit(lambda x: attention(x, x, x, backend="jax:plain"))
    for expected in (1, 0):
        with recording() as record:
            call(Q)
        assert len(record) == expected


def test_a_refusal_is_raised_and_not_recorded_and_an_explanation_is_no_call():
    with recording() as record:
        with pytest.raises(Refusal):
            attention(Q, Q, Q, softcap=1.0, backend="jax:nn-xla")
        heedful.explain(Q, Q, Q)
    assert record == []


def test_the_outer_one_has_what_the_inner_one_recorded_and_another_thread_records_nothing():
    with recording() as outer:
        with recording() as inner:
            attention(Q, Q, Q)
        thread = threading.Thread(target=attention, args=(Q, Q, Q))
        thread.start()
        thread.join()
    assert (len(outer), len(inner)) == (1, 1)
    attention(Q, Q, Q)
    assert (len(outer), len(inner)) == (1, 1)


def test_other_calls_of_heedful_are_recorded_once():
    with recording() as record:
        heedful.flash_attention(Q, Q, Q)
        heedful.flash_attention_varlen(
            *[jnp.ones((4, 2, 8))] * 3, *[jnp.array([0, 1, 4], jnp.int32)] * 2
        )
        heedful.decode(Q, jnp.zeros((1, 4, 8, 8)), jnp.ones((1, 4, 8, 8)), Q, Q, cache_lengths=2)
    assert [choice.backend for choice in record] == ["jax:flash"] * 3


# Choices by name


def test_a_pattern_holds_for_what_it_matches_and_all_within_and_the_first_wins():
    choices = Choices.of({"*.1": "jax:flash", "decoder": ["jax:nn-xla", "jax:plain"]})
    assert choices.at(["decoder"]) == (
        ("jax:nn-xla", "jax:plain"),
        "asked for by per_module for 'decoder'",
    )
    assert (
        choices.at(["decoder", "1"])[0] == choices.at(["decoder", "1", "self"])[0] == ("jax:flash",)
    )
    assert choices.at(["decoder", "10"])[0] == ("jax:nn-xla", "jax:plain")
    assert choices.at(["encoder", "0"]) == choices.at([]) == ((), "")
    assert Choices.of({"*": "jax:flash"}).at([])[0] == ("jax:flash",)


def test_patterns_that_are_of_no_use_are_refused():
    choices = Choices.of({"layers.*": "jax:flash", "layers.0": "jax:plain", "encoder": "jax:plain"})
    names = ["", "layers", "layers.0", "layers.1"]
    for decided, message in (
        (
            {"layers.*", "encoder", None},
            "'layers.0' decides nothing: the first pattern wins, and 'layers.*', which comes before it, "
            "holds for 'layers.0' too.",
        ),
        (
            {"layers.*", "layers.0"},
            "no module that could call attention is named 'encoder'. "
            "There are layers, layers.0, layers.1.",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            choices.check_each_decides(decided, names)
    choices.check_each_decides({"layers.*", "layers.0", "encoder"}, names)


def test_wrong_choices():
    with pytest.raises(ValueError, match=r"no backend is named 'jax:flesh'.* for 'layers'"):
        Choices.of({"layers": "jax:flesh"})
    with pytest.raises(TypeError, match=r"must be a mapping such as .* Got str\."):
        Choices.of("jax:flash")
