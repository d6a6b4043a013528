"""What is public survives pickle and copy, as a pool of processes asks of it."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

import heedful
from heedful.call import Call
from heedful.results import WrongResult

X = np.ones((1, 1, 4, 8), np.float32)


def refused():
    heedful.attention(X, X, X, softcap=3.0, backend="jax:nn-xla")


def refusal():
    with pytest.raises(heedful.Refusal) as raised:
        refused()
    return raised.value


def things():
    explanation = heedful.explain(X, X, X, causal=True)
    problem = Call.of(X, X, X, causal=True, return_lse=True).problem
    return [
        explanation,
        explanation.verdicts[0],
        problem,
        Call.of(X, X, X, causal=True).operands,
        refusal(),
        WrongResult("no lse", "jax:odd", "lse"),
    ]


@pytest.mark.parametrize("thing", things(), ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(
    "again", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy]
)
def test_survives(thing, again):
    found = again(thing)
    assert type(found) is type(thing)
    assert str(found) == str(thing)
    if isinstance(thing, Exception):
        assert vars(found) == vars(thing)


def test_a_refusal_comes_back_from_another_process():
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(heedful.Refusal) as raised,
    ):
        pool.submit(refused).result()
    assert raised.value.reasons == refusal().reasons
