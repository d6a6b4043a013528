"""What `jax:nn-xla` and `jax:nn-cudnn` refuse, and why; what they compute is in test_backends."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heedful import attention, dispatch
from heedful.backends import jax_nn_cudnn, jax_nn_xla
from heedful.call import Call


def refusals(backend, problem):
    return list(dispatch.reasons(backend, problem))


def problem(dtype="bfloat16", platform="gpu", Sq=6, Sk=8, D=16, Dv=16, **options):
    q = jnp.zeros((2, 4, Sq, D), jnp.bfloat16)
    k, v = (jnp.zeros((2, 2, Sk, size), jnp.bfloat16) for size in (D, Dv))
    return replace(Call.of(q, k, v, **options).problem, dtype=dtype, platform=platform)


@pytest.fixture
def gpu(monkeypatch):
    """Makes reasons believe in a GPU of some compute capability."""

    def gpu(capability):
        monkeypatch.setattr(jax_nn_cudnn, "compute_capability", lambda: capability)

    gpu((9, 0))
    return gpu


BIAS = np.zeros((6, 8), jnp.bfloat16)
LENGTHS = np.array([6, 3], np.int32)


@pytest.mark.parametrize(
    ("asked", "reasons"),
    [
        ({}, []),
        ({"Sq": 5, "Sk": 7}, []),
        ({"causal": "top_left", "Sq": 5, "kv_lengths": LENGTHS}, []),
        ({"causal": True}, []),
        ({"bias": BIAS, "mask": np.ones((2, 8), bool), "window": (3, None)}, []),
        ({"softcap": 3.0}, ["jax.nn.dot_product_attention has no softcap"]),
        (
            {"return_lse": True},
            [
                "jax.nn.dot_product_attention stops the gradient of its log-sum-exp and rounds it to "
                "q's dtype"
            ],
        ),
        (
            {"Dv": 8},
            [
                "jax.nn.dot_product_attention takes no value head size of its own: Dv = 8, D = 16",
            ],
        ),
        (
            {"dtype": "float32"},
            ["cuDNN's attention takes float16 and bfloat16, not float32"],
        ),
        ({"Sk": 0}, ["cuDNN takes no empty arrays"]),
        (
            {"bias": BIAS.astype(np.float32)},
            ["cuDNN takes a bias of q's dtype alone, not float32"],
        ),
        (
            {"causal": True, "Sq": 5},
            [
                "cuDNN's gradient with a bias, which is what hides keys here, needs even lengths: "
                "Sq = 5, Sk = 8"
            ],
        ),
        (
            {"D": 12, "Dv": 12},
            ["cuDNN's attention takes head sizes up to 256 that are multiples of 8, not 12"],
        ),
        ({"platform": "tpu"}, ["cuDNN runs on NVIDIA GPUs alone; q lies on tpu"]),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_cudnn(asked, reasons):
    assert refusals(jax_nn_cudnn.backend, problem(**asked)) == reasons


@pytest.mark.parametrize(
    ("asked", "bytes_a_score"),
    [
        ({}, 0),
        ({"causal": "top_left"}, 0),
        ({"kv_lengths": LENGTHS}, 0),
        ({"causal": True}, 2),
        ({"window": (3, 0)}, 2),
        ({"bias": BIAS}, 2),
        ({"mask": np.ones((2, 8), bool)}, 2),
    ],
)
def test_what_cudnn_is_given_beside_q_k_v(asked, bytes_a_score):
    assert jax_nn_cudnn.backend.score_bytes(problem(**asked)) == bytes_a_score * 2 * 4 * 6 * 8


def test_cudnn_asks_what_gpu_there_is(gpu):
    wide = problem(D=256, Dv=256)
    assert refusals(jax_nn_cudnn.backend, wide) == []
    gpu((8, 6))
    assert refusals(jax_nn_cudnn.backend, wide) == [
        "cuDNN's attention takes head sizes up to 128 that are multiples of 8, not 256"
    ]
    gpu((7, 5))
    assert refusals(jax_nn_cudnn.backend, problem()) == [
        "cuDNN's attention needs a GPU of compute capability 8.0 or more; this one has 7.5"
    ]
    gpu(None)
    assert refusals(jax_nn_cudnn.backend, problem()) == [
        "cuDNN runs on NVIDIA GPUs alone; this GPU is none of theirs"
    ]


def test_every_reason_is_told():
    asked = {"softcap": 1.0, "return_lse": True, "Dv": 8, "platform": "cpu", "dtype": "float32"}
    assert len(refusals(jax_nn_cudnn.backend, problem(**asked, Sk=0))) == 6
    assert len(refusals(jax_nn_xla.backend, problem(**asked))) == 3


def test_xla_takes_half_precision_where_jax_does():
    reasons = jax_nn_xla.backend.reasons
    assert reasons(problem("bfloat16", "cpu")) == [
        "jax.nn.dot_product_attention promotes bfloat16 to float32 implicitly, which "
        'jax_numpy_dtype_promotion="strict" forbids'
    ]
    with jax.numpy_dtype_promotion("standard"):
        assert reasons(problem("bfloat16", "cpu")) == []
        assert reasons(problem("float16", "gpu")) == []
        assert reasons(problem("float16", "cpu")) == [
            "jax.nn.dot_product_attention asks XLA for the product F16_F16_F32, which XLA has on GPUs "
            "alone; q lies on cpu"
        ]
        assert reasons(problem("float64", "cpu")) == [
            "jax.nn.dot_product_attention computes every softmax in float32"
        ]


@pytest.mark.parametrize("Sq", [1, 2])
@pytest.mark.parametrize("Sk", [1, 3])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(
    "heads", [(1, 1, 1), (1, 2, 1), (2, 1, 1)], ids="{0[0]}x{0[1]}/{0[2]}".format
)
def test_the_smallest_bfloat16_is_computed_or_refused(heads, Sq, Sk, D):
    B, Hq, Hkv = heads
    q, k, v = (jnp.ones((B, H, S, D), jnp.bfloat16) for H, S in ((Hq, Sq), (Hkv, Sk), (Hkv, Sk)))
    with jax.numpy_dtype_promotion("standard"):
        computes = not refusals(jax_nn_xla.backend, Call.of(q, k, v).problem)
        no_matrix = B == Hkv == 1 and (Hq * Sq, Sk, D).count(1) >= 2
        assert computes == (not no_matrix or jax.__version_info__ >= (0, 12))
        if computes:
            attend = partial(attention, backend="jax:nn-xla")
            assert (attend(q, k, v) == 1).all()
            dv = jax.grad(lambda v: attend(q, k, v).astype(jnp.float32).sum())(v)
            assert float(dv.astype(jnp.float32).sum()) == pytest.approx(B * Hq * Sq * D, rel=0.02)
