"""Keras's layer with heedful inside beside Keras's own, by KERAS_BACKEND: outputs and gradients.

A process of its own, as Keras has one backend for the whole of it. Prints the largest differences.
"""

from typing import Any

import keras
import numpy as np

import heedful


class Attention(keras.layers.MultiHeadAttention):
    def _compute_attention(
        self, query: Any, key: Any, value: Any, attention_mask: Any = None, *_: Any
    ) -> tuple[Any, None]:
        mask = None if attention_mask is None else attention_mask[:, None]
        return heedful.attention(query, key, value, mask=mask, layout="bshd"), None


def gradients(layer: Any, x: Any, **options: Any) -> list[Any]:
    """Of the sum of sines of the output, with respect to the weights; that sum first."""
    if keras.backend.backend() == "torch":
        layer.zero_grad()
        total = layer(x, x, **options).sin().sum()
        total.backward()
        return [total, *(weight.value.grad for weight in layer.trainable_weights)]
    import jax

    def loss(weights: Any) -> Any:
        out, _ = layer.stateless_call(weights, [], x, x, **options)
        return jax.numpy.sin(out).sum()

    value, found = jax.value_and_grad(loss)([w.value for w in layer.trainable_weights])
    return [value, *found]


def main() -> None:
    x = keras.random.normal((2, 9, 32), seed=0)
    padding = np.arange(9) < np.array([5, 9])[:, None, None]
    own, ours = (
        kind(num_heads=4, key_dim=8) for kind in (keras.layers.MultiHeadAttention, Attention)
    )
    for layer in (own, ours):
        layer(x, x)
    for theirs, weight in zip(own.weights, ours.weights, strict=True):
        weight.assign(theirs.value)
    for options in ({}, {"use_causal_mask": True}, {"attention_mask": padding}):
        pairs = zip(gradients(ours, x, **options), gradients(own, x, **options), strict=True)
        differences = [
            np.abs(np.subtract(*map(keras.ops.convert_to_numpy, pair))).max() for pair in pairs
        ]
        print(max(differences))


if __name__ == "__main__":
    main()
