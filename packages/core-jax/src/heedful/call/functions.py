"""Functions among the options: traced by JAX, and what they close over made operands.

To JAX a function that closes over arrays is a new one at each call, with other constants in it. Here it
is a `Program`, equal to any other of the same text, which is part of the problem; and arrays, which are
differentiated, mapped and spread as any operand is. They come packed, those of all functions of a call
one behind the other: `floats`, which are differentiated, and `words`, all others.

torch's functions stay what they are, and keep what they close over: they are torch's to read.
"""

import contextlib
import math
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import FunctionType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.sharding import AxisType

from heedful.call.arrays import Array, dtype_of
from heedful.call.checks import shown


class Slot(NamedTuple):
    """Where a closed-over array stands in what is packed.

    Attributes:
        differentiated: whether that is `floats`.
        begin: of its numbers there.
        shape, dtype: of the array.
    """

    differentiated: bool
    begin: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def end(self) -> int:
        halves = 2 if not self.differentiated and np.dtype(self.dtype).itemsize == 8 else 1
        return self.begin + halves * math.prod(self.shape)

    def unpacked(self, packed: Array) -> Array:
        """(1 or B, 1, ·) → (1 or B, *shape)."""
        x = packed[:, 0, self.begin : self.end]
        x = x if self.differentiated else _of_words(x, self.dtype)
        return x.reshape(-1, *self.shape)


@dataclass(frozen=True, eq=False)
class Program:
    """A function of numbers: b, h, i and j, and the score before them where it has one.

    Attributes:
        jaxpr: what it computes, of what it closes over and then of numbers.
        slots: of what it closes over.
        text: what makes it equal to another.
        uses: which of the numbers play a part.
        wide: the same in float64, where NumPy calls.
    """

    jaxpr: ClosedJaxpr = field(repr=False)
    slots: tuple[Slot, ...]
    text: Any = field(repr=False)
    uses: tuple[bool, ...] = field(repr=False)
    wide: "Program | None" = field(default=None, repr=False)

    @classmethod
    def of(cls, found: ClosedJaxpr, slots: tuple[Slot, ...], function: Callable[..., Any]) -> Self:
        """A traced function, with the slots of what it closes over, of which it keeps nothing."""

        def hoisted(closed: Sequence[Array], *numbers: Array) -> list[Array]:
            return jaxpr_as_fun(ClosedJaxpr(found.jaxpr, closed))(*numbers)

        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in found.consts]
        numbers = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in found.in_avals]
        whole = jax.make_jaxpr(hoisted)(shapes, *numbers)
        jaxpr = whole.jaxpr
        used = {id(x) for x in (*(x for e in jaxpr.eqns for x in e.invars), *jaxpr.outvars)}
        uses = tuple(id(x) in used for x in jaxpr.invars[len(shapes) :])
        return cls(whole, slots, _text(whole, _by_identity(function)), uses)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and (self.slots, self.text) == (other.slots, other.text)

    @cached_property
    def _hash(self) -> int:  # a text may be long, and every call asks
        return hash((self.slots, self.text))

    def __hash__(self) -> int:
        return self._hash

    def closed_over(self, floats: Array | None, words: Array | None) -> list[Array]:
        """What it closes over, each (1 or B, *shape)."""
        packed = {True: floats, False: words}
        return [slot.unpacked(packed[slot.differentiated]) for slot in self.slots]

    def of_numbers(self, closed: Sequence[Array], *numbers: Array) -> Array:
        """The function itself; of each array that it closes over all of one row."""
        avals: Sequence[Any] = self.jaxpr.in_avals
        closed = [x.astype(aval.dtype) for x, aval in zip(closed, avals, strict=False)]
        found: Array = jaxpr_as_fun(self.jaxpr)(*closed, *numbers)[0]
        return found

    def __call__(self, floats: Array | None, words: Array | None, *arrays: Array) -> Array:
        """The function at each place of arrays of rank 4, each axis full or 1.

        Axes that nothing which plays a part has are 1 in the answer. Of NumPy's arrays it is NumPy's.
        """
        if isinstance(arrays[0], np.ndarray):  # perhaps in somebody's jit, where JAX would trace it
            with jax.ensure_compile_time_eval():
                return np.asarray(self(floats, words, *map(jnp.asarray, arrays)))
        closed = self.closed_over(floats, words)
        used = [x if use else x[:1, :1, :1, :1] for x, use in zip(arrays, self.uses, strict=True)]

        def of_row(*row: Array) -> Array:
            function = partial(self.of_numbers, row[: len(closed)])
            return _over_axes(jax.vmap, function, 3, row[len(closed) :])

        return _over_axis(jax.vmap, of_row, (*closed, *used))


