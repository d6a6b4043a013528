"""Any function and any pytree across frameworks: `as_torch` and `as_jax`, twins.

They stand on `jax_in_torch` and `torch_in_jax` of `heedful_torch.autograd`, which know derivatives and
compilation but only flat arrays. What is here, and nowhere else, is how a call is taken apart into
arrays and the rest, and put together again. For both twins alike:

==================  ================================================================================
containers          JAX's pytrees: tuples, lists, dicts, None, named tuples, registered classes
arrays              cross, and carry gradients where they are floating
every other leaf    is static: handed to the function as it is, and compiled by; so it must be hashable.
                    Numbers are told apart by type and digits: 1, 1.0 and True are three, also in
                    the fields of a frozen dataclass, in a frozenset, and in a tuple in one of these
results             the same, of whose other leaves numbers and strings alone are let through
==================  ================================================================================

One function, compared by ``==`` and ``hash``, compiles once for each structure, set of static leaves,
shapes and dtypes. The last 128 of these are kept, with all that their functions close over. Functions,
and what structures carry themselves (the keys of a dict, static fields of a registered class), are told
apart by ``==`` alone, as by `jax.jit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from heedful.call.arrays import dtype_of
from heedful.compiled import KEPT
from heedful_torch.autograd import jax_in_torch, torch_in_jax
from heedful_torch.dlpack import (
    EXCHANGED,
    is_narrowed,
    platform_of,
    to_jax,
    x64_is_enabled,
)
from heedful_torch.function import outside_compilation

__all__ = ["as_jax", "as_torch"]

Function = Callable[..., Any]
NOT_TORCH = (jax.Array, np.ndarray)
IN_JAX = (*NOT_TORCH, np.generic)  # what JAX takes for an array
NUMBERS = (int, float, complex, np.generic)  # and bool, which is an int


# ---------------------------------------------------------------------------------------------------
# JAX in torch


def as_torch(function: Function, *, copy: bool | None = False) -> Function:
    """A torch function that runs a JAX function of any pytrees, differentiable to any order.

        def loss(parameters, x, *, power=2): ...                # of JAX arrays

        value = heedful_torch.as_torch(loss)(parameters, x, power=4)  # of torch tensors
        value.backward()

    ``function`` is compiled by `jax.jit`. It takes positional and keyword arguments; the result takes
    the same ones with torch tensors for arrays, and returns what ``function`` returns, with ordinary
    tensors in fresh memory. The top of this module says what is static: a number that changes at every
    call compiles at every call, and should be a tensor. Call `as_torch` once and keep the result, or
    hand it equal functions: a new lambda is a new function.

    Reverse and forward mode, torch.func, torch.utils.checkpoint, tensors without data, ``copy`` and
    what is refused are those of `heedful_torch.autograd.jax_in_torch`: so `torch.compile` breaks its
    graph here, and with fullgraph=True raises, while `make_fx` holds the call.

    Raises TypeError for a function or static leaf that has no hash, for arrays of another framework,
    and what `to_jax` raises.
    """
    _refuse_unhashable_function("as_torch", function)

    @outside_compilation
    def in_torch(*args: Any, **kwargs: Any) -> Any:
        given, tensors = _split("as_torch", (args, kwargs), torch.Tensor, NOT_TORCH)
        call = _Call(function, given)
        results = jax_in_torch(_JaxCall(call), copy=copy)(*tensors)
        return _results_of_jax(call, x64_is_enabled()).filled(results)

    return functools.update_wrapper(in_torch, function, updated=())


@dataclass(frozen=True)
class _JaxCall:
    """A call as a function of its arrays, with a tuple of arrays."""

    call: _Call

    @property
    def __name__(self) -> str:  # in errors
        return self.call.name

    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(self.split(arrays)[1])

    def split(self, arrays: Iterable[jax.Array]) -> tuple[_Tree, list[jax.Array]]:
        tree, found = _split_results("as_torch", self.call, self.call(arrays), IN_JAX)
        # A tracer as it is: that a residual is an input is known by the object.
        return tree, [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in found]


@functools.lru_cache(KEPT)
def _results_of_jax(call: _Call, _x64: bool) -> _Tree:
    """What the function returns, without its arrays. One more tracing, and no compilation."""
    trees = []

    def look(*arrays: jax.Array) -> None:
        trees.append(_JaxCall(call).split(arrays)[0])

    jax.eval_shape(look, *call.given.shapes)
    return trees[-1]


# ---------------------------------------------------------------------------------------------------
# torch in JAX


@overload
def as_jax(  # type: ignore[overload-overlap]  # a module is callable too, and the first fit counts
    function: torch.nn.Module, *, result_shapes: Any = None, vmap_method: str = "sequential"
) -> tuple[Function, dict[str, jax.Array]]: ...
@overload
def as_jax(
    function: Function, *, result_shapes: Any = None, vmap_method: str = "sequential"
) -> Function: ...
def as_jax(
    function: Function, *, result_shapes: Any = None, vmap_method: str = "sequential"
) -> Function | tuple[Function, dict[str, jax.Array]]:
    """A JAX function that runs a torch function of any pytrees: under jit, grad, vmap, scan, checkpoint.

        def loss(parameters, x, *, power=2): ...                # of torch tensors

        gradient = jax.grad(heedful_torch.as_jax(loss))(parameters, x, power=4)  # of JAX arrays

        apply, parameters = heedful_torch.as_jax(torch.nn.Linear(4, 2))
        gradient = jax.grad(lambda parameters: apply(parameters, x).sum())(parameters)

    ``function`` runs as it is, on XLA's own buffers: JAX compiles the call, and nothing of torch. It
    must not write into its arguments, keep them, or call JAX. NumPy's arrays and scalars count as JAX's.

    Of a torch.nn.Module there are two results: a function whose first argument is the parameters, and
    these, a dict by the names of ``named_parameters()``. They are over the module's own memory: do not
    train the module meanwhile, or copy them (``jax.tree.map(jax.numpy.copy, parameters)``). Buffers stay
    the module's, as constants; a module that writes into one, as BatchNorm does while it trains, is
    refused: call ``module.eval()``. So is, where it is differentiated, one that recomputes its
    activations (torch.utils.checkpoint): `jax.checkpoint` does that here.

    ``result_shapes`` is the result with a `jax.ShapeDtypeStruct` for each array, or a function that
    makes it from the arguments, with the same in place of theirs. Where it is None, ``function`` is run
    once for each structure and shapes on torch's fake tensors, which have no data. That cannot work
    where the shape of a result, or the way to it, depends on what the arrays hold (``.item()``,
    ``if x.sum() > 0``, ``nonzero``), nor through ``.numpy()`` or foreign kernels: then it raises, and
    says that ``result_shapes`` is what is missing.

    ``vmap_method``, derivatives (reverse mode, any order), and what is refused within the call and how
    it comes out are those of `heedful_torch.autograd.torch_in_jax`.

    Raises TypeError for a function or static leaf that has no hash, for torch tensors, and for results
    that JAX cannot hold.
    """
    if isinstance(function, torch.nn.Module):
        parameters = {
            name: to_jax(tensor, copy=None) for name, tensor in function.named_parameters()
        }
        return _in_jax(_OfParameters(function), result_shapes, vmap_method), parameters
    return _in_jax(function, result_shapes, vmap_method)


def _in_jax(function: Function, result_shapes: Any, vmap_method: str) -> Function:
    _refuse_unhashable_function("as_jax", function)

    def in_jax(*args: Any, **kwargs: Any) -> Any:
        given, found = _split("as_jax", (args, kwargs), IN_JAX, torch.Tensor)
        arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in found]
        given = given.of(arrays)  # JAX has its own idea of the dtype of a NumPy array
        _refuse_without_counterpart("arguments that torch can hold", given)
        call = _Call(function, given)
        if result_shapes is None:
            results = _results_of_torch(call, _device_of(arrays), x64_is_enabled())
        else:
            results = _promised(call, result_shapes)
        in_torch = _AsPromised(call, results.without_shapes)
        return results.filled(
            torch_in_jax(in_torch, results.shapes, vmap_method=vmap_method)(*arrays)
        )

    return functools.update_wrapper(in_jax, function, updated=())


@dataclass(frozen=True)
class _AsPromised:
    """A call as a function of its arrays, with a tuple of tensors, put together as was promised."""

    call: _Call
    promised: _Tree

    @property
    def __name__(self) -> str:  # in errors
        return self.call.name

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tree, found = _split_results("as_jax", self.call, self.call(tensors), torch.Tensor)
        if tree.without_shapes != self.promised:
            raise TypeError(
                f"as_jax: expected {self.call.name} to return {self.promised}, as result_shapes or its "
                f"run without data promises. Got {tree.without_shapes}."
            )
        return tuple(found)


@dataclass(frozen=True)
class _OfParameters:
    """A module as a function of its parameters and its arguments."""

    module: torch.nn.Module

    @property
    def __name__(self) -> str:  # in errors
        return type(self.module).__name__

    def __call__(self, parameters: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        names = {name for name, _ in self.module.named_parameters()}
        if not isinstance(parameters, dict) or parameters.keys() != names:
            got = sorted(parameters) if isinstance(parameters, dict) else type(parameters).__name__
            raise TypeError(
                "as_jax: expected the module's parameters as the first argument, a dict of "
                f"{sorted(names)}. Got {got}. Call apply(parameters, ...) with the dict that as_jax "
                "returned, or one like it."
            )
        buffers = {name: buffer.detach() for name, buffer in self.module.named_buffers()}
        before = {name: buffer._version for name, buffer in buffers.items()}
        # What is recomputed in the backward pass would find the module's own parameters put back.
        keeping: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if torch.is_grad_enabled():
            keeping = torch.autograd.graph.disable_saved_tensors_hooks(
                f"as_jax: expected a module that keeps its activations. Got {self.__name__}, which "
                "recomputes them (torch.utils.checkpoint), by other parameters than it was given. "
                "Switch that off, and let JAX recompute: jax.checkpoint(apply)."
            )
        with _swapping, keeping:
            result = torch.func.functional_call(self.module, parameters | buffers, args, kwargs)
        written = [name for name, buffer in buffers.items() if buffer._version != before[name]]
        if written:
            raise RuntimeError(
                f"as_jax: expected a module that only reads its buffers. Got {self.__name__}, which "
                f"writes into {written}, and JAX may run it any number of times. Call module.eval()."
            )
        return result


# functional_call puts parameters into the module and takes them out again, and XLA has many threads.
_swapping = threading.RLock()


@functools.lru_cache(KEPT)
def _results_of_torch(call: _Call, device: str, _x64: bool) -> _Tree:
    """What the function returns, without its arrays, by running it on tensors without data."""
    mend = (
        f"{call.name} was run on tensors without data, to find the shapes of its results. If it needs "
        "data, say them: as_jax(function, result_shapes=jax.ShapeDtypeStruct(shape, dtype)), or a "
        "pytree of these."
    )
    try:
        # In torch_in_jax's own modes. What a function closes over is real, and made a fake of.
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        alone = torch.autocast(device, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), alone, fake:
            fakes = [
                torch.empty(x.shape, dtype=getattr(torch, str(x.dtype)), device=device)
                for x in call.given.shapes
            ]
            returned = call(fakes)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise TypeError(
            "as_jax: expected a function whose results have shapes that follow from the shapes of its "
            f"arguments. Got one whose {error.func} needs their data. {mend}"
        ) from error
    except Exception as error:  # whatever the function raises, on tensors that it may not expect
        error.add_note(f"as_jax: {mend}")
        raise
    tree, _ = _split_results("as_jax", call, returned, torch.Tensor)
    _refuse_without_counterpart(f"results of {call.name} that JAX can hold", tree)
    return tree


def _promised(call: _Call, result_shapes: Any) -> _Tree:
    if callable(result_shapes):
        args, kwargs = call.given.filled(call.given.shapes)
        result_shapes = result_shapes(*args, **kwargs)
    leaves, structure = jax.tree.flatten(result_shapes)
    for leaf in leaves:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                "as_jax: expected result_shapes to be a jax.ShapeDtypeStruct, a pytree of them, or a "
                f"function that makes one from the arguments. Got {type(leaf).__name__} in it. "
                "jax.ShapeDtypeStruct(x.shape, x.dtype) is that of an array x."
            )
    return _Tree(structure, tuple(map(_place, leaves)))


def _refuse_without_counterpart(expected: str, tree: _Tree) -> None:
    for leaf in tree.leaves:
        if not isinstance(leaf, _Array):
            continue
        narrowed = is_narrowed(leaf.dtype)
        if narrowed or leaf.dtype not in EXCHANGED:
            off = " while JAX's x64 mode is off" if narrowed else ""
            raise TypeError(f"as_jax: expected {expected}. Got {leaf}{off}. Cast it.")


def _device_of(arrays: Sequence[jax.Array]) -> str:
    """Where torch will be handed the arrays: where one lies, or else where JAX computes by default."""
    lying = (platform_of(x) for x in arrays if not isinstance(x, jax.core.Tracer))
    default = jax.config.jax_default_device  # type: ignore[attr-defined]  # untyped config
    computing = getattr(default, "platform", default) or jax.default_backend()
    return "cuda" if next(lying, computing) in ("gpu", "cuda") else "cpu"


# ---------------------------------------------------------------------------------------------------
# both


@dataclass(frozen=True)
class _Array:
    """An array's place in a tree."""

    shape: tuple[int, ...] | None
    dtype: str

    def __repr__(self) -> str:
        return "array" if self.shape is None else f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class _Static:
    """A leaf that is no array: equal ones are compiled once, so it is told apart by more than ``==``."""

    value: Any = field(compare=False)
    key: tuple[Any, ...]

    @classmethod
    def of(cls, value: Any) -> _Static:
        return cls(value, _key(value))

    def __repr__(self) -> str:
        return repr(self.value)


