"""The three blockwise functions as three JAX primitives, and the rules that tie them together.

    forward     operands → out, m, l                        its tangent is `tangent`
    tangent     linear in the operands' tangents            its transpose is `cotangent`
    cotangent   cotangents of out and l → the operands' gradients

With these, JAX derives the rest: reverse mode that saves the operands, out, m and l, forward mode,
and their compositions of any order. m is a shift, which changes neither out nor lse = m + log l: it
stands still in every derivative. From the second order on the derivatives are those of tangent and
cotangent as sums over tiles (see `sums.py`), which are such sums again, so their memory is linear too.

`custom_vjp` would give up forward mode, and `custom_jvp` alone would transpose every slice of every
tile into an update of a whole gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.compiled import compiled
from heedful.flash.cotangent import cotangent, cotangent_as_sums
from heedful.flash.forward import Kept, forward
from heedful.flash.partition import varying_alike
from heedful.flash.primitive import fold, like, primitive
from heedful.flash.scores import numbered
from heedful.flash.tangent import tangent, tangent_as_sums
from heedful.flash.tiles import Tiles
from heedful.rules.softmax import FEATURES as BEYOND_THE_KEYS
from heedful.rules.softmax import beyond_the_keys, log_sum_exp

# Names for `jax.checkpoint` policies such as `save_only_these_names(*RESIDUALS)`: with all saved, the
# backward pass does not run the forward pass again. For each query they take Dv + 2 numbers of the
# accumulator's dtype: out is saved as it was before it was rounded to the problem's dtype.
RESIDUALS = tuple(f"heedful_{name}" for name in Kept._fields)


def flash(problem: Problem, operands: Operands, tiles: Tiles | None = None) -> tuple[Array, Array]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq), differentiable in all of `operands.differentiable`.

    Without `tiles`, `tile_sizes` chooses them.
    """
    if 0 in (problem.batch, problem.q_length, problem.kv_length):
        rows = (problem.batch, problem.q_heads, problem.q_length)
        shapes = (*rows, problem.value_dim), rows, rows
        kept = Kept(*(jnp.zeros(shape, problem.accumulator) for shape in shapes))
    else:
        of_keys = operands._replace(**dict.fromkeys(BEYOND_THE_KEYS))
        leaves, tree = jax.tree.flatten(varying_alike(numbered(problem, of_keys)))
        kept = Kept(*forward_p.bind(*leaves, problem=problem, tree=tree, tiles=tiles))
    return _results(problem.dtype, kept.out.shape, *beyond_the_keys(operands, *kept))


@compiled(static=2, inline=True)  # outside of a trace one call, not one each
def _results(
    dtype: str, _shape: tuple[int, ...], out: Array, m: Array, l: Array
) -> tuple[Array, Array]:
    """out and lse as the contract has them."""
    return out.astype(dtype), log_sum_exp(m, l)


# The primitives' arguments are flat: the leaves of `Numbered`, which `tree` puts together again; then
# what forward kept; then cotangents. Tangents, of the operands that `moving` names, stand before these.


def _forward(*leaves: Array, tree: Any, **options: Any) -> list[Array]:
    return list(forward(given=jax.tree.unflatten(tree, leaves), **options))


def _tangent(
    function: Callable[..., tuple[Array, Array]],
    *flat: Array,
    tree: Any,
    moving: tuple[str, ...],
    **options: Any,
) -> list[Array]:
    tangents, (*leaves, out, m, l) = flat[: len(moving)], flat[len(moving) :]
    return list(
        function(
            given=jax.tree.unflatten(tree, leaves),
            kept=Kept(out, m, l),
            tangents=Operands(**dict(zip(moving, tangents, strict=True))),
            **options,
        )
    )


def _cotangent(
    function: Callable[..., Operands],
    *flat: Array,
    tree: Any,
    moving: tuple[str, ...],
    **options: Any,
) -> list[Array]:
    *leaves, out, m, l, d_out, d_l = flat
    found = function(
        given=jax.tree.unflatten(tree, leaves),
        kept=Kept(out, m, l),
        out_cotangent=d_out,
        l_cotangent=d_l,
        wanted=moving,
        **options,
    )
    return [getattr(found, name) for name in moving]


# What they return


def _kept(*avals: Any, problem: Problem, **_: Any) -> list[Any]:
    rows = (problem.batch, problem.q_heads, problem.q_length)
    shapes = (*rows, problem.value_dim), rows, rows
    return [like(avals[0], shape, problem.accumulator) for shape in shapes]


def _out_and_l(*avals: Any, **params: Any) -> list[Any]:
    out, _, l = _kept(*avals, **params)
    return [out, l]


def _gradients(*avals: Any, tree: Any, moving: tuple[str, ...], **_: Any) -> list[Any]:
    operands = jax.tree.unflatten(tree, avals[: tree.num_leaves]).operands
    return [like(x, x.shape, x.dtype) for x in (getattr(operands, name) for name in moving)]


