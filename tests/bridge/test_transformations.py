"""What torch can do to a function, done to attention on every backend that torch can reach.

One table of backends and transformations: each pair gives the right numbers, or refuses in words that
name a backend which can. The numbers to be right are those of the formula in torch's own operations, put
through the same transformation.
"""

import itertools
import warnings

import jax
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

import heedful

JAX = ("jax:flash", "jax:plain", "jax:nn-xla")
BACKENDS = ("torch:sdpa-flash", "torch:sdpa-math", *JAX, "numpy:oracle")
WITH_LSE = ("torch:sdpa-flash", "jax:flash", "jax:plain", "numpy:oracle")
DIFFERENTIABLE = ("torch:sdpa-math", *JAX)  # to any order, and forwards


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings(), jax.enable_x64(True):
        warnings.simplefilter("error")
        # torch's own, from its first call of forward mode and of vmap over a kernel of its own
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        yield


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def qkv(backend="", *lead):
    """Grouped heads, more keys than queries, in the widest dtype that the backend has."""
    dtype = torch.float32 if backend == "jax:nn-xla" else torch.float64
    shapes = (4, 2, 3), (2, 3, 3), (2, 3, 3)
    return tuple(normal(*lead, *shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))


def formula(q, k, v, bias=None):
    """Attention, causal from the top left: out and lse, of (..., H, S, D)."""
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(j > i, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def attention(backend, **options):
    def call(q, k, v, bias=None):
        return heedful.attention(
            q, k, v, bias=bias, causal="top_left", return_lse=True, backend=backend, **options
        )

    def without_lse(q, k, v, bias=None):
        options_ = options if bias is None else options | {"bias": bias}
        return heedful.attention(q, k, v, causal="top_left", backend=backend, **options_), None

    return call if backend in WITH_LSE else without_lse


def both(function, with_lse):
    """The same from both: results of any shape in one tensor, none of them linear."""

    def results(*args):
        out, lse = function(*args)
        return torch.cat([out.sin().flatten(), lse.flatten() if with_lse else out.new_zeros(0)])

    return results


def loss(f):
    return lambda *args: f(*args).square().sum()


def dual_numbers(f, q, k, v):
    with forward_ad.dual_level():
        result = f(forward_ad.make_dual(q, q.cos()), k, forward_ad.make_dual(v, v.sin()))
        return forward_ad.unpack_dual(result).tangent


def forward_over_reverse(f, q, k, v):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q.clone().requires_grad_(), q.cos())
        (dq,) = torch.autograd.grad(loss(f)(dual, k, v), dual)
        return forward_ad.unpack_dual(dq).tangent


def batched_backward(f, *args):
    leaves = [x.clone().requires_grad_() for x in args]
    result = f(*leaves)
    return torch.autograd.grad(
        result, leaves, normal(5, *result.shape, seed=9, dtype=result.dtype), is_grads_batched=True
    )


def double_backward(f, *args):
    leaves = [x.clone().requires_grad_() for x in args]
    (dq,) = torch.autograd.grad(f(*leaves).sum(), leaves[0], create_graph=True)
    return torch.autograd.grad(dq.square().sum(), leaves)


FIRST = {
    "grad": lambda f, *args: grad(loss(f), (0, 1, 2))(*args),
    "vjp": lambda f, *args: vjp(f, *args)[1](f(*args).cos()),
    "jacrev": lambda f, q, k, v: jacrev(lambda k: f(q, k, v))(k),
    "vmap": lambda f, *args: vmap(f)(*(torch.stack([x, 2 * x, -x]) for x in args)),
    "vmap of some": lambda f, q, k, v: vmap(f, (None, 1, None))(q, torch.stack([k, 2 * k], 1), v),
    "vmap of q": lambda f, q, k, v: vmap(f, (-1, None, None))(torch.stack([q, 2 * q], -1), k, v),
    "vmap of vmap": lambda f, q, k, v: vmap(vmap(f, (0, None, None)), (None, 0, 0))(
        torch.stack([q, 2 * q]), torch.stack([k, -k]), torch.stack([v, v, v])[:2]
    ),
    "vmap of grad": lambda f, q, k, v: vmap(grad(loss(f), (0, 1, 2)), (0, None, None))(
        torch.stack([q, 2 * q]), k, v
    ),
    "grad of vmap": lambda f, q, k, v: grad(
        lambda k: vmap(f, (0, None, None))(torch.stack([q, 2 * q]), k, v).square().sum()
    )(k),
    "batched backward": batched_backward,
    "vectorized jacobian": lambda f, *args: jacobian(f, args, vectorize=True),
}
FORWARD = {
    "jvp": lambda f, q, k, v: jvp(f, (q, k, v), (q.cos(), k.sin(), v))[1],
    "jvp in k": lambda f, q, k, v: jvp(lambda k: f(q, k, v), (k,), (k.sin(),))[1],
    "jvp of vmap": lambda f, q, k, v: jvp(
        lambda q: vmap(f, (0, None, None))(torch.stack([q, 2 * q]), k, v), (q,), (q.cos(),)
    )[1],
    "jacfwd": lambda f, q, k, v: jacfwd(lambda v: f(q, k, v))(v),
    "dual numbers": dual_numbers,
    "vectorized jacobian, forwards": lambda f, q, k, v: jacobian(
        lambda q: f(q, k, v), q, vectorize=True, strategy="forward-mode"
    ),
}
SECOND = {
    "hessian": lambda f, q, k, v: hessian(lambda q: loss(f)(q, k, v))(q),
    "jacrev of grad": lambda f, q, k, v: jacrev(grad(loss(f)), 1)(q, k, v),
    "jacrev of jacfwd": lambda f, q, k, v: jacrev(jacfwd(loss(f)), 1)(q, k, v),
    "jvp of jvp": lambda f, q, k, v: jvp(
        lambda q: jvp(lambda q: f(q, k, v), (q,), (q.cos(),))[1], (q,), (q.sin(),)
    )[1],
    "double backward": double_backward,
    "forward over reverse": forward_over_reverse,
}
TRANSFORMATIONS = FIRST | FORWARD | SECOND
NO_FORWARD = r"no forward mode.*jax:flash, jax:plain and torch:sdpa-math have it"
NO_SECOND = r"no second derivatives.*jax:flash, jax:plain and torch:sdpa-math have them"


