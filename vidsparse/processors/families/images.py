"""Image models that need a few lines each: PixArt, CogView 4, AuraFlow, HunyuanImage; and Latte, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidsparse.layout import LatentGrid
from vidsparse.processors.families.base import Arguments, Family, first_head, image_grid, path_ends_in

AURAFLOW_REGISTERS = 8
"""Learned tokens that AuraFlow puts before the text."""


def _is_in_frame(path: str, module: Any) -> bool:
    return path.startswith("transformer_blocks.") and path.endswith(".attn1")


def _is_joint(path: str, module: Any) -> bool:
    # The token refiner, under context_embedder, attends over text alone.
    return path.endswith(".attn") and path.startswith(("transformer_blocks.", "single_transformer_blocks."))


def _text_first(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    return ((arguments["encoder_hidden_states"].shape[1], 0),)


def _auraflow_text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    return ((AURAFLOW_REGISTERS + arguments["encoder_hidden_states"].shape[1], 0),)


def _hunyuan_grid(arguments: Arguments, config: Any) -> LatentGrid:
    sizes = (
        size // patch for size, patch in zip(arguments["hidden_states"].shape[2:], config.patch_size, strict=True)
    )
    return LatentGrid(*([1] * (5 - arguments["hidden_states"].ndim)), *sizes)


def _hunyuan_text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    glyphs = arguments.get("encoder_hidden_states_2") if config.text_embed_2_dim is not None else None
    return ((0, arguments["encoder_hidden_states"].shape[1] + (0 if glyphs is None else glyphs.shape[1])),)


PIXART = Family(
    name="PixArt",
    model_classes=("PixArtTransformer2DModel",),
    is_target=path_ends_in("attn1"),
    grid=image_grid,
    key_mask=first_head,
)
COGVIEW_4 = Family(
    name="CogView 4",
    model_classes=("CogView4Transformer2DModel",),
    is_target=path_ends_in("attn1"),
    grid=image_grid,
    text=_text_first,
    pairwise_mask=True,
)
AURAFLOW = Family(
    name="AuraFlow",
    model_classes=("AuraFlowTransformer2DModel",),
    is_target=path_ends_in("attn"),
    grid=image_grid,
    text=_auraflow_text,
)
HUNYUAN_IMAGE = Family(
    name="HunyuanImage",
    model_classes=("HunyuanImageTransformer2DModel",),
    is_target=_is_joint,
    grid=_hunyuan_grid,
    text=_hunyuan_text,
)
# Frames attend within themselves, then positions over frames; only the former is long enough to be sparse.
LATTE = Family(
    name="Latte",
    model_classes=("LatteTransformer3DModel",),
    is_target=_is_in_frame,
    grid=image_grid,
)
