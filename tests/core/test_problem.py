"""What a call asks for: every wrong call and its message, word for word, and the canonical form."""

import os
import subprocess
import sys
import warnings
from textwrap import dedent

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heedful
from heedful.call import Call


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


Q, K, V = zeros(2, 4, 5, 8), zeros(2, 2, 7, 8), zeros(2, 2, 7, 16)
TRUE = np.ones((2, 4, 5, 7), bool)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", PendingDeprecationWarning)  # which is why it is refused
    MATRIX = np.asmatrix(zeros(3, 8))

# What is changed in the good call attention(Q, K, V), which error comes, and its message.
WRONG = {
    # names
    "unknown option": (
        {"color": "red"},
        TypeError,
        "unknown option 'color'. The options are mask, bias, causal, window, alibi_slopes, q_offset, "
        "q_lengths, kv_lengths, q_segment_ids, kv_segment_ids, scale, softcap, score_mod, mask_mod, "
        "sinks, dropout_rate, dropout_seed, layout, return_lse.",
    ),
    "SDPA's name": (
        {"attn_mask": TRUE},
        TypeError,
        "unknown option 'attn_mask'. Here it is mask= for a boolean mask, bias= for a float one.",
    ),
    "jax.nn's name": (
        {"is_causal": True},
        TypeError,
        "unknown option 'is_causal'. Here it is causal=\"top_left\" (SDPA and jax.nn align the diagonal "
        "top-left) or causal=True.",
    ),
    "flash-attn's name": (
        {"window_size": (3, 0)},
        TypeError,
        "unknown option 'window_size'. Here it is window=(left, right), None for an open side.",
    ),
    "no option at all": (
        {"enable_gqa": True},
        TypeError,
        "unknown option 'enable_gqa'. Here it is not needed: grouped heads need no switch.",
    ),
    # kinds of arrays
    "list": (
        {"q": [[1.0, 2.0]]},
        TypeError,
        "q must be a JAX array, a NumPy array or a torch tensor. Got list. Convert it first, for "
        "example with numpy.asarray.",
    ),
    "matrix": (
        dict.fromkeys("qkv", MATRIX),
        TypeError,
        "q must be a JAX array, a NumPy array or a torch tensor. Got matrix. Convert it first, for "
        "example with numpy.asarray.",
    ),
    "list as mask": (
        {"mask": [True, False]},
        TypeError,
        "mask must be a JAX array, a NumPy array or a torch tensor. Got list. Convert it first, for "
        "example with numpy.asarray.",
    ),
    "mixed frameworks": (
        {"k": jnp.zeros((2, 2, 7, 8))},
        TypeError,
        "all arrays of a call must be of one framework. Got q of numpy and k of jax. Convert one of "
        "them: nothing here moves silently between frameworks.",
    ),
    "mixed frameworks, a length": (
        {"kv_lengths": jnp.array([7, 3])},
        TypeError,
        "all arrays of a call must be of one framework. Got q of numpy and kv_lengths of jax. Convert "
        "one of them: nothing here moves silently between frameworks.",
    ),
    # dtypes
    "integer q": (
        {"q": zeros(2, 4, 5, 8, dtype="int32")},
        TypeError,
        "q, k and v must be one of float64, float32, float16, bfloat16. Got q of int32. Cast it: "
        "nothing here casts silently.",
    ),
    "mixed dtypes": (
        {"k": zeros(2, 2, 7, 8, dtype="float16")},
        TypeError,
        "q, k and v must have one dtype. Got q of float32, k of float16, v of float32. Cast them: "
        "nothing here casts silently.",
    ),
    "float mask": (
        {"mask": TRUE.astype("float32")},
        TypeError,
        "mask must be boolean, True = visible. Got float32. An additive float mask is bias=; for 0/1 "
        "use mask != 0.",
    ),
    "boolean bias": (
        {"bias": TRUE},
        TypeError,
        "bias must be float32 for float32 q, k, v. Got bool. A boolean mask is mask=.",
    ),
    "wide bias": (
        {"bias": zeros(2, 4, 5, 7, dtype="float64")},
        TypeError,
        "bias must be float32 for float32 q, k, v. Got float64. Cast it: nothing here casts silently.",
    ),
    "half bias": (
        {
            "q": zeros(3, 8, dtype="float16"),
            "k": zeros(3, 8, dtype="float16"),
            "v": zeros(3, 8, dtype="float16"),
            "bias": zeros(3, 3, dtype="float64"),
        },
        TypeError,
        "bias must be float16 or float32 for float16 q, k, v. Got float64. Cast it: nothing here casts "
        "silently.",
    ),
    "float lengths": (
        {"kv_lengths": zeros(2)},
        TypeError,
        "kv_lengths must hold integers. Got float32. Cast it to int32.",
    ),
    "sinks of another dtype": (
        {"sinks": np.zeros(3, np.float16)},
        TypeError,
        "sinks must be float32 for float32 q, k, v. Got float16. Cast it: nothing here casts silently.",
    ),
    "sinks for each row": (
        {"sinks": zeros(2, 3)},
        ValueError,
        "sinks must be one logit for each query head, shape (Hq,) = (4,). Got (2, 3).",
    ),
    "slopes of each query": (
        {"alibi_slopes": zeros(4, 5)},
        ValueError,
        "alibi_slopes must be one slope for each query head, (Hq,) = (4,) or (B, Hq) = (2, 4). "
        "Got (4, 5).",
    ),
    "slopes of another dtype": (
        {"alibi_slopes": np.zeros(4, np.float16)},
        TypeError,
        "alibi_slopes must be float32 for float32 q, k, v. Got float16. Cast it: nothing here casts "
        "silently.",
    ),
    "dropout of all": (
        {"dropout_rate": 1.0, "dropout_seed": 1},
        ValueError,
        "dropout_rate must lie between 0 and 1, without 1. Got 1.0. It is the probability that a weight "
        "is dropped.",
    ),
    "a traced rate": (
        {"dropout_rate": np.array(0.5), "dropout_seed": 1},
        TypeError,
        "dropout_rate must be a Python number. Got array(0.5). For no dropout pass None or 0.0.",
    ),
    "dropout without a seed": (
        {"dropout_rate": 0.5},
        ValueError,
        "dropout_rate=0.5 needs dropout_seed, an integer that says which weights are dropped. Pass a "
        "new one in each step and layer; for no dropout pass dropout_rate=0.0.",
    ),
    "a seed without dropout": (
        {"dropout_seed": 1},
        ValueError,
        "dropout_seed goes with dropout_rate, and this call has none. Pass the rate too, 0.0 where "
        "nothing is to be dropped: no option is ignored.",
    ),
    "a seed of 64 bits": (
        {"dropout_rate": 0.5, "dropout_seed": 2**40},
        ValueError,
        "dropout_seed must lie between 0 and 2**31 - 1. Got 1099511627776. Of a longer one take it "
        "modulo 2**31.",
    ),
    "a seed below 0": (
        {"dropout_rate": 0.5, "dropout_seed": np.array([3, -1])},
        ValueError,
        "dropout_seed must lie between 0 and 2**31 - 1. Got -1. Of a longer one take it modulo 2**31.",
    ),
    "a seed that is no integer": (
        {"dropout_rate": 0.5, "dropout_seed": 1.5},
        TypeError,
        "dropout_seed must be an integer or an integer array. Got 1.5. Of a key of jax.random take "
        "jax.random.randint(key, (), 0, 2**31 - 1).",
    ),
    "a seed for each head": (
        {"dropout_rate": 0.5, "dropout_seed": np.arange(4)},
        ValueError,
        "dropout_seed must be one integer, or one for each batch row: (B,) = (2,). Got (4,). One is "
        "enough: batch rows differ in what they drop.",
    ),
    "flash-attn's dropout": (
        {"dropout_p": 0.5},
        TypeError,
        "unknown option 'dropout_p'. Here it is dropout_rate= with dropout_seed=.",
    ),
    "float segment ids": (
        {"q_segment_ids": zeros(2, 5), "kv_segment_ids": zeros(2, 7)},
        TypeError,
        "q_segment_ids must hold integers. Got float32. Cast it to int32.",
    ),
    "segment ids of the queries alone": (
        {"q_segment_ids": np.zeros((2, 5), int)},
        ValueError,
        "q_segment_ids and kv_segment_ids go together: a query sees the keys of its own segment. Got "
        "q_segment_ids alone. For self attention pass one array as both.",
    ),
    "segment ids of another length": (
        {"q_segment_ids": np.zeros((2, 7), int), "kv_segment_ids": np.zeros((2, 7), int)},
        ValueError,
        "q_segment_ids must have one number for each token, shape (2, 5), each axis full or 1. "
        "Got (2, 7).",
    ),
    "segment ids beyond int32": (
        {"q_segment_ids": np.zeros((2, 5), int), "kv_segment_ids": np.full((2, 7), 2**31)},
        ValueError,
        "kv_segment_ids must fit an int32. Got numbers from 2147483648 to 2147483648. Number the "
        "segments from 0.",
    ),
    # shapes
    "layout": (
        {"layout": "bnsh"},
        ValueError,
        'layout must be "bhsd" or "bshd". Got \'bnsh\'. It is never guessed: say where the head axis '
        "stands.",
    ),
    "rank 1": (
        {"q": zeros(8), "k": zeros(8), "v": zeros(8)},
        ValueError,
        "q, k and v must have the same rank, at least 2: (S, D), (H, S, D) or (B, H, S, D). Got q (8,), "
        "k (8,), v (8,). Add the missing axes: they are never guessed.",
    ),
    "ranks": (
        {"q": zeros(4, 5, 8), "layout": "bshd"},
        ValueError,
        "q, k and v must have the same rank, at least 2: (S, D), (S, H, D) or (B, S, H, D). Got "
        "q (4, 5, 8), k (2, 2, 7, 8), v (2, 2, 7, 16). Add the missing axes: they are never guessed.",
    ),
    "batch": (
        {"q": zeros(1, 4, 5, 8)},
        ValueError,
        "q, k and v must have the same batch axes in layout 'bhsd'. Got q (1, 4, 5, 8), k (2, 2, 7, 8), "
        "v (2, 2, 7, 16). Broadcast them first: they are never repeated silently.",
    ),
    "head size": (
        {"q": zeros(2, 4, 5, 4)},
        ValueError,
        "q and k must have the same head size, their last axis. Got q (2, 4, 5, 4), k (2, 2, 7, 8), "
        "v (2, 2, 7, 16). Only v may have a head size of its own.",
    ),
    "lengths of k and v": (
        {"v": zeros(2, 2, 6, 16)},
        ValueError,
        "k and v must have the same length in layout 'bhsd'. Got q (2, 4, 5, 8), k (2, 2, 7, 8), "
        "v (2, 2, 6, 16). If the axes are in the other order, pass the other layout=.",
    ),
    "heads of k and v": (
        {"v": zeros(2, 1, 7, 16)},
        ValueError,
        "k and v must have the same number of heads in layout 'bhsd'. Got q (2, 4, 5, 8), "
        "k (2, 2, 7, 8), v (2, 1, 7, 16). If the axes are in the other order, pass the other layout=.",
    ),
    "heads of q and k": (
        {"layout": "bshd", "q": zeros(2, 5, 4, 8), "k": zeros(2, 7, 3, 8), "v": zeros(2, 7, 3, 8)},
        ValueError,
        "q's heads must be a multiple of k's in layout 'bshd'. Got 4 and 3 from q (2, 5, 4, 8), "
        "k (2, 7, 3, 8), v (2, 7, 3, 8). If the axes are in the other order, pass the other layout=.",
    ),
    "no heads": (
        {"q": zeros(0, 5, 8), "k": zeros(0, 7, 8), "v": zeros(0, 7, 8)},
        ValueError,
        "q's heads must be a multiple of k's in layout 'bhsd'. Got 0 and 0 from q (0, 5, 8), "
        "k (0, 7, 8), v (0, 7, 8). If the axes are in the other order, pass the other layout=.",
    ),
    "no head size": (
        {"q": zeros(5, 0), "k": zeros(7, 0), "v": zeros(7, 8)},
        ValueError,
        "head sizes must be at least 1. Got q (5, 0), k (7, 0), v (7, 8). Check the last axis.",
    ),
    "mask": (
        {"mask": TRUE[:, :3]},
        ValueError,
        "mask must be broadcastable to (B, Hq, Sq, Sk) = (2, 4, 5, 7), or be (B, Sk) = (2, 7). "
        "Got (2, 3, 5, 7). Each axis is full or 1.",
    ),
    "bias beside several batch axes": (
        {
            **dict.fromkeys("qkv", zeros(2, 3, 4, 5, 8)),
            "bias": zeros(2, 2, 4, 5, 5),
        },
        ValueError,
        "bias must be broadcastable to (B1, B2, Hq, Sq, Sk) = (2, 3, 4, 5, 5). Got (2, 2, 4, 5, 5). "
        "Each axis is full or 1.",
    ),
    "too many axes": (
        dict.fromkeys("qkv", jnp.zeros((1,) * 62 + (2, 3, 8))),
        ValueError,
        "q, k and v may have 64 axes, as many as NumPy's arrays. Got 65. Join the leading ones by "
        "reshape: all are batch.",
    ),
    "mask of too high a rank": (
        {"mask": TRUE[None]},
        ValueError,
        "mask must be broadcastable to (B, Hq, Sq, Sk) = (2, 4, 5, 7), or be (B, Sk) = (2, 7). "
        "Got (1, 2, 4, 5, 7). Each axis is full or 1.",
    ),
    "mask with two meanings": (
        {"q": zeros(2, 4, 2, 8), "mask": TRUE[:, 0, 0]},
        ValueError,
        "mask of shape (2, 7) could be (B, Sk) or (Sq, Sk), since B = Sq = 2. Say which: "
        "mask[:, None, None, :] for (B, Sk), mask[None, None] for (Sq, Sk).",
    ),
    "bias": (
        {"bias": zeros(2, 7)},
        ValueError,
        "bias must be broadcastable to (B, Hq, Sq, Sk) = (2, 4, 5, 7). Got (2, 7). Each axis is full "
        "or 1.",
    ),
    "bias of rank 2": (
        {"q": zeros(5, 8), "k": zeros(7, 8), "v": zeros(7, 8), "bias": zeros(7, 5)},
        ValueError,
        "bias must be broadcastable to (B, Hq, Sq, Sk) = (1, 1, 5, 7). Got (7, 5). Each axis is full "
        "or 1.",
    ),
    "lengths": (
        {"q_lengths": np.array([5, 5, 5])},
        ValueError,
        "q_lengths must have one length for each batch row, shape (B,) = (2,). Got (3,). Pass one "
        "number for each sequence of the batch.",
    ),
    "lengths beside several batch axes": (
        {**dict.fromkeys("qkv", zeros(2, 3, 4, 5, 8)), "kv_lengths": np.array([5, 5])},
        ValueError,
        "kv_lengths must have one length for each batch row, shape (B1, B2) = (2, 3), each axis full or "
        "1. Got (2,). Pass one number for each sequence of the batch.",
    ),
    "negative length": (
        {"kv_lengths": np.array([-1, 7])},
        ValueError,
        "kv_lengths must lie between 0 and Sk = 7. Got -1. A length counts the tokens of a row that "
        "are real.",
    ),
    "length too long": (
        {"q_lengths": np.array([5, 6])},
        ValueError,
        "q_lengths must lie between 0 and Sq = 5. Got 6. A length counts the tokens of a row that are "
        "real.",
    ),
    # options
    "causal": (
        {"causal": "bottom_right"},
        ValueError,
        "causal must be False, True (bottom-right) or \"top_left\". Got 'bottom_right'. For any other "
        "alignment pass causal=True and q_offset=.",
    ),
    "causal as a number": (
        {"causal": 1},
        ValueError,
        'causal must be False, True (bottom-right) or "top_left". Got 1. For any other alignment pass '
        "causal=True and q_offset=.",
    ),
    "window of one number": (
        {"window": 3},
        ValueError,
        "window must be a pair (left, right). Got 3. Write (w, 0) to see w keys back, (w, w) for both "
        "sides, None for an open side.",
    ),
    "negative window": (
        {"window": (-1, 0)},
        ValueError,
        "window must hold integers of at least 0, or None. Got (-1, 0). An open side is None here, "
        "not -1.",
    ),
    "window of floats": (
        {"window": (1.5, 0)},
        ValueError,
        "window must hold integers of at least 0, or None. Got (1.5, 0). An open side is None here, "
        "not -1.",
    ),
    "q_offset without a use for it": (
        {"q_offset": 3},
        ValueError,
        "q_offset places the queries for causal, window and ALiBi, and this call has none of them. "
        "Got 3. Leave it out, or pass causal=, window= or alibi_slopes= too: no option is ignored.",
    ),
    "q_offset beside a window that is open": (
        {"q_offset": np.array([3, 2]), "window": (None, None)},
        ValueError,
        "q_offset places the queries for causal, window and ALiBi, and this call has none of them. "
        "Got an array. Leave it out, or pass causal=, window= or alibi_slopes= too: no option is "
        "ignored.",
    ),
    "q_offset": (
        {"causal": True, "q_offset": 1.5},
        TypeError,
        "q_offset must be an integer or a signed integer array. Got 1.5. Cast it to int32: it counts "
        "keys.",
    ),
    "q_offset of floats": (
        {"causal": True, "q_offset": zeros(2)},
        TypeError,
        "q_offset must be an integer or a signed integer array. Got float32. Cast it to int32: it "
        "counts keys.",
    ),
    "q_offset of truth": (
        {"causal": True, "q_offset": True},
        TypeError,
        "q_offset must be an integer or a signed integer array. Got True. Cast it to int32: it counts "
        "keys.",
    ),
    "q_offset's shape": (
        {"causal": True, "q_offset": np.array([1, 2, 3])},
        ValueError,
        "q_offset must be one integer, or one for each batch row: (B,) = (2,). Got (3,). It is the "
        "place of the first query among the keys.",
    ),
    "q_offset out of range": (
        {"causal": True, "q_offset": 2**31},
        ValueError,
        "q_offset must lie between -2**29 and 2**29. Got 2147483648. It counts keys: it is the place "
        "of the first query among them.",
    ),
    "q_offset out of range, in an array": (
        {"causal": True, "q_offset": np.array([0, -(2**40)])},
        ValueError,
        "q_offset must lie between -2**29 and 2**29. Got -1099511627776. It counts keys: it is the "
        "place of the first query among them.",
    ),
    "scale of the wrong kind": (
        {"scale": "sqrt"},
        TypeError,
        "scale must be a Python number. Got 'sqrt'. To learn it, multiply q by it instead.",
    ),
    "scale": (
        {"scale": float("nan")},
        ValueError,
        "scale must be finite, in float32 too. Got nan. For the default, D**-0.5, pass None.",
    ),
    "scale beyond float32": (
        {"scale": -1e39},
        ValueError,
        "scale must be finite, in float32 too. Got -1e+39. For the default, D**-0.5, pass None.",
    ),
    "scale beyond float64": (
        {"scale": 10**400},
        ValueError,
        f"scale must be finite, in float32 too. Got 1{'0' * 99}…. For the default, D**-0.5, pass None.",
    ),
    "scale that float32 takes for 0": (
        {"scale": 1e-46},
        ValueError,
        "scale must be 0, or at least 1.2e-38, the smallest normal float32. Got 1e-46. Scale q, or pass "
        "0.",
    ),
    "softcap of the wrong kind": (
        {"softcap": True},
        TypeError,
        "softcap must be a Python number. Got True. For no softcap pass None.",
    ),
    "softcap": (
        {"softcap": 0},
        ValueError,
        "softcap must be positive and finite. Got 0. For no softcap pass None.",
    ),
    "softcap beyond float32": (
        {"softcap": 1e39},
        ValueError,
        "softcap must lie between 9.9e-32 and 1e+31, so that float32 can divide by it. Got 1e+39. For "
        "no softcap pass None.",
    ),
    "softcap that float32 takes for 0": (
        {"softcap": 1e-46},
        ValueError,
        "softcap must lie between 9.9e-32 and 1e+31, so that float32 can divide by it. Got 1e-46. For "
        "no softcap pass None.",
    ),
    "softcap beyond float64": (
        {"softcap": 10**5000},
        ValueError,
        "softcap must be positive and finite. Got an integer of thousands of digits. For no softcap "
        "pass None.",
    ),
    "window beyond what Python writes": (
        {"window": (-(10**5000), 0)},
        ValueError,
        "window must hold integers of at least 0, or None. Got an integer of thousands of digits. An "
        "open side is None here, not -1.",
    ),
    "q_offset beyond what Python writes": (
        {"causal": True, "q_offset": 10**5000},
        ValueError,
        "q_offset must lie between -2**29 and 2**29. Got an integer of thousands of digits. It counts "
        "keys: it is the place of the first query among them.",
    ),
    "return_lse": (
        {"return_lse": 1},
        TypeError,
        "return_lse must be True or False. Got 1. It decides what is returned, so it cannot be an "
        "array.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_says_what_was_expected_what_came_and_how_to_mend_it(name):
    changed, error, message = WRONG[name]
    with pytest.raises(error) as raised:
        heedful.attention(**{"q": Q, "k": K, "v": V} | changed)
    assert str(raised.value) == message
    assert type(raised.value) is error


def test_arrays_on_two_devices_are_refused():
    # JAX reads how many devices a CPU stands for when it starts.
    script = """
        import jax, heedful
        import jax.numpy as jnp
        cpu0, cpu1 = jax.devices()
        q, k = (jax.device_put(jnp.zeros((3, 8)), cpu) for cpu in (cpu0, cpu1))
        try:
            heedful.attention(q, q, k)
        except ValueError as error:
            print(error)
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", dedent(script)],
        env=os.environ | flags,
        text=True,
        stdout=-1,
        check=True,
    )
    assert run.stdout.strip() == (
        "all arrays of a call must lie on one device. Got q on cpu:0 and v on cpu:1. "
        "Move one of them: nothing here moves silently between devices."
    )


def test_a_jax_array_without_memory_is_refused():
    q, k = jnp.ones((3, 8)), jnp.ones((3, 8))
    k.delete()
    for call in (heedful.attention, heedful.explain):
        with pytest.raises(ValueError, match=r"^k is a JAX array whose memory was given back"):
            call(q, k, q)


@pytest.mark.parametrize("framework", ["numpy", "jax", "torch"])
def test_leading_axes_broadcast_one_by_one(framework):
    """A pair bias and a mask of each row of an alignment, as in AlphaFold's triangle attention."""
    if framework == "torch":
        torch = pytest.importorskip("torch", reason="core is tested without torch too")
    array = {"numpy": np.asarray, "jax": jnp.asarray}.get(framework) or torch.tensor
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 3, 2, 5, 8), np.float32)
    given = {
        "mask": rng.random((2, 3, 1, 1, 5)) < 0.7,
        "bias": rng.standard_normal((2, 1, 2, 5, 5), np.float32),
        "q_lengths": np.array([[5], [3]]),
        "kv_lengths": np.array([5, 4, 2]),
        "q_offset": np.array([[0, 1, 2]]),
        "q_segment_ids": rng.integers(0, 2, (2, 1, 5)),
        "kv_segment_ids": rng.integers(0, 2, (3, 5)),
    }
    shapes = [(2, 3, 1, 1, 5), (2, 3, 2, 5, 5), *[(2, 3)] * 3, *[(2, 3, 5)] * 2]
    whole = {
        n: np.broadcast_to(x, shape) for (n, x), shape in zip(given.items(), shapes, strict=True)
    }
    backend = "torch:sdpa-math" if framework == "torch" else "jax:plain"
    got, expected = (
        heedful.attention(
            *[array(q)] * 3,
            causal=True,
            backend=backend,
            **{n: array(np.array(x)) for n, x in options.items()},
        )
        for options in (given, whole)
    )
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_a_bias_of_some_leading_axes_gets_its_gradient_in_its_own_shape():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 3, 2, 5, 8), np.float32))
    weight = jnp.asarray(rng.standard_normal(q.shape, np.float32))

    def loss(bias):
        return (weight * heedful.attention(q, q, q, bias=bias, backend="jax:plain")).sum()

    bias = jnp.asarray(rng.standard_normal((2, 1, 2, 5, 5), np.float32))
    gradient = jax.grad(loss)(bias)
    whole = jax.grad(loss)(jnp.broadcast_to(bias, (2, 3, 2, 5, 5)))
    np.testing.assert_allclose(gradient, whole.sum(1, keepdims=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("softcap", [1e-31, 1e-20, 1e20, 1e31])
@pytest.mark.parametrize("backend", ["jax:plain", "jax:flash"])
def test_a_softcap_within_its_bounds_is_honoured(softcap, backend):
    q = np.random.default_rng(0).standard_normal((3, 5, 8), np.float32)
    got, expected = (
        heedful.attention(q, q, q, softcap=softcap, return_lse=True, backend=name)
        for name in (backend, "numpy:oracle")
    )
    for x, truth in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, truth, atol=1e-6)


def test_wrong_lengths_are_found_in_a_trace_too_where_they_are_known():
    lengths = jnp.array([7, 8])
    with pytest.raises(ValueError, match=r"between 0 and Sk = 7\. Got 8"):
        jax.jit(lambda q: heedful.attention(q, *map(jnp.array, (K, V)), kv_lengths=lengths))(
            jnp.array(Q)
        )


def test_equal_calls_make_equal_problems():
    problem = Call.of(Q, K, V, causal=True, window=[3, np.int64(0)], scale=np.float32(0.5)).problem
    same = Call.of(Q + 1, K, V, causal=np.True_, window=(3, 0), scale=0.5, bias=None).problem
    assert problem == same
    assert hash(problem) == hash(same)
    assert len({problem, same}) == 1
    assert problem != Call.of(Q, K, V, causal=True, window=(3, 1), scale=0.5).problem


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"window": (None, None)}, {}),
        ({"causal": "top_left", "q_offset": 1}, {"causal": True, "q_offset": 1}),
        ({"scale": None}, {"scale": 8**-0.5}),
        ({"mask": TRUE[:, :1, :1]}, {"mask": TRUE[:, 0, 0]}),  # (B, Sk)
        ({"bias": zeros(7)}, {"bias": zeros(1, 1, 1, 7)}),
    ],
)
def test_what_means_the_same_is_the_same_problem(said, meant):
    assert Call.of(Q, K, V, **said).problem == Call.of(Q, K, V, **meant).problem


