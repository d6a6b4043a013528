"""torch.utils.checkpoint: what is recomputed takes the backends of its first pass."""

import gc
import threading
import warnings
import weakref
from contextlib import nullcontext

import jax
import pytest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

import heedful
from heedful import use_backend
from heedful.oracle import FEATURES


class Multiplies:
    """q times a factor, and a note of each run."""

    takes = FEATURES

    def __init__(self, name, factor, ran):
        self.name, self.factor, self.ran = name, factor, ran

    def reasons(self, problem):
        return ("takes no softcap",) if problem.softcap is not None else ()

    def run(self, problem, operands):
        self.ran.append(self.name.removeprefix("torch:"))
        return (operands.q.sin() * self.factor), None


@pytest.fixture(autouse=True)
def ran():
    """The runs of torch:two, :three and :five, and of the automatic choice, which is torch:one."""
    found = []
    fakes = [
        Multiplies(f"torch:{n}", k, found)
        for n, k in (("one", 1), ("two", 2), ("three", 3), ("five", 5))
    ]
    fakes[0].automatic = -1
    for fake in fakes:
        heedful.register(fake)
    yield found
    for fake in fakes:
        heedful.unregister(fake.name)


@pytest.fixture(params=[True, False], ids=["reentrant", "not reentrant"])
def reentrant(request):
    return request.param


def attend(x, **options):
    return heedful.attention(x, x, x, **options)


def leaf():
    return torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 1, 3, 4).requires_grad_()


def gradient(function, factors):
    """Of the function, and of sin, one in the other, times the factors."""
    x, y = leaf(), leaf()
    function(x).sum().backward()
    expected = y
    for factor in factors:
        expected = expected.sin() * factor
    expected.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)


def twice(x):
    return attend(attend(x))


def test_a_block_that_is_closed_goes_along(ran, reentrant):
    def call(x):
        with use_backend("torch:two"):
            return checkpoint(twice, x, use_reentrant=reentrant)

    gradient(call, (2, 2))
    assert ran == ["two"] * 4


def test_real_backends(reentrant):
    for name in ("jax:plain", "numpy:oracle", "torch:sdpa-math"):
        x, y = (leaf().detach().float().requires_grad_() for _ in range(2))
        with use_backend(name):
            out = checkpoint(lambda x: attend(x, causal=True), x, use_reentrant=reentrant)
        with use_backend("torch:five"):
            out.sum().backward()
        attend(y, causal=True, backend=name).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)


def test_no_block_goes_along_too(ran, reentrant):
    out = checkpoint(twice, leaf(), use_reentrant=reentrant)
    with use_backend("torch:two"):
        out.sum().backward()
        attend(leaf())
    assert ran == ["one"] * 4 + ["two"]


def test_the_first_able_one_of_a_list_goes_along(ran, reentrant):
    with use_backend(["torch:sdpa-cudnn", "torch:three"]):
        out = checkpoint(attend, leaf(), use_reentrant=reentrant)
    out.sum().backward()
    assert ran == ["three"] * 2


def test_blocks_inside_the_function_are_opened_again(ran, reentrant):
    def function(x):
        with use_backend("torch:three"):  # the first that is seen of this checkpoint
            x = attend(x)
            with use_backend("torch:five"):
                x = attend(x)
        return attend(attend(x, backend="torch:one"))

    def call(x):
        with use_backend("torch:two"):
            return checkpoint(function, x, use_reentrant=reentrant)

    gradient(call, (3, 5, 1, 2))
    assert ran == ["three", "five", "one", "two"] * 2


def test_a_call_decides_before_the_blocks_inside(ran, reentrant):
    def function(x):
        x = attend(x)
        with use_backend("torch:three"):
            x = attend(x)
        return attend(x)

    with use_backend("torch:two"):
        out = checkpoint(function, leaf(), use_reentrant=reentrant)
    out.sum().backward()
    assert ran == ["two", "three", "two"] * 2


