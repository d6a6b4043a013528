"""Two functions against each other: what is rounding, what is not, and which of them is off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heedful_crosscheck import compare

RANDOM = np.random.default_rng(0)
Q, K, V = RANDOM.standard_normal((3, 2, 6, 8), dtype=np.float32)


def softmax(s):
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def numpy_attention(q, k, v, scale=8**-0.5):
    return softmax(q @ k.swapaxes(1, 2) * q.dtype.type(scale)) @ v


def other_order(q, k, v):
    return softmax(q * q.dtype.type(8**-0.5) @ k.swapaxes(1, 2)) @ v


def jax_attention(q, k, v, scale=8**-0.5):
    return jax.nn.softmax(q @ k.mT * scale) @ v


def test_rounding_is_agreement_across_frameworks_and_gradients_are_compared():
    found = compare(jax_attention, numpy_attention, [Q, K, V])
    assert found.agree, str(found)
    assert found.names == ("jax_attention", "numpy_attention")
    assert [x.tensor for x in found.differences] == ["out"]
    assert 0 < found["out"].largest < 1e-6 and found["out"].of_f.rms < 1e-6
    assert "! numpy_attention is NumPy's, and has no gradients" in str(found)
    assert "jax_attention and numpy_attention agree." in str(found)


def test_a_wrong_gradient_is_named_and_its_owner_too():
    @jax.custom_jvp
    def own(s):
        return jax.nn.softmax(s)

    @own.defjvp
    def _(primals, tangents):
        out, tangent = jax.jvp(jax.nn.softmax, primals, tangents)
        return out, tangent * 1.001

    def off(q, k, v):
        return own(q @ k.mT * 8**-0.5) @ v

    found = compare(jax_attention, off, {"q": Q, "k": K, "v": V})
    assert {x.tensor: x.agrees for x in found.differences} == {
        "out": True, "dq": False, "dk": False, "dv": True,
    }  # fmt: skip
    assert "they compute something else: 0.001 apart in float64 too" in found["dq"].message
    assert "✗ dq: they compute something else" in str(found)


def narrow(q, k, v):
    """No float64: it computes in float32 whatever comes."""
    return numpy_attention(*(x.astype(np.float32) for x in (q, k, v))).astype(q.dtype)


def only_float32(q, k, v):
    assert q.dtype == np.float32, "this kernel has float32 alone"
    return numpy_attention(q, k, v)


def lossy(q, k, v):
    assert q.dtype == np.float32, "this kernel has float32 alone"
    return numpy_attention(*(x.astype(np.float16) for x in (q, k, v))).astype(np.float32)


@pytest.mark.parametrize(
    ("f", "g", "agree", "said"),
    [
        (numpy_attention, other_order, True, "agree."),
        (narrow, other_order, True, "no float64 of narrow: it computes in a narrower dtype"),
        (only_float32, narrow, True, "AssertionError: this kernel has float32 alone"),
        (numpy_attention, lossy, False, "✗ out: lossy is off by rms "),
        (lossy, narrow, False, "without float64 of either"),
    ],
)
def test_float64_of_either_is_the_judge_where_it_can_be_had(f, g, agree, said):
    for one, other in ((f, g), (g, f)):
        found = compare(one, other, [Q, K, V])
        assert found.agree == agree and said in str(found), str(found)


def test_a_value_wrong_by_little_is_no_rounding():
    def off(q, k, v):
        return numpy_attention(q, k, v, scale=8**-0.5 * (1 + 1e-5))

    found = compare(numpy_attention, off, [Q, K, V])
    assert not found.agree and "in float64 too" in found["out"].message, str(found)


def test_what_is_not_finite_must_stand_where_the_others_stands():
    def holes(*at):
        def function(q):
            out = q.copy()
            out[0, 3] = -np.inf
            out[1, 2, at] = np.nan
            return out

        return function

    assert compare(holes(), holes(), [Q]).agree
    found = compare(holes(), holes(5), [Q])
    assert found["out"].message == (
        f"f has {Q[1, 2, 5]:.3g} where g has nan, at (1, 2, 5), and so in 1 of 96 places"
    )


def test_several_outputs_go_by_name_and_integers_are_exact():
    def ranked(q, top, last=0):
        return {"best": q.argmax(-1) + last, "sorted": np.sort(q, -1)[..., :top]}

    def other(q, top):
        return ranked(q, top, last=np.arange(6) == 5)

    assert compare(ranked, ranked, [Q, 3]).agree
    found = compare(ranked, other, {"q": Q, "top": 3})
    assert found["sorted"].agrees and not found["best"].agrees
    assert "at (0, 5), and so in 2 of 12 places" in found["best"].message


def test_cotangents_may_be_given():
    found = compare(jax_attention, jax_attention, [Q, K, V], cotangents=[np.zeros_like(V)])
    assert found.agree and {x.tensor for x in found.differences} == {"out", "dq", "dk", "dv"}
    with pytest.raises(ValueError, match=r"cotangents must be one for each floating output"):
        compare(numpy_attention, numpy_attention, [Q, K, V], cotangents=[])


def test_a_gradient_that_cancels_is_measured_by_the_others():
    def one_key(turn):
        return lambda q, k, v: jax.nn.softmax(turn(q) @ turn(k[:, :1]).mT) @ v[:, :1]

    found = compare(one_key(lambda x: x), one_key(lambda x: 2 * x / 2), [Q, K, V])
    assert found.agree, str(found)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(
        ValueError, match=r"Got out float32 \(2, 6, 8\) of f, and out float32 \(2, 8"
    ):
        compare(lambda q: np.abs(q), lambda q: np.abs(q).swapaxes(1, 2), [Q])
    with pytest.raises(TypeError, match="Pass framework"):
        compare(lambda q: q @ q.mT, numpy_attention, [Q])
    found = compare(lambda q: q + q, lambda q: 2 * q, [Q], frameworks=("jax", "numpy"))
    assert found.agree


def test_half_precision_is_judged_by_its_own_floors():
    half = [x.astype(jnp.bfloat16) for x in (Q, K, V)]

    def wide(q, k, v, times=1.0):
        out = numpy_attention(*(x.astype(np.float32) for x in (q, k, v)))
        return (out * np.float32(times)).astype(q.dtype)

    assert compare(wide, lambda q, k, v: wide(q, k, v, 1.001), half).agree  # a quarter of a digit
    found = compare(wide, lambda q, k, v: wide(q, k, v, 1.02), half)
    assert not found.agree and "rms 0.02" in found["out"].message, str(found)
