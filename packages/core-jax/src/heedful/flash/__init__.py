"""The flash core: exact attention, tile by tile, in plain JAX. It knows nothing of backends.

    tiles.py       how the score matrix is cut, and which tiles are visited
    scores.py      one tile: its place, its scores, and the products that make and use it
    forward.py     Algorithms 1 and 2 of Dao et al. 2022: out, and m and l of each row
    tangent.py     its tangent, by what the forward pass kept
    cotangent.py   Algorithm 4: the transpose of the tangent
    sums.py        sums over tiles: what tangent and cotangent are, and all derivatives of theirs
    autodiff.py    the three as JAX primitives, whose rules give every order of derivative, and `vmap`
    primitive.py   what primitives have in common
    partition.py   how they are lowered, and spread over devices

What scores are and who sees whom is said once for everybody, in `heedful.rules`. Begin with `forward`;
the others are the same loop over the same tiles.
"""

from heedful.flash.autodiff import flash

__all__ = ["flash"]
