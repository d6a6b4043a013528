"""Flax's modules with heedful's attention inside: outputs and gradients are those of Flax's own."""

import functools
import inspect
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from threading import Barrier, BrokenBarrierError
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import heedful.flax

FUNCTIONS = [
    (heedful.flax.nnx_attention, nnx.dot_product_attention),
    (heedful.flax.linen_attention, nn.dot_product_attention),
]
BACKENDS = ["jax:flash", "jax:plain"]
# Older modules cannot be asked, though their function can.
CAN_BE_CAUSAL = "is_causal" in inspect.signature(nnx.MultiHeadAttention.__call__).parameters
IS_CAUSAL = [False, True] if CAN_BE_CAUSAL else [False]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def assert_same(got: Any, want: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), got, want)


@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS)
def test_the_parameters_are_those_of_flax(ours: Any, theirs: Any) -> None:
    parameters = dict(inspect.signature(ours).parameters)
    assert parameters.pop("backend").kind is inspect.Parameter.KEYWORD_ONLY
    assert list(parameters) == list(inspect.signature(theirs).parameters)
    for name, parameter in inspect.signature(theirs).parameters.items():
        if name != "promote_dtype":  # there a function of Flax's
            assert parameters[name].default == parameter.default


MASKS = {
    "none": {},
    "causal": {"mask": nn.make_causal_mask(jnp.ones((2, 7)))},  # of floats, as Linen makes it
    "padding": {"mask": np.arange(7) < np.array([4, 7])[:, None, None, None]},
    "one for all": {"mask": jnp.tril(jnp.ones((7, 7), bool))},
    "bias": {"bias": jax.random.normal(jax.random.key(9), (1, 4, 7, 7))},
    "bias for all": {"bias": jax.random.normal(jax.random.key(9), (7, 7))},
}


@pytest.mark.parametrize(
    ("lead", "name"),
    [
        *(((2,), name) for name in MASKS),
        ((), "one for all"),
        ((3, 2), "none"),
        ((3, 2), "bias for all"),
    ],
)
@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS)
def test_the_functions_agree(ours: Any, theirs: Any, lead: tuple[int, ...], name: str) -> None:
    options = MASKS[name]
    q, k, v = (normal(i, *lead, 7, 4, 8) for i in range(3))

    def loss(attend: Any, *qkv: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attend(*qkv, **options, deterministic=True)))

    got, want = (
        jax.value_and_grad(functools.partial(loss, attend), (0, 1, 2))(q, k, v)
        for attend in (ours, functools.partial(theirs, dropout_rate=0.0))
    )
    assert_same(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", IS_CAUSAL)
def test_a_module_of_nnx_agrees(backend: str, is_causal: bool) -> None:
    def module(attend: Any) -> nnx.MultiHeadAttention:
        return nnx.MultiHeadAttention(
            num_heads=4, in_features=16, decode=False, attention_fn=attend, rngs=nnx.Rngs(0)
        )

    x, mask = normal(5, 2, 7, 16), np.arange(7) < np.array([5, 7])[:, None, None, None]

    def loss(module: nnx.MultiHeadAttention) -> jax.Array:
        return jnp.sum(jnp.sin(module(x, mask=mask, **({"is_causal": True} if is_causal else {}))))

    ours = functools.partial(heedful.flax.nnx_attention, backend=backend)
    want, gradients = nnx.value_and_grad(loss)(module(nnx.dot_product_attention))
    got, found = nnx.value_and_grad(loss)(module(ours))
    assert_same(
        (got, nnx.to_pure_dict(nnx.state(found))), (want, nnx.to_pure_dict(nnx.state(gradients)))
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_of_linen_is_handed_the_mask_and_agrees(backend: str) -> None:
    ours = functools.partial(heedful.flax.linen_attention, backend=backend)
    x = normal(5, 2, 7, 16)
    mask = nn.make_causal_mask(x[..., 0])
    modules = [
        nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attend)
        for attend in (nn.dot_product_attention, ours)
    ]
    variables = modules[0].init(jax.random.key(0), x, mask=mask)

    def loss(module: nn.Module, variables: Any) -> jax.Array:
        return jnp.sum(jnp.sin(module.apply(variables, x, mask=mask)))

    want, got = (jax.value_and_grad(functools.partial(loss, m))(variables) for m in modules)
    assert_same(got, want)


def test_linens_cache_decodes_the_same() -> None:
    x = normal(5, 2, 5, 16)
    outputs = []
    for attend in (nn.dot_product_attention, heedful.flax.linen_attention):
        module = nn.MultiHeadDotProductAttention(num_heads=4, decode=True, attention_fn=attend)
        variables = module.init(jax.random.key(0), x)
        for i in range(3):
            out, cache = module.apply(variables, x[:, i : i + 1], mutable=["cache"])
            variables = variables | cache
            outputs.append(out)
    assert_same(outputs[3:], outputs[:3])


@pytest.mark.parametrize("make", [nnx, nn], ids=["nnx", "linen"])
def test_dropout_is_repeated_by_its_key(make: Any) -> None:
    attend = heedful.flax.nnx_attention if make is nnx else heedful.flax.linen_attention
    q = normal(0, 2, 7, 4, 8)
    asked = {"dropout_rate": 0.5, "broadcast_dropout": False}
    one, again, other = (attend(q, q, q, dropout_rng=jax.random.key(i), **asked) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    assert_same(attend(q, q, q, deterministic=True, **asked), attend(q, q, q))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (
            {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)},
            "broadcast_dropout must be False",
        ),
        ({"dropout_rate": 0.5, "broadcast_dropout": False}, "needs dropout_rng"),
        ({"module": object()}, "sow_weights"),
        ({"einsum_dot_general": jax.lax.dot_general}, "einsum_dot_general must be None"),
        ({"mask": jnp.ones((2, 4, 7, 6), bool)}, "mask"),
    ],
)
def test_what_cannot_be_honoured_is_refused(asked: dict[str, Any], why: str) -> None:
    q = normal(0, 2, 7, 4, 8)
    with pytest.raises(ValueError, match=why):
        heedful.flax.linen_attention(q, q, q, **asked)


