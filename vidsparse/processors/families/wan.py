"""Wan 2.1 and 2.2 (text-, image- and frame-to-video), VACE, Animate, ChronoEdit and SkyReels-V2.

Video self-attention (`attn1`) beside cross-attention to text and image; Animate's face adapter is cross-attention too.
"""

from __future__ import annotations

from typing import Any

from vidsparse.processors.families.base import Family, path_ends_in, video_grid

_ends_in_attn1 = path_ends_in("attn1")


def _is_target(path: str, module: Any) -> bool:
    return _ends_in_attn1(path, module) and not getattr(module, "is_cross_attention", False)


WAN = Family(
    name="Wan",
    model_classes=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
    ),
    is_target=_is_target,
    grid=video_grid,
)