def test_a_problem_knows_neither_rank_nor_layout():
    turned = (x.swapaxes(1, 2) for x in (Q, K, V))
    problem = Call.of(Q, K, V, causal=True).problem
    assert Call.of(*turned, causal=True, layout="bshd").problem == problem
    assert Call.of(*(x[None] for x in (Q, K, V)), causal=True).problem == problem


@pytest.mark.parametrize(
    ("options", "features"),
    [
        ({}, set()),
        ({"causal": "top_left"}, {"causal", "q_offset"}),  # of five queries on seven keys
        ({"causal": True, "q_offset": np.array([1, 2])}, {"causal", "q_offset"}),
        ({"causal": True, "kv_lengths": np.array([7, 3])}, {"causal", "kv_lengths"}),
        (
            {"causal": "top_left", "kv_lengths": np.array([7, 3])},
            {"causal", "kv_lengths", "q_offset"},
        ),
        ({"window": (None, None), "scale": 8**-0.5, "bias": None}, set()),
        ({"window": (1, None), "scale": 1, "bias": zeros(7)}, {"window", "scale", "bias"}),
    ],
)
def test_features_are_what_is_asked_beyond_plain_attention(options, features):
    of_shapes = {"grouped_heads", "value_dim"}
    assert Call.of(Q, K, V, **options).problem.features == features | of_shapes
    assert Call.of(K, K, K).problem.features == set()
    # As many queries as keys, but not of what is real: not the default alignment.
    padded = Call.of(K, K, K, causal="top_left", kv_lengths=np.array([7, 3])).problem
    assert padded.features == {"causal", "kv_lengths", "q_offset"}


