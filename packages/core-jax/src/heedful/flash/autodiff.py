"""The three blockwise functions as three JAX primitives, and the rules that tie them together.

    forward     q, k, v, bias → out, m, l                 its tangent is `tangent`
    tangent     linear in q̇, k̇, v̇, bias̄                     its transpose is `cotangent`
    cotangent   cotangents of out and l → dq, dk, dv, dbias

With these, JAX derives the rest itself: reverse mode that saves q, k, v, out, m and l, forward mode, and
their compositions of any order. m is a shift, which changes neither out nor lse = m + log l: it stands
still in every derivative. From the second order on the derivatives are those of the blockwise
functions with loops of a fixed length, which JAX can transpose; their memory is not linear.

`custom_vjp` would give up forward mode, and `custom_jvp` alone would transpose every slice of every
tile into an update of a whole gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# Private, but how JAX's own partitioned primitives ask to be told the mesh (0.10 to 0.12).
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.compiled import compiled
from heedful.flash.cotangent import cotangent
from heedful.flash.forward import Kept, forward
from heedful.flash.partition import lowering, varying_alike
from heedful.flash.tangent import tangent
from heedful.flash.tiles import Tiles

# Names for `jax.checkpoint` policies such as `save_only_these_names(*RESIDUALS)`: with all saved, the
# backward pass does not run the forward pass again. For each query they take Dv + 2 numbers of the
# accumulator's dtype: out is saved as it was before it was rounded to the problem's dtype.
RESIDUALS = tuple(f"heedful_{name}" for name in Kept._fields)


def flash(problem: Problem, operands: Operands, tiles: Tiles | None = None) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq), differentiable in q, k, v and bias.

    Without `tiles`, `tile_sizes` chooses them.
    """
    if 0 in (problem.batch, problem.q_length, problem.kv_length):
        rows = (problem.batch, problem.q_heads, problem.q_length)
        out = jnp.zeros((*rows, problem.value_dim), problem.dtype)
        return out, jnp.full(rows, -jnp.inf, problem.accumulator)
    leaves, tree = jax.tree.flatten(varying_alike(operands))
    kept = Kept(*forward_p.bind(*leaves, problem=problem, tree=tree, tiles=tiles))
    return _results(problem.dtype, kept.out.shape, *kept)


@compiled(static=2, inline=True)  # outside of a trace one call, not one each
def _results(
    dtype: str, _shape: tuple[int, ...], out: Array, m: Array, l: Array
) -> tuple[Array, Array]:
    """out and lse as the contract has them."""
    empty = l == 0
    lse = jnp.where(empty, -jnp.inf, m + jnp.log(jnp.where(empty, 1, l)))
    return out.astype(dtype), lse


# The primitives' arguments are flat: the operands' leaves, which `tree` puts together again; then
# what forward kept; then cotangents. Tangents stand before all of these.


def _forward(*leaves: Array, tree: Any, **options: Any) -> list[Array]:
    return list(forward(operands=jax.tree.unflatten(tree, leaves), **options))


def _tangent(*flat: Array, tree: Any, of_bias: bool, **options: Any) -> list[Array]:
    moving, (*leaves, out, m, l) = flat[: 3 + of_bias], flat[3 + of_bias :]
    tangents = moving if of_bias else (*moving, None)
    operands = jax.tree.unflatten(tree, leaves)
    return list(tangent(operands=operands, kept=Kept(out, m, l), tangents=tangents, **options))


def _cotangent(*flat: Array, tree: Any, **options: Any) -> list[Array]:
    *leaves, out, m, l, d_out, d_l = flat
    operands = jax.tree.unflatten(tree, leaves)
    kept = Kept(out, m, l)
    return list(
        cotangent(operands=operands, kept=kept, out_cotangent=d_out, l_cotangent=d_l, **options)
    )


# What they return, said without tracing them: outside of a jit, `jax.grad` asks at every call.


