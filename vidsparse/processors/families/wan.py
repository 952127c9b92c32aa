"""Wan 2.1 and 2.2 (text-, image- and frame-to-video), VACE and SkyReels-V2: video self-attention beside cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vidsparse.layout import LatentGrid
from vidsparse.processors.families.base import Family


def _is_target(name: str, module: Any) -> bool:
    return name.rpartition(".")[2] == "attn1" and not getattr(module, "is_cross_attention", False)


def _grid(arguments: Mapping[str, Any], config: Any) -> LatentGrid:
    # hidden_states [batch, channels, latent frames, latent height, latent width]
    _, _, frames, height, width = arguments["hidden_states"].shape
    patch_frames, patch_height, patch_width = config.patch_size
    return LatentGrid(frames // patch_frames, height // patch_height, width // patch_width)


WAN = Family(
    name="Wan",
    model_classes=("WanTransformer3DModel", "WanVACETransformer3DModel", "SkyReelsV2Transformer3DModel"),
    is_target=_is_target,
    grid=_grid,
)
