"""Attention for Flax's modules: `attention_fn=` of NNX's and of Linen's, in their signatures.

    nnx.MultiHeadAttention(8, 64, decode=False, rngs=rngs, attention_fn=heedful.flax.nnx_attention)
    nn.MultiHeadDotProductAttention(8, attention_fn=heedful.flax.linen_attention)

Which backend computes is said by `heedful.use_backend`, or by functools.partial(…, backend="jax:flash").
Each function has the very parameters of the one that it stands for, because Linen looks: what a function
does not name, a mask too, Linen leaves out. An argument is honoured or refused. Two things differ: a
query that sees no key gets 0, where Flax takes the mean of all values; and other weights are dropped,
of the same rate, by the numbers that `heedful.dropout_mask` documents.

`linen_per_module` and `nnx_per_module` choose a backend for each module by its name, and name modules
for `heedful.recording`. Flax itself is imported by these two alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock, get_ident
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp

from heedful.api import attention
from heedful.dispatch import ambient
from heedful.dispatch.by_module import NO_CHOICES, Choices


def nnx_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    *,
    backend: str | Sequence[str] | None = None,
) -> jax.Array:
    """`flax.nnx.dot_product_attention`, computed by a backend of heedful.

    Args:
        query: (batch..., Sq, Hq, D).
        key: (batch..., Sk, Hkv, D), Hq a multiple of Hkv.
        value: (batch..., Sk, Hkv, Dv).
        bias: added to the scores, broadcastable to (batch..., Hq, Sq, Sk).
        mask: visible where it is not 0, likewise.
        broadcast_dropout: must be False where weights are dropped: heedful drops others in each head.
        dropout_rng: the key that what is dropped is drawn by.
        dropout_rate: with which probability a weight is dropped, where not deterministic.
        deterministic: whether nothing is dropped.
        dtype: what query, key and value are cast to first; by default they must be of one.
        precision: any; products of the flash core and of plain attention are of the highest.
        module: None; weights, which it would sow, are not to be had.
        promote_dtype: Flax's own, called as there where it is given.
        is_causal: whether query i sees keys up to i alone, counted from the first of each.
        backend: as in `heedful.attention`.

    Returns:
        (batch..., Sq, Hq, Dv).

    Raises:
        TypeError, ValueError: an argument is none of those above, or cannot be honoured.
        Refusal: no backend that was asked can honour the call.
    """
    if promote_dtype is not None:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    elif dtype is not None:
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    _refuse_what_needs_weights(module)
    out = attention(
        query,
        key,
        value,
        bias=_of_rank(query.ndim, bias),
        mask=None if mask is None else _of_rank(query.ndim, mask) != 0,
        causal="top_left" if is_causal else False,
        layout="bshd",
        backend=backend,
        **_dropout(broadcast_dropout, dropout_rng, dropout_rate, deterministic),
    )
    return cast(jax.Array, out)


def linen_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Any] | None = None,
    qk_attn_weights_einsum: Callable[..., Any] | None = None,
    attn_weights_value_einsum: Callable[..., Any] | None = None,
    *,
    backend: str | Sequence[str] | None = None,
) -> jax.Array:
    """`flax.linen.dot_product_attention`, computed by a backend of heedful: see `nnx_attention`.

    Args:
        force_fp32_for_softmax: the softmax is float32's in any case.
        einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: None; a kernel has its own
            products.
    """
    einsums = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    if given := [name for name, einsum in einsums.items() if einsum is not None]:
        raise ValueError(
            f"{', '.join(given)} must be None: a kernel of attention has its own products. "
            "For another einsum use flax.linen.dot_product_attention."
        )
    return nnx_attention(
        query,
        key,
        value,
        bias,
        mask,
        broadcast_dropout,
        dropout_rng,
        dropout_rate,
        deterministic,
        dtype,
        precision,
        module,
        backend=backend,
    )


def _refuse_what_needs_weights(module: Any) -> None:
    if module is not None:
        raise ValueError(
            "sow_weights=True asks for the attention's weights, which heedful does not make: they are "
            "quadratic in memory. For them use Flax's own dot_product_attention."
        )


def _of_rank(rank: int, x: jax.Array | None) -> Any:
    """With as many leading axes of 1 as it lacks: two axes alone would be those of keys' padding."""
    return x if x is None else jnp.reshape(x, (1,) * (rank - x.ndim) + x.shape)