def _key(value: Any) -> tuple[Any, ...]:
    """What tells a value apart: its type and the digits of its numbers, and otherwise ``==``."""
    if isinstance(value, NUMBERS):
        return type(value), repr(value)  # 1 == True, 0.0 == -0.0, and NaN is not NaN
    if isinstance(value, tuple):
        return type(value), tuple(map(_key, value))
    if isinstance(value, frozenset):
        return type(value), frozenset(map(_key, value))
    own: Any = type(value).__eq__  # that of object is by identity
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and own is not object.__eq__:
        compared = (getattr(value, f.name) for f in dataclasses.fields(value) if f.compare)
        # A class with a hash of its own may have fields that have none.
        return type(value), value, tuple(_key(x) if _has_hash(x) else None for x in compared)
    return type(value), value


def _has_hash(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class _Tree:
    """A pytree without its arrays, which is hashable."""

    structure: Any
    leaves: tuple[_Array | _Static, ...]

    @functools.cached_property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for leaf in self.leaves
            if isinstance(leaf, _Array)
        )

    @functools.cached_property
    def without_shapes(self) -> _Tree:
        anywhere = _Array(None, "")
        leaves = (anywhere if isinstance(leaf, _Array) else leaf for leaf in self.leaves)
        return _Tree(self.structure, tuple(leaves))

    def of(self, arrays: Iterable[Any]) -> _Tree:
        """The same, of other arrays in their places."""
        each = iter(arrays)
        leaves = (_place(next(each)) if isinstance(x, _Array) else x for x in self.leaves)
        return _Tree(self.structure, tuple(leaves))

    def filled(self, arrays: Iterable[Any]) -> Any:
        each = iter(arrays)
        return jax.tree.unflatten(
            self.structure,
            [next(each) if isinstance(leaf, _Array) else leaf.value for leaf in self.leaves],
        )

    def __str__(self) -> str:
        return str(jax.tree.unflatten(self.structure, self.leaves))


