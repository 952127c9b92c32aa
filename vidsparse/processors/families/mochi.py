"""Mochi: joint attention, video first, one call per sample with the text tokens that are no padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vidsparse.processors.families.base import Arguments, Family, path_ends_in, read_once, video_grid


def _text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    def lengths(mask: torch.Tensor) -> list[int]:
        return sorted(set(mask.bool().sum(1).tolist()), reverse=True)

    return [(0, length) for length in read_once(arguments["encoder_attention_mask"], lengths)]


MOCHI = Family(
    name="Mochi",
    model_classes=("MochiTransformer3DModel",),
    is_target=path_ends_in("attn1"),
    grid=video_grid,
    text=_text,
    per_sample=True,
)