def test_checkpoints_side_by_side_have_their_own(ran, reentrant):
    def call(x):
        for name in ("torch:two", "torch:three"):
            with use_backend(name):
                x = checkpoint(attend, x, use_reentrant=reentrant)
        return checkpoint(attend, x, use_reentrant=reentrant)

    gradient(call, (2, 3, 1))
    assert ran == ["two", "three", "one", "one", "three", "two"]


# In a reentrant first pass.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("inner", [True, False])
def test_a_checkpoint_in_a_checkpoint(ran, reentrant, inner):
    def nested(x):
        with use_backend("torch:three"):
            x = checkpoint(attend, x, use_reentrant=inner)
        return checkpoint(attend, x, use_reentrant=inner)

    def call(x):
        with use_backend("torch:two"):
            x = checkpoint(nested, x, use_reentrant=reentrant)
        with use_backend("torch:five"):
            return checkpoint(attend, x, use_reentrant=reentrant)

    gradient(call, (3, 2, 5))
    assert ran[:4] == ["three", "two", "five", "five"]
    assert ran.count("three") >= 2 <= ran.count("two") and "one" not in ran


def test_a_backward_pass_within_a_first_pass(ran):
    with use_backend("torch:two"):
        inner = checkpoint(attend, leaf(), use_reentrant=False)

    def function(x):
        inner.sum().backward(retain_graph=True)
        return attend(x)

    with use_backend("torch:three"):
        out = checkpoint(function, leaf(), use_reentrant=False)
    del ran[:]
    out.sum().backward()
    assert ran == ["two", "three"]


@pytest.mark.parametrize("early_stop", [True, False])
def test_with_and_without_an_early_stop(ran, early_stop):
    def function(x):
        return attend(attend(x).sum() * x) + attend(x.detach())

    with set_checkpoint_early_stop(early_stop), use_backend("torch:two"):
        out = checkpoint(function, leaf(), use_reentrant=False)
    out.sum().backward()
    assert ran == ["two"] * (5 if early_stop else 6)
    attend(leaf())
    assert ran.pop() == "one"  # the stop left no block open


def test_a_graph_is_kept_for_two_backward_passes(ran, reentrant):
    x = leaf()
    with use_backend("torch:two"):
        out = checkpoint(twice, x, use_reentrant=reentrant)
    out.sum().backward(retain_graph=True)
    once = x.grad.clone()
    with use_backend("torch:three"):
        out.sum().backward()
    torch.testing.assert_close(x.grad, 2 * once, rtol=0, atol=0)
    assert ran == ["two"] * 6


