"""What `transfer_report` says, beside what really happened to the memory."""

import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import heedful
from heedful_torch import CopyWarning, as_jax, as_torch, to_jax, to_torch, transfer_report


def summary(report):
    return [(x.source, x.target, x.shape, x.bytes, x.copied) for x in report]


def test_what_is_shared_and_what_is_copied_and_why():
    tensor, array = torch.ones(4, 8), jnp.ones(3, jnp.bfloat16)
    with transfer_report() as report, warnings.catch_warnings():
        warnings.simplefilter("ignore", CopyWarning)
        shared = to_jax(tensor)
        copied = to_jax(tensor[:, ::2], copy=None)
        to_jax(tensor, copy=True)
        to_torch(array)
        to_torch(array, copy=True)
    assert shared.unsafe_buffer_pointer() == tensor.data_ptr() != copied.unsafe_buffer_pointer()
    assert summary(report) == [
        ("torch", "jax", (4, 8), 128, False),
        ("torch", "jax", (4, 4), 64, True),
        ("torch", "jax", (4, 8), 128, True),
        ("jax", "torch", (3,), 6, False),
        ("jax", "torch", (3,), 6, True),
    ]
    assert "leave gaps (a slice)" in report.copied[0].why and report.copied[1].why == "copy=True"
    assert len(report) == 5 and len(report.shared) == 2
    assert "torch to jax: float32[4, 4] on cpu, 64 bytes, copied: its strides" in str(report)
    assert str(report).endswith("2 shared, 134 bytes; 3 copied, 198 bytes")


def test_a_refusal_crosses_nothing():
    with transfer_report() as report, pytest.raises(ValueError, match="leave gaps"):
        to_jax(torch.ones(4, 8)[:, ::2])
    assert not report.transfers and str(report) == "0 shared, 0 bytes; 0 copied, 0 bytes"


def test_a_call_and_its_backward_pass_through_jax_copy_nothing():
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    with transfer_report() as report:
        heedful.attention(q, k, v, backend="jax:flash").backward(torch.ones(1, 2, 16, 8))
    assert len(report.shared) > 6 and not report.copied
    assert f"{(1, 2, 16, 8)}".replace("(", "[").replace(")", "]") in str(report)


def test_a_cotangent_that_cannot_be_shared_is_in_the_report():
    x = torch.ones(8, 8, requires_grad=True)
    with transfer_report() as report:
        as_torch(lambda x: x * 3)(x).sum().backward()
    (copy,) = report.copied
    assert copy.shape == (8, 8) and "a broadcast" in copy.why


def test_torch_in_jax_borrows_arguments_and_fills_results():
    x = jnp.ones((4, 4))
    function = jax.jit(as_jax(torch.sin))
    function(x)
    with transfer_report() as report:
        jax.block_until_ready(function(x))
    assert summary(report) == [
        ("jax", "torch", (4, 4), 64, False),
        ("torch", "jax", (4, 4), 64, True),
    ]
    assert "XLA" in report.copied[0].why


def test_numpy_and_torch():
    q, k, v = (np.ones((1, 2, 16, 8), np.float32) for _ in range(3))
    with transfer_report() as report:
        heedful.attention(q, k, v, backend="torch:sdpa-math")
    assert [x.target for x in report] == ["torch"] * 3 + ["numpy"]
    assert not any(x.copied for x in report.transfers[:3])
    q, k, v = map(torch.from_numpy, (q, k, v))
    with transfer_report() as report:
        heedful.attention(q, k, v, backend="numpy:oracle")
    assert [x.target for x in report] == ["numpy"] * 3 + ["torch"]


def test_reports_nest_and_close():
    x = torch.ones(2)
    with transfer_report() as outer:
        with transfer_report() as inner:
            to_jax(x)
        to_jax(x)
    to_jax(x)
    assert len(inner) == 1 and len(outer) == 2
    assert "(2 times)" in str(outer)
    with pytest.raises(ZeroDivisionError), transfer_report() as report:
        raise ZeroDivisionError
    to_jax(x)
    assert not report.transfers


def test_a_closed_report_costs_nothing_that_shows():
    """A look at an empty list, against the 45 µs of a crossing."""
    from heedful_torch.transfers import crossed

    x = torch.ones(2)
    start = time.perf_counter()
    for _ in range(10_000):
        crossed("torch", "jax", x, copied=False, why="")
    assert time.perf_counter() - start < 0.1  # 10 µs each, and ten times what it takes
