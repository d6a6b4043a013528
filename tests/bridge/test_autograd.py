"""Functions across frameworks: values and gradients of every order, and whose memory is whose."""

import dataclasses
import threading
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads
from torch.fx.experimental.proxy_tensor import make_fx

from compilations import counted
from heedful_torch import autograd
from heedful_torch.autograd import jax_in_torch, torch_in_jax
from heedful_torch.dlpack import CopyWarning


def softmax_jax(x, w):
    """Two outputs, matrix (n, m) and vector (n,), neither linear in the inputs x (n, k) and w (k, m)."""
    scores = x @ w
    return jax.nn.softmax(scores), jax.nn.logsumexp(scores, axis=-1)


def softmax_torch(x, w):
    scores = x @ w
    return scores.softmax(-1), scores.logsumexp(-1)


def softmax_shapes(x, w):
    n, m = x.shape[0], w.shape[1]
    return jax.ShapeDtypeStruct((n, m), x.dtype), jax.ShapeDtypeStruct((n,), x.dtype)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def pair(dtype=torch.float64):
    return normal(5, 3, dtype=dtype).requires_grad_(), normal(
        3, 4, seed=1, dtype=dtype
    ).requires_grad_()


@jax.custom_vjp
def root_as_residual(x):
    """A square root whose backward pass reads its own output, as flash attention's does."""
    return (jnp.sqrt(x),)


def root_and_residual(x):
    root = jnp.sqrt(x)
    return (root,), root


root_as_residual.defvjp(root_and_residual, lambda root, cotangents: (cotangents[0] / (2 * root),))


# ----------------------------------------------------------------------------- JAX in torch: values


def test_outputs_are_ordinary_tensors_equal_to_torchs():
    x, w = normal(5, 3, dtype=torch.float32), normal(3, 4, dtype=torch.float32)
    for got, expected in zip(jax_in_torch(softmax_jax)(x, w), softmax_torch(x, w), strict=True):
        assert type(got) is torch.Tensor and not got.requires_grad
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_kept_in_outputs_and_gradients(dtype, x64):
    x = torch.tensor([1.0, 2.0, 4.0], dtype=dtype, requires_grad=True)
    (out,) = jax_in_torch(lambda x: (x * x,))(x)
    out.backward(torch.ones_like(out))
    assert out.dtype == x.grad.dtype == dtype
    assert out.tolist() == [1, 4, 16] and x.grad.tolist() == [2, 4, 8]


def test_outputs_are_fresh_memory_even_if_an_input_or_a_constant_is_returned():
    constant = jnp.ones(3)
    x = torch.arange(3.0)
    outputs = jax_in_torch(lambda x: (x, x, x.reshape(3, 1), constant))(x)
    recorded = jax_in_torch(lambda x: (x, x, x.reshape(3, 1), constant))(x.clone().requires_grad_())
    for output in (*outputs, *(output.detach() for output in recorded)):
        output.zero_()
    assert x.tolist() == [0, 1, 2] and constant.tolist() == [1, 1, 1]
    assert len({output.data_ptr() for output in (*outputs, *recorded)}) == 8


def test_inputs_that_jax_cannot_share_follow_the_copy_argument():
    packed = normal(5, 2, 3, dtype=torch.float32).requires_grad_()
    w = normal(3, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="leave gaps"):
        jax_in_torch(softmax_jax)(packed[:, 0], w)
    with pytest.warns(CopyWarning, match="leave gaps"):
        out, _ = jax_in_torch(softmax_jax, copy=None)(packed[:, 0], w)
    out.square().sum().backward()
    expected = torch.autograd.grad(softmax_torch(packed[:, 0], w)[0].square().sum(), packed)[0]
    torch.testing.assert_close(packed.grad, expected)


def test_float64_is_refused_while_x64_is_off():
    with jax.enable_x64(False), pytest.raises(TypeError, match="x64"):
        jax_in_torch(softmax_jax)(*pair())


