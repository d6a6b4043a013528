"""How arrays lie in memory: a copy by each name has the same numbers, with other strides."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from heedful.call.arrays import broadcast_to


class Layout(NamedTuple):
    """A layout in memory.

    Attributes:
        store: from an array to the one that is made, all of whose memory is its own.
        view: from that one, of any framework, back to the numbers of the first.
    """

    store: Callable[[np.ndarray], np.ndarray]
    view: Callable[[Any], Any]

    def of(self, x: np.ndarray, make: Callable[[np.ndarray], Any]) -> Any:
        """An array like x, of the framework that `make` copies NumPy's arrays to, laid out so."""
        if x.ndim < 2 or not x.size:
            return make(x)
        if 0 in x.strides:  # axes that were expanded stay so
            once = tuple(slice(1) if step == 0 else slice(None) for step in x.strides)
            return broadcast_to(make(x[once]), x.shape)
        return self.view(make(self.store(x)))


def _itself(x: Any) -> Any:
    return x


def _transposed(x: Any) -> Any:
    """Heads and positions, or the two last axes, in the other order."""
    return x.swapaxes(0, -2) if len(x.shape) < 3 else x.swapaxes(-3, -2)


def _cut_from(x: np.ndarray) -> np.ndarray:
    """x as the end of a larger array, whose rest is NaN, or True."""
    shape = (*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5)
    larger = np.full(shape, True if x.dtype.kind in "biu" else np.nan, x.dtype)
    larger[..., 3:, 5:] = x
    return larger


LAYOUTS = {
    "packed": Layout(_itself, _itself),
    "transposed": Layout(_transposed, _transposed),
    "columns": Layout(lambda x: x.swapaxes(-2, -1), lambda x: x.swapaxes(-2, -1)),
    "strided": Layout(lambda x: np.repeat(x, 2, axis=-1), lambda x: x[..., ::2]),
    "sliced": Layout(_cut_from, lambda x: x[..., 3:, 5:]),
    "expanded": Layout(_itself, _itself),
}
