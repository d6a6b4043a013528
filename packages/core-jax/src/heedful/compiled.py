"""Compiled functions that are forgotten when they are no longer used.

JAX keeps what it compiled for as long as the jitted function lives, 2 MiB or more for each new shape: of
ours, which live as long as the process, one more for each token of a growing cache. So each has a jitted
function of its own for every problem, and the least recently used go, their programs with them.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax

KEPT = 128  # of each function: half a gigabyte at the worst, more shapes than a loop goes through

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(static: int, **options: Any) -> Callable[[Function], Function]:
    """Like `jax.jit` of a function whose first arguments are static; the last `KEPT` of them are kept.

    Args:
        static: how many they are. They must say all shapes, lest one jitted function have many programs.
        options: of `jax.jit`.
    """

    def decorate(function: Function) -> Function:
        @functools.lru_cache(KEPT)
        def of(*known: Hashable) -> Callable[..., Any]:
            def run(*arrays: Any) -> Any:
                return function(*known, *arrays)

            run.__name__ = function.__name__  # not all of it: JAX would look for its signature too
            return jax.jit(run, **options)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return of(*args[:static])(*args[static:])

        call.cache_clear = of.cache_clear  # type: ignore[attr-defined]  # as lru_cache's has it
        return call  # type: ignore[return-value]  # of the same arguments

    return decorate