def test_arguments_must_be_tensors():
    with pytest.raises(TypeError, match=r"expected a torch.Tensor. Got float"):
        jax_in_torch(softmax_jax)(torch.ones(2, 2, requires_grad=True), 1.0)


def test_a_function_must_return_a_tuple():
    def alone(x):
        return x

    for x in (torch.ones(2), torch.ones(2, requires_grad=True)):
        with pytest.raises(TypeError, match=r"expected alone to return a tuple of arrays. Got"):
            jax_in_torch(alone)(x)


def test_equal_functions_are_compiled_once():
    traced = []

    @dataclasses.dataclass(frozen=True)
    class Scale:
        factor: float

        def __call__(self, x):
            traced.append(self.factor)
            return (self.factor * jnp.sin(x),)

    x = torch.ones(3, requires_grad=True)
    for _ in range(3):
        jax_in_torch(Scale(2.0))(x.detach())
        jax_in_torch(Scale(2.0))(x)[0].sum().backward()
    assert len(traced) == 2  # once alone, once with its residuals


# -------------------------------------------------------------------------- JAX in torch: gradients


def test_gradients_are_torchs(x64):
    x, w = pair()
    out, lse = jax_in_torch(softmax_jax)(x, w)
    cotangents = normal(5, 4, seed=2), normal(5, seed=3)
    got = torch.autograd.grad((out, lse), (x, w), cotangents)
    expected = torch.autograd.grad(softmax_torch(x, w), (x, w), cotangents)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck_first_and_second_order(x64):
    assert torch.autograd.gradcheck(jax_in_torch(softmax_jax), pair())
    assert torch.autograd.gradgradcheck(jax_in_torch(softmax_jax), pair())


def test_third_order(x64):
    x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = jax_in_torch(lambda x: (jnp.sin(x),))(x)[0]
    for expected in (np.cos(0.7), -np.sin(0.7), -np.cos(0.7)):
        (y,) = torch.autograd.grad(y, x, create_graph=True)
        assert y.item() == pytest.approx(expected, abs=1e-14)


def test_only_wanted_inputs_are_differentiated(x64):
    x, w = pair()
    out, _ = jax_in_torch(softmax_jax)(x.detach(), w)
    out.square().sum().backward()
    assert x.grad is None
    torch.testing.assert_close(
        w.grad, torch.autograd.grad(softmax_torch(x, w)[0].square().sum(), w)[0]
    )


def test_integers_and_booleans_are_passed_through_undifferentiated():
    def pick(x, index, keep):
        return jnp.where(keep, x, 0)[index], index + 1, keep

    x, index, keep = (
        torch.arange(4.0).requires_grad_(),
        torch.tensor([3, 1], dtype=torch.int32),
        torch.tensor([True, False, True, True]),
    )
    out, moved, kept = jax_in_torch(pick)(x, index, keep)
    assert out.requires_grad and not moved.requires_grad and not kept.requires_grad
    assert moved.tolist() == [4, 2] and kept.dtype == torch.bool
    out.sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 1]


def test_an_output_that_is_not_used_counts_as_zero(x64):
    x, w = pair()
    _, lse = jax_in_torch(softmax_jax)(x, w)
    got = torch.autograd.grad(lse.sum(), (x, w))  # .sum(): an expanded cotangent of stride 0
    torch.testing.assert_close(got, torch.autograd.grad(softmax_torch(x, w)[1].sum(), (x, w)))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "cotangent",
    [
        lambda: torch.ones(()).expand(8, 8),
        lambda: torch.arange(128.0).view(8, 16)[:, ::2],
        lambda: torch.arange(65.0)[1:].view(8, 8),
    ],
    ids=["broadcast", "slice", "unaligned"],
)
def test_cotangents_in_any_memory_give_no_warning(cotangent, create_graph):
    x = torch.ones(8, 8, requires_grad=True)
    (out,) = jax_in_torch(lambda x: (x * 3,))(x)
    (gradient,) = torch.autograd.grad(out, x, cotangent(), create_graph=create_graph)
    torch.testing.assert_close(gradient, 3 * cotangent())


