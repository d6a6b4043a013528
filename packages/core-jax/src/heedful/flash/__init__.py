"""The flash core: exact attention, tile by tile, in plain JAX."""

from heedful.flash.autodiff import flash

__all__ = ["flash"]
