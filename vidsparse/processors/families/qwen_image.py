"""Qwen-Image and its edit models: joint attention, text first, then the image, then reference images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vidsparse.layout import LatentGrid
from vidsparse.processors.families.base import Arguments, Family, path_ends_in


def _shapes(arguments: Arguments) -> list[tuple[int, int, int]]:
    shapes = arguments["img_shapes"]
    # One entry per sample, or the entry itself; all samples of a batch have the same shapes.
    first = shapes[0] if isinstance(shapes[0], list) else shapes
    return [first] if isinstance(first[0], int) else list(first)


def _grid(arguments: Arguments, config: Any) -> LatentGrid:
    return LatentGrid(*_shapes(arguments)[0])


def _text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    references = sum(math.prod(shape) for shape in _shapes(arguments)[1:])
    return ((arguments["encoder_hidden_states"].shape[1], references),)


QWEN_IMAGE = Family(
    name="Qwen-Image",
    model_classes=("QwenImageTransformer2DModel",),
    is_target=path_ends_in("attn"),
    grid=_grid,
    text=_text,
)
