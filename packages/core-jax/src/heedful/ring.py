"""A sequence that is longer than one device: ring attention (Liu, Zaharia & Abbeel 2023) in `shard_map`.

Each device keeps its share of the queries, and the shares of the keys and values go round: a device
attends to the one that visits and sends it on meanwhile. What rows come to, out, m and l of the flash
core, is merged from visit to visit. The backward pass sends them round once more, and with them their
gradients, which come home complete: m and l of whole rows make each visit's weights anew. So nothing
that visited is kept, and memory grows with a device's share.

Causal attention leaves the first devices idle where shares are contiguous. In zigzag order (Brandon et
al. 2023 stripe tokens to the same end; pairs of chunks are Llama 3's way, §3.3.2) every device holds one
chunk from the front and its mirror image from the back, and all have the same work.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from heedful.call import Call
from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.compiled import compiled
from heedful.flash import flash
from heedful.flash.autodiff import cotangent_p, forward_p
from heedful.flash.forward import Kept, merged, nothing
from heedful.flash.partition import varying_alike
from heedful.flash.scores import numbered
from heedful.flash.tiles import cut
from heedful.rules.softmax import log_sum_exp


def ring_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    axis_name: Hashable,
    zigzag: bool = False,
    causal: bool | Literal["top_left"] = False,
    window: tuple[int | None, int | None] | None = None,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    layout: Literal["bhsd", "bshd"] = "bhsd",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention over a sequence that is cut along a mesh axis; to be called within `jax.shard_map`.

    Each device passes its share of the sequence and gets its share of what `heedful.attention` gives for
    all of it. Computed by the flash core; a device's memory grows with its share. Shares of keys that no
    query of a device sees cost it nothing, and those beyond a window are not even sent, where shares are
    contiguous and there are as many keys as queries.

    Differentiable in q, k and v, through out and lse, in reverse mode and once.

    Args:
        q: JAX's, this device's queries, (B, Hq, Sq, D), or as `heedful.attention` takes them: all
            devices' shares have one size.
        k: this device's keys, (B, Hkv, Sk, D), Hq a multiple of Hkv.
        v: this device's values, (B, Hkv, Sk, Dv).
        axis_name: of the mesh axis along which the sequence is cut.
        zigzag: False: device d holds the d-th share of the sequence. True: it holds chunks d and
            2n − 1 − d of 2n, as `heedful.zigzag` lays them out, and all devices have the same work of
            causal attention.
        causal, window: as in `heedful.attention`, about places in the whole sequence.
        q_segment_ids: (B, Sq) integers, of this device's queries.
        kv_segment_ids: (B, Sk) integers, of this device's keys; they travel with them.
        scale, softcap, layout, return_lse: as in `heedful.attention`.

    Returns:
        out, shaped like q with v's head size, in q's dtype; with `return_lse` also lse (B, Hq, Sq).

    Raises:
        TypeError, ValueError: the call breaks the contract of `heedful.attention`; arrays are not JAX's;
            `axis_name` is not bound; in zigzag order, a share is no two chunks.
    """
    options = {
        "causal": causal,
        "window": window,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "scale": scale,
        "softcap": softcap,
        "layout": layout,
        "return_lse": return_lse,
    }
    call = Call.of(q, k, v, **options)
    problem, operands = call.problem, call.operands
    if problem.framework != "jax":
        raise TypeError(
            "ring_attention talks by JAX's collectives, within jax.shard_map, and takes JAX arrays. "
            f"Got {problem.framework}'s. Pass them to the function that jax.shard_map makes."
        )
    devices = _devices(axis_name)
    if 0 in (problem.batch, problem.q_length, problem.kv_length):
        return call.restore(*flash(problem, operands))
    ring = Ring.of(problem, axis_name, devices, zigzag)
    # What varies from device to device is so from the start, as the number of the device does.
    rank, operands = varying_alike((lax.axis_index(axis_name), operands))
    arrays = operands.given
    keys = {name: arrays.pop(name) for name in KEYS if name in arrays}
    out, m, l = _ring(ring, rank, arrays, keys)
    return call.restore(out.astype(problem.dtype), log_sum_exp(m, l))


