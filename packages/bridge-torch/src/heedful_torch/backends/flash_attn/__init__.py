"""The official flash-attn packages, a backend each."""
