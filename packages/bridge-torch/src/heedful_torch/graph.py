"""A JAX function as one operation of torch's graphs, those of `torch.compile` and `make_fx`.

A graph holds torch's operations, and of Python nothing but what it made of them when it was recorded.
A JAX function stands there as `heedful::jax(program, tensors)`. The program is a number: graphs hold
numbers and tensors, and no functions. To tensors without data it answers with tensors without data,
whose shapes JAX says; so it is recorded, and traced further, without being computed. It has no
derivatives of its own: `heedful_torch.autograd` makes them, as such operations again.

The numbers are those of this process. In a graph that is saved and read elsewhere they would mean
nothing: `torch.export` is refused.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import jax
import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from heedful.call.arrays import dtype_of
from heedful.compiled import KEPT, compiled
from heedful_torch.dlpack import NARROWED, adopt, is_narrowed, x64_is_enabled
from heedful_torch.function import has_no_data, is_written_down

Program = Callable[..., Sequence[jax.Array]]  # hashable: equal ones compile once
Take = Callable[[Tensor], jax.Array]


class Held(NamedTuple):
    """What a number stands for."""

    program: Program
    take: Take
    x64: bool


_held: list[Held] = []
_numbers: dict[Held, int] = {}
_one_at_a_time = Lock()


def is_recorded(tensors: Sequence[Any]) -> bool:
    """Whether what happens to some tensors is written down, or asked for its shapes alone."""
    return _are_written_down(tensors) or any(
        isinstance(x, Tensor) and has_no_data(x) for x in tensors
    )


def _are_written_down(tensors: Sequence[Any]) -> bool:
    return is_written_down() or any(isinstance(x, FunctionalTensor) for x in tensors)


def in_graph(program: Program, take: Take, *tensors: Tensor) -> tuple[Tensor, ...]:
    """program(*map(take, tensors)) as an operation, fresh tensors; computed when the graph is."""
    known = Held(program, take, x64_is_enabled())
    if not _are_written_down(
        tensors
    ):  # asked for shapes alone, by a graph that is still to be made
        return tuple(_without_data(known, tensors))
    with _one_at_a_time:
        if known not in _numbers:
            _held.append(known)
            _numbers[known] = len(_held) - 1
    return tuple(torch.ops.heedful.jax(_numbers[known], list(tensors)))


def held(number: int) -> Held:
    """What an operation of a graph stands for."""
    return _held[number]


def shapes_of_results(program: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    """What JAX says that a program returns, by `jax.eval_shape`: for equal shapes the same object."""
    return _shapes_of_results(program, tuple(map(_shape, tensors)), x64_is_enabled())


@lru_cache(KEPT)
def _shapes_of_results(
    program: Callable[..., Any], shapes: tuple[jax.ShapeDtypeStruct, ...], x64: bool
) -> Any:
    return jax.eval_shape(program, *shapes)


def refuse_export(what: Any) -> None:
    """Raises NotImplementedError where torch writes down a program that is to be read elsewhere."""
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        what = getattr(what, "__name__", what)
        raise NotImplementedError(
            f"torch is exporting a program, which cannot hold {what}: it is a function of this process. "
            "Write it in torch there; of attention, torch:sdpa-flash and torch:sdpa-math are."
        )


@torch.library.custom_op(
    "heedful::jax", mutates_args=(), schema="(int program, Tensor[] tensors) -> Tensor[]"
)
def _jax(program: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    known = held(program)
    with jax.enable_x64(known.x64):
        return [*map(adopt, _run(known.program, *map(known.take, tensors)))]


@_jax.register_fake
def _jax_without_data(program: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    return _without_data(held(program), tensors)


def _without_data(known: Held, tensors: Sequence[Tensor]) -> list[Tensor]:
    with jax.enable_x64(known.x64):
        results = shapes_of_results(known.program, tensors)
    return [tensors[0].new_empty(x.shape, dtype=getattr(torch, x.dtype.name)) for x in results]


@compiled(static=1)
def _run(program: Program, *arrays: jax.Array) -> Sequence[jax.Array]:
    return program(*arrays)


def _shape(tensor: Tensor) -> jax.ShapeDtypeStruct:
    dtype = dtype_of(tensor)
    if is_narrowed(dtype):
        raise TypeError(f"jax_in_torch: expected a dtype that JAX has here. Got {dtype} {NARROWED}")
    return jax.ShapeDtypeStruct(tuple(map(int, tensor.shape)), dtype)
