"""Functions of pytrees across frameworks: structure and statics; derivatives are test_autograd.py's."""

import dataclasses
import threading
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from compilations import counted
from heedful_torch import CopyWarning, as_jax, as_torch, to_jax
from heedful_torch.pytrees import _Static


class Line(NamedTuple):
    slope: object
    offset: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    values: object
    name: str = dataclasses.field(metadata={"static": True})


def in_jax(parameters, x, *, power=2, kind="line"):
    """One function, in JAX; beside it the same in torch."""
    line, extra = parameters["line"], parameters["extra"][0]
    y = (x @ line.slope + line.offset) ** power + jnp.sin(extra)
    return {"y": y, "mean": (y.mean(),), "kind": kind, "none": None, "length": x.shape[0]}


def in_torch(parameters, x, *, power=2, kind="line"):
    line, extra = parameters["line"], parameters["extra"][0]
    y = (x @ line.slope + line.offset) ** power + torch.sin(extra)
    return {"y": y, "mean": (y.mean(),), "kind": kind, "none": None, "length": x.shape[0]}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors():
    line = Line(normal(3, 4), normal(1, 4, seed=1))
    return {"line": line, "extra": [normal(5, 4, seed=2)]}, normal(5, 3, seed=3)


def recorded():
    return jax.tree.map(lambda tensor: tensor.requires_grad_(), tensors())


def arrays():
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), tensors())


def close(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if isinstance(other, torch.Tensor | jax.Array):
            one, other = (x.detach() if isinstance(x, torch.Tensor) else x for x in (one, other))
            np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-11, atol=1e-12)
        else:
            assert one == other and type(one) is type(other)


# ------------------------------------------------------------------------------------ JAX in torch


@pytest.mark.parametrize("options", [{}, {"power": 3, "kind": "cubic"}], ids=["default", "named"])
def test_as_torch_gives_values_structure_and_gradients(options, x64):
    got = as_torch(in_jax)(*recorded(), **options)
    close(got, in_torch(*tensors(), **options))
    assert type(got["y"]) is torch.Tensor and got["y"].requires_grad
    ours, theirs = recorded(), recorded()
    as_torch(in_jax)(*ours, **options)["y"].sin().sum().backward()
    in_torch(*theirs, **options)["y"].sin().sum().backward()
    gradients = [jax.tree.map(lambda tensor: tensor.grad, given) for given in (ours, theirs)]
    close(*gradients)


def test_as_torch_is_differentiated_to_second_order(x64):
    def y(slope, x):
        return as_torch(in_jax)({"line": Line(slope, slope[:1]), "extra": [x[:, :1]]}, x)["y"]

    given = (normal(3, 4).requires_grad_(), normal(5, 3).requires_grad_())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CopyWarning)

        def copying(slope, x):
            parameters = {"line": Line(slope, slope[:1]), "extra": [x[:, :1]]}
            return as_torch(in_jax, copy=None)(parameters, x)["y"]

        assert torch.autograd.gradcheck(copying, given)
        assert torch.autograd.gradgradcheck(copying, given)
    with pytest.raises(ValueError, match="leave gaps"):  # by default nothing is copied
        y(*given)


def test_as_torch_under_torch_func(x64):
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch's own, in hessian
    function = as_torch(in_jax)
    parameters, x = tensors()
    xs = normal(6, 5, 3)
    close(
        torch.func.vmap(lambda p, x: function(p, x)["y"], (None, 0))(parameters, xs),
        torch.stack([in_torch(parameters, x)["y"] for x in xs]),
    )
    losses = [lambda p, f=f: f(p, x, power=3)["mean"][0] for f in (function, in_torch)]
    close(*(torch.func.grad(loss)(parameters) for loss in losses))
    close(*(torch.func.hessian(loss)(parameters) for loss in losses))
    close(*(torch.func.jvp(loss, (parameters,), (parameters,)) for loss in losses))


