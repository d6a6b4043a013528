"""Calls on a mesh with explicit axes, where JAX asks every operation how its result is spread.

`jax.make_mesh` makes such axes by default. Attention's answer is known beforehand: out is spread as q
is, and where q is whole, as k and v are. So it is given once, for the whole call, and within the call
the axes are automatic: no backend needs to know of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes

from heedful.call import Call
from heedful.call.arrays import Array
from heedful.call.form import Form


def spread_like_its_arrays(compute: Callable[[Mapping[str, Array]], Any], call: Call) -> Any:
    """`compute(call.arrays)`, with out and lse spread as the arrays are that they come from.

    Args:
        compute: (arrays by name, in the caller's form) → out, or (out, lse), in that form too.
        call: whose arrays they are.
    """
    arrays = call.arrays
    types = {name: jax.typeof(x) for name, x in arrays.items() if isinstance(x, jax.Array)}
    meshes = (x.sharding.mesh for x in types.values())
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return compute(arrays)
    of_out, of_lse = _specs(call.form, [tuple(types[name].sharding.spec) for name in "qkv"])
    result = (of_out, of_lse) if call.problem.return_lse else of_out
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        result,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    return auto_axes(compute, out_sharding=shardings)(arrays)


def _specs(form: Form, specs: Sequence[tuple[Any, ...]]) -> tuple[PartitionSpec, PartitionSpec]:
    """How out and lse are spread, for q, k and v that are spread so."""
    q, *others = specs
    taken = {name for axes in q[:-1] for name in _names(axes)}
    out = list(q[:-1])
    for other in others:
        for axis, axes in enumerate(other[:-1]):
            # A mesh axis cuts one axis of an array; the queries are cut as q's alone.
            if out[axis] is None and axis != form.tokens_axis and taken.isdisjoint(_names(axes)):
                out[axis] = axes
                taken.update(_names(axes))
    lse = list(out)
    if form.heads_last:
        lse[-2:] = reversed(lse[-2:])
    return PartitionSpec(*out, None), PartitionSpec(*lse)


def _names(axes: Any) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()
