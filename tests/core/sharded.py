"""What test_sharding.py runs on 8 devices: `python sharded.py auto|explicit|shard_map`."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import heedful

COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter|ragged-all-to-all)"
)
SPECS = {"batch": P("data"), "heads": P(None, "model"), "both": P("data", "model")}
PARTS = {"batch": 2, "heads": 4, "both": 8}


def attend(q, k, v, lengths):
    return heedful.attention(q, k, v, causal=True, kv_lengths=lengths, backend="jax:flash")


def forward(call, q, k, v, _, lengths):
    return call(q, k, v, lengths)


def reverse(call, q, k, v, cotangent, lengths):
    return jax.vjp(lambda *qkv: call(*qkv, lengths), q, k, v)[1](cotangent)


def tangent(call, q, k, v, moved, lengths):
    return jax.jvp(lambda q: call(q, k, v, lengths), (q,), (moved,))


def twice(call, q, k, v, moved, lengths):
    def gradient(q):
        return jax.grad(lambda q: jnp.sin(call(q, k, v, lengths)).sum())(q)

    return jax.vjp(gradient, q)[1](moved)


def heads_that_cannot_be_cut(mesh):
    """Fewer key heads than devices, and a bias that rows and heads share: right, if with talk."""
    rng = np.random.default_rng(1)

    def total(q, k, bias):
        return jnp.sin(heedful.attention(q, k, k, bias=bias, backend="jax:flash")).sum()

    for kv_heads in (1, 2, 4):
        shapes = (8, 8, 16, 8), (8, kv_heads, 16, 8), (1, 1, 16, 16)
        arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
        specs = P("data", "model"), P("data", "model" if kv_heads == 4 else None), P()
        sharded = [
            jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)
        ]
        gradients = jax.jit(jax.grad(total, (0, 1, 2)))
        for x, y in zip(gradients(*sharded), gradients(*arrays), strict=True):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-4, rtol=1e-4)


def functions(mesh):
    """Each device asks them of its own rows and heads, and what they close over is summed over all."""
    rng = np.random.default_rng(2)
    q, table = (
        rng.standard_normal((8, 8, 16, 8), np.float32),
        rng.standard_normal((8, 8), np.float32),
    )

    def total(q, table):
        out = heedful.attention(
            q,
            q,
            q,
            backend="jax:flash",
            score_mod=lambda s, b, h, i, j: s + table[b, h] * (i - j).astype(s.dtype),
            mask_mod=lambda b, h, i, j: (i + j + b + h) % 3 != 0,
        )
        return jnp.sin(out).sum()

    gradients = jax.jit(jax.grad(total, (0, 1)))
    sharded = jax.device_put(q, NamedSharding(mesh, P("data", "model")))
    compiled = gradients.lower(sharded, table).compile()
    assert set(COLLECTIVE.findall(compiled.as_text())) <= {"all-reduce"}
    for x, y in zip(compiled(sharded, table), gradients(q, table), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-4, rtol=1e-4)


def main(kind):
    assert jax.device_count() == 8
    rng = np.random.default_rng(0)
    shapes = [(8, 8, 64, 16), (8, 4, 64, 16), (8, 4, 64, 16), (8, 8, 64, 16)]
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    lengths = np.arange(57, 65, dtype=np.int32)
    axis = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis, axis))
    whole = {}
    for function in (forward, reverse, tangent, twice):
        compiled = jax.jit(partial(function, attend)).lower(*arrays, lengths).compile()
        size = compiled.memory_analysis().temp_size_in_bytes
        whole[function] = compiled(*arrays, lengths), size
    for name, spec in SPECS.items():
        sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
        call = attend
        if kind == "shard_map":
            each = (spec, spec, spec, P(*spec[:1]))
            call = jax.shard_map(attend, mesh=mesh, in_specs=each, out_specs=spec)
        # Uncommitted lengths are taken beside sharded arrays; those of a row go with the row.
        eager = call(*sharded[:3], jnp.asarray(lengths)) if kind != "shard_map" else None
        assert eager is None or eager.sharding.is_equivalent_to(sharded[0].sharding, 4)
        placed = jax.device_put(lengths, NamedSharding(mesh, P(*spec[:1])))
        for function in (forward, reverse, tangent, *([twice] if name == "both" else [])):
            expected, size = whole[function]
            compiled = jax.jit(partial(function, call)).lower(*sharded, placed).compile()
            found = set(COLLECTIVE.findall(compiled.as_text()))
            assert not found, (name, function, found)
            part = compiled.memory_analysis().temp_size_in_bytes
            assert part < 1.2 * size / PARTS[name], (name, function, part, size)
            got = compiled(*sharded, placed)
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-5, rtol=1e-5)
                assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (name, x)
    if kind != "shard_map":
        heads_that_cannot_be_cut(mesh)
    if kind == "auto":
        functions(mesh)
    print("all right")


main(sys.argv[1])
