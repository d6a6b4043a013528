"""The tests' own reference: against attention by hand, and its gradients against differences."""

import numpy as np
import pytest

import reference
from heedful_crosscheck.contract.cases import CASES, FORMS
from heedful_crosscheck.question import Question

CHECKED = [
    case for case in CASES + FORMS if case.dtype == "float32" and case.make.sizes.kv_length <= 12
]


def test_by_hand():
    q, k = np.array([[1.0], [2.0]]), np.array([[0.0], [np.log(3)]])
    v = np.array([[4.0], [8.0]])
    out, lse, *_ = reference.attention(q, k, v)
    np.testing.assert_allclose(out[:, 0], [(4 + 3 * 8) / 4, (4 + 9 * 8) / 10])
    np.testing.assert_allclose(lse, [np.log(4), np.log(10)])
    out, lse, *_ = reference.attention(q, k, v, causal="top_left")
    np.testing.assert_allclose(out[:, 0], [4, (4 + 9 * 8) / 10])
    out, lse, *_ = reference.attention(q, k, v, mask=np.array([[True, True], [False, False]]))
    np.testing.assert_array_equal(out[1], 0)
    assert lse[1] == -np.inf


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_gradients_are_those_of_the_function(case):
    question = Question.of(case, 0, "float64")
    out_cotangent = question.as_called(question.out_cotangent)
    lse_cotangent = question.rows_as_called(question.lse_cotangent)
    q, k, v, options = (getattr(question.inputs, name) for name in ("q", "k", "v", "options"))
    options = dict(options)
    others = [name for name in ("bias", "sinks", "alibi_slopes") if name in options]
    operands = [q, k, v, *(options.pop(name) for name in others)]
    rng = np.random.default_rng(1)
    direction = [rng.standard_normal(x.shape) for x in operands]

    def attention(step, *cotangents):
        q, k, v, *given = (x + step * d for x, d in zip(operands, direction, strict=True))
        given = dict(zip(others, given, strict=True))
        return reference.attention(q, k, v, *cotangents, **options, **given)

    def value(step):
        out, lse, *_ = attention(step)
        return (out * out_cotangent).sum() + (np.where(lse > -np.inf, lse, 0) * lse_cotangent).sum()

    _, _, *gradients = attention(0.0, out_cotangent, lse_cotangent)
    gradients = [g for g in gradients if g is not None]
    finite = (np.where(g == 0, 0, g * d) for g, d in zip(gradients, direction, strict=True))
    slope = sum(x.sum() for x in finite)
    np.testing.assert_allclose(slope, (value(1e-6) - value(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-6)
