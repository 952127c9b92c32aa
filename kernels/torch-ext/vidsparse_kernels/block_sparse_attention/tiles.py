"""Tile lists of masks with blocks of variable size, built on the device without waiting for it.

A kernel owns one tile of a block on its own side at a time and walks the tiles that the block lists on the other side.
Tokens of neighbouring listed blocks are one run, and runs are cut into tiles, so small clusters that are listed
together share tiles. The forward owns tiles of queries; with `transposed` the sides change places, for gradients of
key and value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_mask import BlockMask

LENGTH_BITS = 8
"""A tile is packed as start << LENGTH_BITS | length - 1 in int32, half the memory of two numbers; -1 means no tile."""
MAX_TILE = 1 << LENGTH_BITS
MAX_TOKENS = 1 << 31 - LENGTH_BITS


def tile_lists(block_mask: BlockMask, tile_size: int, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """For each block of the own side, the tiles of the other side that it attends to.

    Args:
        block_mask: the lists; either side may be uniform.
        tile_size: tokens per tile, at most 256.
        transposed: False: tiles of keys for each q-block; True: tiles of queries for each kv-block.

    Returns:
        `counts` int32 `[B|1, H|1, blocks]` and packed `tiles` int32 `[B|1, H|1, blocks, capacity]`, ascending, 0 past
        the count. With N blocks on the other side and lists of at most K entries, each of its R = min(K, (N + 1) / 2)
        runs wastes less than one tile, so capacity is (tokens + R * (tile_size - 1)) / tile_size on a GPU: for 40
        heads, 300 q-blocks, 1,000 clusters and 75,600 tokens in tiles of 64 that is 80 MB, and some five times that
        while it is built. On the CPU it is the longest list. Kept on the mask.

    Raises:
        ValueError: a length or the tile size is too large to be packed.
    """
    key = f"tile_lists {tile_size} {transposed}"
    if key not in block_mask._cache:
        counts, indices = block_mask.transpose() if transposed else (block_mask.kv_num_blocks, block_mask.kv_indices)
        _check_packing(block_mask, tile_size)
        block_mask._cache[key] = _cut_runs(
            counts,
            indices,
            block_mask.offsets("q" if transposed else "kv"),
            block_mask.seq_len_q if transposed else block_mask.seq_len_kv,
            tile_size,
        )
    return block_mask._cache[key]


def own_tiles(block_mask: BlockMask, tile_size: int, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """All tiles of the own side: what the programs of a kernel work on.

    Args:
        block_mask, tile_size: as for `tile_lists`.
        transposed: False: tiles of queries; True: tiles of keys.

    Returns:
        `blocks` int32 and packed `tiles` int32, both `[B|1, H|1, capacity]`: the block that a tile belongs to, and the
        tile, -1 past the last one. They cover every token once. Capacity is (tokens + N * (tile_size - 1)) / tile_size
        for N blocks on a GPU, the true number on the CPU. Kept on the mask.

    Raises:
        ValueError: as for `tile_lists`.
    """
    key = f"own_tiles {tile_size} {transposed}"
    if key not in block_mask._cache:
        _check_packing(block_mask, tile_size)
        offsets = block_mask.offsets("kv" if transposed else "q")
        seq_len = block_mask.seq_len_kv if transposed else block_mask.seq_len_q
        sizes = offsets.diff()
        per_block = -(-sizes // tile_size)
        ends = per_block.cumsum(-1, dtype=torch.int32)
        capacity = _capacity(ends, seq_len, sizes.shape[-1], tile_size)
        slot = torch.arange(capacity, dtype=torch.int32, device=offsets.device).expand(*ends.shape[:2], -1)
        blocks = torch.searchsorted(ends, slot.contiguous(), right=True)
        exists = blocks < sizes.shape[-1]
        blocks = torch.where(exists, blocks, 0)
        start = offsets.gather(-1, blocks) + (slot - (ends - per_block).gather(-1, blocks)) * tile_size
        length = (offsets.gather(-1, blocks + 1) - start).clamp(max=tile_size)
        tiles = torch.where(exists, _packed(start, length), -1)
        block_mask._cache[key] = (blocks.to(torch.int32), tiles)
    return block_mask._cache[key]


def unpacked(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """First token and number of tokens of packed tiles; the latter is 0 where there is no tile (-1)."""
    return tiles.clamp(min=0) >> LENGTH_BITS, torch.where(tiles < 0, 0, (tiles & MAX_TILE - 1) + 1)


def _cut_runs(counts: Tensor, indices: Tensor, offsets: Tensor, seq_len: int, tile_size: int) -> tuple[Tensor, Tensor]:
    """Tiles of the listed blocks: each entry of a list gives those that start within its tokens."""
    if indices.shape[-1] == 0:
        return counts, indices.new_zeros(*indices.shape[:3], 1)
    lead = torch.broadcast_shapes(indices.shape[:2], offsets.shape[:2])
    num_blocks, max_blocks = indices.shape[2:]
    listed = torch.arange(max_blocks, device=indices.device) < counts.unsqueeze(-1)
    # [*lead, num_blocks, max_blocks], int32: where each listed block starts and stops
    flat = indices.to(torch.int64).flatten(2).expand(*lead, -1)
    offsets = offsets.expand(*lead, -1)
    start = offsets.gather(-1, flat).unflatten(-1, (num_blocks, max_blocks))
    stop = offsets.gather(-1, flat + 1).unflatten(-1, (num_blocks, max_blocks))
    # Entries past the count become empty blocks at the end of the last run.
    start, stop = torch.where(listed, start, 0), torch.where(listed, stop, 0)
    stop = stop.cummax(-1).values
    start = torch.where(listed, start, stop)
    starts_run = torch.ones_like(start, dtype=torch.bool)
    starts_run[..., 1:] = start[..., 1:] != stop[..., :-1]
    run_start = torch.where(starts_run, start, 0).cummax(-1).values
    # The stop of a run is the smallest one of those still ahead.
    ends_run = torch.ones_like(start, dtype=torch.bool)
    ends_run[..., :-1] = starts_run[..., 1:]
    run_stop = torch.where(ends_run, stop, seq_len).flip(-1).cummin(-1).values.flip(-1)
    before = -((run_start - start) // tile_size)
    number = -((run_start - stop) // tile_size) - before
    ends = number.cumsum(-1, dtype=torch.int32)
    # Its own memory, so that kernels always see the same alignment.
    totals = ends[..., -1].clone()
    # Listed blocks without an unlisted one between them are one run.
    capacity = _capacity(ends, seq_len, min(max_blocks, offsets.shape[-1] // 2), tile_size)
    slot = torch.arange(capacity, dtype=torch.int32, device=indices.device).expand(*ends.shape[:-1], -1)
    entry = torch.searchsorted(ends, slot.contiguous(), right=True).clamp(max=max_blocks - 1)
    # The tiles of a run follow each other, wherever its blocks are cut.
    first = (ends - number).gather(-1, entry)
    tile_start = run_start.gather(-1, entry) + (before.gather(-1, entry) + slot - first) * tile_size
    length = (run_stop.gather(-1, entry) - tile_start).clamp(max=tile_size)
    return totals, torch.where(slot < totals.unsqueeze(-1), _packed(tile_start, length), 0)


def _packed(start: Tensor, length: Tensor) -> Tensor:
    return (start << LENGTH_BITS | length - 1).to(torch.int32)


def _capacity(ends: Tensor, seq_len: int, runs: int, tile_size: int) -> int:
    """Room for the tiles: on the CPU what is there, at least 1; elsewhere what shapes alone tell."""
    if ends.device.type == "cpu":
        return max(1, int(ends[..., -1].max()))
    return most_tiles(seq_len, runs, tile_size)


def most_tiles(seq_len: int, runs: int, tile_size: int) -> int:
    """A run of n tokens takes at most (n + tile_size - 1) / tile_size tiles."""
    return (seq_len + runs * (tile_size - 1)) // tile_size


def _check_packing(block_mask: BlockMask, tile_size: int) -> None:
    if not 1 <= tile_size <= MAX_TILE:
        raise ValueError(f"`tile_size` must be between 1 and {MAX_TILE}, got {tile_size}.")
    for name in ("seq_len_q", "seq_len_kv"):
        if getattr(block_mask, name) > MAX_TOKENS:
            raise ValueError(
                f"`{name}` must be at most {MAX_TOKENS} in masks with offsets, got {getattr(block_mask, name)}."
            )