def _dropout(
    broadcast_dropout: bool, rng: jax.Array | None, rate: float, deterministic: bool
) -> dict[str, Any]:
    if deterministic or rate == 0:
        return {}
    if broadcast_dropout:
        raise ValueError(
            "broadcast_dropout must be False where weights are dropped. Got True, by which Flax drops "
            "the same ones in every batch row and head: heedful drops others in each."
        )
    if rng is None:
        raise ValueError("dropout_rate > 0 needs dropout_rng, a key of jax.random. Got None.")
    seed = jax.random.randint(rng, (), 0, 2**31 - 1, jnp.int32)
    return {"dropout_rate": rate, "dropout_seed": seed}


# JAX keeps what it compiled by this value among others: by the choices around it, and by the module.
_traced_in: Any = jax.make_user_context(default_value=None)


@lru_cache(maxsize=4096)  # as many as JAX keeps of what it traced
def _decided(table: Choices, model: type, variables: Any) -> set[str | None]:
    """The patterns that held when it was traced: what is compiled is not traced again.

    nn.jit keeps what it compiled by the tree of the variables too, which models of one class differ in.
    """
    return set()


# Around what changes models of NNX.
_changing = Lock()


@contextmanager
def linen_per_module(choices: Mapping[str, str | Sequence[str]] = NO_CHOICES) -> Iterator[None]:
    """Within the block, modules of Linen take the backend that is chosen for their names.

        with heedful.flax.linen_per_module({"decoder.layers_0": "jax:flash", "*": "jax:plain"}):
            y = model.apply(variables, x)

    A name is the module's path with dots. A pattern (of fnmatch) holds for the modules that it matches
    and for all within them; of several the first wins; where none holds, it is as without the block. A
    backend is as in `heedful.attention`: a name runs or raises. It comes before `use_backend` around the
    model; `backend=`, and `use_backend` within a module and around its call, come before it. Without
    choices the modules are only named for `heedful.recording`.

    What JAX compiles is kept apart by the choices, and within them by the module: a layer under `nn.jit`
    is traced for each name. Layers of `nn.scan` are one module, with one name and one backend. Which
    modules there are is known once they have run: what matches none raises at the end of the block.

    Raises:
        TypeError, ValueError: no backend or no module has such a name.
    """
    from flax import linen

    table = Choices.of(choices)
    decided: set[str | None] = set()
    seen: set[str] = set()
    before: list[set[str | None]] = []
    outer, around = _traced_in.value, ambient.part_of_the_model()

    def intercepted(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.scope is None:  # unbound: it has no path
            return method(*args, **kwargs)
        path = module.path
        kept_apart = _kept_apart(outer, table, path, module.name)
        if module.name is not None and path[-1:] != (module.name,):
            # nn.jit, or another lifting, begins outside of the module, and calls nobody around what it
            # compiles: this holds until the next module runs, or until the one around it ends.
            kept_apart.__enter__()
            return method(*args, **kwargs)
        if not path:
            before.append(_decided(table, module.__class__, jax.tree.structure(module.variables)))
        decided.add(table.pattern_at(path))
        seen.add(".".join(path))
        name = ".".join(filter(None, (around, *path)))
        with kept_apart, ambient.within(name, *table.at(path)):
            return method(*args, **kwargs)

    with _kept_apart(outer, table), linen.intercept_methods(intercepted):
        yield
    if seen:
        for traced in before:
            traced |= decided
            decided |= traced
        table.check_each_decides(decided, seen)


@contextmanager
def nnx_per_module(
    model: Any, choices: Mapping[str, str | Sequence[str]] = NO_CHOICES
) -> Iterator[None]:
    """Within the block, a model's modules of NNX take the backend that is chosen for their names.

        with heedful.flax.nnx_per_module(model, {"layers.0": "jax:flash", "*": "jax:plain"}):
            y = model(x)

    NNX has no hook between a module and its caller. So this is for modules with an `attention_fn`, as
    `nnx.MultiHeadAttention` has it, in whose place another is put as long as the block is open; for
    other modules open `heedful.use_backend` around their calls. Names and choices are as in
    `linen_per_module`. nnx.jit and jax.jit trace anew under other choices; nnx.jit also where there are
    none, since the model's functions are part of what it compiles for.

    Raises:
        TypeError, ValueError: no backend or no such module has such a name, a module has two names with
            two choices, or it computes by Flax's own function, which asks no backend.
        RuntimeError: another thread has a block open on this model, which is changed while it is.
    """
    from flax import nnx

    table = Choices.of(choices)
    places = _places(model, table)
    named = []
    with _changing:
        for module, path, names, source in places:
            before = function = module.attention_fn
            if isinstance(before, _InPart) and before.thread != get_ident():
                raise RuntimeError(
                    "another thread has a block of nnx_per_module open on this model, whose modules it "
                    "changed. Give each thread a model of its own (nnx.clone), or wait for the other."
                )
            if names and before is nnx.dot_product_attention:
                raise ValueError(
                    f"{_said(path)} computes by nnx.dot_product_attention, which asks no backend. Make "
                    "it with attention_fn=heedful.flax.nnx_attention."
                )
            if names and isinstance(before, _InPart):  # of two blocks the inner one chooses
                function = before.function
            part = ambient.part_of_the_model(*path)
            named.append((module, before, _InPart(function, part, names, source)))
        for module, _, attention_fn in named:
            module.attention_fn = attention_fn
    try:
        with _kept_apart(_traced_in.value, table):
            yield
    finally:
        with _changing:
            for module, before, _ in named:
                module.attention_fn = before


_Path: TypeAlias = tuple[str, ...]


class _Place(NamedTuple):
    """A module, a name of it, the backends that are asked for in it, none perhaps, and who asks."""

    module: Any
    path: _Path
    names: tuple[str, ...]
    source: str


def _places(model: Any, table: Choices) -> Iterable[_Place]:
    found: dict[int, _Place] = {}
    decided, named = set(), []
    for path, module in _by_each_name(model):
        if not callable(getattr(module, "attention_fn", None)):
            continue
        decided.add(table.pattern_at(path))
        named.append(".".join(path))
        place = _Place(module, path, *table.at(path))
        first = found.setdefault(id(module), place)
        if first.names != place.names:
            raise ValueError(
                f"{_said(first.path)} and {_said(path)} are one module, of which two choices are made: "
                f"{first.names or 'none'} and {place.names or 'none'}. Choose one for both."
            )
    table.check_each_decides(decided, named)
    return found.values()


def _by_each_name(
    node: Any, path: _Path = (), around: tuple[Any, ...] = ()
) -> Iterator[tuple[_Path, Any]]:
    """The modules in it by all of their names, of which `nnx.iter_modules` says one each."""
    from flax import nnx

    if any(node is x for x in around):  # NNX lets a model refer to itself
        return
    if isinstance(node, nnx.Module):
        yield path, node
    children: Iterable[tuple[str, Any]]
    if isinstance(node, nnx.Pytree):
        children = vars(node).items()
    else:
        level, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
        children = [(jax.tree_util.keystr(key, simple=True), child) for key, child in level if key]
    for name, child in children:
        yield from _by_each_name(child, (*path, name), (*around, node))


def _said(path: _Path) -> str:
    return ".".join(path) or "the model"


def _kept_apart(outer: Any, table: Choices, *where: Any) -> AbstractContextManager[Any]:
    """What JAX compiles within is of these choices alone."""
    return _traced_in((outer, table, *where)) if table.table else nullcontext()


@dataclass(frozen=True)  # equal to one of another block: nnx.jit keeps by it what it compiled
class _InPart:
    function: Callable[..., Any]
    part: str
    names: tuple[str, ...]
    source: str
    thread: int = field(default_factory=get_ident, compare=False)  # which opened the block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ambient.within(self.part, self.names, self.source):
            return self.function(*args, **kwargs)