COMPLEX = {
    "complex to complex": (torch.complex64, lambda x: (x * x,)),
    "complex to real": (torch.complex64, lambda x: (x.real,)),
    "real to complex": (torch.float32, lambda x: (jax.lax.complex(x, x),)),
}


@pytest.mark.parametrize(("dtype", "function"), COMPLEX.values(), ids=COMPLEX)
@pytest.mark.parametrize(
    "differentiated",
    [
        lambda f: lambda x: f(x.requires_grad_()),
        torch.func.grad,
        lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
        lambda f: lambda x: torch.func.vmap(torch.func.grad(f))(x[None]),
        lambda f: lambda x: make_fx(torch.func.grad(f))(x),
        lambda f: lambda x: make_fx(lambda x: torch.autograd.grad(f(x), x))(x.requires_grad_()),
    ],
    ids=["eager", "func.grad", "func.jvp", "vmap of grad", "make_fx of func.grad", "make_fx"],
)
def test_complex_gradients_are_refused(dtype, function, differentiated):
    warnings.filterwarnings("ignore", message=".*torch.jit.script")  # torch's own, in jvp

    def loss(x):
        return jax_in_torch(function)(x)[0].abs().sum()

    with pytest.raises(TypeError, match="expected real inputs and outputs to differentiate"):
        differentiated(loss)(torch.ones(2, dtype=dtype))


@pytest.mark.parametrize(
    "transformed", [lambda f: f, torch.func.vmap, lambda f: lambda x: make_fx(f)(x)(x)]
)
def test_complex_numbers_that_are_not_differentiated_pass(transformed):
    function = transformed(lambda x: jax_in_torch(lambda x: (jnp.fft.fft(x),))(x)[0])
    x = normal(2, 4, dtype=torch.float32)
    torch.testing.assert_close(function(x), torch.fft.fft(x))


def test_complex_numbers_within_a_function_are_jaxs_to_differentiate(x64):
    function = jax_in_torch(lambda x: (jnp.abs(jnp.fft.fft(x)),))
    assert torch.autograd.gradcheck(function, normal(4).requires_grad_())


def test_no_grad_records_nothing():
    with torch.no_grad():
        assert not jax_in_torch(softmax_jax)(*pair(torch.float32))[0].requires_grad


def test_the_backward_pass_may_run_outside_the_x64_context():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    with jax.enable_x64(True):
        (out,) = jax_in_torch(lambda x: (jnp.exp(x),))(x)
    with jax.enable_x64(False):
        out.backward(torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(x.grad, torch.exp(x.detach()))


# ----------------------------------------------------------------------- JAX in torch: whose memory


def test_writing_into_an_input_before_backward_is_noticed():
    x = torch.ones(4, requires_grad=True)
    (out,) = jax_in_torch(lambda x: (jnp.sin(x),))(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    "function",
    [jax_in_torch(root_as_residual), jax_in_torch(lambda x: (jnp.exp(x),))],
    ids=["custom_vjp", "exp"],
)
def test_writing_into_an_output_that_backward_needs_is_noticed(function):
    x = torch.full((4,), 4.0, requires_grad=True)
    (out,) = function(x)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_writing_into_an_output_that_backward_does_not_need_is_allowed():
    x = torch.full((4,), 4.0, requires_grad=True)
    (out,) = jax_in_torch(lambda x: (jnp.sin(x),))(x)
    out.mul_(2)
    out.sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.cos(x.detach()))


def test_residuals_that_are_inputs_or_outputs_take_no_memory():
    # jit returns copies, also of its own arguments: unrecognised, q, k, v and out would be kept twice.
    one = jnp.ones((4, 4))
    _, residuals = autograd._run_and_linearize(lambda x, y: (x @ y,), (True, True), one, one)
    assert sorted(residuals.inputs) == [0, 1] and not residuals.outputs and not residuals.fresh
    _, residuals = autograd._run_and_linearize(root_as_residual, (True,), one)
    assert residuals.outputs == (0,) and not residuals.inputs and not residuals.fresh


