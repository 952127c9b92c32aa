"""Helios: self-attention over the history of earlier frames, kept dense, and then the frames that are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vidsparse.processors.families.base import Arguments, Family, path_ends_in, video_grid

HISTORY = {"short": 1, "mid": 2, "long": 4}
"""How many times larger than the model's patches those of each part of the history are."""


def _text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    history = 0
    for name, times in HISTORY.items():
        latents = arguments.get(f"latents_history_{name}")
        if latents is not None and arguments.get(f"indices_latents_history_{name}") is not None:
            patches = zip(latents.shape[2:], config.patch_size, strict=True)
            history += math.prod(-(-size // (times * patch)) for size, patch in patches)
    return ((history, 0),)


HELIOS = Family(
    name="Helios",
    model_classes=("HeliosTransformer3DModel",),
    is_target=path_ends_in("attn1"),
    grid=video_grid,
    text=_text,
)