@dataclass(frozen=True)
class _Call:
    """A function, and what it is called with but for the values of arrays: what is compiled once."""

    function: Function
    given: _Tree  # the pair of positional and keyword arguments

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))

    def __call__(self, arrays: Iterable[Any]) -> Any:
        args, kwargs = self.given.filled(arrays)
        return self.function(*args, **kwargs)


def _split(name: str, tree: Any, arrays: Any, foreign: Any) -> tuple[_Tree, list[Any]]:
    """The arguments without their arrays, and these, in the order of the tree's leaves."""
    leaves, structure = jax.tree.flatten(tree)
    places: list[_Array | _Static] = []
    found = []
    for leaf in leaves:
        if isinstance(leaf, arrays):
            places.append(_place(leaf))
            found.append(leaf)
            continue
        if isinstance(leaf, foreign):
            mend = (
                "heedful_torch.to_jax(tensor)"
                if isinstance(leaf, torch.Tensor)
                else "heedful_torch.to_torch(array), or torch.from_numpy(array)"
            )
            expected = "torch tensors" if arrays is torch.Tensor else "JAX arrays"
            raise TypeError(
                f"{name}: expected {expected} as arguments. Got {type(leaf).__name__}. Pass {mend}."
            )
        if not _has_hash(leaf):
            raise TypeError(
                f"{name}: expected arguments to be arrays, pytrees of them, or hashable. Got "
                f"{type(leaf).__name__}. Register its class with "
                "jax.tree_util.register_dataclass or register_pytree_node, or close over it."
            )
        places.append(_Static.of(leaf))
    return _Tree(structure, tuple(places)), found


