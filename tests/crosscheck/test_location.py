"""Where an error lies is said in words, and shown as a map."""

import json
import pickle
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from heedful_crosscheck.cases import select
from heedful_crosscheck.contract.cases import CASES
from heedful_crosscheck.location import LINES, heat_map
from heedful_crosscheck.question import Question
from heedful_crosscheck.tolerance import Standard

RIGHT = np.random.default_rng(0).standard_normal((2, 3, 150, 16))


def judged(wrong, right=RIGHT, **more):
    """Of a tensor that is half as large again at an index."""
    got = right.copy()
    got[wrong] *= 1.5
    return Standard.of("out", right, right, "float32", **more).judge(got)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.s_[:], "; wrong in every row"),
        (np.s_[0], "; wrong only in batch row 0"),
        (np.s_[:, 2], "; wrong only in head 2"),
        (np.s_[:, 1:], "; wrong only in heads 1, 2"),
        (np.s_[1, 2], "; wrong only in head 2 of batch row 1"),
        (np.s_[1, :2], "; wrong only in heads 0, 1 of batch row 1"),
        (np.s_[1, 2, 100], "; wrong only in head 2 of batch row 1, in row 100"),
        (np.s_[:, :, 100], "; wrong only in row 100"),
        (np.s_[:, :, 127], "; wrong only in row 127, the last of a tile of 128"),
        (np.s_[:, :, 32:64], "; wrong only in rows 32-63, one tile of 32"),
        (np.s_[:, :, 144:], "; wrong only in rows 144-149, the last, partial tile of 16"),
        (np.s_[:, :, 64:], "; wrong only in rows 64-149, from a multiple of 64 on"),
        (np.s_[:, :, 70:90], "; wrong only in rows 70-89"),
        (np.s_[:, :, ::64], "; wrong only in the first row of each tile of 64"),
        (np.s_[:, :, 15::16], "; wrong only in the last row of each tile of 16"),
        (np.s_[:, :, :, 8:12], "; wrong only in columns 8-11"),
        (np.s_[0, 1, 5, 3], "; wrong only in head 1 of batch row 0, in row 5, in column 3"),
    ],
)
def test_what_is_wrong_is_said_in_words(wrong, words):
    (fault,) = judged(wrong).faults
    assert fault.endswith(words), fault


def test_the_worst_element_and_its_tile_are_named():
    (fault,) = judged((1, 2, 140, 7)).faults
    assert "worst at (b 1, h 2, row 140), column 7, in the tile of rows 128-149; " in fault


def test_drift_is_spread():
    (fault,) = Standard.of("out", RIGHT, RIGHT, "float32").judge(RIGHT * (1 + 4e-6)).faults
    assert fault.endswith("spread over all of it: no row by itself is beyond the limit")


@pytest.mark.parametrize(
    ("name", "tensor", "first", "what"),
    [
        ("lengths: queries", "out", (5, 2), "q_lengths end"),
        ("lengths: keys", "dv", (7, 3), "kv_lengths end"),
        ("causal: fewer queries", "dk", (3, 3), "causal begins to hide keys"),
        ("window: left alone", "out", (3, 3), "the window begins to hide keys on its left"),
        ("causal: more queries: empty rows", "dq", (5, 5), "causal shows a key at all"),
        ("segments: packed", "dk", (3, 3), "the second segment begins"),
    ],
)
def test_where_something_begins_is_named(name, tensor, first, what):
    (case,) = select([name], CASES)
    right, edges = (
        getattr(Question.of(case, 0, "float32").standards(True)[tensor], of)
        for of in ("right", "edges")
    )
    standard = Standard.of(tensor, right, right, "float32", edges=edges)
    behind, before = right.copy(), right.copy()
    for b, row in enumerate(first):
        behind[b, :, row:] += 1
        before[b, :, :row] += row < right.shape[2]
    assert f"from row {first[1]} on, where {what}" in standard.judge(behind).faults[0]
    assert f"up to row {first[1] - 1}, behind which {what}" in standard.judge(before).faults[0]


def test_a_map_is_coarse_and_shows_what_is_not_finite():
    error = np.zeros((3, 20, 5000, 8))
    error[2, 19, 4999] = 1.0
    error[0, 0, 0, 0] = np.nan
    heat = heat_map(error, (error != 0).any(-1))
    assert (heat.lines, heat.columns) == ("heads", "rows")
    assert len(heat.cells) <= LINES and {len(line) for line in heat.cells} == {40}
    assert heat.cells[0][0] is None and heat.cells[-1][-1] == heat.largest > 0
    drawn = str(heat).splitlines()
    assert "128 a cell" in drawn[0] and "! is not finite" in drawn[0]
    assert drawn[1].endswith("│!" + " " * 39 + "│") and drawn[-1].endswith(" █│")
    with (console := Console(width=80, color_system=None)).capture() as printed:
        console.print(heat)
    assert printed.get().rstrip() == str(heat)


def test_one_head_is_shown_by_rows_and_columns():
    heat = judged(np.s_[1, 2, 128:, 3]).heat
    assert (heat.lines, heat.columns) == ("rows", "columns")
    assert heat.first_line[-3:] == (128, 144, 150) and heat.first_column[-1] == 16
    assert [line[3] > 0 for line in heat.cells] == [False] * 8 + [True] * 2
    assert not heat.even and judged(np.s_[:]).heat.even


def test_a_map_is_plain_data():
    heat = judged(np.s_[0]).heat
    assert json.loads(json.dumps(asdict(heat)))["cells"][0][0] == heat.cells[0][0]
    assert pickle.loads(pickle.dumps(heat)) == heat