def test_a_problem_says_what_is_asked():
    lengths = np.array([7, 3])
    problem = Call.of(Q, K, V, causal=True, kv_lengths=lengths, bias=zeros(5, 7)).problem
    assert (problem.batch, problem.q_heads, problem.kv_heads, problem.group) == (2, 4, 2, 2)
    assert (problem.q_length, problem.kv_length) == (5, 7)
    assert (problem.head_dim, problem.value_dim) == (8, 16)
    assert (problem.framework, problem.platform, problem.dtype) == ("numpy", "cpu", "float32")
    assert problem.accumulator == "float32"
    assert problem.bias_shape == (1, 1, 5, 7)
    assert problem.mask_shape is None
    assert problem.kv_lengths and not problem.q_lengths
    assert problem.q_offset is None  # comes from the lengths
    assert problem.positional and problem.band == (None, 0)


@pytest.mark.parametrize(
    ("options", "band"),
    [
        ({}, (None, None)),
        ({"causal": True}, (None, 0)),
        ({"window": (3, 1)}, (3, 1)),
        ({"window": (3, 1), "causal": True}, (3, 0)),
        ({"window": (3, None), "causal": True}, (3, 0)),
        ({"window": (None, 2)}, (None, 2)),
        ({"window": (2**40, 2)}, (None, 2)),  # as good as open
    ],
)
def test_causal_and_window_together_are_a_band(options, band):
    problem = Call.of(Q, K, V, **options).problem
    assert problem.band == band
    assert problem.positional == (band != (None, None))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_canonical_operands_are_views_and_restore_is_their_inverse(layout, lead):
    def array(heads, length, size):
        pair = (heads, length) if layout == "bhsd" else (length, heads)
        return np.random.default_rng(0).standard_normal((*lead, *pair, size))

    q, k, v = array(4, 5, 8), array(2, 7, 8), array(2, 7, 16)
    batch = int(np.prod(lead))
    options = {"layout": layout, "mask": np.ones((5, 7), bool), "return_lse": True}
    call = Call.of(q, k, v, **options)
    operands = call.operands
    assert operands.q.shape == (batch, 4, 5, 8)
    assert operands.k.shape == (batch, 2, 7, 8)
    assert operands.v.shape == (batch, 2, 7, 16)
    assert operands.mask.shape == (1, 1, 5, 7)
    for given, canonical in zip((q, k, v, options["mask"]), operands, strict=False):
        assert np.shares_memory(given, canonical)
    out, lse = call.restore(operands.q, np.zeros((batch, 4, 5)))
    np.testing.assert_array_equal(out, q)
    assert lse.shape == (*lead, 4, 5)