# XLA's own crash, the same without torch (jaxlib 0.10.2, a segmentation fault in its YNN fusions).
XLA_CRASHES = {("jax:nn-xla", "jacrev of jacfwd")}


def refusal(backend, transformation):
    """The words of the refusal, None where there must be none."""
    if backend in DIFFERENTIABLE or transformation in FIRST:
        return None
    return NO_FORWARD if transformation in FORWARD else f"{NO_FORWARD}|{NO_SECOND}"


@pytest.mark.parametrize(
    ("backend", "transformation"),
    [pair for pair in itertools.product(BACKENDS, TRANSFORMATIONS) if pair not in XLA_CRASHES],
)
def test_every_transformation_is_right_or_refused(backend, transformation):
    transform = TRANSFORMATIONS[transformation]
    args = qkv(backend, 2)
    call = both(attention(backend), backend in WITH_LSE)
    words = refusal(backend, transformation)
    if words is not None:
        with pytest.raises(NotImplementedError, match=words):
            transform(call, *args)
        return
    expected = transform(both(formula, backend in WITH_LSE), *args)
    exact = (
        {"rtol": 1e-9, "atol": 1e-11}
        if args[0].dtype == torch.float64
        else {"rtol": 1e-4, "atol": 1e-4}
    )
    torch.testing.assert_close(transform(call, *args), expected, **exact)


# Options under a map: which of them are mapped, and what they are shared by

MAPS = {  # bias, other options, what is mapped
    "keys alone": ((2, 3), {}, ("k", "v")),
    "a shared bias": ((1, 4, 1, 3), {"causal": True}, ("q",)),
    "a bias a row": ((2, 1, 2, 1), {}, ("q", "v")),
    "a bias for each": ((1, 1, 1, 1), {"causal": True}, ("bias",)),
    "a mask for each": ((2, 3), {"mask": (2, 1, 1, 3)}, ("mask",)),
    "lengths for each": ((2, 1, 2, 3), {"mask": (1, 4, 2, 3)}, ("kv_lengths", "q")),
}


