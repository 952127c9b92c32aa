from __future__ import annotations

import pytest

from vidsparse.errors import ConfigError
from vidsparse.layout import LatentGrid, TokenLayout


def test_counts():
    grid = LatentGrid(21, 30, 52)
    assert (grid.tokens_per_frame, grid.num_tokens, str(grid)) == (1560, 32760, "21x30x52")
    layout = TokenLayout(grid, text_before=5, text_after=11, block_size=128)
    assert (layout.text_len, layout.seq_len, layout.num_blocks) == (16, 32776, 257)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (1, 1, 0)])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ConfigError, match="at least 1, got"):
        LatentGrid(*sizes)


@pytest.mark.parametrize("changes", [{"text_before": -1}, {"text_after": -1}, {"block_size": 0}])
def test_layout_is_checked(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        TokenLayout(LatentGrid(1, 1, 1), **changes)


@pytest.mark.parametrize("size", [1.5, True, "4"])
def test_sizes_are_whole_numbers(size):
    with pytest.raises(ConfigError, match="`frames` of a latent grid must be a whole number"):
        LatentGrid(size, 2, 2)
    with pytest.raises(ConfigError, match="`block_size` must be a whole number"):
        TokenLayout(LatentGrid(2, 2, 2), block_size=size)