def test_one_compilation_a_structure_and_shape_and_none_a_call():
    def scaled(tree, factor):
        return jax.tree.map(lambda x: x * factor, tree)

    def calls(n, factor, build):
        x = torch.ones(n, requires_grad=True)
        jax.tree.leaves(as_torch(scaled)(build(x), factor))[0].sum().backward()

    def in_dict(x):
        return {"x": x}

    def in_list(x):
        return [x]

    calls(3, 2.0, in_dict)
    with counted() as counts:
        for _ in range(5):
            calls(3, 2.0, in_dict)
    assert not counts
    for anew in ((4, 2.0, in_dict), (3, 5.0, in_dict), (3, 2.0, in_list), (3, 2, in_dict)):
        with counted() as counts:
            calls(*anew)
        assert counts["compiled"] >= 1
        with counted() as counts:
            calls(*anew)
        assert not counts


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, True), (1, 1.0), (0.0, -0.0), (np.float32(1), 1.0), (1.0, 1 + 0j)],
    ids=repr,
)
def test_numbers_that_are_equal_and_not_the_same_are_told_apart(one, other):
    assert one == other and _Static.of(one) != _Static.of(other)
    function = as_torch(lambda x, number: (x, repr(number)))
    assert [function(torch.ones(2), n)[1] for n in (one, other)] == [repr(one), repr(other)]


@dataclasses.dataclass(frozen=True)
class Option:
    value: object
    note: object = dataclasses.field(default=None, compare=False)


class Options(Option):
    """With a field that has no hash."""

    def __hash__(self):
        return 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Option(1), Option(1.0)),
        (Option((0.0,)), Option((-0.0,))),
        (Option(Option(1)), Option(Option(True))),
        (frozenset({True}), frozenset({1.0})),
        (frozenset({(1, "a"), (1.0, "b")}), frozenset({(1.0, "a"), (1, "b")})),
        (frozenset({Option(1)}), frozenset({Option(1.0)})),
    ],
    ids=["field", "tuple in a field", "nested", "frozenset", "paired", "both"],
)
def test_numbers_within_a_static_leaf_are_told_apart(one, other):
    assert one == other and _Static.of(one) != _Static.of(other)
    function = as_torch(lambda x, option: (x, repr(option)))
    assert [function(torch.ones(2), x)[1] for x in (one, other)] == [repr(one), repr(other)]


def test_what_is_compared_by_identity_is_not_looked_into():
    @dataclasses.dataclass(eq=False)
    class Node:
        parent: object = None

    node = Node()
    node.parent = node
    assert _Static.of(node) == _Static.of(node) != _Static.of(Node())
    assert as_torch(lambda x, node: x + 1)(torch.ones(1), node).item() == 2


@pytest.mark.parametrize(
    "option",
    [
        lambda: Option(1, note=[1]),
        lambda: Option((1, -0.0, Option("a"))),
        lambda: Options([1.0]),
        lambda: frozenset({1, "a", None}),
        lambda: Option,
    ],
    ids=["not compared", "nested", "own hash", "frozenset", "class"],
)
def test_equal_static_leaves_compile_once(option):
    function = as_torch(lambda x, option: x * 2)
    function(torch.ones(2), option())
    with counted() as counts:
        function(torch.ones(2), option())
    assert not counts


def test_the_same_nan_compiles_once():
    function = as_torch(lambda x, number: x + number)
    function(torch.ones(2), float("nan"))
    with counted() as counts:
        function(torch.ones(2), float("nan"))
    assert not counts


def test_statics_of_any_hashable_kind():
    def apply(function, x, dtype, options):
        return function(x).astype(dtype), options

    got = as_torch(apply)(jnp.sin, torch.ones(2), jnp.bfloat16, ("a", None, b"b"))
    assert got[0].dtype == torch.bfloat16 and got[1] == ("a", None, b"b")