@dataclass(frozen=True)
class TorchFunction:
    """A function of torch tensors, and the option's name.

    Called as a `Program` is, it says what is seen.
    """

    name: str
    function: Callable[..., Any]

    def __call__(self, floats: None, words: None, *arrays: Array) -> Array:
        found = _over_axes(sys.modules["torch"].vmap, self.function, 4, arrays)
        if (dtype := dtype_of(found)) != "bool":
            raise TypeError(
                f"{self.name} must give one number of bool. Got {dtype}. True is visible."
            )
        return found


def _over_axes(
    vmap: Callable[..., Any], function: Callable[..., Array], rank: int, arrays: Sequence[Array]
) -> Array:
    """Axis by axis, so that what has no such axis is computed once along it."""
    if rank == 0:
        return function(*arrays)
    return _over_axis(vmap, lambda *cut: _over_axes(vmap, function, rank - 1, cut), arrays)


def _over_axis(
    vmap: Callable[..., Any], function: Callable[..., Array], arrays: Sequence[Array]
) -> Array:
    axes = tuple(None if x.shape[0] == 1 else 0 for x in arrays)
    cut = [x[0] if axis is None else x for x, axis in zip(arrays, axes, strict=True)]
    if all(axis is None for axis in axes):
        return function(*cut)[None]
    found: Array = vmap(function, axes)(*cut)
    return found


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockMask:
    """A function of b, h, i and j that says which keys are seen, and of which blocks all or none.

    `heedful.block_mask` makes it; JAX takes it for a pytree.

    Attributes:
        blocks: int8, (1 or B, 1 or Hq, blocks of queries, blocks of keys): of each block whether
            nothing (0), something (1) or all (2) of it is seen.
        closed: what the function closes over.
        program: the function.
        size: of a block, queries and keys.
        lengths: Sq and Sk.
    """

    blocks: Array
    closed: tuple[Array, ...]
    program: Program = field(metadata={"static": True})
    size: int = field(metadata={"static": True})
    lengths: tuple[int, int] = field(metadata={"static": True})


# Tracing


def traced(
    name: str,
    function: Any,
    of_score: str | None,
    framework: str,
    before: Sequence[Slot] = (),
) -> tuple[Program, tuple[Array, ...]]:
    """A function as a program, and what it closes over.

    Args:
        name: of the option.
        function: of b, h, i and j, and of the score before them where `of_score` says its dtype.
        of_score: then it also gives a score, and what it closes over is differentiated; else a boolean.
        framework: of the call; where it is "numpy" a program of scores has itself in float64 too.
        before: the slots of what is packed before its own.

    Raises:
        TypeError: it cannot be traced, closes over something else than numbers, or gives something else.
    """
    if isinstance(function, BlockMask):
        return replace(
            function.program, slots=_behind(before, function.program.slots)
        ), function.closed
    if not callable(function):
        raise TypeError(f"{name} must be a function. Got {shown(function)}.")
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        raise TypeError(
            f"{name} is not traced on a mesh with explicit axes, of which each of its operations would "
            "speak. Make them jax.sharding.AxisType.Auto, or call within jax.sharding.auto_axes."
        )
    with _float64_for(of_score):
        found = _trace(name, function, of_score)
        _check_result(name, found.out_avals, of_score)
        slots = []
        for x in found.consts:
            _check_closed_over(name, x, of_score)
            differentiated = of_score is not None and dtype_of(x) == of_score
            slots.append(Slot(differentiated, 0, tuple(x.shape), dtype_of(x)))
        program = Program.of(found, _behind(before, slots), function)
    if framework == "numpy" and of_score:
        with _float64_for("float64"):  # but for what it casts itself
            wide = Program.of(_trace(name, function, "float64"), program.slots, function)
        program = replace(program, wide=wide)
    return program, tuple(found.consts)


