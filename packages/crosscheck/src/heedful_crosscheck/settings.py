"""What is set for the process: a backend may set it, and others come after."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np


@dataclass(frozen=True)
class Settings:
    """The folder, whether JAX has float64, what NumPy does about errors, torch's dtype and autograd.

    Attributes:
        torch: its default dtype, and whether it records; None where it is not imported.
    """

    folder: str
    x64: bool
    errors: dict[str, Any]
    torch: tuple[Any, bool] | None

    @classmethod
    def now(cls) -> Self:
        torch = sys.modules.get("torch")
        of_torch = (torch.get_default_dtype(), torch.is_grad_enabled()) if torch else None
        return cls(os.getcwd(), _x64_is_enabled(), dict(np.geterr()), of_torch)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Afterwards all is set as it was."""
        try:
            yield
        finally:
            os.chdir(self.folder)
            if self.torch is not None:
                dtype, recorded = self.torch
                sys.modules["torch"].set_default_dtype(dtype)
                sys.modules["torch"].set_grad_enabled(recorded)
            np.seterr(**self.errors)
            if _x64_is_enabled() != self.x64:
                jax.config.update("jax_enable_x64", self.x64)


def _x64_is_enabled() -> bool:
    return bool(jax.config.read("jax_enable_x64"))
