"""The package as its users meet it: its names, what it imports, and the quickstart it grew out of."""

import inspect
import os
import re
import subprocess
import sys
from textwrap import dedent

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

import heedful
from heedful import (
    causal_flash_attention,
    flash_attention,
    plain_attention,
    value_and_grad_difference,
)
from heedful.call.options import OPTIONS

PUBLIC = {
    "Backend",
    "Decoded",
    "Operands",
    "Problem",
    "Refusal",
    "attention",
    "backends",
    "block_mask",
    "causal_flash_attention",
    "cosine_sim_flash_attention",
    "decode",
    "dropout_mask",
    "explain",
    "flash_attention",
    "flash_attention_varlen",
    "part",
    "plain_attention",
    "recording",
    "register",
    "ring_attention",
    "unregister",
    "use_backend",
    "value_and_grad_difference",
    "zigzag",
}


def test_the_public_names():
    assert set(heedful.__all__) == PUBLIC
    assert list(heedful.__all__) == sorted(heedful.__all__)
    for name in PUBLIC:
        assert getattr(heedful, name).__doc__, name
    assert re.fullmatch(r"\d+\.\d+\.\d+", heedful.__version__)


def test_every_option_is_documented_where_it_is_taken_and_where_it_is_checked():
    text = inspect.getdoc(heedful.attention)  # dedented, as Python 3.13 itself has it
    arguments = text.partition("Args:")[2].partition("Returns:")[0]
    documented = re.findall(r"^ {4}(\w+):", arguments, re.MULTILINE)
    assert documented == ["q", "k", "v", "backend", *(option.name for option in OPTIONS)]


def test_the_errors_name_every_option():
    with pytest.raises(TypeError) as raised:
        heedful.attention(*[jnp.ones((3, 8))] * 3, nonsense=1)
    assert all(option.name in str(raised.value) for option in OPTIONS)


# What is imported


def run(script, path="", **environment):
    """What a fresh Python prints."""
    path = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", dedent(script)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()


USE = """
    import sys
    import numpy as np
    import jax.numpy as jnp
    import heedful
    for q in (np.ones((3, 8), np.float32), jnp.ones((3, 8))):
        assert heedful.attention(q, q, q, causal=True).shape == (3, 8)
        heedful.attention(q, q, q, backend="numpy:oracle")
    print("torch" in sys.modules)
"""


def test_torch_is_not_imported():
    assert run(USE) == ["False"]


def test_torch_may_be_absent_or_broken(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is broken')")
    assert run(USE, path=tmp_path) == ["False"]


def test_an_explanation_for_jax_arrays_loads_no_torch():
    script = """
        import sys, heedful, jax.numpy as jnp
        q = jnp.ones((2, 3))
        verdicts = heedful.explain(q, q, q).verdicts
        print("torch" in sys.modules, all(v.accepted == (v.name != "torch:sdpa-math") for v in verdicts
              if v.name in ("jax:flash", "torch:sdpa-math")))
    """
    assert run(script) == ["False", "True"]


def test_the_environment_names_the_backend(monkeypatch):
    monkeypatch.setenv("HEEDFUL_BACKEND", "jax:nn-cudnn, jax:plain")
    script = """
        import heedful, numpy as np
        q = np.ones((2, 3), np.float32)
        print(heedful.explain(q, q, q).why)
    """
    assert run(script) == ["asked", "for", "by", "HEEDFUL_BACKEND;", "jax:nn-cudnn", "refused"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork; Linux's CI does")
def test_a_forked_child_is_told_at_once_instead_of_hanging():
    script = """
        import os, warnings, heedful, numpy as np
        warnings.simplefilter("ignore")  # JAX's own, at the fork
        q = np.ones((2, 3), np.float32)
        heedful.attention(q, q, q, backend="jax:flash")
        child = os.fork()
        if child == 0:
            try:
                heedful.attention(q, q, q, backend="jax:flash")
            except heedful.Refusal as refusal:
                print("forked" in str(refusal), heedful.explain(q, q, q).chosen)
            print(heedful.attention(q, q, q)[0, 0], flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print(heedful.attention(q, q, q, backend="jax:flash")[0, 0])
    """
    assert run(script) == ["True", "numpy:oracle", "1.0", "1.0"]


def test_importing_does_not_start_jax():
    script = """
        import heedful
        from jax._src import xla_bridge
        print(xla_bridge.backends_are_initialized())
    """
    assert run(script) == ["False"]


# The quickstart of flash-attention-jax, on shorter sequences


@pytest.mark.parametrize(("shape", "mask_dtype"), [((300, 64), "int32"), ((2, 3, 130, 64), "bool")])
def test_quickstart(shape, mask_dtype):
    q, k, v = random.normal(random.key(42), (3, *shape))
    mask = random.randint(random.key(42), (*shape[:-3], shape[-2]), 0, 2).astype(mask_dtype)

    out, lse = flash_attention(q, k, v, mask)

    assert out.shape == shape
    assert lse.shape == shape[:-1]
    for got, expected in zip((out, lse), plain_attention(q, k, v, mask), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(300, 64), (2, 3, 130, 64)])
def test_causal_quickstart(shape):
    q, k, v = random.normal(random.key(42), (3, *shape))

    out, lse = causal_flash_attention(q, k, v)

    expected = plain_attention(q, k, v, causal=True)
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], atol=1e-5)


