"""The inputs that PyTorch tests its own attention with, answered by heedful: as many as it has."""

import functools
import inspect
from typing import Any

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import heedful
import heedful_torch

BACKENDS = ["jax:flash", "torch:sdpa-flash"]
WITH_ATTENTION = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # what these layers say of slices, layouts, fast paths


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_of_the_function(backend: str) -> None:
    (op,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    samples = [
        s
        for s in op.sample_inputs("cpu", torch.float32, requires_grad=True)
        if not s.kwargs["dropout_p"]
    ]
    assert len(samples) >= 13
    for sample in samples:
        inputs = (sample.input, *sample.args)
        call = functools.partial(torch.nn.functional.scaled_dot_product_attention, **sample.kwargs)
        own = call(*inputs)
        with heedful_torch.replace_sdpa(backend):
            ours = call(*inputs)
        pairs = ((out, *torch.autograd.grad(out.sin().sum(), inputs)) for out in (ours, own))
        torch.testing.assert_close(
            *pairs, rtol=1e-4, atol=1e-4
        )  # the inputs reach 9, the scores 100


@pytest.mark.parametrize("name", WITH_ATTENTION)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_the_layers(name: str, backend: str) -> None:
    (info,) = (info for info in module_db if info.module_cls.__name__ == name)
    asked = 0
    for training in (False, True):
        for given in info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=True, training=training
        ):
            made, called = given.constructor_input, given.forward_input
            if called is None:
                continue
            names = inspect.signature(info.module_cls).parameters
            options = {**made.kwargs, **({"dropout": 0.0} if "dropout" in names else {})}
            arguments = made.args[:3] if "dropout" in names else made.args  # dropout is the fourth
            layer = info.module_cls(*arguments, **options).train(training)
            own = answer(layer, called)
            with heedful_torch.replace_sdpa(backend), heedful.recording() as record:
                ours = answer(layer, called)
            for got, want in zip(ours, own, strict=True):
                assert (got - want).norm() <= 1e-4 * want.norm() + 1e-5
            assert {entry.backend for entry in record} <= {backend}
            asked += bool(record)
    assert asked >= 10


def answer(layer: torch.nn.Module, called: Any) -> list[torch.Tensor]:
    """What the layer returns, and its weights' gradients."""
    layer.zero_grad()
    # Asked for its weights, as it is by default, this one computes attention itself.
    of_out = {"need_weights": False} if isinstance(layer, torch.nn.MultiheadAttention) else {}
    out = layer(*called.args, **called.kwargs | of_out)
    out = out[0] if isinstance(out, tuple) else out
    out.sin().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
