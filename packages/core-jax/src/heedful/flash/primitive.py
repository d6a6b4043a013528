"""What the primitives of the flash core have in common: eager calls, types of results, `vmap`'s fold."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

# Private, but how JAX's own partitioned primitives ask to be told the mesh (0.10 to 0.12).
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from heedful.call.arrays import Array
from heedful.compiled import compiled
from heedful.flash.partition import lowering


def primitive(
    name: str,
    implementation: Callable[..., list[Array]],
    results: Callable[..., list[Any]],
    *params: str,
) -> Primitive:
    """A primitive of blockwise arithmetic.

    Args:
        name: of the primitive.
        implementation: (arrays, params) → results, in JAX.
        results: likewise of the arrays' types, said without tracing: outside of a jit, `jax.grad` asks
            at every call.
        params: the names of all params.
    """
    found = Primitive(name)
    found.multiple_results = True

    @compiled(static=len(params))
    def run(*args: Any) -> list[Array]:
        known = dict(zip(params, args, strict=False))
        return found.bind(*args[len(params) :], **known)

    found.def_impl(lambda *arrays, **known: run(*(known[name] for name in params), *arrays))
    found.def_abstract_eval(results)
    mlir.register_lowering(found, lowering(implementation))
    prim_requires_devices_during_lowering.add(found)
    return found


def like(aval: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An array type that is spread, and varies within a `shard_map`, as another does."""
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec())
    return aval.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)


def fold(x: Array, axis: int | None, size: int, batch: int, whole: bool) -> Array:
    """(batch or 1, ...) with a new axis somewhere → (size · batch, ...).

    What neither moves along the new axis nor has a batch axis stays as it is, unless asked `whole`.
    """
    if axis is None:
        if x.shape[0] == 1 and not whole:
            return x
        x = x[None]
    else:
        x = jnp.moveaxis(x, axis, 0)
    x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
    return x.reshape(size * batch, *x.shape[2:])
