"""Which blocks of keys a function hides, found once for many calls."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from heedful.call.arrays import Array
from heedful.call.checks import is_integral, shown
from heedful.call.functions import BlockMask, Program, packed, traced
from heedful.compiled import compiled
from heedful.flash.tiles import count, count_up


def block_mask(
    function: Callable[..., Any],
    B: int | None,
    H: int | None,
    Sq: int,
    Sk: int,
    *,
    block_size: int = 128,
) -> BlockMask:
    """A function that says which keys are seen, and beforehand of which blocks it hides all or nothing.

    By it `jax:flash` leaves out tiles of which it hides all, and asks nothing of those of which it hides
    nothing. What the function closes over is part of it, as it is now. Takes what FlexAttention's
    `create_block_mask` takes, but for the device.

    Args:
        function: (b, h, q_idx, kv_idx) → boolean, in JAX.
        B, H: how many batch rows and query heads it tells apart; None or 1: none.
        Sq, Sk: the lengths of the calls that it is for.
        block_size: queries and keys of a block.

    Returns:
        the mask, a pytree; its blocks are (B, H, ⌈Sq/block_size⌉, ⌈Sk/block_size⌉) bytes.

    Raises:
        TypeError, ValueError: the function cannot be traced, or a size is none.
    """
    sizes = {"B": 1 if B is None else B, "H": 1 if H is None else H, "Sq": Sq, "Sk": Sk}
    for name, x in {**sizes, "block_size": block_size}.items():
        if not (is_integral(x) and x > 0):
            raise ValueError(f"{name} must be an integer of at least 1. Got {shown(x)}.")
    program, closed = traced("function", function, None, "jax")
    words = packed([program], closed, "jax").get("words")
    blocks = _blocks(
        program, (int(sizes["B"]), int(sizes["H"]), int(Sq), int(Sk)), int(block_size), words
    )
    return BlockMask(blocks, closed, program, int(block_size), (int(Sq), int(Sk)))


@compiled(static=3)
def _blocks(
    program: Program, sizes: tuple[int, int, int, int], block: int, words: Array | None
) -> Array:
    batch, heads, q_length, kv_length = sizes
    rows, columns = count(q_length, block), count(kv_length, block)
    j = count_up(columns * block)[None, None, None]

    def of_row(n: Array) -> Array:
        """One row of blocks, of one batch row and head; what lies beyond the ends says nothing."""
        b, h, row = n // (heads * rows), n // rows % heads, n % rows
        b, h, row = (x[None, None, None, None] for x in (b, h, row))
        i = row * block + count_up(block)[None, None, :, None]
        see = program(
            None, words, b, h, jnp.minimum(i, q_length - 1), jnp.minimum(j, kv_length - 1)
        )
        beyond = (i >= q_length) | (j >= kv_length)
        some, every = ((see & ~beyond), (see | beyond))
        some, every = (x.reshape(block, columns, block) for x in (some, every))
        return some.any((0, 2)).astype(jnp.int8) + every.all((0, 2)).astype(jnp.int8)

    found = jax.lax.map(of_row, count_up(batch * heads * rows))
    return found.reshape(batch, heads, rows, columns)
