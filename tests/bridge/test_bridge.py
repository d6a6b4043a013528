"""Calls across frameworks: torch on JAX and NumPy backends, JAX and NumPy on torch backends."""

import dataclasses
import warnings
from collections import Counter

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import heedful
import reference
from compilations import counted
from heedful.call import Call
from heedful.call.operands import Operands
from heedful.oracle import FEATURES
from heedful_torch.bridge import bridge
from heedful_torch.dlpack import CopyWarning, to_torch

TOLERANCE = 2e-5
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "grouped, padded": {"kv_lengths": np.array([9, 4])},
    "bias": {"bias": np.linspace(-1, 1, 6 * 9, dtype=np.float32).reshape(6, 9)},
}


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def qkv(dtype=np.float32, Sk=9):
    shapes = (2, 4, 6, 8), (2, 2, Sk, 8), (2, 2, Sk, 8)
    return tuple(normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))


DOUT, DLSE = normal(2, 4, 6, 8, seed=3), normal(2, 4, 6, seed=4)


def assert_close(got, expected):
    for x, truth in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), truth, atol=TOLERANCE, rtol=TOLERANCE)


def expected(arrays, options):
    results = reference.attention(*arrays, DOUT, DLSE, **options)
    return [x for x in results if x is not None]


def in_torch(x, grad=False):
    return torch.tensor(x).requires_grad_(grad) if isinstance(x, np.ndarray) else x


