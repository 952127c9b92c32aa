"""Spatial and temporal bands against a mask written out token by token."""

from __future__ import annotations

import numpy as np
import pytest

from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.masks.bands import KINDS, band_dense_blocks, solve_band_width

LAYOUT = TokenLayout(LatentGrid(4, 3, 5), text_before=3, text_after=6)


def token_by_token(kind: str, width: float, q_block: int, kv_block: int, sink_frames: int) -> np.ndarray:
    seq_len, size, start = LAYOUT.seq_len, LAYOUT.grid.tokens_per_frame, LAYOUT.text_before
    video = range(start, start + LAYOUT.grid.num_tokens)
    near = np.ones((seq_len, seq_len), dtype=bool)
    for i in video:
        for j in video:
            q, k = i - start, j - start
            distance = abs(q - k) if kind == "spatial" else abs(q % size - k % size)
            near[i, j] = k < sink_frames * size or distance <= int(width * size)
    rows, columns = range(0, seq_len, q_block), range(0, seq_len, kv_block)
    return np.array([[near[i : i + q_block, j : j + kv_block].any() for j in columns] for i in rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [0, 0.1, 0.3, 0.5, 1, 2])
@pytest.mark.parametrize(("q_block", "kv_block"), [(4, 4), (8, 4), (16, 8), (5, 3), (32, 16)])
def test_blocks_are_those_that_hold_a_pair_of_the_band(kind, width, q_block, kv_block):
    for sink_frames in (0, 1):
        got = band_dense_blocks(LAYOUT, kind, width, q_block, kv_block, sink_frames)
        assert np.array_equal(got, token_by_token(kind, width, q_block, kv_block, sink_frames))


@pytest.mark.parametrize("kind", KINDS)
def test_width_for_a_density(kind):
    layout = TokenLayout(LatentGrid(21, 30, 52))
    sizes = {"q_block_size": 128, "kv_block_size": 64}
    width = solve_band_width(layout, kind, 0.3, **sizes)
    assert band_dense_blocks(layout, kind, width, **sizes).mean() == pytest.approx(0.3, abs=0.02)
