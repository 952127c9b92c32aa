"""Lumina 2: joint attention, each sample's caption without its padding, then the image; refiners stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vidsparse.processors.families.base import Arguments, Family, image_grid, read_once

LENGTHS = "captions of different lengths put the images of a batch at different places"


def _is_target(path: str, module: Any) -> bool:
    return path.startswith("layers.") and path.endswith(".attn")


def _lengths(arguments: Arguments) -> list[int]:
    def lengths(mask: torch.Tensor) -> list[int]:
        return sorted(set(mask.sum(1).tolist()), reverse=True)

    return read_once(arguments["encoder_attention_mask"], lengths)


def _text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    return ((_lengths(arguments)[0], 0),)


def _obstacle(arguments: Arguments, config: Any) -> str | None:
    return LENGTHS if len(_lengths(arguments)) > 1 else None


LUMINA_2 = Family(
    name="Lumina 2",
    model_classes=("Lumina2Transformer2DModel",),
    is_target=_is_target,
    grid=image_grid,
    text=_text,
    obstacle=_obstacle,
    rising_time=True,
)
