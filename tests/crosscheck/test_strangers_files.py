"""Files of strangers: whatever is in one, it is read, or one error of the reader's own says why not.

Here a few examples of each; `nox -s fuzz` takes as many as five minutes do.
"""

import copy
import json
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heedful_crosscheck import InputError, Report, chosen_cases, crosscheck, files, records
from heedful_crosscheck.journal import Journal, _facts, kept
from heedful_crosscheck.report.saved import ReportError
from heedful_crosscheck.respondent import Here
from heedful_crosscheck.run import Inquiry

REFUSED = (InputError, ReportError)
MOST = 2**24  # bytes that reading may take beside what the file has: all of these are small

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, x in inner:
        yield from places(x, (*path, key))


@st.composite
def altered_json(draw, value):
    """A JSON value with a few places of it something else, gone, or there twice."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in places(value) if p] or [()]))
        if not path:
            return draw(any_json)
        *way, last = path
        holder = value
        for key in way:
            holder = holder[key]
        match draw(st.sampled_from(["other", "gone", "like a neighbour"])):
            case "other":
                holder[last] = draw(any_json)
            case "gone":
                del holder[last]
            case _:
                holder[last] = copy.deepcopy(draw(st.sampled_from(list(
                    holder.values() if isinstance(holder, dict) else holder
                ))))  # fmt: skip
    return value


@st.composite
def altered_bytes(draw, value):
    """Bytes of which a few are others, gone, or there twice."""
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, max(len(value) - 1, 0)))
        last = min(first + draw(st.integers(0, 8)), len(value))
        value = (
            value[:first]
            + draw(st.binary(max_size=8))
            + value[draw(st.sampled_from([first, last])) :]
        )
    return value[: draw(st.integers(0, len(value)))] if draw(st.booleans()) else value


@st.composite
def altered_safetensors(draw, value):
    """A safetensors file with another header, its length made to fit, or other bytes."""
    if draw(st.booleans()):
        return draw(altered_bytes(value))
    length = int.from_bytes(value[:8], "little")
    header = json.loads(value[8 : 8 + length])
    if draw(st.booleans()) and "__metadata__" in header:
        facts = json.loads(header["__metadata__"]["heedful"])
        header["__metadata__"]["heedful"] = json.dumps(draw(altered_json(facts)))
    else:
        header = draw(altered_json(header))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + value[8 + length :]


@contextmanager
def refused_or_read():
    tracemalloc.start()
    try:
        yield
    except REFUSED:
        pass  # in a sentence: anything else that is raised fails the test
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < MOST


@pytest.fixture(scope="module")
def report():
    return crosscheck(["numpy:oracle"], ["tiny"], ["float32"])


@pytest.fixture(scope="module")
def record():
    return records.record("numpy:oracle", chosen_cases(["tiny"]), ["float32"], 0, {"date": "2026"})


held = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@held
@given(data=st.data())
def test_a_report(data, report, tmp_path):
    file = tmp_path / "r.json"
    whole = report.as_json()
    text = json.dumps(data.draw(altered_json(whole))) if data.draw(st.booleans()) else None
    file.write_bytes(
        data.draw(altered_bytes(json.dumps(whole).encode())) if text is None else text.encode()
    )
    with refused_or_read():
        found = Report.read(file)
        assert (
            str(found) and found.as_markdown() and found.as_junit() and json.dumps(found.as_json())
        )


@held
@given(data=st.data())
def test_calls(data, tmp_path):
    file = tmp_path / "c.safetensors"
    x = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    one = {"q": x, "k": x, "v": x, "causal": True, "window": (2, None), "kv_lengths": np.array([2])}
    files.save(file, {"one": one, "two": {"q": x, "k": x, "v": x, "out_cotangent": x}})
    file.write_bytes(data.draw(altered_safetensors(file.read_bytes())))
    with refused_or_read():
        assert files.read(file)


@held
@given(data=st.data())
def test_a_record(data, record, tmp_path):
    file = tmp_path / "r.safetensors"
    records.save(record, file)
    file.write_bytes(data.draw(altered_safetensors(file.read_bytes())))
    with refused_or_read():
        records.replay(records.load(file), [])


@held
@given(data=st.data())
def test_a_journal(data, report, tmp_path):
    file = tmp_path / "j.jsonl"
    inquiry = Inquiry(
        {"numpy:oracle": [Here("numpy:oracle")]}, chosen_cases(["tiny"]), ["float32"], [0]
    )
    of = Journal(file, _facts([inquiry]))
    of.add(report.outcomes[0])
    of.close()
    first, second, _ = file.read_text().split("\n")
    if data.draw(st.booleans()):
        lines = (data.draw(altered_json(json.loads(line))) for line in (first, second))
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    else:
        file.write_bytes(data.draw(altered_bytes(file.read_bytes())))
    with refused_or_read(), kept(file, True, [inquiry]):
        pass


def test_a_safetensors_file_is_no_larger_than_it_is(tmp_path):
    """A header that promises a terabyte is refused before a byte of it is asked for."""
    file = tmp_path / "t.safetensors"
    x = np.zeros((1, 1, 2, 2), np.float32)
    safetensors.numpy.save_file({"q": x, "k": x, "v": x}, file)
    value = file.read_bytes()
    length = int.from_bytes(value[:8], "little")
    header = json.loads(value[8 : 8 + length])
    header["q"] |= {"shape": [1, 1, 2**19, 2**19], "data_offsets": [0, 2**40]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + value[8 + length :])
    with refused_or_read(), pytest.raises(InputError, match="cannot be read as safetensors"):
        files.read(file)
