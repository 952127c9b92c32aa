"""LTX-Video and LTX-2: video self-attention beside cross-attention and sound; latents come as a packed sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidsparse.errors import UnsupportedModelError
from vidsparse.layout import LatentGrid
from vidsparse.processors.families.base import Arguments, Family, first_head, path_ends_in


def _grid(arguments: Arguments, config: Any) -> LatentGrid:
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise UnsupportedModelError(
            "LTX was called without `num_frames`, `height` and `width`; give them, in latent tokens, so that vidsparse "
            "knows where the packed tokens stand."
        )
    return LatentGrid(sizes[0] // config.patch_size_t, sizes[1] // config.patch_size, sizes[2] // config.patch_size)


def _keyframes(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    # Frames given as conditions follow the video.
    return ((0, arguments["hidden_states"].shape[1] - _grid(arguments, config).num_tokens),)


LTX = Family(
    name="LTX-Video",
    model_classes=("LTXVideoTransformer3DModel",),
    is_target=path_ends_in("attn1"),
    grid=_grid,
)
LTX_2 = Family(
    name="LTX-2",
    model_classes=("LTX2VideoTransformer3DModel",),
    is_target=path_ends_in("attn1"),
    grid=_grid,
    text=_keyframes,
    key_mask=first_head,
)