def _split_results(name: str, call: _Call, tree: Any, arrays: Any) -> tuple[_Tree, list[Any]]:
    """The results without their arrays, and these."""
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        if not isinstance(leaf, arrays) and not isinstance(leaf, (*NUMBERS, str, bytes)):
            raise TypeError(
                f"{name}: expected {call.name} to return arrays, or a pytree of arrays, numbers and "
                f"strings. Got {type(leaf).__name__}. Return a tuple or dict, or register the class "
                "with jax.tree_util.register_dataclass or register_pytree_node."
            )
    places = (_place(leaf) if isinstance(leaf, arrays) else _Static.of(leaf) for leaf in leaves)
    return _Tree(structure, tuple(places)), [leaf for leaf in leaves if isinstance(leaf, arrays)]


def _place(array: Any) -> _Array:
    # to_jax refuses nested tensors, which have no shape to ask for
    nested = isinstance(array, torch.Tensor) and array.is_nested
    return _Array(() if nested else tuple(array.shape), dtype_of(array))


def _refuse_unhashable_function(name: str, function: Function) -> None:
    if not callable(function):
        raise TypeError(f"{name}: expected a function. Got {type(function).__name__}.")
    if not _has_hash(function):
        raise TypeError(
            f"{name}: expected a function that has a hash, by which it is compiled once. Got a "
            f"{type(function).__name__} that has none. If it is a pytree, make it an argument: "
            f"{name}(lambda f, *args: f(*args)); else close over it: {name}(lambda *args: f(*args))."
        )