def in_numpy(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else x


class Counting:
    """A backend of any framework that counts how often it is run, or traced, by q's dtype."""

    takes = FEATURES

    def __init__(self, backend, name):
        self.backend, self.name, self.runs = backend, name, Counter()

    def reasons(self, problem):
        return self.backend.reasons(problem)

    def run(self, problem, operands):
        self.runs[str(operands.q.dtype)] += 1
        return self.backend.run(problem, operands)


@pytest.fixture
def register():
    names = []

    def add(backend):
        heedful.register(backend)
        names.append(backend.name)
        return backend

    yield add
    for name in names:
        heedful.unregister(name)


# torch on the backends of JAX and NumPy


@pytest.mark.parametrize("backend", ["jax:plain", "jax:flash", "numpy:oracle"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_torch_gets_values_and_gradients(backend, options):
    arrays = qkv()
    leaves = [in_torch(x, grad=True) for x in arrays]
    options = {name: in_torch(x, grad=name == "bias") for name, x in options.items()}
    out, lse = heedful.attention(*leaves, **options, return_lse=True, backend=backend)
    assert type(out) is type(lse) is torch.Tensor
    if "bias" in options:
        leaves.append(options["bias"])
    gradients = torch.autograd.grad((out, lse), leaves, (in_torch(DOUT), in_torch(DLSE)))
    options = {name: in_numpy(x) for name, x in options.items()}
    assert_close([x.detach() for x in (out, lse, *gradients)], expected(arrays, options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["jax:plain", "numpy:oracle"])
def test_torch_dtypes_cross(backend, dtype):
    q, k, v = (in_torch(x).to(dtype).requires_grad_() for x in qkv())
    with jax.enable_x64(dtype == torch.float64):
        out = heedful.attention(q, k, v, backend=backend)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert {x.dtype for x in (out, *gradients)} == {dtype}
    truth = reference.attention(*(x.detach().double().numpy() for x in (q, k, v)))[0]
    bound = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-13}[dtype]
    np.testing.assert_allclose(out.detach().double().numpy(), truth, atol=bound)


def test_torch_calls_of_one_problem_are_traced_once(register):
    backend = register(Counting(heedful.backends()["jax:plain"], "jax:counting"))
    for _ in range(3):
        q, k, v = (in_torch(x, grad=True) for x in qkv())
        heedful.attention(q, k, v, causal=True, backend=backend.name).sum().backward()
    assert backend.runs == {"float32": 1}


def test_what_jax_cannot_share_is_copied_with_a_warning():
    q, k, v = map(in_torch, qkv())
    wide = torch.cat([q, q], -1)
    with pytest.warns(CopyWarning, match="leave gaps"):
        out = heedful.attention(wide[..., :8], k, v, backend="jax:plain")
    torch.testing.assert_close(out, heedful.attention(q, k, v, backend="jax:plain"))
    everywhere = v[:1].expand_as(v)  # over the batch, which no axis of 1 would say
    with pytest.warns(CopyWarning, match="a broadcast"):
        heedful.attention(q, k, everywhere, backend="jax:plain")


@pytest.mark.parametrize("backend", ["jax:plain", "numpy:oracle"])
def test_a_transpose_is_not_copied(backend):
    q, k, v = (in_torch(x).transpose(1, 2) for x in qkv())
    with warnings.catch_warnings():
        warnings.simplefilter("error", CopyWarning)
        out = heedful.attention(q, k, v, layout="bshd", backend=backend)
    assert_close([out.transpose(1, 2)], [reference.attention(*qkv())[0]])


def test_a_numpy_backend_without_gradients_computes_and_refuses_to_differentiate(register):
    backend = register(Counting(heedful.backends()["numpy:oracle"], "numpy:counting"))
    q, k, v = (in_torch(x, grad=True) for x in qkv())
    out = heedful.attention(q, k, v, backend=backend.name)
    with pytest.raises(NotImplementedError, match=r"needs a method `gradients`"):
        out.sum().backward()


def test_second_derivatives_across_the_bridge():
    q, k, v = (in_torch(x, grad=True) for x in qkv())

    def penalty(backend):
        out = heedful.attention(q, k, v, backend=backend)
        (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), (q, k, v))

    assert_close(penalty("jax:plain"), penalty("torch:sdpa-math"))
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        penalty("numpy:oracle")


def test_a_tensor_that_lends_jax_memory_runs_on_torch_backends():
    q, k, v = (to_torch(jnp.asarray(x)) for x in qkv())
    assert_close(
        [heedful.attention(q, k, v, backend="torch:sdpa-flash")], [reference.attention(*qkv())[0]]
    )


# JAX on the backends of torch


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_jax_gets_values_and_gradients(options, jit):
    arrays = qkv()
    options = {
        name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()
    }
    bias = options.pop("bias", None)

    def call(q, k, v, bias):
        with_bias = {} if bias is None else {"bias": bias}
        out, lse = heedful.attention(
            q, k, v, **options, **with_bias, return_lse=True, backend="torch:sdpa-flash"
        )
        return (out * DOUT).sum() + (lse * DLSE).sum(), (out, lse)

    value_and_grad = jax.value_and_grad(call, argnums=(0, 1, 2, 3), has_aux=True)
    if jit:
        value_and_grad = jax.jit(value_and_grad)
    (_, results), gradients = value_and_grad(*map(jnp.asarray, arrays), bias)
    if bias is not None:
        options["bias"] = np.asarray(bias)
    got = [*results, *(x for x in gradients if x is not None)]
    assert all(isinstance(x, jax.Array) for x in got)
    assert_close(got, expected(arrays, options))


def test_jax_maps_a_torch_backend():
    q, k, v = (jnp.stack([x, 2 * x]) for x in map(jnp.asarray, qkv()))

    def gradients(q, k, v):
        return jax.grad(lambda q: heedful.attention(q, k, v, backend="torch:sdpa-flash").sum())(q)

    truth = [
        reference.attention(*qkv_i, np.ones((2, 4, 6, 8)))[2] for qkv_i in zip(q, k, v, strict=True)
    ]
    assert_close(jax.vmap(gradients)(q, k, v), truth)


@pytest.mark.parametrize("backend", ["jax:flash", "torch:sdpa-math", "torch:sdpa-flash"])
@pytest.mark.parametrize("convert", [in_torch, jnp.asarray])
def test_a_new_number_q_offset_compiles_nothing(convert, backend):
    arrays = qkv()
    for n, offset in enumerate((30, 9, 12)):  # every key is seen: sdpa-flash takes no mask
        options = {"causal": True, "q_offset": offset, "window": (6, None)}
        if backend == "torch:sdpa-flash":
            del options["window"]
        with counted() as counts:
            out = heedful.attention(*map(convert, arrays), backend=backend, **options)
        assert n == 0 or (not counts["traced"] and not counts["compiled"])
        truth, *_ = reference.attention(*arrays, None, None, **options)
        assert_close([out], [truth])


def test_jax_in_half_precision():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv())
    out, lse = heedful.attention(q, k, v, return_lse=True, backend="torch:sdpa-flash")
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)