def test_the_pairs_always_return_the_lse():
    q = jnp.ones((3, 8))
    for attend in (flash_attention, causal_flash_attention, plain_attention):
        assert len(attend(q, q, q)) == 2
        with pytest.raises(TypeError, match=r"always return \(out, lse\): leave return_lse out"):
            attend(q, q, q, return_lse=True)
        with pytest.raises(TypeError, match=r"takes no backend=\. Got 'jax:plain'\. To choose one"):
            attend(q, q, q, backend="jax:plain")


def test_sanity_check():
    diff, (dq_diff, dk_diff, dv_diff) = value_and_grad_difference(
        plain_attention, flash_attention, seed=42
    )
    assert 0 < diff < 1e-4
    assert dq_diff < 1e-6
    assert dk_diff < 1e-6
    assert dv_diff < 1e-6


# value_and_grad_difference

SMALL = {"batch": 2, "heads": 3, "q_seq_len": 5, "k_seq_len": 7, "dim": 8}


def scaled(factor):
    def attend(q, k, v, mask=None):
        return factor * (q @ k.swapaxes(2, 3) @ v)

    return attend


def test_differences_are_the_largest_absolute_ones():
    out, gradients = value_and_grad_difference(scaled(1), scaled(3), **SMALL)
    once, once_each = value_and_grad_difference(scaled(0), scaled(1), **SMALL)
    assert value_and_grad_difference(scaled(1), scaled(1), **SMALL) == (0, (0, 0, 0))
    assert out == pytest.approx(2 * once, rel=1e-5)
    assert gradients == pytest.approx([2 * x for x in once_each], rel=1e-5)


def test_inputs_follow_the_seed_and_the_sizes():
    seen = []

    def attend(q, k, v, mask=None):
        seen.append((q.shape, k.shape, v.shape, None if mask is None else mask.shape))
        return scaled(1)(q, k, v)

    def out_difference(**options):
        return value_and_grad_difference(attend, scaled(0), **(SMALL | options))[0]

    assert out_difference(seed=1) == out_difference(seed=1) != out_difference(seed=2)
    assert seen[-1] == ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (2, 7))
    out_difference(add_key_mask=False)
    assert seen[-1] == ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), None)


def test_outputs_of_two_shapes_are_not_compared():
    with pytest.raises(ValueError, match="f and g must return out of one shape"):
        value_and_grad_difference(scaled(1), lambda q, k, v, mask: q.swapaxes(1, 2), **SMALL)