def test_registered_classes_are_pytrees():
    def double(given):
        return Registered(given.values * 2, given.name + "!")

    for got in (
        as_torch(double)(Registered(torch.ones(2), "a")),
        as_jax(double)(Registered(jnp.ones(2), "a")),
    ):
        assert type(got) is Registered and got.name == "a!" and got.values.tolist() == [2, 2]


def test_a_function_without_arrays_computes_where_jax_does():
    assert as_torch(lambda n: (jnp.arange(n), None))(3)[0].tolist() == [0, 1, 2]
    assert as_jax(lambda n: torch.ones(n))(3).tolist() == [1, 1, 1]


def test_tensors_without_data_get_trees_without_data():
    got = as_torch(in_jax)(*jax.tree.map(lambda x: x.float().to("meta"), tensors()))
    assert got["y"].is_meta and got["y"].shape == (5, 4) and got["length"] == 5


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_stays_out_of_as_torch():
    warnings.simplefilter("ignore")  # torch.compile warns of its own graph breaks
    function = as_torch(lambda tree, *, factor: {"y": jnp.sin(tree["x"]) * factor})

    def around(x):
        return function({"x": x * 3}, factor=2)["y"] + 1

    x = torch.ones(3, requires_grad=True)
    torch.testing.assert_close(torch.compile(around, backend="eager")(x), torch.sin(x * 3) * 2 + 1)
    torch._dynamo.reset()  # it would take the broken graph again
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(around, backend="eager", fullgraph=True)(x)


class Unhashable:
    __hash__ = None

    def __call__(self, x):
        return x


REFUSED_BY_AS_TORCH = {
    "jax array": (jnp.sin, lambda: jnp.ones(2), r"expected torch tensors.*to_torch\(array\)"),
    "numpy array": (jnp.sin, lambda: np.ones(2), r"Got ndarray.*torch.from_numpy"),
    "set": (lambda x: x, lambda: {1, 2}, r"or hashable. Got set. Register its class"),
    "float64": (jnp.sin, lambda: torch.ones(2).double(), "float64 while JAX's x64 mode is off"),
    "sparse": (jnp.sin, lambda: torch.ones(2, 2).to_sparse(), r"to_dense\(\)"),
    "complex32": (jnp.sin, lambda: torch.zeros(2, dtype=torch.complex32), "dtype torch.complex32"),
    "result": (lambda x: {x.shape}, lambda: torch.ones(2), "Got set. Return a tuple or dict"),
    "object": (lambda x: Line, lambda: torch.ones(2), "arrays, numbers and strings. Got type"),
}


@pytest.mark.parametrize(
    ("function", "given", "message"), REFUSED_BY_AS_TORCH.values(), ids=REFUSED_BY_AS_TORCH
)
def test_as_torch_refuses_what_it_would_have_to_guess(function, given, message):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ComplexHalf")
        given = given()
    with pytest.raises(TypeError, match=message):
        as_torch(function)(given)


@pytest.mark.parametrize("twin", [as_torch, as_jax])
def test_a_function_must_be_one_and_have_a_hash(twin):
    with pytest.raises(TypeError, match=r"expected a function. Got int"):
        twin(3)
    with pytest.raises(TypeError, match=r"a Unhashable that has none. If it is a pytree"):
        twin(Unhashable())


def test_writing_between_the_passes_is_noticed_by_torch():
    x = torch.ones(2, requires_grad=True)
    y = as_torch(lambda tree: {"y": jnp.sin(tree["x"])})({"x": x})["y"]
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ------------------------------------------------------------------------------------ torch in JAX


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint])
def test_as_jax_gives_values_structure_and_gradients(transform, x64):
    def loss(function):
        def arrays_of(*given):
            results = function(*given)
            return results["y"], results["mean"]

        return lambda *given: jnp.sum(jnp.sin(transform(arrays_of)(*given)[0]))

    close(as_jax(in_torch)(*arrays()), in_jax(*arrays()))
    close(*(jax.value_and_grad(loss(f), (0, 1))(*arrays()) for f in (as_jax(in_torch), in_jax)))


