"""What other people's libraries need that heedful's own tests do without."""

import warnings
from collections.abc import Iterator

import jax
import pytest

with warnings.catch_warnings(
    action="ignore"
):  # of other people's, where a newer JAX or NumPy warns them
    import flax.linen
    import flax.nnx  # noqa: F401  # for that alone


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    """Flax's and Keras's own code promotes ranks and dtypes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
