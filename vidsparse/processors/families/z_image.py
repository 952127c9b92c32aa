"""Z-Image: joint attention, image first, then the caption, each filled up to a multiple of 32; refiners stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidsparse.layout import LatentGrid
from vidsparse.processors.families.base import Arguments, Family

MULTIPLE = 32
"""Diffusers fills image and caption up to multiples of this."""
SEVERAL_IMAGES = "several images in one sequence"
SIZES = "images of different sizes in one batch"


def _is_target(path: str, module: Any) -> bool:
    return path.startswith("layers.") and path.endswith(".attention")


def _grid(arguments: Arguments, config: Any) -> LatentGrid:
    image = arguments["x"][0]
    image = image[-1] if isinstance(image, list) else image
    _, frames, height, width = image.shape
    patch, patch_frames = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    return LatentGrid(frames // patch_frames, height // patch, width // patch)


def _text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    if isinstance(arguments["x"][0], list):
        return ((0, 0),)
    filling = -_grid(arguments, config).num_tokens % MULTIPLE
    longest = max(len(caption) for caption in arguments["cap_feats"])
    return ((0, filling + longest + -longest % MULTIPLE),)


def _obstacle(arguments: Arguments, config: Any) -> str | None:
    images = arguments["x"]
    if isinstance(images[0], list):
        return SEVERAL_IMAGES
    return SIZES if len({image.shape for image in images}) > 1 else None


Z_IMAGE = Family(
    name="Z-Image",
    model_classes=("ZImageTransformer2DModel",),
    is_target=_is_target,
    grid=_grid,
    text=_text,
    obstacle=_obstacle,
    hidden_states="x",
    timestep="t",
    rising_time=True,
)
