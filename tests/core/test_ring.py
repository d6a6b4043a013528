"""Ring attention on 8 virtual devices, and on two real processes, each in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import heedful

SCRIPT = Path(__file__).with_name("ringed.py")


def start(*arguments, devices=8):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*running):
    try:
        for process in running:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
            assert "all right" in said
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_out_lse_and_gradients_equal_those_of_one_device():
    finish(
        start("equal", "full", "causal", "window", "more-keys", "rows-that-see-nothing"),
        start("equal", "window-zigzag", "more-queries", "float64", "two-axes"),
    )


def test_the_judge_agrees():
    finish(start("judged", "float32"), start("judged", "bfloat16"))


def test_memory_shrinks_with_more_devices_and_zigzag_gives_them_equal_work():
    finish(start("memory"), start("work"))


def test_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    finish(*[start("processes", port, number, devices=1) for number in range(2)])


# What needs no second device


def shards(function):
    mesh = jax.make_mesh((1,), ("ring",), (AxisType.Auto,), devices=jax.devices()[:1])
    return jax.shard_map(function, mesh=mesh, in_specs=P(None, "ring"), out_specs=P(None, "ring"))


def ring(x, **options):
    return heedful.ring_attention(x, x, x, axis_name="ring", **options)


def test_outside_of_a_jit_and_on_one_device():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 4), np.float32))
    for zigzag in (False, True):
        got = shards(lambda x, z=zigzag: ring(x, causal=True, zigzag=z))(x)
        expected = heedful.attention(x, x, x, causal=True, backend="jax:plain")
        np.testing.assert_allclose(got, expected, 1e-5, 1e-5)


def test_an_empty_sequence():
    assert shards(ring)(jnp.ones((2, 0, 4))).shape == (2, 0, 4)


def test_zigzag_and_back():
    x = np.arange(12)
    there = heedful.zigzag(x, 3, axis=0)
    assert there.tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert heedful.zigzag(there, 3, axis=0, restore=True).tolist() == x.tolist()
    rows = jnp.arange(24).reshape(1, 12, 2)
    assert heedful.zigzag(rows, 3)[0, :, 0].tolist() == (2 * there).tolist()


def test_what_it_refuses():
    x = jnp.ones((2, 6, 4))
    with pytest.raises(ValueError, match="Got 'ring', which is not bound here"):
        ring(x)
    with pytest.raises(TypeError, match=r"takes JAX arrays\. Got numpy's"):
        ring(np.ones((2, 6, 4), np.float32))
    with pytest.raises(ValueError, match="Got shares of 3 queries and 3 keys"):
        shards(lambda x: ring(x, zigzag=True))(x[:, :3])
    with pytest.raises(ValueError, match=r"2n = 8 of one length\. Got 6 tokens"):
        heedful.zigzag(x, 4)
    with pytest.raises(ValueError, match="q_segment_ids and kv_segment_ids go together"):
        shards(lambda x: ring(x, q_segment_ids=jnp.zeros(6, int)))(x)