PARAMS = ("problem", "tree", "tiles")
forward_p = primitive("heedful_forward", _forward, _kept, *PARAMS)
tangent_p = primitive("heedful_tangent", partial(_tangent, tangent), _out_and_l, *PARAMS, "moving")
cotangent_p = primitive(
    "heedful_cotangent", partial(_cotangent, cotangent), _gradients, *PARAMS, "moving"
)


# Differentiation


def _jvp_of_forward(
    primals: Sequence[Array], tangents: Sequence[Any], **params: Any
) -> tuple[list[Array], list[Any]]:
    kept = forward_p.bind(*primals, **params)
    # Named here, before the tangent rule reads them: a name put on later would not be the residual's.
    kept = [checkpoint_name(x, name) for x, name in zip(kept, RESIDUALS, strict=True)]
    named = jax.tree.unflatten(params["tree"], tangents).operands.differentiable
    # q, k and v always, so that few programs are compiled; the others where they move.
    moving = {n: t for n, t in named.items() if n in "qkv" or not isinstance(t, ad.Zero)}
    along = map(ad.instantiate_zeros, moving.values())
    out_dot, l_dot = tangent_p.bind(*along, *primals, *kept, moving=tuple(moving), **params)
    m_dot = ad.Zero(jax.typeof(kept[1]).to_tangent_aval())
    return kept, [out_dot, m_dot, l_dot]


def _transpose_of_tangent(
    cotangents: Sequence[Any], *flat: Any, moving: tuple[str, ...], **params: Any
) -> list[Array | None]:
    tangents, fixed = flat[: len(moving)], flat[len(moving) :]
    given = [ad.instantiate_zeros(ct) for ct in cotangents]
    gradients = cotangent_p.bind(*fixed, *given, moving=moving, **params)
    asked = [ad.is_undefined_primal(x) for x in tangents]
    wanted = [g if ask else None for g, ask in zip(gradients, asked, strict=True)]
    return [*wanted, *[None] * len(fixed)]


def _jvp_of_sums(
    implementation: Callable[..., list[Array]],
    primals: Sequence[Array],
    tangents: Sequence[Any],
    **params: Any,
) -> tuple[list[Array], list[Array]]:
    """The tangent of a blockwise function that is a sum over tiles, along the arguments that move."""
    moving = [n for n, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def of_moving(*args: Array) -> list[Array]:
        every = list(primals)
        for n, arg in zip(moving, args, strict=True):
            every[n] = arg
        return implementation(*every, **params)

    return jax.jvp(of_moving, [primals[n] for n in moving], [tangents[n] for n in moving])


ad.primitive_jvps[forward_p] = _jvp_of_forward
ad.primitive_transposes[tangent_p] = _transpose_of_tangent
ad.primitive_jvps[tangent_p] = partial(_jvp_of_sums, partial(_tangent, tangent_as_sums))
ad.primitive_jvps[cotangent_p] = partial(_jvp_of_sums, partial(_cotangent, cotangent_as_sums))


# vmap: the new axis is folded into the batch, of which there may be many rows already


def _vmap(
    of: Primitive,
    args: Sequence[Array],
    axes: Sequence[int | None],
    *,
    problem: Problem,
    tree: Any,
    **params: Any,
) -> tuple[list[Array], list[int]]:
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    moving = params.get("moving", ())
    tangents = len(moving) if of is tangent_p else 0
    places = jax.tree.unflatten(tree, range(tangents, tangents + tree.num_leaves))
    # What is not differentiated may be shared by all of the new axis; its gradient could not.
    whole = [True] * len(args)
    for n in jax.tree.leaves(places):
        whole[n] = n in (getattr(places.operands, name) for name in ("q", "k", "v", *moving))
    folded = [
        fold(x, axis, size, problem.batch, w) for x, axis, w in zip(args, axes, whole, strict=True)
    ]
    results = of.bind(
        *folded, problem=replace(problem, batch=size * problem.batch), tree=tree, **params
    )
    results = [x.reshape(size, problem.batch, *x.shape[1:]) for x in results]
    if of is cotangent_p:
        for n, name in enumerate(moving):
            at = getattr(places.operands, name)
            rows = args[at].shape[0] if axes[at] is None else _rows(args[at], axes[at])
            if rows < problem.batch:  # the rows of a batch share one, so it gets their sum
                results[n] = results[n].sum(axis=1, keepdims=True)
    return results, [0] * len(results)


def _rows(x: Array, mapped: int) -> int:
    """The batch rows of an array that has one more axis."""
    return x.shape[0 if mapped else 1]


for _p in (forward_p, tangent_p, cotangent_p):
    batching.primitive_batchers[_p] = partial(_vmap, _p)