def test_a_residual_that_torch_cannot_hold_is_kept_by_jax():
    @jax.custom_vjp
    def noise(x, seed):
        return (x * jax.random.normal(jax.random.key(seed), x.shape),)

    def forward(x, seed):
        return noise(x, seed), jax.random.key(seed)

    noise.defvjp(forward, lambda key, ct: (ct[0] * jax.random.normal(key, ct[0].shape), None))
    x = torch.ones(3, requires_grad=True)
    (out,) = jax_in_torch(noise)(x, torch.tensor(7, dtype=torch.int32))
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())


def test_residuals_are_freed_by_backward():
    # Kept on the graph node instead, they would live as long as the loss does.
    x = torch.ones(4, requires_grad=True)
    (out,) = jax_in_torch(lambda x: (jnp.sin(x) * jnp.cos(x),))(x)
    node, loss = out.grad_fn, out.sum()
    saved = [weakref.ref(tensor) for tensor in node.saved_tensors[1:]]
    assert saved
    loss.backward()
    assert not any(reference() is not None for reference in saved)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_retain_graph_allows_a_second_backward():
    x = torch.ones(4, requires_grad=True)
    loss = jax_in_torch(lambda x: (x * x,))(x)[0].sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert x.grad.tolist() == [4, 4, 4, 4]


def test_torch_may_reuse_the_input_as_soon_as_the_call_returns():
    # JAX's CPU computes in the background: without a wait it would read what torch writes next.
    function = jax_in_torch(lambda x: (jax.lax.fori_loop(0, 30, lambda _, y: y @ x, x),))
    eye = torch.eye(400)
    function(eye)
    for requires_grad in (False, True):
        x = eye.clone().requires_grad_(requires_grad)
        (out,) = (
            function(x) if not requires_grad else jax_in_torch(lambda x: (x @ x @ x @ x @ x,))(x)
        )
        x.data.zero_()
        assert out.diagonal().sum().item() == 400


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_torch_checkpoint(use_reentrant, x64):
    x, w = pair()
    out, lse = torch.utils.checkpoint.checkpoint(
        jax_in_torch(softmax_jax), x, w, use_reentrant=use_reentrant
    )
    (out.square().sum() + lse.sum()).backward()
    out, lse = softmax_torch(x, w)
    torch.testing.assert_close(
        (x.grad, w.grad), torch.autograd.grad(out.square().sum() + lse.sum(), (x, w))
    )


def test_saved_tensor_hooks_see_the_residuals(x64):
    x, w = pair()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t) or t.clone(), lambda t: t
    ):
        out, _ = jax_in_torch(softmax_jax)(x, w)
    assert len(packed) >= 2
    out.square().sum().backward()
    torch.testing.assert_close(
        x.grad, torch.autograd.grad(softmax_torch(x, w)[0].square().sum(), x)[0]
    )


def test_threads_do_not_disturb_each_other(x64):
    results = {}

    def work(seed):
        x, w = normal(5, 3, seed=seed).requires_grad_(), normal(3, 4)
        with jax.enable_x64(True):
            for _ in range(10):
                x.grad = None
                jax_in_torch(softmax_jax)(x, w)[0].square().sum().backward()
        results[seed] = (x.grad, torch.autograd.grad(softmax_torch(x, w)[0].square().sum(), x)[0])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert len(results) == 4
    for got, expected in results.values():
        torch.testing.assert_close(got, expected)


# ----------------------------------------------------------------------------- torch in JAX: values


def arrays(dtype=jnp.float64):
    return jnp.asarray(normal(5, 3).numpy(), dtype), jnp.asarray(
        normal(3, 4, seed=1).numpy(), dtype
    )


softmax_in_jax = torch_in_jax(softmax_torch, softmax_shapes)


