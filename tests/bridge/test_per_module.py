"""`per_module`: a backend for each module of a model, called, recomputed, in threads and in graphs."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import heedful
from heedful.oracle import FEATURES
from heedful_torch import per_module


class Multiplies:
    """sin of q, times a factor."""

    takes = FEATURES

    def __init__(self, name, factor):
        self.name, self.factor = name, factor

    def reasons(self, problem):
        return ()

    def run(self, problem, operands):
        return operands.q.sin() * self.factor, None


@pytest.fixture(autouse=True)
def backends():
    """torch:two, :three and :five; the automatic choice is torch:one."""
    fakes = [
        Multiplies(f"torch:{n}", k) for n, k in (("one", 1), ("two", 2), ("three", 3), ("five", 5))
    ]
    fakes[0].automatic = -1
    for fake in fakes:
        heedful.register(fake)
    yield
    for fake in fakes:
        heedful.unregister(fake.name)
    torch._dynamo.reset()


class Attention(nn.Module):
    fails = False

    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()

    def forward(self, x):
        out = heedful.attention(x, x, x)
        if self.fails:
            raise ZeroDivisionError
        return out


class Layer(nn.Module):
    checkpointed = None  # use_reentrant

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        if self.checkpointed is None:
            return self.attention(x)
        return checkpoint(self.attention, x, use_reentrant=self.checkpointed)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = Layer()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


CHOICES = {"layers.1": "torch:three", "layers": "torch:two", "*": "torch:five"}
NAMES = ["layers.0.attention", "layers.1.attention", "head.attention"]


def leaf():
    return torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 1, 3, 4).requires_grad_()


def by(*factors):
    """The output and the gradient where the layers multiply by these."""
    x = y = leaf()
    for factor in factors:
        y = y.sin() * factor
    return y, torch.autograd.grad(y.sum(), x)[0]


def assert_multiplied(got, *factors):
    torch.testing.assert_close(got, by(*factors)[0], rtol=0, atol=0)


def test_each_module_has_its_choice_and_the_record_says_so():
    model = Model()
    with per_module(model, CHOICES), heedful.recording() as record:
        assert_multiplied(model(leaf()), 2, 3, 5)
    assert [choice.part for choice in record] == NAMES
    assert [choice.backend for choice in record] == ["torch:two", "torch:three", "torch:five"]
    assert record[0].why == "asked for by per_module for 'layers'"
    assert_multiplied(model(leaf()), 1, 1, 1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_choices_it_names_the_modules():
    model = Model()
    with heedful.part("decoder"), per_module(model), heedful.recording() as record:
        assert_multiplied(model(leaf()), 1, 1, 1)
    assert [choice.part for choice in record] == [f"decoder.{name}" for name in NAMES]
    assert {choice.why for choice in record} == {"the automatic choice"}


def test_where_no_pattern_holds_it_is_as_without_the_block():
    model = Model()
    with heedful.use_backend("torch:five"), per_module(model, {"layers.1": "torch:two"}):
        assert_multiplied(model(leaf()), 5, 2, 5)
    with per_module(model, {"layers.1": "torch:two"}):
        assert_multiplied(model(leaf()), 1, 2, 1)


def test_a_part_of_the_model_may_be_called_alone():
    model = Model()
    with per_module(model, CHOICES):
        assert_multiplied(model.layers[1].attention(leaf()), 3)


def test_the_inner_one_wins():
    model = Model()
    with per_module(model, CHOICES), per_module(model.layers[0], {"*": "torch:three"}):
        assert_multiplied(model(leaf()), 3, 3, 5)
    with per_module(model, CHOICES), heedful.use_backend("torch:three"):
        assert_multiplied(model(leaf()), 2, 3, 5)  # said outside of the modules


def test_a_module_that_raises_leaves_its_choice_behind():
    model = Model()
    with per_module(model, CHOICES):
        model.layers[0].attention.fails = True
        with pytest.raises(ZeroDivisionError):
            model(leaf())
        assert heedful.explain(*[leaf()] * 3).chosen == "torch:one"
        model.layers[0].attention.fails = False
        assert_multiplied(model(leaf()), 2, 3, 5)


def test_a_hook_that_raises_before_ours_does_no_harm():
    model = Model()

    def fail(module, _):
        raise ZeroDivisionError

    handle = model.layers[1].register_forward_pre_hook(fail)
    with per_module(model, CHOICES):
        with pytest.raises(ZeroDivisionError):
            model(leaf())
        handle.remove()
        assert_multiplied(model(leaf()), 2, 3, 5)


def test_the_block_is_that_of_its_thread():
    model, found = Model(), []
    thread = threading.Thread(target=lambda: found.append(model(leaf())))
    with per_module(model, CHOICES):
        thread.start()
        thread.join()
    assert_multiplied(found[0], 1, 1, 1)


def test_a_copy_that_was_made_within_is_as_the_model():
    model = Model()
    with per_module(model, CHOICES):
        copied = copy.deepcopy(model)
        assert_multiplied(copied(leaf()), 2, 3, 5)
    assert_multiplied(copied(leaf()), 1, 1, 1)


@pytest.mark.parametrize("within", [True, False], ids=["within", "after"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers"])
def test_a_checkpoint_recomputes_under_the_choices_of_its_first_pass(whole, reentrant, within):
    model, x = Model(), leaf()
    if not whole:
        for layer in (*model.layers, model.head):
            layer.checkpointed = reentrant
    other = Model() if whole else model

    with per_module(model, CHOICES):
        y = checkpoint(model, x, use_reentrant=reentrant) if whole else model(x)
        if within:
            with heedful.use_backend("torch:five"), per_module(other, {"*": "torch:three"}):
                y.sum().backward()
    with heedful.recording() as record:
        if not within:
            y.sum().backward()
    torch.testing.assert_close(x.grad, by(2, 3, 5)[1], rtol=0, atol=0)
    assert sorted(choice.part for choice in record) == ([] if within else sorted(NAMES))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning"
)  # torch's own, at a graph's end
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_what_is_compiled_is_compiled_anew_with_its_choices(compiler):
    model = Model()
    compiled = torch.compile(model, backend=compiler)
    for _ in range(2):
        assert_multiplied(compiled(leaf()), 1, 1, 1)
        with per_module(compiled, CHOICES):
            assert_multiplied(compiled(leaf()), 2, 3, 5)
        with per_module(model, {"layers.1": "torch:five"}):
            assert_multiplied(compiled(leaf()), 1, 5, 1)
        with per_module(Model(), CHOICES):
            assert_multiplied(compiled(leaf()), 1, 1, 1)


def test_names_alone_end_no_graph():
    model = Model()
    with per_module(model), heedful.recording() as record:
        assert_multiplied(torch.compile(model, backend="eager", fullgraph=True)(leaf()), 1, 1, 1)
    assert record


def test_what_is_wrong_is_said_at_once():
    model = Model()
    for choices, message in (
        (
            {"layer.*": "torch:two"},
            r"is named 'layer\.\*'\. There are head, head\.attention, layers, ",
        ),
        (
            {"head.attention.norm": "torch:two"},
            r"no module that could call attention is named 'head",
        ),
        (
            {"*": "torch:two", "head": "torch:three"},
            r"'head' decides nothing: the first pattern wins",
        ),
        ({"*": "torch:tow"}, r"no backend is named 'torch:tow'"),
    ):
        with pytest.raises(ValueError, match=message), per_module(model, choices):
            pass
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module\. Got function"):
        per_module(leaf, {}).__enter__()
    model.head.attention = model.layers[0].attention
    with pytest.raises(
        ValueError, match=r"layers\.0\.attention and head\.attention are one module"
    ):
        per_module(model, CHOICES).__enter__()
    with per_module(model, {"*": "torch:two"}):
        assert_multiplied(model(leaf()), 2, 2, 2)