def _float64_for(dtype: str | None) -> contextlib.AbstractContextManager[object]:
    """NumPy's calls have float64 where JAX has none."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def _trace(name: str, function: Callable[..., Any], of_score: str | None) -> ClosedJaxpr:
    numbers = [jax.ShapeDtypeStruct((), "int32")] * 4
    if of_score:
        numbers = [jax.ShapeDtypeStruct((), of_score), *numbers]
    try:
        return jax.make_jaxpr(function)(*numbers)
    except Exception as error:  # whatever the caller's own code raises
        raise TypeError(
            f"{name} must be a function of JAX numbers, {'score, ' if of_score else ''}b, h, q_idx and "
            f"kv_idx. To trace it raised {type(error).__name__}: "
            + shown(str(error).partition("\n")[0])[1:-1]
        ) from error


def _check_result(name: str, avals: Sequence[Any], of_score: str | None) -> None:
    gives = of_score or "bool"
    got = ", ".join(aval.str_short() for aval in avals)
    if [(aval.shape, str(aval.dtype)) for aval in avals] != [((), gives)]:
        raise TypeError(
            f"{name} must give one number of {gives}. Got {got or 'nothing'}. "
            + ("Cast it, or what it adds." if of_score else "True is visible.")
        )


def _check_closed_over(name: str, x: Any, of_score: str | None) -> None:
    dtype = dtype_of(x)
    number = jnp.issubdtype(x.dtype, jnp.number) or dtype == "bool"
    if not number or jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} may close over real numbers. Got an array of {dtype}. Close over none."
        )
    if of_score and jnp.issubdtype(x.dtype, jnp.floating) and dtype != of_score:
        raise TypeError(
            f"floating arrays that {name} closes over must be {of_score}, in which scores are computed "
            f"and their gradient is summed. Got {dtype} {x.shape}. Cast it: nothing here casts silently."
        )


def _behind(before: Sequence[Slot], slots: Sequence[Slot]) -> tuple[Slot, ...]:
    """The slots, one behind the other and behind those before."""
    ends = {
        kind: max((s.end for s in before if s.differentiated == kind), default=0)
        for kind in (True, False)
    }
    placed = []
    for slot in slots:
        placed.append(slot._replace(begin=ends[slot.differentiated]))
        ends[slot.differentiated] = placed[-1].end
    return tuple(placed)


def _by_identity(function: Callable[..., Any]) -> Any:
    """What equals itself alone, without keeping the function and what it closes over alive."""
    try:
        found = weakref.ref(function)
        hash(found)  # which it keeps, as long as the function is there to ask
        return found
    except TypeError:
        return id(function)


def _text(x: Any, owner: Any) -> Any:
    """Of a jaxpr, or of a parameter in it: hashable, and equal where the same is computed.

    What JAX makes anew whenever it traces, the rules of `jax.custom_jvp` for one, counts as the owner's:
    with the same function it is the same.
    """
    if isinstance(x, ClosedJaxpr | Jaxpr):  # from jax 0.12 on the same
        baked = tuple((str(np.shape(c)), np.asarray(c).tobytes()) for c in getattr(x, "consts", ()))
        x = getattr(x, "jaxpr", x)
        numbers: dict[Any, int] = {}

        def operand(v: Any) -> Any:
            if isinstance(v, Literal):
                return str(v.aval), np.asarray(v.val).tobytes()
            return numbers.setdefault(v, len(numbers)), str(v.aval)

        ins = tuple(map(operand, (*x.constvars, *x.invars)))
        equations = tuple(
            (
                e.primitive,
                tuple(map(operand, e.invars)),
                _text(e.params, owner),
                tuple(map(operand, e.outvars)),
            )
            for e in x.eqns
        )
        return ins, equations, tuple(map(operand, x.outvars)), baked
    if isinstance(x, Mapping):
        return tuple((key, _text(x[key], owner)) for key in sorted(x))
    if isinstance(x, tuple | list):
        return type(x), tuple(_text(each, owner) for each in x)
    if isinstance(x, FunctionType | partial) or hasattr(x, "call_wrapped"):  # the last is JAX's
        return owner
    try:
        hash(x)
    except TypeError:
        return owner
    return type(x), x


# Packing


def packed(
    programs: Sequence[Program], closed: Sequence[Array], framework: str
) -> dict[str, Array]:
    """`floats` and `words`, (1, 1, ·) each, of what the programs close over, of the call's framework."""
    slots = [slot for program in programs for slot in program.slots]
    if framework == "numpy":  # and may stand in somebody's jit, where JAX would trace it
        with jax.ensure_compile_time_eval():
            return {n: np.asarray(x) for n, x in _packed(slots, closed).items()}
    return _packed(slots, closed)


def _packed(slots: Sequence[Slot], closed: Sequence[Array]) -> dict[str, Array]:
    parts: dict[str, list[Array]] = {"floats": [], "words": []}
    for slot, x in zip(slots, closed, strict=True):
        x = jnp.asarray(x)
        parts["floats" if slot.differentiated else "words"].append(
            x.reshape(-1) if slot.differentiated else _words(x).reshape(-1)
        )
    return {name: jnp.concatenate(xs)[None, None] for name, xs in parts.items() if xs}


def _words(x: Array) -> Array:
    """Any numbers as int32, of which `_of_words` makes the same bits again."""
    if x.dtype.itemsize >= 4:
        return lax.bitcast_convert_type(x, jnp.int32)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return x.astype(jnp.int32)


def _of_words(words: Array, dtype: str) -> Array:
    """(rows, ·) → (rows, ·)."""
    kind = jnp.dtype(dtype)
    if kind.itemsize == 8:
        words = words.reshape(len(words), -1, 2)
    if kind.itemsize >= 4:
        return lax.bitcast_convert_type(words, kind)
    if jnp.issubdtype(kind, jnp.floating):
        return lax.bitcast_convert_type(words, jnp.float32).astype(kind)
    return words.astype(kind)
