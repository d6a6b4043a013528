"""`replace_sdpa`: torch's own call of attention, sent through a backend, in torch's own meaning."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import heedful
import heedful_torch
from heedful import Refusal

BACKENDS = ["jax:flash", "torch:sdpa-math", None]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


Q, K, V = (2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)
CALLS: dict[str, tuple[tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "plain": ((Q, K, V), {}),
    "causal": ((Q, K, V), {"is_causal": True}),
    "scale": ((Q, K, V), {"scale": 0.3}),
    "groups": ((Q, (2, 2, 7, 8), (2, 2, 7, 6)), {"enable_gqa": True}),
    "mask for all": ((Q, K, V), {"attn_mask": torch.ones(5, 7).tril(1).bool()}),
    "as many rows as batch": (((5, 4, 5, 8), (5, 4, 7, 8), (5, 4, 7, 6)), {
        "attn_mask": torch.ones(5, 7).tril(1).bool()
    }),
    "mask of keys": ((Q, K, V), {"attn_mask": torch.arange(7).expand(2, 1, 1, 7) < 4}),
    "bias": ((Q, K, V), {"attn_mask": torch.linspace(-1, 1, 140).reshape(4, 5, 7)}),
    "rank 2": (((5, 8), (7, 8), (7, 6)), {"attn_mask": torch.ones(5, 7).tril(1).bool()}),
    "rank 3": (((4, 5, 8), (4, 7, 8), (4, 7, 6)), {"is_causal": True}),
    "rank 5": (((3, *Q), (3, *K), (3, *V)), {}),
    "one batch of keys": ((Q, (1, 4, 7, 8), (1, 4, 7, 6)), {}),
    "one head of keys": ((Q, (2, 1, 7, 8), (2, 1, 7, 6)), {}),
    "fewer axes": (((4, 5, 8), K, V), {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::heedful_torch.CopyWarning")  # of what broadcasts
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shapes", "options"), CALLS.values(), ids=CALLS)
def test_it_means_what_it_means_in_torch(shapes: Any, options: Any, backend: str | None) -> None:
    inputs = [normal(*shape) for shape in shapes]
    own = scaled_dot_product_attention(*inputs, **options)
    with heedful_torch.replace_sdpa(backend):
        ours = nn.functional.scaled_dot_product_attention(*inputs, **options)
    cotangent = torch.randn_like(own)
    torch.testing.assert_close(ours, own)
    for got, want in zip(
        torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(own, inputs, cotangent),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_dropout_is_torchs_generators_and_a_checkpoint_repeats_it() -> None:
    q = normal(2, 4, 5, 8)

    def attend(q: torch.Tensor) -> torch.Tensor:
        with heedful_torch.replace_sdpa("jax:flash"):
            return scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    gradients = []
    for run in (attend, attend, lambda q: checkpoint(attend, q, use_reentrant=False)):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(run(q).sum(), q)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    assert not torch.equal(attend(q), attend(q))


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_layer_of_torchs_is_replaced_within_the_block_alone(backend: str) -> None:
    layer = nn.TransformerDecoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    x, memory = torch.randn(2, 9, 32), torch.randn(2, 6, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    own = layer(x, memory, tgt_mask=causal, tgt_is_causal=True)
    with heedful_torch.replace_sdpa(backend), heedful.recording() as record:
        torch.testing.assert_close(layer(x, memory, tgt_mask=causal, tgt_is_causal=True), own)
    assert [entry.backend for entry in record] == [backend] * 2  # of itself, and of the memory
    q = torch.randn(1, 1, 3, 8)
    with heedful_torch.replace_sdpa("torch:flash-attn-4"), pytest.raises(Refusal):
        scaled_dot_product_attention(q, q, q)
    scaled_dot_product_attention(q, q, q)


def test_a_compiled_function_holds_it() -> None:
    q = torch.randn(2, 4, 5, 8)

    @torch.compile(backend="eager", fullgraph=True)
    def attend(q: torch.Tensor) -> torch.Tensor:
        with heedful_torch.replace_sdpa("torch:sdpa-math"):
            return scaled_dot_product_attention(q, q, q, is_causal=True)

    torch.testing.assert_close(attend(q), scaled_dot_product_attention(q, q, q, is_causal=True))


def test_a_compiled_layer_holds_it() -> None:
    layer = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)
    own, _ = layer(x, x, x, need_weights=False)
    compiled = torch.compile(layer, backend="eager")
    with heedful_torch.replace_sdpa("torch:sdpa-math"), heedful.recording() as record:
        ours, _ = compiled(x, x, x, need_weights=False)
    torch.testing.assert_close(ours, own)
    assert "torch:sdpa-math" in {entry.backend for entry in record}


def test_under_autocast_it_computes_in_the_dtype_that_torch_would() -> None:
    q, v = normal(2, 4, 5, 8), torch.randn(2, 4, 5, 8, dtype=torch.bfloat16)
    mask = torch.randn(5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        own = scaled_dot_product_attention(q, q, v, mask)
        with heedful_torch.replace_sdpa("jax:flash"):
            ours = scaled_dot_product_attention(q, q, v, mask)
    assert ours.dtype == own.dtype == torch.bfloat16
    torch.testing.assert_close(ours, own, rtol=2e-2, atol=1e-2)
    assert torch.autograd.grad(ours.float().sum(), q)[0].dtype == torch.float32


def test_a_recorded_draw_of_dropout_is_refused() -> None:
    q = torch.randn(2, 4, 5, 8)

    def attend(q: torch.Tensor) -> torch.Tensor:
        with heedful_torch.replace_sdpa("jax:plain"):
            return scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    for mode in ("real", "fake"):
        with pytest.raises(NotImplementedError, match="the seed of dropout would be a constant"):
            make_fx(attend, tracing_mode=mode)(q)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"attn_mask": torch.ones(5, 5, dtype=torch.bool), "is_causal": True},
            "exclude each other",
        ),
        ({"attn_mask": torch.ones(5, 6, dtype=torch.bool)}, "mask"),
        (
            {"attn_mask": torch.ones(5, 5, dtype=torch.int64)},
            "attn_mask must be boolean or of query",
        ),
    ],
)
def test_what_torch_refuses_is_refused(options: dict[str, Any], why: str) -> None:
    q = torch.randn(2, 4, 5, 8)
    with heedful_torch.replace_sdpa("jax:flash"), pytest.raises((TypeError, ValueError), match=why):
        scaled_dot_product_attention(q, q, q, **options)


def test_bad_input_has_an_error_of_its_own() -> None:
    with pytest.raises(ValueError, match="no backend is named 'jax:falsh'"):
        heedful_torch.replace_sdpa("jax:falsh")
    q, k, one = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(8)
    with heedful_torch.replace_sdpa():
        with pytest.raises(ValueError, match="pass enable_gqa=True"):
            scaled_dot_product_attention(q, k, k)
        with pytest.raises(ValueError, match=r"must be \(\.\.\., S, D\)"):
            scaled_dot_product_attention(one, q, q)
