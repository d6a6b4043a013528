"""The table of combinations: every two values that are possible together stand together in it."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import pytest

import heedful
from heedful.backends.numpy_oracle import backend as numpy_oracle
from heedful.call import Call
from heedful.oracle import FEATURES
from heedful_crosscheck import crosscheck
from heedful_crosscheck.cases import combined, everything, quick
from heedful_crosscheck.combinations import (
    FACTORS,
    TRIPLED,
    VIEWS,
    is_possible,
    judges_everything,
    pairs,
    pairs_of,
    table,
    triples_of,
)
from heedful_crosscheck.question import Question
from heedful_crosscheck.run import is_asked


def is_completable(part):
    """Whether some row that breaks no rule has these values: found by search, not by a rule's word."""
    names = [name for name in FACTORS if name not in part]

    def complete(row, rest):
        if not is_possible(row):
            return False
        if not rest:
            return True
        name, *others = rest
        return any(complete(row | {name: value}, others) for value in FACTORS[name])

    return complete(dict(part), names)


def test_every_row_is_of_the_factors_and_breaks_no_rule():
    for row in table():
        assert list(row) == list(FACTORS)
        assert all(row[name] in values for name, values in FACTORS.items())
        assert is_possible(row), row


def test_every_possible_pair_stands_in_a_row_where_everything_is_judged():
    found = {pair for row in table() if judges_everything(row) for pair in pairs_of(row)}
    viewed = {pair for row in table() for pair in pairs_of(row)}
    missing, possible = [], 0
    for pair in completable(combinations(FACTORS, 2)):
        possible += 1
        if frozenset(pair.items()) not in (viewed if is_view(pair) else found):
            missing.append(pair)
    assert not missing
    assert possible == pairs(table())
    print(f"{possible} pairs in {len(table())} rows")


def test_every_possible_triple_of_what_kernels_branch_on_does_too():
    found = {triple for row in table() if judges_everything(row) for triple in triples_of(row)}
    every = [part for part in completable(TRIPLED) if not is_view(part)]
    assert not [part for part in every if frozenset(part.items()) not in found]
    print(f"{len(every)} triples in {len(table())} rows")


@pytest.mark.parametrize("backend", ["jax:flash", "torch:sdpa-math", "numpy:oracle"])
def test_every_row_is_asked_of_backends_of_every_framework(backend):
    assert all(is_asked(backend, case) for case in combined())


def completable(of_names):
    """Every choice of values of these factors that some row may have."""
    for names in of_names:
        for values in product(*(FACTORS[name] for name in names)):
            part = dict(zip(names, values, strict=True))
            if is_completable(part):
                yield part


def is_view(part):
    return any(part.get(name) in values for name, values in VIEWS.items())


def test_the_quick_selection_has_every_value_and_most_pairs():
    rows = [case.row for case in quick() if case.row is not None]
    for name, values in FACTORS.items():
        assert {row[name] for row in rows} == set(values), name
    covered = pairs(rows) / pairs(table())
    print(f"{pairs(rows)} of {pairs(table())} pairs in {len(rows)} rows")
    assert covered > 0.6


def test_a_row_becomes_the_case_that_it_describes():
    for case in combined():
        inputs = case.inputs(0, case.dtype)
        row = case.row
        assert inputs.q.dtype.name == row["dtype"]
        assert inputs.q.ndim == int(row["rank"])
        assert ("mask" in inputs.options) == (row["mask"] != "none")
        assert ("bias" in inputs.options) == (row["bias"] != "none")
        assert inputs.options.get("layout", "bhsd") == row["layout"]
    expanded = [case for case in combined() if case.memory == "expanded"]
    arrays = [x for case in expanded for x in case.inputs(0, case.dtype).options.values()]
    assert sum(0 in x.strides for x in arrays if isinstance(x, np.ndarray)) > len(expanded) / 2


def test_in_every_row_somebody_sees_something():
    """Where nobody does, out is 0 whatever a kernel makes of the options."""
    for case in combined():
        question = Question.of(case, 0, case.dtype)
        assert not question.hidden["out"].all(), case.description


@pytest.mark.parametrize(
    "kind",
    [
        {"causal": "yes", "lengths": "70x70"},
        {"causal": "yes", "lengths": "64x64"},
        {"q_lengths": "some", "kv_lengths": "none"},
        {"heads": "8/1"},
        {"rank": "3"},
        {"bias": "heads"},
        {"head_dim": "64"},
        {"head_dim": "128"},
        {"lengths": "64x192"},
        {"lengths": "33x2100"},
        {"value_dim": "smaller"},
        {"bias": "full", "window": "both"},
        {"window": "both", "kv_lengths": "some"},
        {"window": "both", "q_offset": "each"},
        {"softcap": "1.5", "mask": "full"},
        {"heads": "4/2", "kv_lengths": "some"},
        {"heads": "4/2", "mask": "head-rows"},
        {"batch": "6"},
        {"mask": "heads"},
        {"scale": "-0.2"},
        {"memory": "columns"},
        {"logits": "above"},
        {"lengths": "1x133", "kv_lengths": "some"},
    ],
    ids=str,
)
def test_what_the_matrix_of_named_cases_lacked_is_there(kind):
    rows = [row for row in table() if all(row[n] == x for n, x in kind.items())]
    assert any(judges_everything(row) for row in rows)


