"""What test_ring.py runs: `python ringed.py PART …` on 8 devices, `processes PORT 0|1` on one each."""

import sys
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import heedful
from heedful import ring
from heedful_crosscheck import crosscheck
from heedful_crosscheck.cases import Case
from heedful_crosscheck.recipes import Segments, Sizes, normal

BOTH = {"return_lse": True}
LENGTH = 32
SHAPES = (2, 4, LENGTH, 8), (2, 2, LENGTH, 8), (2, 2, LENGTH, 4)
PADDED = np.where(np.arange(LENGTH) < 21, 0, -1)[None].repeat(2, 0)
CASES = {  # all of grouped heads; the judge asks for segments in zigzag order
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (5, 2)},
    "window-zigzag": {"window": (7, 0), "zigzag": True, "scale": 0.3, "softcap": 2.0},
    "rows-that-see-nothing": {"segments": (PADDED, np.where(PADDED < 0, 7, PADDED))},
    "more-keys": {"causal": True, "kv_length": 48},
    "more-queries": {"causal": "top_left", "kv_length": 16, "zigzag": True, "layout": "bshd"},
    "float64": {"causal": True, "zigzag": True, "dtype": "float64"},
    # Rows of the batch lie along another mesh axis.
    "two-axes": {"causal": True, "zigzag": True, "axes": {"batch": 2, "ring": 4}},
}


def arrays_of(kv_length, dtype, layout):
    rng = np.random.default_rng(0)
    q, k, v = SHAPES
    shapes = q, (*k[:2], kv_length, 8), (*v[:2], kv_length, 4), (*q[:3], 4), q[:3]
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    if layout == "bshd":
        arrays[:4] = [x.swapaxes(1, 2) for x in arrays[:4]]
    return arrays


def results(attend, q, k, v, d_out, d_lse, *segments):
    """out, lse, dq, dk, dv; the cotangent of an lse of −inf is none."""
    (out, lse), pull_back = jax.vjp(lambda *qkv: attend(*qkv, *segments), q, k, v)
    return out, lse, *pull_back((d_out, jnp.where(lse == -jnp.inf, jnp.inf, d_lse)))


def of_ring(mesh, layout, options):
    """`results` of arrays whose sequence is cut along the mesh axis "ring"."""
    batch = "batch" if "batch" in mesh.axis_names else None
    each = P(batch, "ring") if layout == "bshd" else P(batch, None, "ring")
    lse, segments = P(batch, None, "ring"), P(batch, "ring")

    def attend(q, k, v, *ids):
        named = dict(zip(("q_segment_ids", "kv_segment_ids"), ids, strict=False))
        return heedful.ring_attention(
            q, k, v, axis_name="ring", layout=layout, **named, **options, **BOTH
        )

    def specs(ids):
        return (each, each, each, *[segments] * len(ids))

    def call(q, k, v, *ids):
        spread = jax.shard_map(attend, mesh=mesh, in_specs=specs(ids), out_specs=(each, lse))
        return spread(q, k, v, *ids)

    return partial(results, call), (*specs(()), each, lse), segments


def check(mesh, name, *, segments=(), kv_length=LENGTH, dtype="float32", layout="bhsd", **options):
    arrays = arrays_of(kv_length, dtype, layout)
    axis = -3 if layout == "bshd" else -2
    axes = [*[axis] * 4, -1, -1, -1]  # of q, k, v, d_out, d_lse, ids
    function, specs, of_ids = of_ring(mesh, layout, dict(options))
    zigzag = options.pop("zigzag", False)
    order = partial(heedful.zigzag, devices=mesh.shape["ring"]) if zigzag else None

    def place(x, axis, spec):
        x = x if order is None else order(x, axis=axis)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    given = [
        place(x, *how)
        for x, *how in zip((*arrays, *segments), axes, (*specs, of_ids, of_ids), strict=False)
    ]
    got = jax.jit(function)(*given)

    def whole(q, k, v, *ids):
        named = dict(zip(("q_segment_ids", "kv_segment_ids"), ids, strict=False))
        return heedful.attention(
            q, k, v, backend="jax:plain", layout=layout, **named, **options, **BOTH
        )

    expected = jax.jit(partial(results, whole))(*arrays, *segments)
    atol = 1e-5 if dtype == "float32" else 1e-13
    axes = axis, -1, axis, axis, axis
    for what, x, y, a in zip(("out", "lse", "dq", "dk", "dv"), got, expected, axes, strict=True):
        y = np.asarray(y)
        y = y if order is None else order(y, axis=a)
        assert x.dtype == y.dtype, (name, what, x.dtype)
        for shard in x.addressable_shards:
            message = f"{name} {what} {shard.index}"
            part = np.asarray(shard.data)
            np.testing.assert_allclose(part, y[shard.index], atol, atol, err_msg=message)