def test_a_dtype_casts() -> None:
    q = normal(0, 2, 7, 4, 8)
    out = heedful.flax.nnx_attention(q, q, q, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, heedful.flax.nnx_attention(*[q.astype(jnp.bfloat16)] * 3))


# A backend for each module


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.MultiHeadDotProductAttention(
            2, name="attn", attention_fn=heedful.flax.linen_attention
        )(x)


class Decoder(nn.Module):
    block: Any = Block
    layers: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = self.block(name=f"layers_{i}")(x)
        return x


X = normal(0, 2, 7, 16)


def chosen(record: list[Any]) -> list[tuple[str, str]]:
    return [(choice.part, choice.backend) for choice in record]


def compiled_by_its_method() -> Any:
    class Block(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.MultiHeadDotProductAttention(
                2, name="attn", attention_fn=heedful.flax.linen_attention
            )(x)

    return Block


BLOCKS = {  # made in each test, as they keep what they compiled
    "its own": lambda: Block,
    "remat": lambda: nn.remat(Block),
    "jit": lambda: nn.jit(Block),
    "jit of the method": compiled_by_its_method,
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("compiled", [True, False])
def test_modules_of_linen_take_what_is_chosen_for_their_names(kind: str, compiled: bool) -> None:
    block = BLOCKS[kind]()
    model = Decoder(block)
    variables = model.init(jax.random.key(0), X)
    apply = jax.jit(model.apply) if compiled else model.apply
    own = apply(variables, X)
    for choices, backends in (
        ({"layers_1": "jax:flash", "*": "jax:plain"}, ("jax:plain", "jax:flash")),
        ({"*.attn": "jax:flash"}, ("jax:flash", "jax:flash")),
    ):
        for again in (False, True):
            with heedful.flax.linen_per_module(choices), heedful.recording() as record:
                assert_same(apply(variables, X), own)
            expected = list(zip(("layers_0.attn", "layers_1.attn"), backends, strict=True))
            kept = again and (compiled or "jit" in kind)
            assert chosen(record) == ([] if kept else expected)
    assert heedful.explain(*[X[None]] * 3).why.startswith("the automatic choice")


def test_what_no_module_of_linen_is_named_is_said_at_the_end() -> None:
    model = Decoder()
    variables = model.init(jax.random.key(0), X)
    with (
        pytest.raises(
            ValueError, match=r"is named 'layer_1'\. There are layers_0, layers_0\.attn,"
        ),
        heedful.flax.linen_per_module({"layer_1": "jax:flash"}),
    ):
        model.apply(variables, X)
    with pytest.raises(ValueError, match="no backend is named 'jax:flesh'"):
        heedful.flax.linen_per_module({"layers_1": "jax:flesh"}).__enter__()
    with heedful.flax.linen_per_module({"layers_1": "jax:flash", "*": "jax:plain"}):
        pass  # nothing has run


def test_what_one_model_has_another_may_not_have() -> None:
    choices = {"layers_1": "jax:plain"}
    for model, says in ((Decoder(), None), (Block(), "is named 'layers_1'. There are attn")):
        variables = model.init(jax.random.key(0), X)
        said = pytest.raises(ValueError, match=re.escape(says)) if says else nullcontext()
        with said, heedful.flax.linen_per_module(choices):
            model.apply(variables, X)


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_a_deeper_model_has_one_of_its_class_may_not_have(kind: str) -> None:
    block, choices = BLOCKS[kind](), {"layers_1": "jax:plain"}
    for layers in (2, 2, 1, 2):  # of those that are compiled the second is not traced
        model = Decoder(block, layers)
        variables = model.init(jax.random.key(0), X)
        said = (
            nullcontext() if layers == 2 else pytest.raises(ValueError, match="is named 'layers_1'")
        )
        with said, heedful.flax.linen_per_module(choices):
            model.apply(variables, X)


class Stack(nnx.Module):
    def __init__(self, attend: Any = heedful.flax.nnx_attention) -> None:
        self.layers = nnx.List(
            [
                nnx.MultiHeadAttention(2, 16, decode=False, attention_fn=attend, rngs=nnx.Rngs(i))
                for i in range(2)
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("compiled", ["no", "nnx", "jax"])
def test_modules_of_nnx_take_what_is_chosen_for_their_names(compiled: str) -> None:
    model = Stack()
    call = {
        "no": model,
        "nnx": functools.partial(nnx.jit(Stack.__call__), model),
        "jax": jax.jit(model),
    }[compiled]
    own = call(X)
    choices = {"layers.1": "jax:flash", "*": "jax:plain"}
    for again in (False, True):
        with heedful.flax.nnx_per_module(model, choices), heedful.recording() as record:
            assert_same(call(X), own)
        expected = [("layers.0", "jax:plain"), ("layers.1", "jax:flash")]
        assert chosen(record) == ([] if again and compiled != "no" else expected)
    assert model.layers[1].attention_fn is heedful.flax.nnx_attention
    with heedful.use_backend("jax:plain"), heedful.recording() as record:
        assert_same(model(X), own)
    assert chosen(record) == [("", "jax:plain")] * 2


def test_a_model_that_another_thread_has_open_is_refused_and_left_as_it_was() -> None:
    model = Stack()
    with heedful.flax.nnx_per_module(model, {"*": "jax:plain"}):
        with ThreadPoolExecutor(1) as other, pytest.raises(RuntimeError, match="another thread"):
            other.submit(heedful.flax.nnx_per_module(model, {"*": "jax:flash"}).__enter__).result()
        with heedful.flax.nnx_per_module(model, {"*": "jax:flash"}), heedful.recording() as record:
            model(X)
        assert chosen(record) == [("layers.0", "jax:flash"), ("layers.1", "jax:flash")]
        with heedful.recording() as record:
            model(X)
        assert chosen(record) == [("layers.0", "jax:plain"), ("layers.1", "jax:plain")]
    assert model.layers[0].attention_fn is heedful.flax.nnx_attention


def test_of_two_threads_at_once_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, both, part = Stack(), Barrier(2), heedful.flax.ambient.part_of_the_model

    def as_slow_as_the_other(*names: str) -> str:
        with suppress(BrokenBarrierError):
            both.wait(timeout=0.5)
        return part(*names)

    def opened(name: str) -> bool:
        with ExitStack() as block:
            try:
                block.enter_context(heedful.flax.nnx_per_module(model, {"*": name}))
            except RuntimeError:
                return False
            finally:
                with suppress(BrokenBarrierError):
                    at_the_end.wait(timeout=60)
        return True

    at_the_end = Barrier(2)
    monkeypatch.setattr(heedful.flax.ambient, "part_of_the_model", as_slow_as_the_other)
    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(opened, BACKENDS)) == [False, True]
    assert all(layer.attention_fn is heedful.flax.nnx_attention for layer in model.layers)


class Twice(nnx.Module):
    """One layer under two names, and a way back to the model."""

    def __init__(self) -> None:
        self.a = Stack()
        self.b = nnx.data([self.a])
        self.me = nnx.data({"again": self})

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.b[0](self.a(x))


@pytest.mark.parametrize("name", ["a", "b", "b.0.layers", "a.layers.1"])
def test_a_module_of_nnx_with_two_names_has_one_choice(name: str) -> None:
    with pytest.raises(ValueError, match=r"a\.layers\.\d and b\.0\.layers\.\d are one module"):
        heedful.flax.nnx_per_module(Twice(), {name: "jax:flash"}).__enter__()


@pytest.mark.parametrize("choices", [{"a": "jax:flash", "b": "jax:flash"}, {"*": "jax:flash"}])
def test_a_module_of_nnx_with_two_names_takes_what_is_chosen_for_both(
    choices: dict[str, str],
) -> None:
    model = Twice()
    own = model(X)
    with heedful.flax.nnx_per_module(model, choices), heedful.recording() as record:
        assert_same(model(X), own)
    assert chosen(record) == [("a.layers.0", "jax:flash"), ("a.layers.1", "jax:flash")] * 2
    assert model.a.layers[0].attention_fn is heedful.flax.nnx_attention


def test_what_nnx_cannot_honour_is_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"is named 'layer\.1'\. There are layers\.0, layers\.1\."):
        heedful.flax.nnx_per_module(Stack(), {"layer.1": "jax:flash"}).__enter__()
    with pytest.raises(ValueError, match=r"layers\.0 computes by nnx\.dot_product_attention"):
        heedful.flax.nnx_per_module(
            Stack(nnx.dot_product_attention), {"*": "jax:flash"}
        ).__enter__()
