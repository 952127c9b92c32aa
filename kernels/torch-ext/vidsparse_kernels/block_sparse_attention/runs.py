"""Lists of blocks of variable size as runs of tokens: what a kernel that packs tokens into full tiles walks."""

# In kernels every value is the compiler's, which its annotations for the host do not describe.
# pyright: reportArgumentType=false

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from .tiles import LENGTH_BITS, most_tiles

MAX_LIST = 1 << 14
"""Entries of a list that one program takes at once."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def block_runs_kernel(
    counts_ptr, indices_ptr, offsets_ptr, starts_ptr, lengths_ptr, num_runs_ptr, slots_ptr,
    counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m,
    offsets_stride_b, offsets_stride_h, num_heads, num_blocks, max_blocks, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One list: neighbouring entries become one run."""
    row = tl.program_id(0).to(tl.int64)
    block = row % num_blocks
    head = row // num_blocks % num_heads
    batch = row // num_blocks // num_heads
    count = tl.load(counts_ptr + batch * counts_stride_b + head * counts_stride_h + block)
    indices_ptr += batch * indices_stride_b + head * indices_stride_h + block * indices_stride_m
    offsets_ptr += batch * offsets_stride_b + head * offsets_stride_h
    entry = tl.arange(0, BLOCK)
    listed = entry < count
    index = tl.load(indices_ptr + entry, mask=listed, other=0)
    before = tl.load(indices_ptr + entry - 1, mask=listed & (entry > 0), other=-2)
    after = tl.load(indices_ptr + entry + 1, mask=entry + 1 < count, other=-2)
    start = tl.load(offsets_ptr + index, mask=listed, other=0)
    stop = tl.load(offsets_ptr + index + 1, mask=listed, other=0)
    start_before = tl.load(offsets_ptr + before, mask=listed & (before >= 0), other=0)
    stop_after = tl.load(offsets_ptr + after + 1, mask=listed & (after >= 0), other=0)
    # Empty blocks belong to no run and end the one before.
    opens = (start < stop) & ((before + 1 != index) | (start_before == start))
    closes = (start < stop) & ((after != index + 1) | (stop_after == stop))
    run = tl.cumsum(opens.to(tl.int32), 0) - 1
    # Starts ascend, so the largest one so far is that of the own run.
    length = stop - tl.associative_scan(tl.where(opens, start, 0), 0, _larger)
    pieces = (length + PIECE - 1) // PIECE
    tl.store(starts_ptr + row * max_blocks + run, start, mask=opens)
    tl.store(lengths_ptr + row * max_blocks + run, length, mask=closes)
    tl.store(num_runs_ptr + row, tl.sum(opens.to(tl.int32), 0))
    tl.store(slots_ptr + row, tl.sum(tl.where(closes, pieces * PIECE, 0), 0))


