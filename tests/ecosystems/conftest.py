"""What other people's libraries need that heedful's own tests do without."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    """Flax's and Keras's own code promotes ranks and dtypes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
