"""torch.compile: attention of torch and JAX is part of a graph, NumPy's stands between two."""

import shutil
import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import heedful
from compilations import counted
from heedful.oracle import FEATURES
from heedful_torch import graph
from heedful_torch.graph import held

HELD = ("torch:sdpa-flash", "torch:sdpa-math", "jax:flash")
OPTIONS = {
    "causal": {"causal": True},
    "mask": {"mask": torch.arange(7) < torch.tensor([[7], [3], [0], [5], [1]])},
    "lengths, lse": {"kv_lengths": torch.tensor([7, 2]), "return_lse": True},
    "bias, window": {"bias": torch.linspace(-1, 1, 35).reshape(5, 7), "window": (3, 1)},
    "bshd, offset": {"layout": "bshd", "causal": True, "q_offset": torch.tensor([2, 0])},
}


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch warns of its own graph breaks and of what it imports.
        warnings.simplefilter("ignore")
        yield


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(layout="bhsd"):
    shapes = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)
    leaves = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    if layout == "bshd":
        leaves = [x.transpose(1, 2) for x in leaves]
    return [x.requires_grad_() for x in leaves]


def attention(backend, **options):
    """With operations on either side, so that there is a graph to be broken."""

    def call(q, k, v):
        results = heedful.attention(2 * q, k, v, backend=backend, **options)
        return results if isinstance(results, tuple) else (results.sin(),)

    return call


def with_gradients(function, leaves):
    results = function(*leaves)
    finite = (torch.where(x.isfinite(), x, 0).square().sum() for x in results)
    return *results, *torch.autograd.grad(sum(finite), leaves)


