"""How the three primitives are lowered, and spread over devices: by batch rows and by heads.

A row of the batch and a key head with its query heads are computed from nothing but their own part of
each operand, so devices that hold such parts need not talk. XLA cannot see that in loops over tiles:
left alone, it gathers every operand on every device. So where a computation runs on several devices, a
primitive is lowered to a call that tells the partitioner which axes may be cut, and that is traced anew
for the part of one device, whose tiles are then sized for that part.

Lengths and head sizes are not cut: an operand that is cut there is gathered. Heads are cut as far as
their key heads go. What all rows or heads share, a bias of size 1 there, has a gradient that is a sum
over devices: that one is communicated.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from heedful.call.arrays import Array
from heedful.call.problem import Problem

Implementation = Callable[..., list[Array]]


def lowering(implementation: Implementation) -> Callable[..., Any]:
    """The lowering rule of a primitive whose arguments all have axes (batch, heads, ...) or (batch,).

    The implementation is traced without the meshes, and without the varying axes of a `shard_map`, that
    its arguments' types hold: its loops begin with constants, which have none.
    """

    def rule(ctx: Any, *args: Any, **params: Any) -> Any:
        bare = [jax.core.ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
        spread = _is_spread(ctx)
        function = (
            _partitioned(implementation, params) if spread else partial(implementation, **params)
        )
        return mlir.lower_fun(function, multiple_results=True)(ctx.replace(avals_in=bare), *args)

    return rule


def varying_alike(arrays: Any) -> Any:
    """Within a `shard_map` that checks what varies: every leaf varies where any of them does.

    JAX makes this cast before its own operations. Its transpose is the sum over devices that the
    gradient of a leaf needs which they share.
    """
    leaves = [x for x in jax.tree.leaves(arrays) if isinstance(x, jax.core.Tracer)]
    varies = frozenset().union(*(jax.typeof(x).mat.varying for x in leaves))
    if not varies:
        return arrays

    def cast(x: Array) -> Array:
        missing = varies - jax.typeof(x).mat.varying
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def _is_spread(ctx: Any) -> bool:
    """Whether XLA will partition what is lowered here, along a mesh that is known.

    An export must do without a call back into this process, and gathers.
    """
    axes = ctx.module_context.axis_context
    exported = ctx.module_context.lowering_parameters.for_export
    return getattr(axes, "abstract_mesh", None) is not None and not exported


class _Cut(NamedTuple):
    """Along which mesh axes batch rows and heads are cut."""

    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    def of(self, problem: Problem, shape: Sequence[int]) -> PartitionSpec:
        """How an array of the shape is cut; what all rows or heads share is whole everywhere."""
        rest = [None] * (len(shape) - 2)
        batch = self.batch if shape[0] == problem.batch else ()
        heads = self.heads if len(shape) > 1 and shape[1] in _heads(problem) else ()
        return PartitionSpec(*[batch or None, heads or None][: len(shape)], *rest)


def _heads(problem: Problem) -> tuple[int, int]:
    return problem.q_heads, problem.kv_heads


def _cut(problem: Problem, mesh: Mesh, arrays: Iterable[Any]) -> _Cut:
    """The first of these arrays that is cut along an axis says how all are cut there."""
    found = _Cut()
    for x in arrays:
        spec = (*x.sharding.spec, None, None)
        if not found.batch and x.shape[0] == problem.batch:
            found = found._replace(batch=_dividing(mesh, spec[0], problem.batch, found.heads))
        if not found.heads and len(x.shape) > 1 and x.shape[1] in _heads(problem):
            heads = _dividing(mesh, spec[1], problem.kv_heads, found.batch)
            found = found._replace(heads=heads)
    return found


def _dividing(mesh: Mesh, axes: Any, size: int, taken: tuple[str, ...]) -> tuple[str, ...]:
    """The first mesh axes, of those along which an axis is cut, whose parts come out equal."""
    names: tuple[str, ...] = ()
    for name in (axes,) if isinstance(axes, str) else axes or ():
        if name in taken or size % math.prod(mesh.shape[n] for n in (*names, name)):
            break
        names = (*names, name)
    return names


def _partitioned(implementation: Implementation, params: dict[str, Any]) -> Any:
    problem: Problem = params["problem"]

    def partition(mesh: Mesh, args: Sequence[Any], results: Sequence[Any]) -> Any:
        cut = _cut(problem, mesh, (*args, *results))

        def shardings(arrays: Sequence[Any]) -> tuple[NamedSharding, ...]:
            return tuple(NamedSharding(mesh, cut.of(problem, x.shape)) for x in arrays)

        rows = math.prod(mesh.shape[name] for name in cut.batch)
        heads = math.prod(mesh.shape[name] for name in cut.heads)
        part = replace(
            problem,
            batch=problem.batch // rows,
            q_heads=problem.q_heads // heads,
            kv_heads=problem.kv_heads // heads,
        )
        tiles = params["tiles"]
        if tiles is not None:
            tiles = tiles._replace(
                batch=math.gcd(tiles.batch, part.batch),
                kv_heads=math.gcd(tiles.kv_heads, part.kv_heads),
            )

        def of_a_part(*arrays: Array) -> list[Array]:
            found = implementation(*arrays, **{**params, "problem": part, "tiles": tiles})
            return [
                _sum(x, cut, problem, whole.shape) for x, whole in zip(found, results, strict=True)
            ]

        return mesh, of_a_part, list(shardings(results)), shardings(args)

    def infer(mesh: Mesh, args: Sequence[Any], results: Sequence[Any]) -> list[NamedSharding]:
        cut = _cut(problem, mesh, args)
        return [NamedSharding(mesh, cut.of(problem, x.shape)) for x in results]

    def rule(mesh: Mesh, args: Sequence[Any], results: Sequence[Any]) -> SdyShardingRule:
        return _shardy_rule(problem, mesh, [x.shape for x in args], [x.shape for x in results])

    call = custom_partitioning(lambda *arrays: implementation(*arrays, **params))
    call.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return call


def _sum(x: Array, cut: _Cut, problem: Problem, whole: Sequence[int]) -> Array:
    """The sum over those devices that each hold a share of what their rows or heads have in common."""
    shared = () if whole[0] == problem.batch else cut.batch
    shared += () if whole[1] in _heads(problem) else cut.heads
    return lax.psum(x, shared) if shared else x


def _shardy_rule(
    problem: Problem, mesh: Mesh, args: Sequence[Sequence[int]], results: Sequence[Sequence[int]]
) -> SdyShardingRule:
    """The same for Shardy: batch rows and heads are factors that arrays share; the rest stays whole.

    Shardy would cut a mesh axis in two that grouped key heads do not fill, one part for them and one for
    the group, which no `NamedSharding` can say; then heads stay whole too.
    """
    whole: list[str] = []
    shared = [math.gcd(problem.kv_heads, size) for size in mesh.shape.values()]
    fits = all(n in (1, size) for n, size in zip(shared, mesh.shape.values(), strict=True))
    cut_heads = problem.group == 1 or (problem.kv_heads > 1 and fits)

    def new_factor() -> str:
        whole.append(f"whole{len(whole)}")
        return whole[-1]

    def mapping(shape: Sequence[int]) -> ArrayMapping:
        factors: list[str | CompoundFactor] = []
        for axis, size in enumerate(shape):
            if axis == 0 and size == problem.batch:
                factors.append("batch")
            elif not cut_heads:
                factors.append(new_factor())
            elif axis == 1 and size == problem.q_heads and problem.group > 1:
                factors.append(CompoundFactor("heads", "group"))
            elif axis == 1 and size == problem.kv_heads:
                factors.append("heads")
            else:
                factors.append(new_factor())
        return ArrayMapping(*factors)

    mappings = tuple(map(mapping, args)), tuple(map(mapping, results))
    sizes: dict[str, Any] = {"group": problem.group} if cut_heads and problem.group > 1 else {}
    return SdyShardingRule(*mappings, need_replication_factors=tuple(whole), **sizes)