@pytest.mark.parametrize(
    "transform",
    [lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))],
    ids=["eager", "jit", "checkpoint", "jit of checkpoint"],
)
def test_values_and_gradients_are_jaxs(transform, x64):
    got, expected = transform(softmax_in_jax)(*arrays()), softmax_jax(*arrays())
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-12), got, expected)

    def loss(function):
        return lambda x, w: sum(jnp.sum(jnp.sin(output)) for output in function(x, w))

    got = jax.value_and_grad(loss(transform(softmax_in_jax)), (0, 1))(*arrays())
    expected = jax.value_and_grad(loss(softmax_jax), (0, 1))(*arrays())
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-11, atol=1e-12), got, expected
    )


def test_check_grads_to_third_order(x64):
    check_grads(softmax_in_jax, arrays(), order=3, modes=["rev"])


def test_vmap_and_vmap_of_grad(x64):
    xs = jnp.asarray(normal(6, 5, 3).numpy())
    w = arrays()[1]

    def loss(function):
        return lambda x, w: jnp.sum(jnp.sin(function(x, w)[0]))

    for transform in (lambda f: f, jax.jit):
        got = transform(jax.vmap(softmax_in_jax, (0, None)))(xs, w)
        jax.tree.map(
            lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-12),
            got,
            jax.vmap(softmax_jax, (0, None))(xs, w),
        )
        got = transform(jax.vmap(jax.grad(loss(softmax_in_jax), (0, 1)), (0, None)))(xs, w)
        expected = jax.vmap(jax.grad(loss(softmax_jax), (0, 1)), (0, None))(xs, w)
        jax.tree.map(
            lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-11, atol=1e-13), got, expected
        )
    got = jax.grad(lambda xs: jnp.sum(jnp.sin(jax.vmap(softmax_in_jax, (0, None))(xs, w)[1])))(xs)
    expected = jax.grad(lambda xs: jnp.sum(jnp.sin(jax.vmap(softmax_jax, (0, None))(xs, w)[1])))(xs)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-13)


def test_a_function_of_any_rank_is_called_once_for_a_whole_vmap():
    calls = []

    def double(x):
        calls.append(tuple(x.shape))
        return (2 * x,)

    function = torch_in_jax(
        double, lambda x: (jax.ShapeDtypeStruct(x.shape, x.dtype),), vmap_method="expand_dims"
    )
    np.testing.assert_array_equal(jax.vmap(function)(jnp.ones((6, 3)))[0], 2 * np.ones((6, 3)))
    assert calls == [(6, 3)]


def test_scan(x64):
    function = torch_in_jax(
        lambda x: (torch.sin(x),), lambda x: (jax.ShapeDtypeStruct(x.shape, x.dtype),)
    )

    def four_times(sine):
        return lambda x: jax.lax.scan(lambda x, _: (sine(x), None), x, None, length=4)[0]

    got, expected = (
        jax.value_and_grad(four_times(sine))(0.7) for sine in (lambda x: function(x)[0], jnp.sin)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes_are_kept_in_results_and_gradients(dtype, x64):
    function = torch_in_jax(lambda x: (x * x,), (jax.ShapeDtypeStruct((3,), dtype),))
    x = jnp.asarray([1, 2, 4], dtype)
    (out,), pull_back = jax.vjp(function, x)
    (gradient,) = pull_back((jnp.ones_like(out),))
    assert out.dtype == gradient.dtype == x.dtype
    assert out.tolist() == [1, 4, 16] and gradient.tolist() == [2, 4, 8]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_scalars_and_empty_results(shape):
    function = torch_in_jax(lambda x: (x * x,), (jax.ShapeDtypeStruct(shape, jnp.float32),))
    assert function(jnp.ones(shape))[0].shape == shape
    assert jax.grad(lambda x: function(x)[0].sum())(jnp.ones(shape)).shape == shape


def test_transposed_memory_arrives_in_logical_order():
    x = torch.arange(6.0).view(2, 3).T
    function = torch_in_jax(lambda x: (x + 0,), (jax.ShapeDtypeStruct((3, 2), jnp.float32),))
    np.testing.assert_array_equal(function(jax.dlpack.from_dlpack(x))[0], x.numpy())
    transposing = torch_in_jax(lambda x: (x.T,), (jax.ShapeDtypeStruct((2, 3), jnp.float32),))
    np.testing.assert_array_equal(transposing(jnp.asarray(x.numpy()))[0], x.T.numpy())


# -------------------------------------------------------------------------- torch in JAX: gradients


def test_torch_differentiates_only_what_jax_asks_for(x64):
    wanted = []

    def spy(x, w):
        if torch.is_grad_enabled():
            wanted.append((x.requires_grad, w.requires_grad))
        return softmax_torch(x, w)

    function = torch_in_jax(spy, softmax_shapes)
    x, w = arrays()
    got = jax.jit(jax.grad(lambda w: function(x, w)[1].sum()))(w)
    np.testing.assert_allclose(got, jax.grad(lambda w: softmax_jax(x, w)[1].sum())(w), rtol=1e-12)
    assert wanted == [(False, True)]


def test_integer_arguments_and_results():
    function = torch_in_jax(
        lambda x, index: (x[index], index + 1),
        (jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)),
    )
    x, index = jnp.arange(4.0), jnp.asarray([3, 1], jnp.int32)
    value, pull_back, moved = jax.vjp(lambda x: function(x, index), x, has_aux=True)
    assert value.tolist() == [3, 1] and moved.tolist() == [4, 2]
    assert pull_back(jnp.asarray([1.0, 5.0]))[0].tolist() == [0, 5, 0, 1]