def _like(aval: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An array type that is spread, and varies within a `shard_map`, as another does."""
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec())
    return aval.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)


def _kept(*avals: Any, problem: Problem, **_: Any) -> list[Any]:
    rows = (problem.batch, problem.q_heads, problem.q_length)
    shapes = (*rows, problem.value_dim), rows, rows
    return [_like(avals[0], shape, problem.accumulator) for shape in shapes]


def _out_and_l(*avals: Any, **params: Any) -> list[Any]:
    out, _, l = _kept(*avals, **params)
    return [out, l]


def _gradients(*avals: Any, problem: Problem, tree: Any, of_bias: bool, **_: Any) -> list[Any]:
    operands = jax.tree.unflatten(tree, avals[: tree.num_leaves])
    moving = (operands.q, operands.k, operands.v, *([operands.bias] if of_bias else []))
    return [_like(x, x.shape, x.dtype) for x in moving]


def _primitive(
    name: str,
    implementation: Callable[..., list[Array]],
    results: Callable[..., list[Any]],
    *params: str,
) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True

    @compiled(static=len(params))
    def run(*args: Any) -> list[Array]:
        known = dict(zip(params, args, strict=False))
        return primitive.bind(*args[len(params) :], **known)

    primitive.def_impl(lambda *leaves, **known: run(*(known[name] for name in params), *leaves))
    primitive.def_abstract_eval(results)
    mlir.register_lowering(primitive, lowering(implementation))
    prim_requires_devices_during_lowering.add(primitive)
    return primitive


PARAMS = ("problem", "tree", "tiles")
forward_p = _primitive("heedful_forward", _forward, _kept, *PARAMS)
tangent_p = _primitive("heedful_tangent", _tangent, _out_and_l, *PARAMS, "of_bias")
cotangent_p = _primitive("heedful_cotangent", _cotangent, _gradients, *PARAMS, "of_bias")


# Differentiation


def _jvp_of_forward(
    primals: Sequence[Array], tangents: Sequence[Any], **params: Any
) -> tuple[list[Array], list[Any]]:
    kept = forward_p.bind(*primals, **params)
    # Named here, before the tangent rule reads them: a name put on later would not be the residual's.
    kept = [checkpoint_name(x, name) for x, name in zip(kept, RESIDUALS, strict=True)]
    named = jax.tree.unflatten(params["tree"], tangents)
    moving = [ad.instantiate_zeros(t) for t in (named.q, named.k, named.v)]
    of_bias = named.bias is not None and not isinstance(named.bias, ad.Zero)
    if of_bias:
        moving.append(named.bias)
    out_dot, l_dot = tangent_p.bind(*moving, *primals, *kept, of_bias=of_bias, **params)
    m_dot = ad.Zero(jax.typeof(kept[1]).to_tangent_aval())
    return kept, [out_dot, m_dot, l_dot]


def _transpose_of_tangent(
    cotangents: Sequence[Any], *flat: Any, of_bias: bool, **params: Any
) -> list[Array | None]:
    moving, fixed = flat[: 3 + of_bias], flat[3 + of_bias :]
    given = [ad.instantiate_zeros(ct) for ct in cotangents]
    gradients = cotangent_p.bind(*fixed, *given, of_bias=of_bias, **params)
    asked = [ad.is_undefined_primal(x) for x in moving]
    wanted = [g if ask else None for g, ask in zip(gradients, asked, strict=True)]
    return [*wanted, *[None] * len(fixed)]


def _jvp_of_loops(
    implementation: Callable[..., list[Array]],
    primals: Sequence[Array],
    tangents: Sequence[Any],
    **params: Any,
) -> tuple[list[Array], list[Array]]:
    """The tangent of a blockwise function as JAX derives it, along the arguments that move."""
    moving = [n for n, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def of_moving(*args: Array) -> list[Array]:
        every = list(primals)
        for n, arg in zip(moving, args, strict=True):
            every[n] = arg
        return implementation(*every, **params, every_tile=True)

    return jax.jvp(of_moving, [primals[n] for n in moving], [tangents[n] for n in moving])


ad.primitive_jvps[forward_p] = _jvp_of_forward
ad.primitive_transposes[tangent_p] = _transpose_of_tangent
ad.primitive_jvps[tangent_p] = partial(_jvp_of_loops, _tangent)
ad.primitive_jvps[cotangent_p] = partial(_jvp_of_loops, _cotangent)


# vmap: the new axis is folded into the batch, of which there may be many rows already


def _fold(x: Array, axis: int | None, size: int, batch: int, whole: bool) -> Array:
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


def _vmap(
    primitive: Primitive,
    args: Sequence[Array],
    axes: Sequence[int | None],
    *,
    problem: Problem,
    tree: Any,
    **params: Any,
) -> tuple[list[Array], list[int]]:
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    of_bias = params.get("of_bias", False)
    tangents = 3 + of_bias if primitive is tangent_p else 0
    places = jax.tree.unflatten(tree, range(tree.num_leaves))
    names = [name for name, x in zip(Operands._fields, places, strict=True) if x is not None]
    may_stay = {"mask", "q_lengths", "kv_lengths", "q_offset"} | (set() if of_bias else {"bias"})
    whole = [True] * len(args)
    for n, name in enumerate(names, start=tangents):
        whole[n] = name not in may_stay
    folded = [
        _fold(x, axis, size, problem.batch, w) for x, axis, w in zip(args, axes, whole, strict=True)
    ]
    results = primitive.bind(
        *folded, problem=replace(problem, batch=size * problem.batch), tree=tree, **params
    )
    results = [x.reshape(size, problem.batch, *x.shape[1:]) for x in results]
    if primitive is cotangent_p and of_bias:
        bias = args[names.index("bias")]
        axis = axes[names.index("bias")]
        rows = bias.shape[0] if axis is None else jnp.moveaxis(bias, axis, 0).shape[1]
        if rows == 1:  # the rows of a batch share one bias, so it gets their sum
            results[3] = results[3].sum(axis=1, keepdims=True)
    return results, [0] * len(results)


for _p in (forward_p, tangent_p, cotangent_p):
    batching.primitive_batchers[_p] = partial(_vmap, _p)