def test_as_jax_takes_keywords_that_jit_calls_static(x64):
    def y(function):
        return jax.jit(
            lambda *given, power: function(*given, power=power)["y"], static_argnames="power"
        )

    close(y(as_jax(in_torch))(*arrays(), power=3), y(in_jax)(*arrays(), power=3))


def test_as_jax_under_vmap_scan_and_grad_of_grad(x64):
    parameters, _ = arrays()
    xs = jnp.asarray(normal(6, 5, 3).numpy())

    def results(function):
        def mean(x):
            return function(parameters, x)["mean"][0]

        def step(carry, x):
            return carry + mean(x), mean(x)

        return (
            jax.vmap(mean)(xs),
            jax.vmap(jax.grad(mean))(xs),
            jax.lax.scan(step, jnp.zeros(()), xs),
            jax.grad(lambda x: jax.grad(lambda x: jnp.sin(mean(x)))(x).sum())(xs[0]),
        )

    close(results(as_jax(in_torch)), results(in_jax))


def test_the_callers_autocast_does_not_matter():
    x = jnp.full((4, 4), 1.01)
    with torch.autocast("cpu", torch.bfloat16):
        got = jax.block_until_ready(as_jax(lambda x: x @ x)(x))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, x @ x, rtol=1e-6)


@pytest.mark.parametrize(
    "default", [lambda: jax.devices("cpu")[0], lambda: "cpu"], ids=["device", "name"]
)
def test_torch_runs_without_data_where_jax_computes_by_default(default, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = []

    def look(x):
        found.append(x.device.type)
        return x

    with jax.default_device(default()):
        jax.jit(as_jax(look)).lower(jnp.ones(2))
    assert found == ["cpu"]


def test_shapes_are_found_once_for_each_structure_and_shape():
    fakes = []

    def spy(tree, factor):
        fakes.append(type(tree["x"]).__name__ == "FakeTensor")
        return tree["x"] * factor

    function = as_jax(spy)
    for n in (3, 3, 3, 4):
        jax.block_until_ready(function({"x": jnp.ones(n)}, 2.0))
    assert sum(fakes) == 2 and len(fakes) == 6
    with counted() as counts:
        jax.block_until_ready(function({"x": jnp.ones(3)}, 2.0))
    assert not counts


NEEDS_DATA = {
    "item": lambda x: x * x.max().item(),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "nonzero": lambda x: x[x > 0],
}


@pytest.mark.parametrize("function", NEEDS_DATA.values(), ids=NEEDS_DATA)
def test_shapes_that_need_data_are_asked_for(function):
    x = jnp.arange(1.0, 4.0)
    with pytest.raises(TypeError, match=r"(?s)aten\..* needs their data.*result_shapes="):
        as_jax(function)(x)
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    expected = np.asarray(function(torch.arange(1.0, 4.0)))
    np.testing.assert_array_equal(as_jax(function, result_shapes=shape)(x), expected)


def test_an_error_without_data_says_that_there_was_none():
    with pytest.raises(RuntimeError, match="result_shapes=") as error:
        as_jax(lambda x: torch.from_numpy(x.numpy()))(jnp.ones(3))
    assert "numpy" in str(error.value)


def test_result_shapes_may_be_a_function_of_the_arguments():
    function = as_jax(
        lambda tree, n: (tree["x"].repeat(n),),
        result_shapes=lambda tree, n: (
            jax.ShapeDtypeStruct((n * tree["x"].shape[0],), tree["x"].dtype),
        ),
    )
    assert function({"x": jnp.ones(2)}, 3)[0].shape == (6,)


@pytest.mark.parametrize("shapes", [(3,), 3, jnp.ones(3), "x"], ids=repr)
def test_result_shapes_are_shapes(shapes):
    with pytest.raises(TypeError, match=r"expected result_shapes to be a jax.ShapeDtypeStruct"):
        as_jax(torch.sin, result_shapes=shapes)(jnp.ones(3))


def test_results_of_another_structure_than_promised_are_an_error():
    function = as_jax(lambda x: (x,), result_shapes={"y": jax.ShapeDtypeStruct((3,), jnp.float32)})
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"to return \{'y': array\}.*Got \(array,\)"
    ):
        jax.block_until_ready(function(jnp.ones(3)))