def check(on, options, rtol=0.0, atol=0.0, **how):
    leaves, call = qkv(options.get("layout", "bhsd")), attention(on, **options)
    got = with_gradients(torch.compile(call, **how), leaves)
    torch.testing.assert_close(
        got, with_gradients(call, leaves), rtol=rtol, atol=atol, check_stride=False
    )


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", HELD)
def test_a_graph_holds_it_forward_and_backward(backend, options, compiler):
    if backend == "torch:sdpa-math":
        options = {name: x for name, x in options.items() if name != "return_lse"}
    check(backend, options, backend=compiler, fullgraph=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("backend", HELD)
def test_inductor(backend):
    options = OPTIONS["mask"] | {"causal": True}
    check(backend, options, rtol=1e-5, atol=1e-5, backend="inductor", fullgraph=True)


def test_the_first_call_of_a_process_may_be_a_compiled_one():
    program = """
import torch, heedful
f = torch.compile(lambda q: heedful.attention(q, q, q), backend="aot_eager", fullgraph=True)
q = torch.ones(1, 2, 4, 8)
assert torch.equal(f(q), heedful.attention(q, q, q))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_what_no_graph_holds_stands_between_two(compiler):
    backend = "numpy:oracle"
    check(backend, {"causal": True, "return_lse": True}, backend=compiler)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    check(backend, {"causal": True}, backend=counter)
    assert counter.frame_count == 2  # q before, out after
    with pytest.raises(
        torch._dynamo.exc.Unsupported,
        match=f"cannot hold {backend}.*choose torch:sdpa-flash or torch:sdpa-math",
    ):
        check(backend, {"causal": True}, backend=compiler, fullgraph=True)


def test_a_graph_holds_the_functions_of_the_core():
    q, k, v = qkv()

    def call(q):
        return heedful.causal_flash_attention(2 * q, k, v, torch.ones(5, 7).int())[0].sin()

    got, expected = torch.compile(call, backend="eager", fullgraph=True)(q), call(q)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert torch.compile(lambda *x: heedful.explain(*x).chosen, backend="eager")(q, k, v)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_graph_is_for_one_choice_of_backend(compiler, monkeypatch):
    class Sevens:
        name = "torch:sevens"

        takes = FEATURES

        def reasons(self, problem):
            return ()

        def run(self, problem, operands):
            return operands.q * 0 + 7, None

    q, _, _ = (x.detach() for x in qkv())
    heedful.register(Sevens())
    try:
        compiled = torch.compile(
            lambda q: heedful.attention(q, q, q), backend=compiler, fullgraph=True
        )
        for _ in range(2):
            assert not (compiled(q) == 7).any()
            with heedful.use_backend("torch:sevens"):
                assert (compiled(q) == 7).all()
        with heedful.use_backend("torch:sdpa-cudnn"), pytest.raises(RuntimeError, match="CUDA GPU"):
            compiled(q)
        torch._dynamo.reset()
        monkeypatch.setenv("HEEDFUL_BACKEND", "torch:sevens")
        monkeypatch.setattr(heedful.dispatch.ambient, "_environment", "torch:sevens")
        assert (compiled(q) == 7).all()
        monkeypatch.delenv("HEEDFUL_BACKEND")
        monkeypatch.setattr(heedful.dispatch.ambient, "_environment", None)
        assert not (compiled(q) == 7).any()
    finally:
        heedful.unregister("torch:sevens")


def test_use_backend_within_what_is_compiled():
    def call(q):
        with heedful.use_backend("torch:sdpa-math"):
            return heedful.attention(2 * q, q, q).sin()

    q, _, _ = qkv()
    torch.testing.assert_close(torch.compile(call, backend="eager")(q), call(q))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [True, None])
def test_other_sizes_and_numbers_are_other_graphs(compiler, dynamic):
    def call(q, scale, q_offset, window):
        return heedful.attention(
            q, q, q, scale=scale, causal=True, q_offset=q_offset, window=window
        )

    compiled = torch.compile(call, backend=compiler, fullgraph=True, dynamic=dynamic)
    for length, scale, q_offset, window in (
        (4, 0.1, 0, (2, None)),
        (5, 0.2, 1, (3, None)),
        (6, 0.3, 2, (1, None)),
        (6, 0.3, 2, (1, None)),
    ):
        q = normal(1, 2, length, 8)
        got, expected = (f(q, scale, q_offset, window) for f in (compiled, call))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_arrays_of_others_get_arrays_of_theirs(array):
    x = array(normal(1, 2, 4, 8).numpy())

    def call(x):
        return heedful.attention(x, x, x, causal=True)

    got, expected = torch.compile(call, backend="eager")(x), call(x)
    assert type(got) is type(expected)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


@pytest.mark.parametrize("backend", HELD)
def test_torch_func_within_what_is_compiled(backend):
    def call(q):
        return heedful.attention(q, q, q, causal=True, backend=backend).square().sum()

    def gradients(q):
        return vmap(grad(call))(2 * q).sin()

    compiled = torch.compile(gradients, backend="aot_eager", fullgraph=True)
    q = normal(3, 2, 4, 8)
    torch.testing.assert_close(compiled(q), gradients(q))


def test_a_compiled_step_compiles_jax_once_and_each_call_runs_what_is_there():
    leaves = qkv()
    step = torch.compile(attention("jax:flash", causal=True), backend="aot_eager", fullgraph=True)
    with_gradients(step, leaves)
    with counted() as compilations:
        for _ in range(3):
            with_gradients(step, leaves)
    assert not compilations


def test_the_backward_pass_of_a_graph_does_not_compute_forward_again():
    """What JAX kept for it crosses the graph as tensors."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        attention("jax:flash"), backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    with_gradients(compiled, qkv())
    of_jax = [
        [n for n in g.graph.nodes if n.target is torch.ops.heedful.jax.default] for g in graphs
    ]
    assert [len(nodes) for nodes in of_jax] == [1, 1]
    forward, backward = (held(nodes[0].args[0]).program for nodes in of_jax)
    assert type(forward).__name__ == "_JaxForward" and type(backward).__name__ == "_JaxPull"


def test_graphs_of_the_same_are_told_by_the_same_numbers():
    q, k, v = qkv()

    def numbers():
        made = make_fx(lambda *x: with_gradients(attention("jax:flash"), x))(q, k, v)
        return [n.args[0] for n in made.graph.nodes if n.target is torch.ops.heedful.jax.default]

    once = numbers()
    assert len(once) == 2 and numbers() == once
    kept = len(graph._held)
    for length in (11, 12, 13):  # asked for shapes alone, nothing is kept
        x = torch.empty(1, 2, length, 8, device="meta")
        heedful.attention(x, x, x, backend="jax:flash")
    assert len(graph._held) == kept


def test_the_operation_passes_torchs_own_check():
    q, k, v = (x.detach() for x in qkv())
    made = make_fx(attention("jax:flash"), tracing_mode="fake")(q, k, v)
    (node,) = (n for n in made.graph.nodes if n.target is torch.ops.heedful.jax.default)
    torch.library.opcheck(torch.ops.heedful.jax.default, (node.args[0], [q, k, v]))


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_for_elsewhere_refuses_what_is_of_this_process(strict):
    class Model(torch.nn.Module):
        def forward(self, q):
            return heedful.attention(q, q, q, backend="jax:flash")

    with pytest.raises(Exception, match="is exporting a program, which cannot hold jax:flash"):
        torch.export.export(Model(), (normal(1, 2, 4, 8),), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    class Model(torch.nn.Module):
        def forward(self, q):
            return heedful.attention(q, q, q, causal=True, backend="torch:sdpa-flash")

    program = torch.export.export(Model(), (normal(1, 2, 4, 8),), strict=strict)
    q = normal(1, 2, 4, 8, seed=5)
    torch.testing.assert_close(program.module()(q), Model()(q), rtol=0, atol=0)
