"""Arrays between torch and JAX: every rule about copies, layout, dtype and device, in one place.

`to_jax` and `to_torch` share memory through DLPack. ``copy`` has the meaning it has in the Python
array API standard, except that nothing happens unseen:

========  ==================================================================================
False     share memory, or raise one error that says how to mend it (the default)
None      share memory if possible, else copy and say why with a `CopyWarning`
True      always a fresh, independent copy
========  ==================================================================================

A dtype is never cast and a device never left. ``requires_grad`` is dropped here and nowhere else:
gradients cross between the frameworks in `heedful_torch.autograd`, not in these functions.

Shared memory has two owners who do not know of each other:

- A torch tensor over a JAX array could write into it, and JAX arrays are immutable. `to_torch`
  therefore returns a `ReadOnlyTensor`, which refuses before it writes. (A tensor made under
  ``torch.inference_mode`` looks like a guard and is none: it complains *after* the write.)
- A JAX array over a torch tensor changes when the tensor is written later. JAX cannot notice; do not
  write to a tensor that is lent, or pass ``copy=True``.
- On a GPU both sides wait for each other's streams when memory is handed over (the DLPack protocol),
  but not when it is handed back: keep a borrowed tensor alive until the kernels that read it are done.
"""

from __future__ import annotations

import atexit
import contextlib
import copy as copying
import itertools
import time
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn, Self

import jax
import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.dlpack import from_dlpack

from heedful.call.arrays import dtype_of
from heedful_torch.transfers import crossed, is_reported

__all__ = [
    "CopyWarning",
    "LentMemoryWritten",
    "ReadOnlyTensor",
    "adopt",
    "lent",
    "to_jax",
    "to_torch",
    "why_jax_must_copy",
]

# What a JAX buffer's address must be a multiple of, in bytes. On a CPU jax.dlpack copies what is not
# (xla/cpu: "not aligned to 64 bytes"); on a GPU the program would be refused when it runs
# (xla/service/gpu: kEntryParameterAlignBytes).
ALIGNMENT = {"cpu": 64, "cuda": 16}