def test_derivatives_of_derivatives(ran):
    def second(call):
        x = leaf()
        (first,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    def call(x):
        with use_backend("torch:two"):
            return checkpoint(twice, x, use_reentrant=False)

    expected = second(lambda x: 2 * (2 * x.sin()).sin())
    torch.testing.assert_close(second(call), expected, rtol=0, atol=1e-14)
    assert set(ran) == {"two"}


def test_a_backward_pass_in_another_thread(ran, reentrant):
    with use_backend("torch:two"):
        out = checkpoint(twice, leaf(), use_reentrant=reentrant)
        thread = threading.Thread(target=lambda: out.sum().backward())
        thread.start()
        thread.join()
    assert ran == ["two"] * 4


def test_a_first_pass_in_another_thread(ran, reentrant):
    outs = []

    def forward(name):
        with use_backend(name):
            outs.append(checkpoint(attend, leaf(), use_reentrant=reentrant))

    for name in ("torch:two", "torch:three"):
        thread = threading.Thread(target=forward, args=(name,))
        thread.start()
        thread.join()
    with use_backend("torch:five"):
        sum(out.sum() for out in outs).backward()
    assert sorted(ran) == ["three"] * 2 + ["two"] * 2


def test_a_sequence_of_modules(ran, reentrant):
    class Attends(torch.nn.Module):
        def forward(self, x):
            return attend(x)

    modules = torch.nn.Sequential(*(Attends() for _ in range(4)))
    with use_backend("torch:two"):
        out = checkpoint_sequential(modules, 2, leaf(), use_reentrant=reentrant)
    out.sum().backward()
    assert ran == ["two"] * 6


def test_contexts_of_the_caller_are_opened_inside(ran):
    def contexts():
        attend(leaf())  # before the checkpoint has noted anything
        return nullcontext(), use_backend("torch:three")

    with use_backend("torch:two"):
        out = checkpoint(attend, leaf(), use_reentrant=False, context_fn=contexts)
    out.sum().backward()
    assert ran == ["two", "two", "three"]


def test_a_backend_that_must_refuse_refuses_in_the_recomputation(reentrant):
    softcaps = iter([None, 2.0])

    def function(x):
        return attend(x, softcap=next(softcaps))

    with use_backend("torch:two"):
        out = checkpoint(function, leaf(), use_reentrant=reentrant)
    with pytest.raises(heedful.Refusal, match=r"torch:two \(asked for by use_backend\)"):
        out.sum().backward()


def test_jax_arrays_go_along(reentrant):
    chosen = []

    def function(x):
        q = jax.numpy.ones((3, 8))
        chosen.append(jax.jit(lambda q: heedful.attention(q, q, q))(q) is not None)
        chosen.append(heedful.explain(q, q, q).chosen)
        return x.sin()

    with use_backend("jax:plain"):
        out = checkpoint(function, leaf(), use_reentrant=reentrant)
    with use_backend("jax:nn-xla"):
        out.sum().backward()
        assert heedful.explain(*[jax.numpy.ones((3, 8))] * 3).chosen == "jax:nn-xla"
    assert chosen == [True, "jax:plain"] * 2


def of_which_the_first_pass_calls_nothing():
    passes = iter([lambda x: x.sin() * 3, attend])
    return lambda x: next(passes)(x)


def test_a_first_pass_that_was_not_seen_is_an_error(ran, reentrant):
    with use_backend("torch:two"):
        out = checkpoint(of_which_the_first_pass_calls_nothing(), leaf(), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=r"heedful.use_backend\(name\)\(function\)"):
        out.sum().backward()
    assert not ran


def test_a_block_inside_is_seen_though_nothing_is_called(ran, reentrant):
    function = use_backend("torch:three")(of_which_the_first_pass_calls_nothing())
    with use_backend("torch:two"):
        out = checkpoint(function, leaf(), use_reentrant=reentrant)
    out.sum().backward()
    assert ran == ["three"]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_checkpoint_that_is_compiled(ran, compiler, reentrant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: checkpoint(twice, x, use_reentrant=reentrant), backend=compiler
        )
        gradient(compiled, (1, 1))

        def call(x):
            with use_backend("torch:two"):
                return compiled(x)

        for _ in range(2):
            gradient(call, (2, 2))
        torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_block_around_what_was_compiled_before(compiler, reentrant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        torch._dynamo.reset()
        compiled = torch.compile(twice, backend=compiler)
        gradient(compiled, (1, 1))
        within = use_backend("torch:two")(compiled)
        for _ in range(2):
            gradient(lambda x: checkpoint(within, x, use_reentrant=reentrant), (2, 2))
        torch._dynamo.reset()


def test_nothing_is_kept(reentrant):
    class Function:
        def __call__(self, x):
            with use_backend("torch:three"):
                x = attend(x)
            return attend(x)

    function, x = Function(), leaf()
    gc.disable()  # without a cycle, either
    try:
        with use_backend("torch:two"):
            out = checkpoint(function, x, use_reentrant=reentrant)
        kept = [weakref.ref(function), weakref.ref(x)]
        out.sum().backward()
        del function, x, out
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()


def test_without_a_checkpoint_nothing_changes(ran):
    x = leaf()
    x.register_hook(lambda dx: attend(dx))
    with use_backend("torch:two"):
        out = twice(x)
    out.sum().backward()
    with use_backend("torch:three"):
        attend(x)
    assert ran == ["two", "two", "one", "three"]
