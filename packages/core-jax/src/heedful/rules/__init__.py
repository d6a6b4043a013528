"""The contract's arithmetic, each rule once: for the whole score matrix, a tile of it, or a row.

    dropout.py      which weights are kept
    place.py        which batch rows, heads, queries and keys a tile is
    scores.py       from products to scores
    softmax.py      what its denominator holds beyond the keys
    visibility.py   which keys a query sees

Whoever computes by these rules takes every feature they are about, one that is added to them too:
`jax:plain` and `jax:flash`. The judge's yardstick makes scores by them; the oracle says all of it once
more, and shares no line.
"""

from heedful.rules import dropout, scores, softmax, visibility

FEATURES = dropout.FEATURES | scores.FEATURES | softmax.FEATURES | visibility.FEATURES