def zigzag(x: Array, devices: int, *, axis: int = -2, restore: bool = False) -> Array:
    """Tokens in the order of which a mesh axis cuts the shares for `ring_attention(zigzag=True)`.

    The sequence is cut into 2n chunks for n devices, which follow one another as 0, 2n − 1, 1, 2n − 2 ….

    Args:
        x: a JAX or NumPy array of all tokens: queries, keys, values, segment ids, places for RoPE. Not
            yet cut along an explicit mesh axis, of which JAX moves nothing unasked.
        devices: n, how many the mesh axis has.
        axis: of the sequence: −2 in layout "bhsd", −3 in "bshd", −1 of segment ids and lse.
        restore: from that order back into the sequence's own.

    Raises:
        ValueError: the length is no multiple of 2n.
    """
    length = x.shape[axis]
    if length % (2 * devices):
        raise ValueError(
            f"zigzag cuts a sequence into two chunks for each device, 2n = {2 * devices} of one length. "
            f"Got {length} tokens. Pad them, and give the padding a segment of its own."
        )
    front = np.arange(devices)
    chunks = np.stack([front, 2 * devices - 1 - front], axis=1).ravel()
    tokens = np.arange(length).reshape(2 * devices, -1)[chunks].ravel()
    return x.take(np.argsort(tokens) if restore else tokens, axis=axis)


def _devices(axis_name: Hashable) -> int:
    try:
        return lax.axis_size(axis_name)
    except NameError as unbound:
        raise ValueError(
            f"axis_name must be a mesh axis that jax.shard_map binds. Got {axis_name!r}, which is not "
            "bound here. Call ring_attention in a function that jax.shard_map maps over that axis."
        ) from unbound


KEYS = {"k": 2, "v": 2, "kv_segment_ids": 3}  # what travels, and along which axis its tokens lie


