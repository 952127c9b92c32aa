"""Flux.1 (also Fill, Kontext, control): joint attention, text first, then the image, then reference images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vidsparse.layout import LatentGrid
from vidsparse.processors.families.base import Arguments, Family, read_once


def _is_target(path: str, module: Any) -> bool:
    return path.endswith(".attn") and path.startswith(("transformer_blocks.", "single_transformer_blocks."))


def _grid(arguments: Arguments, config: Any) -> LatentGrid:
    def sizes(ids: torch.Tensor) -> LatentGrid:
        ids = ids[0] if ids.ndim == 3 else ids
        # [tokens, (image, row, column)]; the first image is the one that is made, others are references.
        made = ids[ids[:, 0] == ids[0, 0]]
        _, height, width = (made.amax(0) - made.amin(0) + 1).int().tolist()
        return LatentGrid(1, height, width)

    return read_once(arguments["img_ids"], sizes)


def _text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    references = arguments["hidden_states"].shape[1] - _grid(arguments, config).num_tokens
    return ((arguments["encoder_hidden_states"].shape[1], references),)


FLUX = Family(
    name="Flux",
    model_classes=("FluxTransformer2DModel",),
    is_target=_is_target,
    grid=_grid,
    text=_text,
)