def of_complex(z):
    """Neither holomorphic nor linear, with a complex and a real result; in either framework."""
    return z * z * z.conj() + (2 - 1j) * z.conj(), (z * z.conj()).real * z.imag


def of_real(x, fft):
    """Two results by way of a complex one."""
    y = fft(x)
    return y * y, (y * y.conj()).real


COMPLEX_IN_JAX = {
    "complex to complex": (
        torch.complex(normal(2, 4), normal(2, 4, seed=2)),
        of_complex,
        of_complex,
    ),
    "real to complex": (
        normal(2, 4),
        lambda x: of_real(x, torch.fft.fft),
        lambda x: of_real(x, jnp.fft.fft),
    ),
}


@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"]
)
@pytest.mark.parametrize(("x", "in_torch", "in_jax"), COMPLEX_IN_JAX.values(), ids=COMPLEX_IN_JAX)
@jax.numpy_dtype_promotion("standard")
def test_complex_gradients_are_jaxs(x, in_torch, in_jax, transform, x64):
    x = jnp.asarray(x.numpy())
    weights = jnp.asarray(normal(2, 4, seed=1).numpy()) * (1 - 2j) + x[::-1]
    wrapped = torch_in_jax(
        in_torch,
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, jnp.complex128),
            jax.ShapeDtypeStruct(x.shape, jnp.float64),
        ),
    )

    def loss(function):
        def loss(x):
            one, other = transform(function)(x)
            return (one * weights).real.sum() + jnp.sin(other).sum()

        return loss

    def second(function):
        gradient = jax.grad(loss(function))
        return jax.grad(lambda x: (gradient(x) * weights * x).real.sum())

    for derivative in (lambda function: jax.grad(loss(function)), second):
        got, expected = derivative(wrapped)(x), derivative(in_jax)(x)
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-11)


def half_differentiable(x):
    return x * x, (x + 1).detach()


half_in_jax = torch_in_jax(half_differentiable, (jax.ShapeDtypeStruct((3,), jnp.float32),) * 2)


def test_a_gradient_that_torch_does_not_have_is_an_error_not_a_zero():
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="expected outputs that torch can differentiate"
    ):
        jax.grad(lambda x: half_in_jax(x)[1].sum())(jnp.ones(3)).block_until_ready()


