"""Backends in processes of their own: whatever one does there, the run goes on and says how it ended."""

import pickle
import re

import numpy as np
import pytest

from heedful_crosscheck import chosen_cases, wire
from heedful_crosscheck.isolation import GIVEN_UP, Workers
from heedful_crosscheck.origin import Origin
from heedful_crosscheck.proceedings import proceed
from heedful_crosscheck.process import Limits
from heedful_crosscheck.question import Question
from heedful_crosscheck.respondent import Refused
from heedful_crosscheck.run import Inquiry

HOW = {
    "aborts": r"ended by SIGABRT, in print_and_abort \(crashing\.py:\d+\); it printed last: so much was",
    "hangs": r"exceeded 6 s, in print_and_hang \(crashing\.py:\d+\); it printed last: going to sleep",
    "fills": r"held \S+ GiB, more than 0.75(, in .*)?; it printed last: is asked",
    "exits": r"exited with status 3; it printed last: is asked",
    "leaves": r"exited with status 4; it printed last: is asked",
    "garbles": r"what it sent is no answer: it begins with b'xxxxxxxx'; it printed last: is asked",
}


def test_who_brings_its_process_down_has_crashed_and_is_asked_the_next_question(capfd):
    tiny, next_one = chosen_cases(["tiny"]), chosen_cases(["one-key"])
    with Workers(Origin(("crashing",)), Limits(seconds=6, memory=3 * 2**28)) as workers:
        assert {f"numpy:{misdeed}" for misdeed in HOW} <= set(workers.names)
        respondents = workers.respondents([f"numpy:{misdeed}" for misdeed in HOW], 2)
        first = {"numpy:garbles": respondents["numpy:garbles"]}
        report = proceed(
            [
                Inquiry(first, tiny + next_one, ["float32"], [0]),
                Inquiry(
                    {name: respondents[name] for name in respondents if name not in first},
                    *(tiny, ["float32"], [0]),
                ),
            ],
            environment=lambda: workers.environment,
        )
        (garbling,) = respondents["numpy:garbles"]
        garbling.crashes = GIVEN_UP
        with pytest.raises(Refused, match="left out: it crashed in the 5 cases before"):
            garbling.start(None)
    found = {(o.backend, o.case): o for o in report.outcomes}
    assert found.pop(("numpy:garbles", "one-key")).verdict == "agree"
    assert set(found) == {(name, "tiny") for name in respondents}
    for (name, _), o in found.items():
        assert o.verdict == "crashed"
        (failure,) = o.failures
        how = f"crashed: {HOW[name.removeprefix('numpy:')]}"
        assert re.match(how, failure.message), failure.message
        assert failure.tensor is None and len(o.output) <= 2000
    assert report.verdict == "crashed" and not report.agree
    assert "6 crashed: numpy:garbles" in str(report)
    assert report.as_json()["environment"]["jax"]
    assert capfd.readouterr() == ("", "")
    assert all(process.popen.returncode is not None for process in workers._every)


# What goes over the wire


def test_what_is_asked_crosses_and_what_is_right_does_not():
    by_row = {case.name: case for case in chosen_cases(["combination-00?"])}
    case = next(c for c in by_row.values() if {"score_mod", "mask_mod"} <= c.options.keys())
    question = Question.of(case, 0, case.dtype)
    question.check_range()
    asked = pickle.loads(wire.request(question.alone(question.inputs))[wire.REQUEST.size :])[0]
    assert asked.inputs.fingerprint == question.inputs.fingerprint
    assert asked.problem == question.problem
    assert not [name for name in vars(asked) if "with" in name or "forward" in name]


def test_the_options_of_every_case_cross():
    for case in chosen_cases(None):
        assert pickle.loads(pickle.dumps(case.options)).keys() == case.options.keys()


def sent(words, **tensors):
    data = wire.answer(words, tensors)
    header, rest = data[: wire.ANSWER.size], data[wire.ANSWER.size :]
    count, size = wire.sizes(header, most=2**20)
    assert len(rest) == count + size
    return wire.read(rest[:count], rest[count:])


def test_arrays_arrive_as_they_were_sent():
    made = {
        dtype: np.arange(6).reshape(2, 3).astype(dtype)
        for dtype in ("float64", "float32", "float16", "bfloat16", "bool")
    }
    made |= {"none": np.zeros((0, 4), np.float32), "one": np.float64(3) * np.ones(())}
    words, tensors = sent({"refused": ["it is √2"]}, **made)
    assert words == {"refused": ["it is √2"]} and tensors.keys() == made.keys()
    for name, x in made.items():
        assert tensors[name].dtype == x.dtype and np.array_equal(tensors[name], x)


@pytest.mark.parametrize(
    ("mark", "words", "arrays", "says"),
    [
        (b"GET ", 4, 0, "begins with b'GET "),
        (wire.MARK, wire.MOST_WORDS + 1, 0, "would be"),
        (wire.MARK, 4, 101, "and 101 bytes, of"),
    ],
)
def test_no_memory_is_taken_for_what_is_too_large_or_no_answer(mark, words, arrays, says):
    with pytest.raises(wire.Garbled, match=says):
        wire.sizes(wire.ANSWER.pack(mark, words, arrays), most=100)


@pytest.mark.parametrize(
    "words",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"tensors": 1}',
        b'{"tensors": [["out", "object", [1]]]}',
        b'{"tensors": [["out", "float32", [-1, -2]]]}',
        b'{"tensors": [["out", "float32", [3]]]}',
        b'{"tensors": [["out", "float32", [true, 2]]]}',
        b'{"tensors": [["out", "float32", [1000000000000]]]}',
        b'{"tensors": [["out", "float32"]]}',
        b"[" * 100_000,
    ],
)
def test_an_answer_that_is_none_is_garbled(words):
    with pytest.raises(wire.Garbled):
        wire.read(words, bytes(8))