# Planted: wrong by a fiftieth where two things come together, right everywhere else


PLANTED = {
    "causal ignored on squares": lambda p, o: p.causal and p.q_length == p.kv_length,
    "window on squares": lambda p, o: p.window and p.q_length == p.kv_length,
    "q_lengths alone": lambda p, o: p.q_lengths and not p.kv_lengths,
    "a group of 8": lambda p, o: p.group == 8,
    "head size 64": lambda p, o: p.head_dim == 64,
    "head size 128 in bfloat16": lambda p, o: p.head_dim == 128 and p.dtype == "bfloat16",
    "head size 128 in float16": lambda p, o: p.head_dim == 128 and p.dtype == "float16",
    "Sk % 64 = 0": lambda p, o: p.kv_length % 64 == 0,
    "beyond key 2048": lambda p, o: p.kv_length > 2048,
    "beyond query 2048": lambda p, o: p.q_length > 2048,
    "Dv < D": lambda p, o: p.value_dim < p.head_dim,
    "bias with window": lambda p, o: p.bias_shape and p.window,
    "window with lengths": lambda p, o: p.window and p.kv_lengths,
    "window with an array of offsets": lambda p, o: p.window and o.q_offset is not None,
    "softcap with mask": lambda p, o: p.softcap and p.mask_shape,
    "GQA with lengths": lambda p, o: p.group > 1 and p.kv_lengths,
    "GQA with a mask a head": lambda p, o: p.group > 1 and p.mask_shape and p.mask_shape[1] > 1,
    "B >= 4": lambda p, o: p.batch >= 4,
    "mask (1, H, 1, Sk)": lambda p, o: p.mask_shape and p.mask_shape[0] == p.mask_shape[2] == 1,
    "negative scale": lambda p, o: p.scale < 0,
    "scale of zero": lambda p, o: p.scale == 0,
    "Sq = 1 with lengths": lambda p, o: p.q_length == 1 and p.kv_lengths,
    "one key": lambda p, o: p.kv_length == 1,
    "lengths of zero": lambda p, o: o.kv_lengths is not None and (o.kv_lengths == 0).any(),
    "a bias a head, float16": lambda p, o: p.bias_shape and p.dtype == "float16",
    "a wide bias": lambda p, o: p.bias_dtype not in (None, p.dtype),
    "top-left with a window": lambda p, o: p.causal and p.window and p.q_offset == 0,
    "no LSE asked for": lambda p, o: not p.return_lse,
    "causal with a mask in bfloat16": lambda p, o: (
        p.causal and p.mask_shape and p.dtype == "bfloat16"
    ),
    "softcap with a bias": lambda p, o: p.softcap and p.bias_shape,
    "D = 1": lambda p, o: p.head_dim == 1,
    "float64 with lengths": lambda p, o: p.dtype == "float64" and p.q_lengths,
}  # fmt: skip


@dataclass(eq=False)
class Planted:
    """The oracle, with a fault where two things come together."""

    fault: Callable
    name: str = "numpy:planted"

    takes = FEATURES

    def reasons(self, problem):
        return ()

    def run(self, problem, operands):
        out, lse = numpy_oracle.run(problem, operands)
        if self.fault(problem, operands):
            out = (out.astype(np.float64) * 1.02).astype(out.dtype)
        return out, lse

    def gradients(self, *asked):
        return numpy_oracle.gradients(*asked)


def is_small(case):
    return case.row["lengths"] not in ("1x4160", "33x2100", "2100x33", "1031x1300", "256x256")


@pytest.mark.parametrize("kind", PLANTED)
def test_a_fault_that_needs_a_combination_is_caught(kind):
    fault = PLANTED[kind]

    def applies(case):
        inputs = case.inputs(0, case.dtype)
        options = {**inputs.options, "return_lse": case.return_lse}
        call = Call.of(inputs.q, inputs.k, inputs.v, **options)
        return fault(call.problem, call.operands)

    found = [c for c in combined() if ("2048" in kind or is_small(c)) and applies(c)]
    assert found
    heedful.register(Planted(fault))
    try:
        for case in found:
            report = crosscheck(["numpy:planted"], [case])
            if report.failures:
                break
    finally:
        heedful.unregister("numpy:planted")
    assert {f.tensor for f in report.failures} == {"out"}, str(report)


def test_nothing_is_left_out_of_the_run():
    assert {case.name for case in combined()} <= {case.name for case in everything()}