@pytest.mark.parametrize("transform", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_an_output_without_a_gradient_may_be_left_unused(transform):
    # jax.checkpoint turns "not asked for" into a zero cotangent.
    assert jax.grad(lambda x: transform(half_in_jax)(x)[0].sum())(jnp.ones(3)).tolist() == [2, 2, 2]


def test_forward_mode_is_refused_by_custom_vjp():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(softmax_in_jax, arrays(jnp.float32), arrays(jnp.float32))


# ------------------------------------------------------------------ torch in JAX: errors and memory


def fails(x):
    raise ValueError("the original message")


WRONG = {
    "error": (fails, "ValueError: the original message"),
    "shape": (lambda x: (x[:1],), r"expected results \['float32\[3\]'\].*Got \['float32\[1\]'\]"),
    "dtype": (lambda x: (x.half(),), r"Got \['float16\[3\]'\]"),
    "number": (lambda x: (x, x), r"Got \['float32\[3\]', 'float32\[3\]'\]"),
    "no tuple": (lambda x: x, "to return a tuple of arrays. Got Tensor"),
    "device": (lambda x: (x.to("meta"),), "expected results on cpu.*Got one on meta"),
    "write": (
        lambda x: (x.add_(1),),
        r"LentMemoryWritten: A torch function wrote in place into its argument\(s\) \[0\]",
    ),
}


@pytest.mark.parametrize(("function", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_errors_come_out_with_their_message(function, message, transform):
    wrapped = torch_in_jax(function, (jax.ShapeDtypeStruct((3,), jnp.float32),))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(transform(wrapped)(jnp.ones(3) * 1))


def test_an_error_in_the_backward_pass_comes_out_with_its_message():
    def fails_when_recorded(x):
        return fails(x) if torch.is_grad_enabled() else (x + 1,)

    function = torch_in_jax(fails_when_recorded, (jax.ShapeDtypeStruct((3,), jnp.float32),))
    with pytest.raises(jax.errors.JaxRuntimeError, match="the original message"):
        jax.block_until_ready(jax.grad(lambda x: function(x)[0].sum())(jnp.ones(3)))


def test_torch_reads_jax_memory_without_a_copy():
    pointers = []

    def spy(x):
        pointers.append(x.data_ptr())
        return (x + 1,)

    x = jnp.ones(1024)
    torch_in_jax(spy, (jax.ShapeDtypeStruct((1024,), jnp.float32),))(x)[0].block_until_ready()
    assert pointers == [x.unsafe_buffer_pointer()]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_torch_mode_does_not_matter(mode):
    function = torch_in_jax(lambda x: (torch.sin(x),), (jax.ShapeDtypeStruct((3,), jnp.float32),))
    with mode():
        gradient = jax.grad(lambda x: function(x)[0].sum())(jnp.ones(3))
    np.testing.assert_allclose(gradient, np.cos(np.ones(3)), rtol=1e-6)


def test_the_callers_autocast_does_not_matter():
    # XLA runs it on this thread or on another, which has no autocast.
    function = torch_in_jax(lambda x: (x @ x,), (jax.ShapeDtypeStruct((4, 4), jnp.float32),))
    x = jnp.full((4, 4), 1.01)
    with torch.autocast("cpu", torch.bfloat16):
        got = [jax.block_until_ready(f(x)[0]) for f in (function, jax.jit(function))]
        gradient = jax.block_until_ready(jax.grad(lambda x: function(x)[0].sum())(x))
    for array in got:
        np.testing.assert_allclose(array, x @ x, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.full((4, 4), 8.08), rtol=1e-6)


def noisy(x):
    return (x * torch.randn_like(x),)


def noisy_by_a_seed(x):
    generator = torch.Generator().manual_seed(7)
    return (x * torch.randn(x.shape, generator=generator),)


def test_a_gradient_of_random_numbers_is_refused():
    # The backward pass would multiply by other ones.
    shapes = (jax.ShapeDtypeStruct((3,), jnp.float32),)
    function = torch_in_jax(noisy, shapes)
    function(jnp.ones(3))[0].block_until_ready()
    for transform in (lambda f: f, jax.jit):
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=r"draws from torch's random generator.*from a seed"
        ):
            jax.block_until_ready(transform(jax.grad(lambda x: function(x)[0].sum()))(jnp.ones(3)))
    seeded = torch_in_jax(noisy_by_a_seed, shapes)
    out, gradient = jax.value_and_grad(lambda x: seeded(x)[0].sum())(jnp.ones(3))
    np.testing.assert_allclose(out, gradient.sum(), rtol=1e-6)


def test_another_threads_random_numbers_are_not_the_functions():
    started, stop = threading.Event(), threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(1)
            started.set()

    thread = threading.Thread(target=draw)
    thread.start()
    started.wait()
    try:
        function = torch_in_jax(lambda x: (x @ x,), (jax.ShapeDtypeStruct((64, 64), jnp.float32),))
        for _ in range(20):
            jax.block_until_ready(jax.grad(lambda x: function(x)[0].sum())(jnp.ones((64, 64))))
    finally:
        stop.set()
        thread.join()


def test_many_calls_from_many_threads_do_not_lock_up():
    function = torch_in_jax(lambda x: (x @ x,), (jax.ShapeDtypeStruct((200, 200), jnp.float32),))
    twice = jax.jit(lambda x: function(function(x)[0])[0] + function(x)[0])
    eye, sums = jnp.eye(200), []

    def work():
        sums.extend(float(twice(eye).sum()) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert sums == [400.0] * 80


def test_eager_gradients_compile_once():
    traced = []

    def shapes(x):
        traced.append(x.shape)
        return (jax.ShapeDtypeStruct(x.shape, x.dtype),)

    function = torch_in_jax(lambda x: (torch.sin(x),), shapes)
    gradient = jax.grad(lambda x: function(x)[0].sum())
    gradient(jnp.ones(3))
    with counted() as counts:
        gradient(jnp.ones(3))
    assert not counts["compiled"]


# ----------------------------------------------------------------------------------- there and back


def test_torch_in_jax_in_torch(x64):
    x, w = pair()
    there_and_back = jax_in_torch(softmax_in_jax)
    torch.testing.assert_close(there_and_back(x, w), softmax_torch(x, w))
    assert torch.autograd.gradcheck(there_and_back, (x, w))


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_stays_out(x64):
    warnings.simplefilter("ignore")  # torch.compile warns of its own graph breaks
    x, w = pair()
    function = jax_in_torch(softmax_jax)
    compiled = torch.compile(lambda x, w: function(x * 3, w)[0] * 2, backend="eager")
    for arguments in ((x.detach(), w.detach()), (x, w)):
        torch.testing.assert_close(
            compiled(*arguments), softmax_torch(x * 3, w)[0] * 2, check_stride=False
        )
    got = torch.autograd.grad(compiled(x, w).square().sum(), (x, w))
    torch.testing.assert_close(
        got, torch.autograd.grad((softmax_torch(x * 3, w)[0] * 2).square().sum(), (x, w))
    )


# ---------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or jax.default_backend() != "gpu",
    reason="torch and JAX both need a GPU",
)
def test_both_directions_stay_on_the_gpu():
    x, w = (tensor.detach().cuda().requires_grad_() for tensor in pair(torch.float32))
    out, lse = jax_in_torch(softmax_jax)(x, w)
    assert out.is_cuda and lse.is_cuda
    torch.testing.assert_close(
        torch.autograd.grad(lse.sum(), x), torch.autograd.grad(softmax_torch(x, w)[1].sum(), x)
    )
    devices = []

    def spy(x, w):
        devices.append(x.device.type)
        return softmax_torch(x, w)

    got = jax.grad(lambda x, w: torch_in_jax(spy, softmax_shapes)(x, w)[1].sum())(
        *arrays(jnp.float32)
    )
    np.testing.assert_allclose(
        got, jax.grad(lambda x, w: softmax_jax(x, w)[1].sum())(*arrays(jnp.float32)), rtol=1e-3
    )
    assert set(devices) == {"cuda"}
