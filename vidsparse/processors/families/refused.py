"""Transformers of diffusers that vidsparse cannot attach to, and why."""

from __future__ import annotations

LINEAR = "its self-attention is linear, without a softmax over pairs of tokens, so there are no blocks of pairs to leave out"

REFUSED: dict[str, str] = {
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMTransformer3DModel": (
        "its self-attention is a linear recurrence over frames in most layers, and the others have no processor to set"
    ),
    "WanAnimate2Transformer3DModel": (
        "it attends to the kept keys of a reference video through a block mask of its own, for which there is no single "
        "grid; its predecessor Wan-Animate is supported"
    ),
    "Cosmos3OmniTransformer": (
        "it packs all samples and modalities into one sequence without a batch, with causal attention over the text"
    ),
    "DiTTransformer2DModel": "its images have 256 or 1,024 tokens, too few for sparse attention to pay",
}
"""Class name -> why not, as the end of a sentence."""