WIDE = frozenset({"float64", "int64", "uint64", "complex128"})  # exist in JAX only with x64 enabled
EXCHANGED = WIDE | {
    *("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32"),
    *("bfloat16", "float16", "float32", "complex64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
}


class CopyWarning(UserWarning):
    """Memory was copied because it could not be shared; the message says why."""


class LentMemoryWritten(RuntimeError):
    """A torch function wrote into memory that belongs to a JAX array."""


def to_jax(tensor: torch.Tensor, *, copy: bool | None = False) -> jax.Array:
    """A JAX array with the shape, dtype, values and device of a torch tensor.

    ``tensor`` may have any shape; dense memory in any order of dimensions (a transpose) is shared,
    while slices with gaps, broadcasts, pinned and unaligned memory need a copy. A tensor that requires
    grad is detached. See the top of this module for ``copy``, and for what happens to a shared array
    when the tensor is written later.

    Raises TypeError for tensors that have no JAX counterpart (sparse, quantized, meta, conjugated,
    64-bit while JAX's x64 mode is off, ...), ValueError for memory that JAX cannot share or reach.
    """
    _check_copy(copy)
    _refuse_tensor_without_counterpart(tensor)
    tensor = tensor._plain if isinstance(tensor, ReadOnlyTensor) else tensor
    tensor = tensor.detach()
    why, copied = "the same memory, by DLPack", True
    if copy is True:
        if is_reported():
            why = why_jax_must_copy(tensor) or "copy=True"
        tensor = _fresh(tensor)
    elif (reason := why_jax_must_copy(tensor)) is not None:
        if copy is False:
            raise ValueError(
                f"to_jax: expected memory that JAX can share. Got {_describe(tensor)}, and {reason}. "
                "Pass tensor.clone(memory_format=torch.contiguous_format), "
                "or copy=None to copy when needed."
            )
        warnings.warn(f"to_jax copied {_describe(tensor)}: {reason}.", CopyWarning, stacklevel=2)
        why, tensor = reason, _fresh(tensor)
    else:
        copied = False
    crossed("torch", "jax", tensor, copied=copied, why=why)
    # torch exports only from its current CUDA device; JAX hands over the stream that has to wait.
    current = (
        torch.cuda.device(tensor.device)
        if tensor.device.type == "cuda"
        else contextlib.nullcontext()
    )
    with current:
        # copy=True would promise nothing: jax 0.10.2 shares aligned row-major CPU memory all the same.
        array = jax.dlpack.from_dlpack(tensor, copy=False)
    number = next(_numbers)
    _lent[number] = (weakref.ref(tensor, lambda _: _lent.pop(number, None)), weakref.ref(array))
    return array


# Tensors whose memory a JAX array has, until it is let go of. XLA does that on a thread of its own, a
# moment after the results are there, and torch's deleter then takes the GIL. In a process that ends at
# that moment CPython kills the thread in the middle of C++, which aborts: "terminate called without an
# active exception". So the end waits for those whose array is gone already, some milliseconds.
_lent: dict[int, tuple[weakref.ref[torch.Tensor], weakref.ref[jax.Array]]] = {}
_numbers = itertools.count()
LONGEST_WAIT = 2.0  # seconds
# A weakref is dead before what it was to is: XLA's thread may still be within torch's deleter.
AFTERWARDS = 0.02


@atexit.register  # later than JAX's own, and so run before it
def _wait_until_let_go() -> None:
    if next(_numbers) == 0:  # nothing was ever lent
        return
    end = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < end and any(
        tensor() is not None and array() is None for tensor, array in list(_lent.values())
    ):
        time.sleep(1e-3)  # without the GIL, which is what XLA's thread waits for
    time.sleep(AFTERWARDS)


def to_torch(array: jax.Array, *, copy: bool | None = False) -> torch.Tensor:
    """A torch tensor with the shape, dtype, values and device of a JAX array.

    Every array that torch can hold is shared without a copy, so ``copy=None`` is the same as
    ``copy=False``: both return a `ReadOnlyTensor`. ``copy=True`` returns an ordinary tensor that owns
    its memory. Gradients do not flow back into JAX: see `heedful_torch.as_jax`.

    Raises TypeError for arrays that have no torch counterpart (tracers, PRNG keys, 4-bit integers),
    ValueError for arrays that are deleted, spread over several devices or out of torch's reach.
    """
    _check_copy(copy)
    alias = _alias(array)
    if copy is not True:
        crossed("jax", "torch", alias, copied=False, why="the same memory, read-only")
        return ReadOnlyTensor(alias)
    crossed("jax", "torch", alias, copied=True, why="copy=True")
    fresh = _fresh(alias)
    if fresh.is_cuda:  # else JAX could reuse the memory before torch has read it
        torch.cuda.current_stream(fresh.device).synchronize()
    return fresh


def adopt(array: jax.Array) -> torch.Tensor:
    """An ordinary tensor over the memory of an array that nobody else will read.

    For arrays that have just been computed and are given up by the caller: torch may write into them.
    JAX computes in the background; on a CPU this waits, so that afterwards torch may also write into, or
    free, what the array was computed from. On a GPU torch's stream waits, by the DLPack protocol.
    """
    tensor = _alias(array)
    crossed("jax", "torch", tensor, copied=False, why="a fresh result, given up by JAX")
    return tensor


def _alias(array: jax.Array) -> torch.Tensor:
    _refuse_array_without_counterpart(array)
    if platform_of(array) == "cpu":
        array.block_until_ready()
    return from_dlpack(array)


@contextlib.contextmanager
def lent(*buffers: Any) -> Iterator[tuple[torch.Tensor, ...]]:
    """Ordinary tensors over JAX arrays or XLA buffers, for the length of a ``with`` block.

    Raises LentMemoryWritten afterwards if torch wrote into one of them, by the version counter that a
    tensor shares with its views. It comes after the write, and writes that torch does not count
    (``tensor.data``, ``tensor.numpy()``, foreign kernels on ``data_ptr()``) are not seen. The tensors
    must not be used after the block.
    """
    with torch.inference_mode(False):  # inference tensors have no version counter
        tensors = tuple(from_dlpack(buffer) for buffer in buffers)
    for tensor in tensors:
        crossed("jax", "torch", tensor, copied=False, why="XLA's buffer, lent for one call")
    before = [tensor._version for tensor in tensors]
    yield tensors
    written = [i for i, tensor in enumerate(tensors) if tensor._version != before[i]]
    if written:
        raise LentMemoryWritten(
            f"A torch function wrote in place into its argument(s) {written}, which are JAX arrays. JAX "
            "arrays are immutable: these now hold wrong values. Write into a clone() of the argument."
        )


class ReadOnlyTensor(torch.Tensor):
    """A tensor over memory that belongs to a JAX array: every operation that would write is refused.

    The refusal comes before the write, also for views, ``out=``, ``.data``, optimizers and
    ``torch.no_grad``. Everything else works, autograd included; results are ordinary tensors, and so is
    what was pickled or saved, once loaded.

    What would hand out the memory to writers that nobody can see is refused too, though it writes
    nothing itself: the storage, ``other.set_(tensor)``, and DLPack (``torch.from_dlpack``,
    ``np.from_dlpack``), in which torch does not say that memory is read-only. ``np.asarray`` gives NumPy
    a read-only view, and `to_jax` the array to JAX. ``clone()`` gives an ordinary tensor.

    Three ways round it are in C, where no refusal can stand, and write into the JAX array:
    ``other.data = tensor``, the older ``torch.utils.dlpack.to_dlpack(tensor)``, and an address:
    ``data_ptr()``, which kernels that only read need too.
    """

    _plain: torch.Tensor  # the same memory, unguarded

    def __new__(cls, plain: torch.Tensor) -> Self:
        guarded = torch.Tensor._make_subclass(cls, plain)
        guarded._plain = plain
        return guarded

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch says args, kwargs, and no types
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_view = False
        # torch's schemas say of each argument whether it is written to, or a view of it returned.
        for position, argument in enumerate(func._schema.arguments):
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            if func is torch.ops.aten.set_.source_Tensor and isinstance(given, ReadOnlyTensor):
                _refuse_to_hand_out(
                    "other.set_(tensor)"
                )  # its schema calls the source a mere input
            if argument.alias_info is None or not _holds_read_only(given):
                continue
            if argument.alias_info.is_write:
                raise RuntimeError(
                    f"{func} would write into a read-only tensor: its memory belongs to a JAX array, "
                    "and JAX arrays are immutable. Write into tensor.clone(), or make the tensor with "
                    "to_torch(array, copy=True)."
                )
            is_view = True
        args, kwargs = tree_map_only(ReadOnlyTensor, lambda tensor: tensor._plain, (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, cls, result) if is_view else result

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """The same memory as a NumPy array whose ``writeable`` flag is off."""
        view = self._plain.numpy(force=force)
        view.flags.writeable = False
        return view

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        view = self.numpy()
        if dtype is not None and view.dtype != dtype:
            return view.astype(dtype)
        return view.copy() if copy else view

    def untyped_storage(self) -> NoReturn:
        _refuse_to_hand_out("its storage")

    storage = _typed_storage = untyped_storage

    def __dlpack__(self, *, copy: bool | None = None, **options: Any) -> Any:
        if copy is not True:
            _refuse_to_hand_out("its memory by DLPack")
        return _fresh(self._plain).__dlpack__(**options)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        found: dict[str, Any] = self._plain.__cuda_array_interface__
        return found | {"data": (found["data"][0], True)}  # True: read-only

    def apply_(self, function: Any) -> NoReturn:
        _refuse_to_hand_out("its elements to apply_")

    def tolist(self) -> Any:
        return self._plain.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch's own

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copying.deepcopy(self._plain, memo)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped in torch
        return f"{repr(self._plain)[:-1]}, read_only=True)"


def why_jax_must_copy(tensor: torch.Tensor) -> str | None:
    """The reason why JAX cannot share this tensor's memory, or None if it can."""
    if tensor.numel() > 0:
        # JAX knows layouts that permute the dimensions of dense memory, nothing else.
        dense = 1
        for stride, size in sorted(
            (s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1
        ):
            if stride < dense:
                return f"its strides {tensor.stride()} read the same memory more than once (a broadcast)"
            if stride > dense:
                return f"its strides {tensor.stride()} leave gaps (a slice)"
            dense *= size
    alignment = ALIGNMENT.get(tensor.device.type, 1)
    if tensor.data_ptr() % alignment:
        return f"its memory starts {tensor.data_ptr() % alignment} bytes after a multiple of {alignment}"
    if tensor.device.type == "cpu" and torch.cuda.is_available() and tensor.is_pinned():
        return "its memory is pinned, which DLPack counts to the GPU"
    return None


def platform_of(array: jax.Array) -> str:
    """Where JAX keeps an array: "cpu", "gpu" or "tpu"."""
    return next(iter(array.devices())).platform


def x64_is_enabled() -> bool:
    """Whether JAX has 64-bit dtypes here and now: it can be switched for one thread and block."""
    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]  # untyped


def is_narrowed(dtype: str) -> bool:
    """Whether JAX would narrow a dtype here and now."""
    return dtype in WIDE and not x64_is_enabled()


# What follows the name of one that would be.
NARROWED = (
    "while JAX's x64 mode is off, in which JAX would narrow it. "
    'Call jax.config.update("jax_enable_x64", True), use `with jax.enable_x64(True):`, '
    "or cast it yourself."
)


def _refuse_tensor_without_counterpart(tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"to_jax: expected a torch.Tensor. Got {type(tensor).__name__}.")

    def refuse(what: str, mend: str = "") -> NoReturn:
        said = f"{what}. {mend}" if mend else what
        raise TypeError(f"to_jax: expected a tensor that JAX can hold. Got {said}")

    kind = type(tensor)
    if (
        kind is not ReadOnlyTensor
        and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    ):
        refuse(
            f"a {kind.__name__}, which is not plain memory",
            "Pass the tensor inside it, outside torch.compile.",
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        refuse(
            "a tensor inside a torch.func transform, which has no memory of its own",
            "Call it outside of vmap and grad.",
        )
    if tensor.layout != torch.strided:
        refuse(f"the layout {tensor.layout}", "Pass tensor.to_dense().")
    if tensor.is_quantized:
        refuse(f"the quantized dtype {tensor.dtype}", "Pass tensor.dequantize().")
    if tensor.is_nested:
        refuse("a nested tensor", "Pass tensor.to_padded_tensor(padding), and a mask.")
    if tensor.is_conj():
        refuse("a tensor with the conjugate bit set", "Pass tensor.resolve_conj().")
    if tensor.is_neg():
        refuse("a tensor with the negative bit set", "Pass tensor.resolve_neg().")
    dtype = dtype_of(tensor)
    if dtype not in EXCHANGED:
        refuse(f"the dtype {tensor.dtype}", "Cast it with tensor.to(dtype).")
    if is_narrowed(dtype):
        refuse(f"the dtype {tensor.dtype} {NARROWED}")
    platform = {"cpu": "cpu", "cuda": "rocm" if torch.version.hip else "cuda"}.get(
        tensor.device.type
    )
    if platform is None:
        refuse(
            f"a tensor on the device {tensor.device}",
            "Move it yourself: tensor.cpu() or tensor.cuda().",
        )
    try:
        jax.devices(platform)
    except RuntimeError as error:
        raise ValueError(
            f"to_jax: expected a tensor on a device that JAX can use. Got one on {tensor.device}, but "
            f"this JAX has no {platform} backend. Install one, or move it yourself: tensor.cpu()."
        ) from error


def _refuse_array_without_counterpart(array: jax.Array) -> None:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"to_torch: expected an array with values. Got {array}, which is being traced by jit, "
            "grad or vmap. Run torch inside JAX with heedful_torch.as_jax(torch_function)."
        )
    if not isinstance(array, jax.Array):
        raise TypeError(f"to_torch: expected a jax.Array. Got {type(array).__name__}.")
    if str(array.dtype) not in EXCHANGED:
        raise TypeError(
            f"to_torch: expected a dtype that torch can hold. Got {array.dtype}. "
            "Cast it with array.astype."
        )
    if array.is_deleted():
        raise ValueError("to_torch: expected a live array. Got one that was deleted or donated.")
    if len(array.devices()) != 1:
        raise ValueError(
            f"to_torch: expected an array on one device. Got one on {len(array.devices())} devices. "
            "Gather it with jax.device_put(array, device), or pass array.addressable_data(i)."
        )
    platform = platform_of(array)
    if platform != "cpu" and not (platform == "gpu" and torch.cuda.is_available()):
        raise ValueError(
            f"to_torch: expected an array on a device that torch can use. Got one on {platform}. "
            'Move it yourself: jax.device_put(array, jax.devices("cpu")[0]).'
        )


def _fresh(tensor: torch.Tensor) -> torch.Tensor:
    """A row-major copy; torch's allocators align more strictly than `ALIGNMENT` asks."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _check_copy(copy: bool | None) -> None:
    if copy is not None and not isinstance(copy, bool):
        raise TypeError(f"expected copy to be True, False or None. Got {copy!r}.")


def _holds_read_only(given: Any) -> bool:
    return any(
        isinstance(item, ReadOnlyTensor)
        for item in (given if isinstance(given, (list, tuple)) else (given,))
    )


def _refuse_to_hand_out(what: str) -> NoReturn:
    raise RuntimeError(
        f"expected a tensor whose memory may be written. Got a read-only one, asked for {what}: its "
        "memory belongs to a JAX array, and JAX arrays are immutable. To read it pass "
        "np.asarray(tensor) or to_jax(tensor); to write, tensor.clone(), or make it with "
        "to_torch(array, copy=True)."
    )


def _describe(tensor: torch.Tensor) -> str:
    return f"a tensor of shape {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"