def test_jax_with_a_mask_of_numpy():
    mask = np.tri(6, 9, dtype=bool)
    out = jax.jit(lambda *qkv: heedful.attention(*qkv, mask=mask, backend="torch:sdpa-math"))(
        *qkv()
    )
    assert_close([out], [reference.attention(*qkv(), mask=mask)[0]])


def test_jax_is_told_why_a_torch_backend_failed(register):
    class Broken:
        name = "torch:broken"

        takes = FEATURES

        def reasons(self, problem):
            return ()

        def run(self, problem, operands):
            raise RuntimeError("the kernel fell over")

    register(Broken())
    with pytest.raises(jax.errors.JaxRuntimeError, match="the kernel fell over"):
        jax.block_until_ready(heedful.attention(*map(jnp.asarray, qkv()), backend="torch:broken"))


# NumPy on the backends of torch


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_numpy_gets_values_of_its_own(options):
    out, lse = heedful.attention(*qkv(), **options, return_lse=True, backend="torch:sdpa-flash")
    for x in (out, lse):
        assert isinstance(x, np.ndarray) and x.flags.writeable and x.flags.owndata
    assert_close((out, lse), reference.attention(*qkv(), **options)[:2])


def test_numpy_in_bfloat16():
    arrays = qkv(ml_dtypes.bfloat16)
    out = heedful.attention(*arrays, backend="torch:sdpa-flash")
    assert out.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(out.astype(float), reference.attention(*arrays)[0], atol=2e-2)


@pytest.mark.parametrize(
    ("view", "why"),
    [
        (lambda x: np.broadcast_to(x, x.shape), "read-only"),
        (lambda x: x[:, :, ::-1], "step over memory"),
    ],
    ids=["read-only", "reversed"],
)
def test_what_torch_cannot_share_is_copied_with_a_warning(view, why):
    q, k, v = qkv()
    with pytest.warns(CopyWarning, match=why):
        out = heedful.attention(view(q), k, v, backend="torch:sdpa-flash")
    assert_close([out], [reference.attention(view(q), k, v)[0]])


# Refusals


@pytest.mark.parametrize(
    ("caller", "framework", "platform", "reason"),
    [
        ("torch", "jax", "cpu", None),
        ("torch", "numpy", "cpu", None),
        ("jax", "torch", "cpu", None),
        ("numpy", "torch", "cpu", None),
        (
            "torch",
            "numpy",
            "gpu",
            "the arrays lie on a gpu and NumPy's in host memory: "
            "nothing here moves silently between devices",
        ),
        ("torch", "jax", "mps", "arrays on mps do not cross between torch and jax"),
        ("jax", "torch", "tpu", "arrays on tpu do not cross between jax and torch"),
        pytest.param(
            "torch",
            "jax",
            "gpu",
            "this jax has no gpu, where the arrays lie: move them, or install one that has",
            marks=pytest.mark.skipif(jax.default_backend() != "cpu", reason="this JAX has a GPU"),
        ),
        pytest.param(
            "jax",
            "torch",
            "gpu",
            "this torch has no gpu, where the arrays lie: move them, or install one that has",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this torch has a GPU"),
        ),
    ],
)
def test_reasons(caller, framework, platform, reason):
    problem = dataclasses.replace(Call.of(*qkv()).problem, framework=caller, platform=platform)
    assert bridge.reasons(problem, framework) == ([] if reason is None else [reason])