class Ring(NamedTuple):
    """What every device knows of a call. Hashable.

    Attributes:
        problem: of one chunk of queries against one of keys.
        axis_name: of the mesh axis.
        devices: how many there are.
        chunks: how many chunks a device holds: 1, or 2 in zigzag order.
        q_offset: the place of the first of all queries among all keys.
        first: device d begins with the share of device d − first
        steps: and goes on with those before it, so many in all.
    """

    problem: Problem
    axis_name: Hashable
    devices: int
    chunks: int
    q_offset: int
    first: int
    steps: int

    @classmethod
    def of(cls, problem: Problem, axis_name: Hashable, devices: int, zigzag: bool) -> "Ring":
        """The ring of a problem that is said of one device's share."""
        chunks = 2 if zigzag else 1
        q_length, kv_length = problem.q_length, problem.kv_length
        if q_length % chunks or kv_length % chunks:
            raise ValueError(
                "in zigzag order each device holds two chunks of one length. "
                f"Got shares of {q_length} queries and {kv_length} keys. "
                "Pad the sequence to a multiple of 2n, and lay it out by heedful.zigzag."
            )
        assert problem.q_offset is not None  # there are no lengths
        chunk = replace(
            problem,
            q_length=q_length // chunks,
            kv_length=kv_length // chunks,
            q_offset=None if problem.positional else 0,
            q_offset_given=problem.positional,
        )
        first, steps = 0, devices
        if not zigzag and q_length == kv_length:  # else how far a share is away differs by device
            left, right = (
                devices if side is None else -(-side // q_length) for side in problem.band
            )
            if left + right + 1 < devices:
                first, steps = -right, left + right + 1
        offset = devices * problem.q_offset
        return cls(chunk, axis_name, devices, chunks, offset, first, steps)

    def sent(self, x: Any, hops: int) -> Any:
        """What each device gets from the one so many places before it."""
        if hops % self.devices == 0:
            return x
        pairs = [(d, (d + hops) % self.devices) for d in range(self.devices)]
        return lax.ppermute(x, self.axis_name, pairs)

    def chunk(self, rank: Array, n: Array) -> Array:
        """The number, in the sequence, of a device's n-th chunk."""
        return jnp.where(n == 0, rank, 2 * self.devices - 1 - rank)


class Pair(NamedTuple):
    """A chunk of this device's queries and a chunk of the visiting keys.

    Attributes:
        row, column: where they begin in their shares.
        q_offset: the place of the first of these queries among these keys.
    """

    row: Array
    column: Array
    q_offset: Array


def _fold(
    ring: Ring, rank: Array, shift: Array, step: Callable[[Pair, Any], Any], carry: Any
) -> Any:
    """Folds `step` over the pairs of chunks, with the share of device rank − shift, that meet at all."""
    problem = ring.problem
    owner = (rank - shift) % ring.devices

    def one(carry: Any, n: Array) -> tuple[Any, None]:
        mine, theirs = n // ring.chunks, n % ring.chunks
        row = ring.chunk(rank, mine) * problem.q_length + ring.q_offset
        offset = row - ring.chunk(owner, theirs) * problem.kv_length
        pair = Pair(mine * problem.q_length, theirs * problem.kv_length, offset)
        left, right = problem.band
        meets: Any = True
        if left is not None:
            meets &= offset - left < problem.kv_length
        if right is not None:
            meets &= offset + problem.q_length - 1 + right >= 0
        if meets is True:
            return step(pair, carry), None
        return lax.cond(meets, partial(step, pair), lambda carry: carry, carry), None

    if ring.chunks == 1:
        return one(carry, jnp.int32(0))[0]
    return lax.scan(one, carry, jnp.arange(ring.chunks**2, dtype=jnp.int32))[0]


def _cut_queries(ring: Ring, pair: Pair, x: Array) -> Array:
    return cut(x, 2, pair.row, ring.problem.q_length)


def _put(whole: Array, part: Array, begin: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(whole, part, begin, 2)


def _add(whole: Array, part: Array, begin: Array) -> Array:
    part = part.astype(whole.dtype)
    return _put(whole, cut(whole, 2, begin, part.shape[2]) + part, begin)


def _of_pair(
    ring: Ring, pair: Pair, queries: dict[str, Array], keys: dict[str, Array]
) -> tuple[list[Array], dict[str, Any]]:
    """The flash core's arguments for a pair of chunks."""
    problem = ring.problem
    of_queries = {name: _cut_queries(ring, pair, x) for name, x in queries.items()}
    of_keys = {n: cut(x, KEYS[n], pair.column, problem.kv_length) for n, x in keys.items()}
    offset = pair.q_offset[None] if problem.positional else None
    operands = Operands(**of_queries, **of_keys, q_offset=offset)
    leaves, tree = jax.tree.flatten(varying_alike(numbered(problem, operands)))
    return leaves, {"problem": problem, "tree": tree, "tiles": None}


def _forward(ring: Ring, rank: Array, queries: dict[str, Array], keys: dict[str, Array]) -> Kept:
    kept = nothing(ring.problem, queries["q"].shape[:3])

    def step(carry: tuple[Kept, dict[str, Array]], shift: Array) -> tuple[Any, None]:
        kept, visiting = carry
        following = ring.sent(visiting, 1)  # which does not wait for what is computed meanwhile

        def attend(pair: Pair, kept: Kept) -> Kept:
            leaves, params = _of_pair(ring, pair, queries, visiting)
            found = Kept(*forward_p.bind(*leaves, **params))
            before = Kept(*(_cut_queries(ring, pair, x) for x in kept))
            both = merged(before, found)
            return Kept(*(_put(x, y, pair.row) for x, y in zip(kept, both, strict=True)))

        return (_fold(ring, rank, shift, attend, kept), following), None

    start = varying_alike((kept, rank))[0], ring.sent(keys, ring.first)
    return lax.scan(step, start, _shifts(ring))[0][0]


def _shifts(ring: Ring) -> Array:
    return jnp.arange(ring.first, ring.first + ring.steps, dtype=jnp.int32)


def _residuals(
    ring: Ring, rank: Array, queries: dict[str, Array], keys: dict[str, Array]
) -> tuple[Kept, Any]:
    kept = _forward(ring, rank, queries, keys)
    return kept, (rank, queries, keys, kept)


def _backward(ring: Ring, residuals: Any, cotangents: Kept) -> tuple[Any, ...]:
    """The gradients; m is a shift, which changes neither out nor lse, so it has none."""
    rank, queries, keys, kept = residuals
    of_rows = varying_alike(((*kept, cotangents.out, cotangents.l), rank))[0]
    zeros = [
        jnp.zeros(x.shape, ring.problem.accumulator) for x in (queries["q"], keys["k"], keys["v"])
    ]
    dq, *dkv = varying_alike((zeros, rank))[0]

    def step(carry: Any, shift: Array) -> tuple[Any, None]:
        dq, dkv, visiting = carry
        following = ring.sent(visiting, 1)

        def attend(pair: Pair, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            leaves, params = _of_pair(ring, pair, queries, visiting)
            rows = [_cut_queries(ring, pair, x) for x in of_rows]
            found = cotangent_p.bind(*leaves, *rows, moving=("q", "k", "v"), **params)
            begins = pair.row, pair.column, pair.column
            return tuple(map(_add, sums, found, begins))

        dq, *dkv = _fold(ring, rank, shift, attend, (dq, *dkv))
        return (dq, ring.sent(dkv, 1), following), None

    start = dq, dkv, ring.sent(keys, ring.first)
    (dq, dkv, _), _ = lax.scan(step, start, _shifts(ring))
    dk, dv = ring.sent(dkv, -(ring.first + ring.steps))  # home
    found = {"q": dq, "k": dk, "v": dv}
    of_queries, of_keys = (
        {n: found[n].astype(x.dtype) if n in found else None for n, x in arrays.items()}
        for arrays in (queries, keys)
    )
    return None, of_queries, of_keys


_differentiable = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_differentiable.defvjp(_residuals, _backward)


@compiled(static=1)  # a `shard_map` outside of a jit takes no custom derivative
def _ring(ring: Ring, rank: Array, queries: dict[str, Array], keys: dict[str, Array]) -> Kept:
    return _differentiable(ring, rank, queries, keys)