@pytest.mark.parametrize(("bias", "options", "mapped"), MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("backend", ["torch:sdpa-flash", "torch:sdpa-math", "numpy:oracle"])
@pytest.mark.parametrize("dim", [0, -1])
def test_a_map_is_a_loop(backend, bias, options, mapped, dim):
    arrays = dict(zip("qkv", qkv("", 2), strict=True)) | {"bias": normal(*bias, seed=7)}
    if "mask" in options:
        arrays["mask"] = normal(*options["mask"], seed=8) > -0.5
    if "kv_lengths" in mapped:
        arrays["kv_lengths"] = torch.tensor([3, 2])
    static = {"causal": options.get("causal", False), "backend": backend}

    def gradients(*tensors):
        def loss(q, k, v, bias, *rest):
            named = dict(zip(list(arrays)[3:], (bias, *rest), strict=True))
            out = heedful.attention(q, k, v, **named, **static)
            return out.sin().sum(), out

        return grad(loss, (0, 1, 2, 3), has_aux=True)(*tensors)

    def others(x, i):
        if x.dtype == torch.bool:
            return x.roll(i, -1)
        return x - i if not x.is_floating_point() else (1 - 0.7 * i) * x

    members = [
        [others(x, i) if name in mapped else x for name, x in arrays.items()] for i in range(3)
    ]
    in_dims = tuple(dim if name in mapped else None for name in arrays)
    together = [
        xs[0] if where is None else torch.stack(xs, where)
        for xs, where in zip(zip(*members, strict=True), in_dims, strict=True)
    ]
    got = vmap(gradients, in_dims)(*together)
    expected = tree_map(lambda *xs: torch.stack(xs), *(gradients(*member) for member in members))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_lengths_and_seeds_may_come_from_outside_a_transformation():
    q, k, v = qkv()
    told = {"kv_lengths": torch.tensor(2), "dropout_rate": 0.5, "dropout_seed": torch.tensor(3)}

    def loss(q):
        return heedful.attention(q, k, v, **told, backend="numpy:oracle").square().sum()

    (want,) = torch.autograd.grad(loss(q.requires_grad_()), q)
    torch.testing.assert_close(grad(loss)(q.detach()), want)


def test_a_gradient_penalty_of_a_batched_backward_is_refused_too():
    q, k, v = (x.requires_grad_() for x in qkv("", 2))
    out = heedful.attention(q, k, v, backend="torch:sdpa-flash")
    (dq,) = torch.autograd.grad(
        out, q, normal(3, *out.shape), is_grads_batched=True, create_graph=True
    )
    with pytest.raises(NotImplementedError, match=NO_SECOND):
        dq.square().sum().backward()


# Tensors without data

OPTIONS = {
    "plain": {},
    "causal, lse": {"causal": True, "return_lse": True},
    "bshd": {"layout": "bshd"},
    "lengths": {"kv_lengths": torch.tensor([3, 1])},
    "mask, offset": {
        "mask": torch.ones(2, 1, 1, 3, dtype=torch.bool),
        "causal": True,
        "q_offset": torch.tensor([0, 2], dtype=torch.int32),
    },
    "bias": {"bias": normal(4, 2, 3, dtype=torch.float32)},
}


def facts_of_answers(backend, options, on, layout):
    """Shape, dtype, strides and device of the results and of the gradients."""
    q, k, v = (on(x.float()).requires_grad_() for x in qkv(backend, 2))
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {name: on(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    results = heedful.attention(q, k, v, backend=backend, **options)
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad([x.sum() for x in results], (q, k, v))
    return [(x.shape, x.dtype, x.stride(), x.device.type) for x in (*results, *gradients)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_data_gets_the_same_answer_without_data(backend, options):
    layout = options.get("layout")
    meta = [torch.empty(2, *x.shape, device="meta") for x in qkv()]
    if layout == "bshd":
        meta = [x.transpose(1, 2) for x in meta]
    on_meta = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    verdicts = {v.name: v for v in heedful.explain(*meta, **on_meta).verdicts}
    if not verdicts[backend].accepted:
        with pytest.raises(heedful.Refusal):
            heedful.attention(*meta, backend=backend, **on_meta)
        assert (backend, bool(on_meta)) in {("torch:sdpa-math", True), ("jax:nn-xla", True)}
        return
    expected = facts_of_answers(backend, options, torch.Tensor.clone, layout)
    with FakeTensorMode() as mode:
        fake = facts_of_answers(backend, options, mode.from_tensor, layout)
    assert fake == expected
    no_data = facts_of_answers(backend, options, lambda x: x.to("meta"), layout)
    assert no_data == [(*facts, "meta") for *facts, _ in expected]


@pytest.mark.parametrize("backend", ["jax:flash", "numpy:oracle"])
def test_a_graph_of_torch_operations_refuses_what_it_cannot_hold(backend):
    q, k, v = (x.float() for x in qkv("", 2))

    def call(q):
        return heedful.attention(q, k, v, backend=backend)

    for mode in ("real", "fake", "symbolic") if backend == "numpy:oracle" else ():
        with pytest.raises(NotImplementedError, match="choose torch:sdpa-flash or torch:sdpa-math"):
            make_fx(call, tracing_mode=mode)(q)
    warnings.simplefilter("ignore")  # torch's own: shapes become constants of the trace
    with pytest.raises(NotImplementedError, match=f"cannot hold {backend}"):
        torch.jit.trace(call, (q,))


@pytest.mark.parametrize("backend", ["torch:sdpa-flash", "torch:sdpa-math", "jax:flash"])
def test_a_graph_of_torch_operations_holds_it(backend):
    q, k, v = (x.float() for x in qkv("", 2))

    def call(q, k, v):
        return heedful.attention(q, k, v, causal=True, backend=backend)

    graph = make_fx(call, tracing_mode="fake")(q, k, v)
    torch.testing.assert_close(graph(2 * q, k, -v), call(2 * q, k, -v))