def test_a_road_that_the_bridge_does_not_have():
    problem = Call.of(*qkv()).problem
    with pytest.raises(LookupError, match="from numpy to jax"):
        bridge.run(heedful.backends()["jax:plain"], problem, Operands(*qkv()))


# On a GPU. Not run on one yet.


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["jax:plain", "jax:flash"])
def test_torch_on_jax_backends_on_a_gpu(backend):
    leaves = [in_torch(x).cuda().requires_grad_() for x in qkv()]
    out, lse = heedful.attention(*leaves, causal=True, return_lse=True, backend=backend)
    cotangents = in_torch(DOUT).cuda(), in_torch(DLSE).cuda()
    gradients = torch.autograd.grad((out, lse), leaves, cotangents)
    got = [x.detach().cpu() for x in (out, lse, *gradients)]
    for x, truth in zip(got, expected(qkv(), {"causal": True}), strict=True):
        np.testing.assert_allclose(x.numpy(), truth, atol=2e-3)  # products in TF32


@pytest.mark.gpu
def test_jax_on_torch_backends_on_a_gpu():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(Sk=6))

    @jax.jit
    def gradients(q, k, v):
        def loss(q, k, v):
            return heedful.attention(q, k, v, causal=True, backend="torch:sdpa-flash").sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    arrays = [np.asarray(x, np.float64) for x in (q, k, v)]
    truth = reference.attention(*arrays, np.ones((2, 4, 6, 8)), causal=True)[2:5]
    for x, y in zip(gradients(q, k, v), truth, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, atol=5e-2)


# Tensors that are no dense memory


def no_dense_memory():
    x, rows = torch.ones(1, 2, 4, 8), [torch.ones(2, 8), torch.ones(4, 8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls some of these prototypes
        return [
            ("sparse", x.to_sparse()),
            ("sparse rows", torch.ones(4, 8).to_sparse_csr()),
            ("mkldnn", x.to_mkldnn()),
            ("nested", torch.nested.nested_tensor(rows)),
            ("jagged", torch.nested.nested_tensor(rows, layout=torch.jagged)),
        ]


@pytest.mark.parametrize(
    ("kind", "x"), no_dense_memory(), ids=lambda x: x if isinstance(x, str) else ""
)
@pytest.mark.parametrize(
    "name", ["q", "k", "v", "mask", "bias", "q_lengths", "kv_lengths", "q_offset"]
)
def test_a_tensor_that_is_no_dense_memory_is_refused(kind, x, name):
    dense = torch.ones(1, 2, 4, 8)
    arrays = {"q": dense, "k": dense, "v": dense, "causal": True} | {name: x}
    for call in (heedful.attention, heedful.explain):
        with pytest.raises(TypeError, match=f"^{name} must be a dense tensor. Got "):
            call(**arrays)


def test_a_numpy_backend_cannot_write_into_a_tensor():
    class Writer:
        name = "numpy:writer"

        takes = FEATURES

        def reasons(self, problem):
            return ()

        def run(self, problem, operands):
            operands.q[...] = 2

    q = torch.ones(1, 2, 4, 8)
    heedful.register(Writer())
    try:
        with pytest.raises(ValueError, match="read-only"):
            heedful.attention(q, q, q, backend="numpy:writer")
    finally:
        heedful.unregister("numpy:writer")
    assert (q == 1).all()


def test_cosine_similarity_takes_no_tensors_and_says_what_does():
    q = torch.ones(4, 2, 8)
    with pytest.raises(TypeError, match=r"Pass heedful.attention torch.nn.functional.normalize\(q"):
        heedful.cosine_sim_flash_attention(q, q, q)
