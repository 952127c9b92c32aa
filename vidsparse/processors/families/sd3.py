"""Stable Diffusion 3 and 3.5: joint attention, image first; some blocks of 3.5 attend over the image alone as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidsparse.layout import LatentGrid
from vidsparse.processors.families.base import Arguments, Family, path_ends_in


def _grid(arguments: Arguments, config: Any) -> LatentGrid:
    _, _, height, width = arguments["hidden_states"].shape
    return LatentGrid(1, height // config.patch_size, width // config.patch_size)


def _text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    return ((0, arguments["encoder_hidden_states"].shape[1]), (0, 0))


SD3 = Family(
    name="Stable Diffusion 3",
    model_classes=("SD3Transformer2DModel",),
    is_target=path_ends_in("attn", "attn2"),
    grid=_grid,
    text=_text,
)