def test_rank_two_has_neither_batch_nor_heads():
    q, k = zeros(5, 8), zeros(7, 8)
    call = Call.of(q, k, k, return_lse=True)
    assert call.operands.q.shape == (1, 1, 5, 8)
    out, lse = call.restore(zeros(1, 1, 5, 8), zeros(1, 1, 5))
    assert (out.shape, lse.shape) == ((5, 8), (5,))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "int64"])
def test_lengths_of_any_integer_type_become_int32(dtype):
    lengths = np.array([3, 7], dtype)
    options = {"causal": True, "q_lengths": lengths - 2, "kv_lengths": lengths}
    operands = Call.of(Q, K, V, **options).operands
    assert operands.q_lengths.dtype == operands.kv_lengths.dtype == np.int32


def test_a_shape_is_enough():
    q = jax.ShapeDtypeStruct((2, 4, 5, 8), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 4, 7, 8), jnp.bfloat16)
    problem = Call.of(q, k, k, causal=True).problem
    assert (problem.framework, problem.dtype, problem.q_offset) == ("jax", "bfloat16", 2)


def test_numpy_masks_and_lengths_are_constants_to_jax():
    q, k, v = map(jnp.array, (Q, K, V))
    options = {"mask": TRUE[0, 0], "kv_lengths": np.array([7, 3])}
    assert Call.of(q, k, v, **options).problem.framework == "jax"


def test_every_option_is_checked_under_jit_as_outside():
    with pytest.raises(TypeError, match="mask must be boolean"):
        jax.jit(lambda q, k, v, mask: heedful.attention(q, k, v, mask=mask))(
            *map(jnp.array, (Q, K, V)), jnp.ones((5, 7))
        )
