"""HiDream: joint attention, image first; an image that is not square is filled up to the longest sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vidsparse.layout import LatentGrid
from vidsparse.processors.families.base import Arguments, Family, image_grid, path_ends_in, read_once

SIZES = "images of different sizes in one batch"


def _sizes(arguments: Arguments) -> list[list[int]] | None:
    sizes = arguments.get("img_sizes")
    if isinstance(sizes, torch.Tensor):
        return read_once(sizes, lambda sizes: sizes.tolist())
    return None if sizes is None else [list(size) for size in sizes]


def _grid(arguments: Arguments, config: Any) -> LatentGrid:
    sizes = _sizes(arguments)
    return image_grid(arguments, config) if sizes is None else LatentGrid(1, *sizes[0])


def _text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    latents, grid = arguments["hidden_states"], _grid(arguments, config)
    if latents.ndim == 3:
        slots = latents.shape[1]
    else:
        square = latents.shape[-1] == latents.shape[-2]
        height, width = config.max_resolution
        slots = grid.num_tokens if square else height * width // config.patch_size**2
    # T5, Llama's last layer, and the Llama layer that belongs to the block.
    llama = arguments["encoder_hidden_states_llama3"]
    return ((0, slots - grid.num_tokens + arguments["encoder_hidden_states_t5"].shape[1] + 2 * llama.shape[-2]),)


def _obstacle(arguments: Arguments, config: Any) -> str | None:
    sizes = _sizes(arguments)
    return SIZES if sizes is not None and any(size != sizes[0] for size in sizes) else None


HIDREAM = Family(
    name="HiDream",
    model_classes=("HiDreamImageTransformer2DModel",),
    is_target=path_ends_in("attn1"),
    grid=_grid,
    text=_text,
    obstacle=_obstacle,
    timestep="timesteps",
)
