"""Spatial and temporal bands: the two masks that Sparse VideoGen chooses from for each head (arXiv 2502.01776, section 3).

A spatial head looks at the frames near its own; a temporal head at the same place in all frames. Both masks are lists of
blocks over the tokens in their own order (frame after frame): a block is computed when any token pair in it belongs to
the band, so the mask that is judged is the mask that runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vidsparse.layout import TokenLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = ("spatial", "temporal")


def band_dense_blocks(
    layout: TokenLayout, kind: str, width: float, q_block_size: int, kv_block_size: int, sink_frames: int = 1
) -> NDArray[np.bool_]:
    """Block mask of one kind, text and the first frames dense.

    Args:
        layout: the tokens.
        kind: "spatial": tokens at most `width` frames apart in the sequence; "temporal": positions in their frames at
            most `width` frames apart, as a share of a frame, whatever the frames.
        width: half-width of the band in frames, at least 0.
        q_block_size, kv_block_size: tokens per block.
        sink_frames: first latent frames that every query sees.

    Returns:
        Bool `[num_q_blocks, num_kv_blocks]`.
    """
    grid, before = layout.grid, layout.text_before
    size, end = grid.tokens_per_frame, before + grid.num_tokens
    reach = int(width * size)
    (q_low, q_high), (k_low, k_high) = (
        _spans(layout.seq_len, block, before, end) for block in (q_block_size, kv_block_size)
    )
    if kind == "spatial":
        near = (q_low[:, None] - k_high[None] <= reach) & (k_low[None] - q_high[:, None] <= reach)
    else:
        near = np.zeros((len(q_low), len(k_low)), dtype=bool)
        for q_start, q_stop in _pieces(q_low, q_high, size):
            for k_start, k_stop in _pieces(k_low, k_high, size):
                present = (q_start >= 0)[:, None] & (k_start >= 0)[None]
                close = (q_start[:, None] - k_stop[None] <= reach) & (k_start[None] - q_stop[:, None] <= reach)
                near |= present & close
    near |= (k_low < sink_frames * size)[None]
    for blocks, block, axis in ((len(q_low), q_block_size, 0), (len(k_low), kv_block_size, 1)):
        starts = np.arange(blocks) * block
        text = (starts < before) | (np.minimum(starts + block, layout.seq_len) > end)
        near[(text, slice(None)) if axis == 0 else (slice(None), text)] = True
    return near


def solve_band_width(layout: TokenLayout, kind: str, density: float, **options: Any) -> float:
    """The least width whose mask reaches a density, by bisection between 0 and all frames."""
    low, high = 0.0, float(layout.grid.frames) if kind == "spatial" else 1.0
    for _ in range(24):
        middle = (low + high) / 2
        if band_dense_blocks(layout, kind, middle, **options).mean() < density:
            low = middle
        else:
            high = middle
    return high


def _spans(seq_len: int, block: int, before: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last video token of each block, counted from the first one of the video; empty where there is none."""
    starts = np.arange(0, seq_len, block, dtype=np.int64)
    stops = np.minimum(starts + block, seq_len)
    low, high = np.clip(starts, before, end) - before, np.clip(stops, before, end) - before - 1
    return low, high


def _pieces(low: NDArray[np.int64], high: NDArray[np.int64], size: int) -> list[tuple[Any, Any]]:
    """Positions in the frame that a block covers: one interval, or two where it crosses into the next frame."""
    first, last, crosses = low % size, high % size, high // size > low // size
    whole = (high - low + 1 >= size) | (crosses & (last >= first))
    one = (np.where(whole, 0, first), np.where(whole | crosses, size - 1, last))
    absent = np.full_like(low, -1)
    two = (np.where(crosses & ~whole, 0, absent), np.where(crosses & ~whole, last, absent))
    return [one, two]