@triton.jit
def query_tiles_kernel(
    offsets_ptr, blocks_ptr, tiles_ptr, num_blocks, capacity,
    TILE: tl.constexpr, LENGTH_BITS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """The tiles of one head."""
    row = tl.program_id(0).to(tl.int64)
    offsets_ptr += row * (num_blocks + 1)
    block = tl.arange(0, BLOCK)
    start = tl.load(offsets_ptr + block, mask=block < num_blocks, other=0)
    stop = tl.load(offsets_ptr + block + 1, mask=block < num_blocks, other=0)
    number = (stop - start + TILE - 1) // TILE
    first = tl.cumsum(number, 0) - number
    for i in range(tl.max(number, 0)):
        begin = start + i * TILE
        packed = begin << LENGTH_BITS | (tl.minimum(stop - begin, TILE) - 1)
        tl.store(blocks_ptr + row * capacity + first + i, block, mask=i < number)
        tl.store(tiles_ptr + row * capacity + first + i, packed, mask=i < number)
    slot = tl.arange(0, CAPACITY)
    past = (slot >= tl.sum(number, 0)) & (slot < capacity)
    tl.store(blocks_ptr + row * capacity + slot, 0, mask=past)
    tl.store(tiles_ptr + row * capacity + slot, -1, mask=past)


def block_runs(block_mask: BlockMask, piece: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kv-blocks of each q-block as runs of neighbouring tokens, on the device of the mask, without waiting for it.

    Args:
        block_mask: the lists; the side of the keys may be uniform.
        piece: tokens in which runs are counted.

    Returns:
        `starts` and `lengths` int32 `[B|1, H|1, num_q_blocks, max_blocks]`, first token and tokens of each run, at least
        one, ascending; `num_runs` int32 `[B|1, H|1, num_q_blocks]`, how many of them there are (the rest is not
        written); `slots` likewise, tokens of all runs with each rounded up to a multiple of `piece`. Together twice the
        memory of the lists. Kept on the mask.
    """
    name = f"block_runs {piece}"
    if name not in block_mask._cache:
        counts, indices, offsets = block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.offsets("kv")
        batch, num_heads = torch.broadcast_shapes(counts.shape[:2], offsets.shape[:2])
        num_blocks, max_blocks = indices.shape[2:]
        starts, lengths = (
            torch.empty(batch, num_heads, num_blocks, max(1, max_blocks), dtype=torch.int32, device=counts.device)
            for _ in range(2)
        )
        num_runs, slots = (counts.new_empty(batch, num_heads, num_blocks) for _ in range(2))
        # Other strides are read in place; only neighbours have to be neighbours.
        counts, indices, offsets = (x if x.stride(-1) == 1 else x.contiguous() for x in (counts, indices, offsets))
        strides = [0 if x.shape[d] == 1 else x.stride(d) for x in (counts, indices, offsets) for d in (0, 1)]
        launch: Any = block_runs_kernel[(num_runs.numel(),)]
        if num_runs.numel():
            with torch.cuda.device_of(counts):
                launch(
                    counts, indices, offsets, starts, lengths, num_runs, slots,
                    *strides[:4], indices.stride(2), *strides[4:], num_heads, num_blocks, starts.shape[3],
                    PIECE=piece, BLOCK=max(16, triton.next_power_of_2(max_blocks)),
                    num_warps=4 if max_blocks <= 2048 else 8,
                )  # fmt: skip
        block_mask._cache[name] = starts, lengths, num_runs, slots
    return block_mask._cache[name]


def query_tiles(block_mask: BlockMask, tile_size: int) -> tuple[Tensor, Tensor]:
    """`tiles.own_tiles` of the queries in one launch, for kernels that run on a GPU anyway.

    Args:
        block_mask: the side of the queries may be uniform.
        tile_size: tokens per tile, a power of two of at most 256.

    Returns:
        `blocks` and packed `tiles` int32 `[B|1, H|1, capacity]` as of `tiles.own_tiles`. Kept on the mask.
    """
    name = f"query_tiles {tile_size}"
    if name not in block_mask._cache:
        offsets = block_mask.offsets("q").contiguous()
        batch, num_heads, ends = offsets.shape
        capacity = most_tiles(block_mask.seq_len_q, ends - 1, tile_size)
        blocks, tiles = (offsets.new_empty(batch, num_heads, capacity) for _ in range(2))
        launch: Any = query_tiles_kernel[(batch * num_heads,)]
        if tiles.numel():
            with torch.cuda.device_of(offsets):
                launch(
                    offsets, blocks, tiles, ends - 1, capacity, TILE=tile_size, LENGTH_BITS=LENGTH_BITS,
                    BLOCK=triton.next_power_of_2(ends - 1), CAPACITY=triton.next_power_of_2(capacity), num_warps=4,
                )  # fmt: skip
        block_mask._cache[name] = blocks, tiles
    return block_mask._cache[name]


FEWER = 8
"""Multiprocessors that `balanced_programs` leaves idle at most."""
LONG_ROWS, SHARE = 4, 0.2
"""What it assumes of a mask: tiles of text, whose lists are full, and the density of the others."""


@lru_cache
def balanced_programs(num_q_tiles: int, num_heads: int, multiprocessors: int) -> int:
    """Programs for a kernel in which each takes every n-th q tile, head after head, so that not always the same ones
    take the long lists.

    Tiles of text have full lists. With as many q tiles a head as multiprocessors (16,896 tokens on an H200) the same four
    programs would take those of every head, and the call would last as long as dense attention. A few programs less and
    they wander; that is done only where it saves a fifth, as masks without text would lose up to 6 %.

    Args:
        num_q_tiles: of a head.
        num_heads: of all samples.
        multiprocessors: of the GPU.
    """

    def busiest(programs: int) -> float:
        long = [0] * programs
        for head in range(num_heads):
            for tile in range(min(LONG_ROWS, num_q_tiles)):
                long[(head * num_q_tiles + tile) % programs] += 1
        return (1 - SHARE) * max(long) + SHARE * num_q_tiles * num_heads / programs

    if num_q_tiles * num_heads <= multiprocessors:
        return num_q_tiles * num_heads
    best = min(range(multiprocessors, max(0, multiprocessors - FEWER - 1), -1), key=busiest)
    return best if busiest(best) < 0.8 * busiest(multiprocessors) else multiprocessors
