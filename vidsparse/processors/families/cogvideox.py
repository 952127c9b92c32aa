"""CogVideoX 1.0 and 1.5, ConsisID: joint attention, text first; latents come frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidsparse.layout import LatentGrid
from vidsparse.processors.families.base import Arguments, Family, path_ends_in


def _grid(arguments: Arguments, config: Any) -> LatentGrid:
    # hidden_states [batch, frames, channels, height, width]; only 1.5 patches frames.
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch, patch_frames = config.patch_size, getattr(config, "patch_size_t", None) or 1
    return LatentGrid(-(-frames // patch_frames), height // patch, width // patch)


def _text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    return ((arguments["encoder_hidden_states"].shape[1], 0),)


COGVIDEOX = Family(
    name="CogVideoX",
    model_classes=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    is_target=path_ends_in("attn1"),
    grid=_grid,
    text=_text,
)