REFUSED_BY_AS_JAX = {
    "key": (torch.sin, lambda: jax.random.key(0), "arguments that torch can hold. Got key<fry>"),
    "int64": (
        lambda x: x.argmax(),
        lambda: jnp.ones(2),
        r"JAX can hold. Got int64\[\] while JAX's x64 mode is off. Cast it",
    ),
    "list": (lambda x: {1}, lambda: jnp.ones(2), "numbers and strings. Got set"),
}


@pytest.mark.parametrize(
    ("function", "given", "message"), REFUSED_BY_AS_JAX.values(), ids=REFUSED_BY_AS_JAX
)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_as_jax_refuses_what_it_would_have_to_guess(function, given, message, transform):
    with pytest.raises(TypeError, match=message):
        transform(as_jax(function))(given())


def test_as_jax_is_not_handed_tensors():
    # They have a hash, and would count as static.
    with pytest.raises(TypeError, match=r"expected JAX arrays.*to_jax\(tensor\)"):
        as_jax(torch.sin)(torch.ones(2))


def test_numpys_arrays_are_what_jax_makes_of_them():
    got = as_jax(lambda x, y: x + y)(np.arange(3.0), np.float32(1))
    assert got.dtype == jnp.float32 and got.tolist() == [1, 2, 3]


def test_there_and_back(x64):
    parameters, x = recorded()
    close(as_torch(as_jax(in_torch))(parameters, x)["y"], in_torch(parameters, x)["y"])
    both = torch.func.vmap(torch.func.grad(lambda x: as_torch(as_jax(torch.sin))(x).sum()))
    close(both(normal(4, 3)), torch.cos(normal(4, 3)))


# ------------------------------------------------------------------------------------------ modules


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, x, *, factor=1.0):
        return {"y": self.second(torch.tanh(self.first(x))) * self.scale * factor}


def module(kind=Tied):
    torch.manual_seed(0)
    return kind()


def test_a_module_is_a_function_of_its_parameters():
    torch_module, x = module(), normal(5, 4).float()
    apply, parameters = as_jax(torch_module)
    assert parameters.keys() == {"first.weight", "first.bias", "second.bias"}

    def loss(parameters, x):
        return jnp.sum(jnp.sin(apply(parameters, x, factor=2.0)["y"]))

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(parameters, to_jax(x))
    expected = torch_module(x.requires_grad_(), factor=2.0)["y"].sin().sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    theirs = {name: p.grad.numpy() for name, p in torch_module.named_parameters()}
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5),
        gradients,
        (theirs, x.grad.numpy()),
    )


def test_a_step_in_jax_leaves_the_module_as_it_is():
    torch_module = module()
    before = {name: p.detach().clone() for name, p in torch_module.named_parameters()}
    apply, parameters = as_jax(torch_module)
    for name, array in parameters.items():  # the module's own memory
        assert (
            array.unsafe_buffer_pointer() == dict(torch_module.named_parameters())[name].data_ptr()
        )
    x = jnp.ones((2, 4))

    @jax.jit
    def step(parameters):
        gradients = jax.grad(lambda p: (apply(p, x)["y"] ** 2).sum())(parameters)
        return jax.tree.map(lambda p, g: p - 0.01 * g, parameters, gradients)

    def loss(parameters):
        return float((apply(parameters, x)["y"] ** 2).sum())

    losses = [loss(parameters)]
    for _ in range(5):
        parameters = step(parameters)
        losses.append(loss(parameters))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    for name, parameter in torch_module.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)
        assert parameter.grad is None


