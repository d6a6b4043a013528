"""`visible` against the contract asked pair by pair, whole and in tiles, in NumPy and in JAX."""

import jax.numpy as jnp
import numpy as np
import pytest
from definition import visible_by_definition
from hypothesis import given
from hypothesis import strategies as st

from heedful.call import Call
from heedful.rules.place import Place
from heedful.rules.visibility import q_offset, visible
from reference import without_idle_offset

B, HQ, SQ, SK = 2, 2, 5, 7
SIDES = st.none() | st.integers(0, 8)
OFFSETS = st.integers(-9, 9)


def integers(strategy):
    return st.lists(strategy, min_size=B, max_size=B).map(lambda x: np.array(x, np.int32))


@st.composite
def visibility_options(draw):
    offset = st.none() | OFFSETS | integers(OFFSETS)
    options = {
        "causal": draw(st.sampled_from([False, True, "top_left"])),
        "window": draw(st.none() | st.tuples(SIDES, SIDES)),
        "q_offset": draw(offset),
        "q_lengths": draw(st.none() | integers(st.integers(0, SQ))),
        "kv_lengths": draw(st.none() | integers(st.integers(0, SK))),
    }
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, full])) for full in (B, HQ, SQ, SK)]
        random = np.random.default_rng(draw(st.integers(0, 99)))
        options["mask"] = random.random(shape) < 0.7
    if draw(st.booleans()):
        for name, length in (("q_segment_ids", SQ), ("kv_segment_ids", SK)):
            ids = st.lists(st.integers(0, 2), min_size=B * length, max_size=B * length)
            options[name] = np.array(draw(ids), np.int32).reshape(B, length)
    return without_idle_offset(options)


def ask(xp, options, rows=slice(0, SQ), columns=slice(0, SK)):
    """`visible` for those rows and columns, on arrays of `xp`, as the whole tile."""
    q, k = xp.zeros((B, HQ, SQ, 3)), xp.zeros((B, 1, SK, 3))
    options = {n: xp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    call = Call.of(q, k, k, **options)
    problem, operands = call.problem, call.operands
    for name, x in operands.over_scores.items():
        x = x if x.shape[2] == 1 else x[:, :, rows]
        x = x if x.shape[3] == 1 else x[:, :, :, columns]
        operands = operands._replace(**{name: x})
    place = Place.whole(problem, xp.arange)
    place = place._replace(rows=place.rows[rows], columns=place.columns[columns])
    answer = visible(problem, operands, place)
    tile = (B, HQ, len(place.rows), len(place.columns))
    return np.broadcast_to(True if answer is None else np.asarray(answer), tile)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
@given(options=visibility_options())
def test_every_pair(xp, options):
    np.testing.assert_array_equal(ask(xp, options), visible_by_definition(B, HQ, SQ, SK, **options))


@given(options=visibility_options(), i=st.integers(0, SQ - 1), j=st.integers(0, SK - 1))
def test_a_tile_is_a_part_of_the_whole(options, i, j):
    rows, columns = slice(i, i + 2), slice(j, j + 3)
    whole = visible_by_definition(B, HQ, SQ, SK, **options)
    np.testing.assert_array_equal(ask(np, options, rows, columns), whole[:, :, rows, columns])


def answer_to(**options):
    q, k = np.zeros((B, HQ, SQ, 3)), np.zeros((B, 1, SK, 3))
    call = Call.of(q, k, k, **options)
    problem, operands = call.problem, call.operands
    return problem, operands, visible(problem, operands, Place.whole(problem, np.arange))


def test_nothing_hidden_is_none():
    assert answer_to()[2] is None
    assert answer_to(window=(None, None))[2] is None


def test_no_larger_than_the_options_need():
    lengths = np.array([3, 7], np.int32)
    assert answer_to(causal=True)[2].shape == (1, 1, SQ, SK)
    assert answer_to(kv_lengths=lengths)[2].shape == (B, 1, 1, SK)
    assert answer_to(causal=True, kv_lengths=lengths)[2].shape == (B, 1, SQ, SK)


def test_where_the_first_query_stands():
    lengths = np.array([3, 7], np.int32)

    def stands(**options):
        problem, operands, _ = answer_to(**options)
        return q_offset(problem, operands)

    assert stands(causal=True) == SK - SQ
    assert stands(causal="top_left") == 0
    assert stands(causal="top_left", q_offset=4) == 4
    assert stands(causal=True, kv_lengths=lengths).ravel().tolist() == [3 - SQ, 7 - SQ]
    assert stands(causal="top_left", kv_lengths=lengths) == 0
    assert stands(window=(1, 1), q_offset=lengths).ravel().tolist() == [3, 7]