def equal_to_one_device(*names):
    for name in names:
        options = {"axes": {"ring": 8}, **CASES[name]}
        axes = options.pop("axes")
        mesh = jax.make_mesh(tuple(axes.values()), tuple(axes))
        jax.config.update("jax_enable_x64", options.get("dtype") == "float64")
        check(mesh, name, **options)


class Ring:
    """The ring of all devices as a backend, for the judge."""

    name = "jax:ring"
    takes = frozenset(
        {"causal", "q_segment_ids", "kv_segment_ids", "return_lse", "grouped_heads", "value_dim"}
    )

    def reasons(self, problem):
        return ()

    def run(self, problem, operands):
        mesh = jax.make_mesh((8,), ("ring",), (AxisType.Auto,))
        arrays = operands.given
        for name in ("q_segment_ids", "kv_segment_ids"):
            arrays[name] = arrays[name].reshape(problem.batch, -1)
        arrays = {n: heedful.zigzag(x, 8, axis=2 if n in "qkv" else 1) for n, x in arrays.items()}
        specs = {name: P(None, *[None] * (x.ndim == 4), "ring") for name, x in arrays.items()}
        attend = partial(
            heedful.ring_attention, axis_name="ring", zigzag=True, causal=problem.causal, **BOTH
        )
        spread = jax.shard_map(
            lambda arrays: attend(**arrays),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=(specs["q"], specs["q"]),
        )
        out, lse = jax.jit(spread)(arrays)
        return tuple(heedful.zigzag(x, 8, axis=2, restore=True) for x in (out, lse))


def judged(dtype):
    """By the limits that every backend is held to, NaN in keys that nobody sees among what is asked."""
    heedful.register(Ring())
    sizes = Sizes(q_heads=4, kv_heads=2, q_length=96, kv_length=96, value_dim=48)
    make = normal(sizes, q_segment_ids=Segments("q"), kv_segment_ids=Segments("k"))
    case = Case(name="packed", group="ring", make=make, options={"causal": True})
    report = crosscheck(["jax:ring"], cases=[case], dtypes=[dtype], strict=True)
    print(report)
    assert report.agree


def memory():
    """What a device needs for one long sequence, of which it holds less and less."""
    shape = (1, 2, 2**15, 64)
    sizes = []
    for devices in (2, 8):
        mesh = jax.make_mesh((devices,), ("ring",), devices=jax.devices()[:devices])
        function, specs, _ = of_ring(mesh, "bhsd", {"causal": True, "zigzag": True})
        shapes = (*[shape] * 4, shape[:3])
        given = [
            jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec))
            for s, spec in zip(shapes, specs, strict=True)
        ]
        found = jax.jit(function).lower(*given).compile().memory_analysis()
        sizes.append(found.temp_size_in_bytes)
    print([f"{size / 2**20:.1f} MiB" for size in sizes])
    assert sizes[1] < 0.4 * sizes[0], sizes


def work():
    """How many visiting chunks each device attends to, of how many shares that are sent."""
    counts, steps = Counter(), set()
    once = ring._of_pair

    def counted(ring_, pair, queries, keys):
        steps.add(ring_.steps)
        rank = jax.lax.axis_index("ring")
        jax.debug.callback(lambda rank: counts.update([int(rank)]), rank)
        return once(ring_, pair, queries, keys)

    ring._of_pair = counted
    mesh = jax.make_mesh((8,), ("ring",))
    q = jax.device_put(np.ones((1, 64, 4), np.float32), NamedSharding(mesh, P(None, "ring")))
    cut = {"mesh": mesh, "out_specs": P(None, "ring")}
    for options, sent, expected in (
        ({"causal": True}, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"causal": True, "zigzag": True}, 8, [17] * 8),
        ({"window": (9, 0)}, 3, [1, 2, 3, 3, 3, 3, 3, 3]),
        ({"window": (8, 1)}, 3, [2, 3, 3, 3, 3, 3, 3, 2]),
    ):
        counts.clear()
        steps.clear()
        call = partial(heedful.ring_attention, axis_name="ring", **options)
        jax.jit(jax.shard_map(lambda x, call=call: call(x, x, x), **cut))(q).block_until_ready()
        jax.effects_barrier()
        assert [counts[rank] for rank in range(8)] == expected, (options, counts)
        assert steps == {sent}, (options, steps)


def processes(port, number):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    assert jax.process_count() == 2 and jax.device_count() == 2
    check(jax.make_mesh((2,), ("ring",)), "processes", causal=True, zigzag=True)


PARTS = {
    "equal": equal_to_one_device,
    "judged": judged,
    "memory": memory,
    "work": work,
    "processes": processes,
}
part, *arguments = sys.argv[1:]
PARTS[part](*arguments)
print("all right")