def test_ensembles_of_a_module_by_vmap():
    apply, parameters = as_jax(module())
    several = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), parameters)
    x = jnp.ones((2, 4))
    got = jax.vmap(apply, (0, None))(several, x)["y"]
    np.testing.assert_allclose(got[0], apply(parameters, x)["y"], rtol=1e-6)
    np.testing.assert_allclose(
        got[1], apply(jax.tree.map(lambda p: 2 * p, parameters), x)["y"], rtol=1e-6
    )


@pytest.mark.parametrize("wrong", [{}, {"first.weight": 1}, [1]], ids=repr)
def test_parameters_are_those_of_the_module(wrong):
    apply, _ = as_jax(module())
    with pytest.raises(TypeError, match=r"dict of \['first.bias', .*Call apply\(parameters"):
        apply(wrong, jnp.ones((2, 4)))


@pytest.mark.parametrize(
    "normalise",
    [torch.nn.BatchNorm1d, lambda n: torch.nn.InstanceNorm1d(n, track_running_stats=True)],
    ids=["batch", "instance"],
)
def test_a_module_that_writes_its_buffers_is_refused_before_it_does(normalise):
    torch_module = normalise(3)
    apply, parameters = as_jax(torch_module)
    x = jnp.arange(30.0).reshape(2, 3, 5)
    with pytest.raises(RuntimeError, match=r"only reads its buffers.*module.eval\(\)"):
        apply(parameters, x)
    assert torch_module.running_mean.tolist() == [0, 0, 0]
    torch_module.eval()
    assert apply(parameters, x).shape == (2, 3, 5)


def test_dropout_has_no_gradient_until_it_is_switched_off():
    torch_module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    apply, parameters = as_jax(torch_module)
    x = jnp.ones((8, 4))

    def gradient():
        return jax.block_until_ready(jax.grad(lambda p: apply(p, x).sum())(parameters))

    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"draws from torch's random.*module.eval\(\)"
    ):
        gradient()
    torch_module.eval()
    np.testing.assert_allclose(gradient()["0.bias"], np.full(4, 8.0))


class Recomputing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def test_a_module_that_recomputes_its_activations_is_refused():
    # They would be recomputed by the module's own parameters: gradients of another function.
    apply, parameters = as_jax(module(Recomputing))
    x = jnp.ones((2, 4))
    apply(parameters, x).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"let JAX recompute: jax.checkpoint"):
        jax.block_until_ready(jax.grad(lambda p: apply(p, x).sum())(parameters))
    inner, parameters = as_jax(module(Recomputing).inner)
    whole, recomputed = (
        jax.grad(lambda p, f=f: f(p, x).sum())(parameters) for f in (inner, jax.checkpoint(inner))
    )
    jax.tree.map(np.testing.assert_array_equal, whole, recomputed)


class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        time.sleep(1e-3)  # another thread's turn
        return x * self.weight


def test_threads_do_not_see_each_others_parameters():
    apply, parameters = as_jax(Slow())
    x, got = jnp.ones(4), {}

    def work(factor):
        mine = jax.tree.map(lambda p: p * factor, parameters)
        got[factor] = {float(apply(mine, x)[0]) for _ in range(20)}

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert got == {factor: {factor} for factor in (0.0, 1.0, 2.0, 3.0)}


def test_parameters_that_jax_cannot_share_are_copied_aloud():
    torch_module = torch.nn.Linear(4, 4, bias=False)
    torch_module.weight = torch.nn.Parameter(torch.ones(4, 8)[:, ::2])
    with pytest.warns(CopyWarning, match="leave gaps"):
        apply, parameters = as_jax(torch_module)
    assert apply(parameters, jnp.ones((1, 4))).tolist() == [[4, 4, 4, 4]]
