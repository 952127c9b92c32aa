"""The radial mask: the further two frames are apart, the nearer two tokens must be in space.

Radial Attention, arXiv 2506.19852, section 4, Eq. 4. Frames i and j at distance d = |i - j| belong to band
r = floor(log2(max(d, 1))); a query at position k of frame i sees the key at position l of frame j if |k - l| is within
a window that halves from band to band. The first frame is a sink that everyone sees.

Two variants:

- "paper": Eq. 4 token by token, and a block is computed if it holds *any* kept pair. Every token votes, for any grid
  and any block size, so the block mask covers all that Eq. 4 keeps and the error bound of the paper stands.
- "release": the mask of the authors' code. It rounds the tokens per frame down to a power of two, never lets a window
  fall below one block, thins far frames as soon as a window is below 128 tokens, and keeps a block by a vote of its
  columns, one frame pair at a time. Where a frame does not end on a block, tokens in the last sliver have no vote and
  follow their neighbours. Lengths are padded to whole blocks; the partial block at the end is dense.

Both work on intervals per q-block, never on tokens, and in both every block keeps itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from vidsparse.checks import check_share, is_number, is_whole
from vidsparse.errors import ConfigError
from vidsparse.layout import LatentGrid, TokenLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vidsparse_kernels import BlockMask

Variant = Literal["paper", "release"]

CHUNK_INTERVALS = 1 << 20
"""Key intervals held at a time while building; about 40 MB."""


def radial_block_mask(
    layout: TokenLayout | LatentGrid,
    *,
    q_block_size: int | None = None,
    kv_block_size: int | None = None,
    decay_factor: float = 1.0,
    variant: Variant = "paper",
    sink_frames: int = 1,
    device: Any = None,
) -> BlockMask:
    """Radial mask at block level (arXiv 2506.19852, Eq. 4), the same for every sample, head, layer and step.

    Args:
        layout: token layout, or a bare grid without text. Blocks that hold any text token are dense as rows and as
            columns.
        q_block_size, kv_block_size: tokens per block, default `layout.block_size` (128 for a bare grid). The variant
            "release" needs them equal.
        decay_factor: factor on the window of every band from distance 2 on; 1.0 is Eq. 4. Density grows with it.
        variant: "paper" or "release", see the module.
        sink_frames: first frames that every query sees; the paper has 1, the authors' code 1 for Wan, 0 for
            HunyuanVideo.
        device: where the lists go, default CPU.

    Returns:
        BlockMask with lists int32 `[1, 1, num_q_blocks]` and `[1, 1, num_q_blocks, max_blocks]`; no row is empty.

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> radial_block_mask(LatentGrid(8, 16, 16), q_block_size=64, kv_block_size=64, variant="release").density
        0.80859375
    """
    dense = radial_dense_blocks(
        layout,
        q_block_size=q_block_size,
        kv_block_size=kv_block_size,
        decay_factor=decay_factor,
        variant=variant,
        sink_frames=sink_frames,
    )
    layout, q_block_size, kv_block_size = _sizes(layout, q_block_size, kv_block_size)
    return _to_block_mask(dense, layout.seq_len, q_block_size, kv_block_size, device)


def solve_decay_factor(
    layout: TokenLayout | LatentGrid,
    density: float,
    *,
    q_block_size: int | None = None,
    kv_block_size: int | None = None,
    variant: Variant = "paper",
    sink_frames: int = 1,
) -> tuple[float, float]:
    """The decay factor whose mask comes nearest to a density, by bisection (density grows with the factor).

    Near frames, the sink and each block itself are kept whatever the factor, so there is a least density, and the mask
    moves in whole blocks; compare the second value with what was asked for.

    Args:
        layout, q_block_size, kv_block_size, variant, sink_frames: as for `radial_block_mask`.
        density: target, computed blocks / all blocks, in (0, 1].

    Returns:
        `(decay_factor, density reached)`.

    Raises:
        ConfigError: `density` is outside (0, 1].
    """
    check_share("density", density)

    def reached(factor: float) -> float:
        dense = radial_dense_blocks(
            layout,
            q_block_size=q_block_size,
            kv_block_size=kv_block_size,
            decay_factor=factor,
            variant=variant,
            sink_frames=sink_frames,
        )
        return float(np.count_nonzero(dense)) / dense.size

    grid = layout.grid if isinstance(layout, TokenLayout) else layout
    # From here on every window spans its frame: a larger factor changes nothing.
    widest = 4.0 * max(2, grid.frames)
    low, high = 1e-6, widest
    at_low, at_high = reached(low), reached(high)
    if density <= at_low:
        return low, at_low
    if density >= at_high:
        return high, at_high
    for _ in range(18):
        middle = math.sqrt(low * high)
        at_middle = reached(middle)
        if at_middle == density:
            return middle, at_middle
        if at_middle < density:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
        if high / low < 1.0005:
            break
    return min(((low, at_low), (high, at_high)), key=lambda pair: abs(pair[1] - density))


def radial_dense_blocks(
    layout: TokenLayout | LatentGrid,
    *,
    q_block_size: int | None = None,
    kv_block_size: int | None = None,
    decay_factor: float = 1.0,
    variant: Variant = "paper",
    sink_frames: int = 1,
) -> NDArray[np.bool_]:
    """The mask of `radial_block_mask` as a boolean array over blocks, `[num_q_blocks, num_kv_blocks]`.

    Args and Raises: as for `radial_block_mask`.
    """
    layout, q_block_size, kv_block_size = _sizes(layout, q_block_size, kv_block_size)
    check_radial(decay_factor, variant, sink_frames)
    if variant == "release":
        if q_block_size != kv_block_size:
            raise ConfigError(
                f'variant "release" needs equal block sizes, got {q_block_size} and {kv_block_size}; use "paper".'
            )
        dense = _release_blocks(layout, q_block_size, decay_factor, sink_frames)
    else:
        dense = _paper_blocks(layout, q_block_size, kv_block_size, decay_factor, sink_frames)
    _keep_text(dense, layout, q_block_size, kv_block_size)
    _keep_own(dense, layout.seq_len, q_block_size, kv_block_size)
    return dense


def check_radial(decay_factor: float, variant: str, sink_frames: int) -> None:
    """Raise ConfigError for a decay factor, variant or number of sink frames that cannot be."""
    if not is_number(decay_factor) or not (decay_factor > 0 and math.isfinite(decay_factor)):
        raise ConfigError(f"`decay_factor` must be positive and finite, got {decay_factor!r}.")
    if variant not in get_args(Variant):
        raise ConfigError(f"`variant` must be one of {', '.join(get_args(Variant))}, got {variant!r}.")
    if not is_whole(sink_frames) or sink_frames < 0:
        raise ConfigError(f"`sink_frames` must be a whole number of at least 0, got {sink_frames!r}.")


def _sizes(
    layout: TokenLayout | LatentGrid, q_block_size: int | None, kv_block_size: int | None
) -> tuple[TokenLayout, int, int]:
    if isinstance(layout, LatentGrid):
        layout = TokenLayout(layout)
    q_block_size = layout.block_size if q_block_size is None else q_block_size
    kv_block_size = layout.block_size if kv_block_size is None else kv_block_size
    for size in (q_block_size, kv_block_size):
        replace(layout, block_size=size)  # checks the size
    return layout, q_block_size, kv_block_size


def paper_radii(frames: int, tokens_per_frame: int, decay_factor: float) -> NDArray[np.int64]:
    """Largest |k - l| that Eq. 4 keeps at each frame distance, int64 `[frames]`; -1 where the frame pair is dropped."""
    radii = np.empty(frames, dtype=np.int64)
    for distance in range(frames):
        span = 1 << int(math.log2(max(distance, 1)))
        if distance <= 1:
            radii[distance] = tokens_per_frame - 1
        elif span <= tokens_per_frame:
            # |k - l| + 1 <= decay * s / 2^r, and a token always sees its own position.
            window = math.floor(decay_factor * tokens_per_frame / span + 1e-9)
            radii[distance] = min(max(window - 1, 0), tokens_per_frame - 1)
        else:
            period = -(-span // tokens_per_frame)
            radii[distance] = 0 if distance % period == 0 else -1
    return radii


def _paper_blocks(
    layout: TokenLayout, q_block_size: int, kv_block_size: int, decay_factor: float, sink_frames: int
) -> NDArray[np.bool_]:
    grid, offset, size = layout.grid, layout.text_before, layout.grid.tokens_per_frame
    radii = paper_radii(grid.frames, size, decay_factor)
    num_kv_blocks = -(-layout.seq_len // kv_block_size)
    dense = np.zeros((-(-layout.seq_len // q_block_size), num_kv_blocks), dtype=bool)
    key_frames = np.arange(grid.frames)
    for q_blocks, frames, first, last in _segments(layout, q_block_size):
        # Each row is a run of queries inside one frame; each column a key frame: the kept keys are one interval.
        radius = radii[np.abs(frames[:, None] - key_frames)]
        radius[:, :sink_frames] = size - 1
        low = np.maximum(first[:, None] - radius, 0)
        high = np.minimum(last[:, None] + radius, size - 1)
        start = offset + key_frames * size
        kept = radius >= 0
        block_low = ((start + low) // kv_block_size)[kept]
        block_high = ((start + high) // kv_block_size)[kept]
        base = int(q_blocks[0])
        rows = np.broadcast_to((q_blocks - base)[:, None], kept.shape)[kept]
        count, width = int(q_blocks[-1]) - base + 1, num_kv_blocks + 1
        edges = np.bincount(rows * width + block_low, minlength=count * width)
        edges -= np.bincount(rows * width + block_high + 1, minlength=count * width)
        open_intervals = np.cumsum(edges.reshape(count, width), axis=1)
        dense[base : base + count] |= open_intervals[:, :-1] > 0
    return dense


def _segments(
    layout: TokenLayout, q_block_size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Runs of video tokens inside one q-block and one frame, in chunks: q-block, frame, first and last position."""
    offset, tokens, size = layout.text_before, layout.grid.num_tokens, layout.grid.tokens_per_frame
    block_edges = np.arange(0, layout.seq_len, q_block_size) - offset
    block_edges = block_edges[(block_edges > 0) & (block_edges < tokens)]
    cuts = np.unique(np.concatenate([block_edges, np.arange(0, tokens + 1, size)]))
    starts, stops = cuts[:-1], cuts[1:]
    frames = starts // size
    q_blocks = (starts + offset) // q_block_size
    num_kv_blocks = -(-layout.seq_len // q_block_size)
    step = max(1, CHUNK_INTERVALS // max(layout.grid.frames, num_kv_blocks))
    for at in range(0, len(starts), step):
        part = slice(at, at + step)
        first = starts[part] - frames[part] * size
        yield q_blocks[part], frames[part], first, first + (stops[part] - starts[part]) - 1


def _release_blocks(layout: TokenLayout, block: int, decay_factor: float, sink_frames: int) -> NDArray[np.bool_]:
    grid, size = layout.grid, layout.grid.tokens_per_frame
    total = -(-layout.seq_len // block)
    dense = np.zeros((total, total), dtype=bool)
    per_frame = -(-size // block)
    starts = layout.text_before + np.arange(grid.frames) * size
    votes: dict[tuple[int, int, int], NDArray[np.bool_]] = {}
    for i in range(grid.frames):
        row, row_offset = divmod(int(starts[i]), block)
        for j in range(grid.frames):
            radius = size - 1 if j < sink_frames else _release_radius(abs(i - j), size, block, decay_factor)
            if radius < 0:
                continue
            column, column_offset = divmod(int(starts[j]), block)
            case = (row_offset, column_offset, radius)
            if case not in votes:
                votes[case] = _vote(size, block, *case)
            dense[row : row + per_frame, column : column + per_frame] |= votes[case]
    border = (layout.text_before + grid.num_tokens) // block
    dense[border:] = True
    dense[:, border:] = True
    return dense


def _release_radius(distance: int, size: int, block: int, decay_factor: float) -> int:
    """Largest |k - l| of the authors' code at a frame distance; -1 where the frame pair is dropped."""
    if distance <= 1:
        return size - 1
    rounded = 1 << int(math.log2(size))
    band = rounded / (1 << int(math.log2(distance)))
    # 128 is a constant there, not the block size.
    if band < 128 and distance % int(128 / band):
        return -1
    return min(math.floor(max(decay_factor * band, block)), size - 1)


def _vote(size: int, block: int, row_offset: int, column_offset: int, radius: int) -> NDArray[np.bool_]:
    """Which blocks of one frame pair the authors' code keeps, bool `[ceil(size / block)] * 2`.

    A block is kept when more than 0.6 of its columns that hold any kept pair have more than a third of their rows kept.
    Both thresholds are compared in whole numbers; in fp32 they come out the same.
    """
    per_frame = -(-size // block)
    edges = np.arange(per_frame + 1) * block
    rows = np.clip(edges - row_offset, 0, size)
    columns = np.clip(edges - column_offset, 0, size)
    position = np.arange(size)
    low = np.maximum(rows[:-1, None], position - radius)
    high = np.minimum(rows[1:, None], position + radius + 1)
    kept = np.maximum(high - low, 0)
    full = np.zeros((per_frame, size + 1), dtype=np.int64)
    touched = np.zeros_like(full)
    np.cumsum(3 * kept > block, axis=1, out=full[:, 1:])
    np.cumsum(kept > 0, axis=1, out=touched[:, 1:])
    full = full[:, columns[1:]] - full[:, columns[:-1]]
    touched = touched[:, columns[1:]] - touched[:, columns[:-1]]
    return 5 * full > 3 * touched


def _keep_text(dense: NDArray[np.bool_], layout: TokenLayout, q_block_size: int, kv_block_size: int) -> None:
    after = layout.text_before + layout.grid.num_tokens
    if layout.text_before:
        dense[: -(-layout.text_before // q_block_size)] = True
        dense[:, : -(-layout.text_before // kv_block_size)] = True
    if layout.text_after:
        dense[after // q_block_size :] = True
        dense[:, after // kv_block_size :] = True


def _keep_own(dense: NDArray[np.bool_], seq_len: int, q_block_size: int, kv_block_size: int) -> None:
    first = np.arange(dense.shape[0]) * q_block_size
    last = np.minimum(first + q_block_size, seq_len) - 1
    for row, (low, high) in enumerate(zip(first // kv_block_size, last // kv_block_size, strict=True)):
        dense[row, low : high + 1] = True


def _to_block_mask(
    dense: NDArray[np.bool_], seq_len: int, q_block_size: int, kv_block_size: int, device: Any
) -> BlockMask:
    import torch

    from vidsparse_kernels import BlockMask

    counts = dense.sum(axis=1, dtype=np.int32)
    rows, columns = np.nonzero(dense)
    starts = np.cumsum(counts) - counts
    indices = np.zeros((dense.shape[0], int(counts.max())), dtype=np.int32)
    indices[rows, np.arange(len(rows)) - starts[rows]] = columns
    mask = BlockMask.from_indices(
        torch.from_numpy(counts)[None, None],
        torch.from_numpy(indices)[None, None],
        seq_len_q=seq_len,
        seq_len_kv=seq_len,
        q_block_size=q_block_size,
        kv_block_size=kv_block_size,
    )
    return mask if device is None else mask.to(device)
