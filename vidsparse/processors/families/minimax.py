"""MiniMax-H3: one packed sequence, text, conditions and sound before the video; the token refiner stays dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vidsparse.layout import LatentGrid
from vidsparse.processors.families.base import Arguments, Family, read_once


def _is_target(path: str, module: Any) -> bool:
    return path.startswith("transformer_blocks.") and path.endswith(".attn")


def _layout(arguments: Arguments) -> tuple[LatentGrid, int]:
    """The grid of the video that is made, and the position of its first token."""

    def read(positions: torch.Tensor) -> tuple[LatentGrid, int]:
        indices, positions = arguments["video_indices"].cpu(), positions.cpu()
        # Conditions come first among the video's rows: the video that is made is the last of them, without gaps.
        gaps = (indices.diff() != 1).nonzero()
        start = int(indices[gaps[-1, 0] + 1 if len(gaps) else 0])
        rows = positions[start : int(indices[-1]) + 1]
        per_frame = int((rows[:, 0].flip(0) == rows[-1, 0]).int().cumprod(0).sum())
        frames, height = 1, len(rows[-per_frame:, 1].unique())
        while len(rows) >= (frames + 1) * per_frame:
            frame, later = (
                rows[len(rows) - (i + 1) * per_frame : len(rows) - i * per_frame] for i in (frames, frames - 1)
            )
            if not (torch.equal(frame[:, 1:], later[:, 1:]) and (frame[:, 0] < later[:, 0]).all()):
                break
            frames += 1
        return LatentGrid(frames, height, per_frame // height), start + len(rows) - frames * per_frame

    return read_once(arguments["position_ids"], read)


def _grid(arguments: Arguments, config: Any) -> LatentGrid:
    return _layout(arguments)[0]


def _text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    grid, before = _layout(arguments)
    return ((before, len(arguments["position_ids"]) - before - grid.num_tokens),)


MINIMAX_H3 = Family(
    name="MiniMax-H3",
    model_classes=("MiniMaxH3Transformer3DModel",),
    is_target=_is_target,
    grid=_grid,
    text=_text,
    # The text gives the packed sequence its dtype; the video comes in fp32.
    hidden_states="encoder_hidden_states",
)
