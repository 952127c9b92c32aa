"""Lists of blocks of variable size as runs of tokens: what a kernel that packs tokens into full tiles walks."""

# In kernels every value is the compiler's, which its annotations for the host do not describe.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

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
    counts_ptr, indices_ptr, offsets_ptr, bodies_ptr, sources_ptr, valid_ptr, num_runs_ptr, slots_ptr,
    counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m,
    offsets_stride_b, offsets_stride_h, num_heads, num_blocks, max_runs, max_first, seq_len_kv,
    PIECE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
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
    first = tl.associative_scan(tl.where(opens, start, 0), 0, _larger)
    whole = (stop - first - 1) // PIECE
    num_runs = tl.sum(opens.to(tl.int32), 0)
    pieces = tl.sum(tl.where(closes, whole + 1, 0), 0)
    zeros = (TILE - pieces % TILE) % TILE
    bodies_ptr += row * max_runs
    sources_ptr += row * max_first
    valid_ptr += row * max_first
    tl.store(bodies_ptr + run, first.to(tl.int64) | (whole.to(tl.int64) << 32), mask=closes)
    tl.store(sources_ptr + run, first + whole * PIECE, mask=closes)
    tl.store(valid_ptr + run, (stop - first - whole * PIECE).to(tl.int8), mask=closes)
    slot = tl.arange(0, TILE)
    tl.store(sources_ptr + num_runs + slot, tl.zeros([TILE], tl.int32) + seq_len_kv, mask=slot < zeros)
    tl.store(valid_ptr + num_runs + slot, tl.zeros([TILE], tl.int8), mask=slot < zeros)
    # The rest of the last of these tiles.
    last = num_runs + zeros
    rest = last + slot
    tl.store(valid_ptr + rest, tl.full([TILE], PIECE, tl.int8), mask=rest < (last + TILE - 1) // TILE * TILE)
    tl.store(num_runs_ptr + row, num_runs)
    tl.store(slots_ptr + row, pieces * PIECE)


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


@triton.jit
def tile_order_kernel(
    blocks_ptr, tiles_ptr, slots_ptr, order_ptr, own_stride_b, own_stride_h, slots_stride_b, slots_stride_h,
    num_heads, capacity, seq_len_q,
    TILE: tl.constexpr, Q_BLOCK: tl.constexpr, LENGTH_BITS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """The tiles of one head by class, within one as they come; Q_BLOCK: of uniform q-blocks, 0 where tiles are listed."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // num_heads
    head = row % num_heads
    slot = tl.arange(0, CAPACITY)
    there = slot < capacity
    if Q_BLOCK > 0:
        block = slot * TILE // Q_BLOCK
        queries = tl.where(there, tl.minimum(seq_len_q - slot * TILE, TILE), 0)
    else:
        own = batch * own_stride_b + head * own_stride_h + slot
        tile = tl.load(tiles_ptr + own, mask=there, other=-1)
        block = tl.load(blocks_ptr + own, mask=there, other=0)
        queries = tl.where(tile >= 0, (tile & ((1 << LENGTH_BITS) - 1)) + 1, 0)
    length = tl.load(slots_ptr + batch * slots_stride_b + head * slots_stride_h + block, mask=queries > 0, other=0)
    mean = tl.sum(length.to(tl.float32), 0) / tl.maximum(tl.sum((queries > 0).to(tl.int32), 0), 1)
    level = tl.where(length > 1.5 * mean, 0, tl.where(queries > TILE // 2, 1, tl.where(queries > 0, 2, 3)))
    place = tl.zeros([CAPACITY], tl.int32)
    begin = 0
    for i in tl.static_range(4):
        member = (level == i) & there
        place = tl.where(member, begin + tl.cumsum(member.to(tl.int32), 0) - 1, place)
        begin += tl.sum(member.to(tl.int32), 0)
    tl.store(order_ptr + row * capacity + place, slot, mask=there)


class Runs(NamedTuple):
    """Lists of kv-blocks as runs of neighbouring tokens, cut into pieces; the last piece of a run may not be whole.

    A kernel fills its tiles first with the last piece of every run, then with pieces from beyond the last key, as many as
    make the list a whole number of tiles, then with the whole pieces of the runs.

    Attributes:
        bodies: int64 `[B|1, H|1, num_q_blocks, max_runs]`: first token of each run, ascending, and from bit 32 on its whole
            pieces before the last one. What is past `num_runs` is not written.
        sources: int32 `[B|1, H|1, num_q_blocks, max_first]`: first token of each piece that is the last of a run, and then of
            those beyond the last key.
        valid: int8, likewise: tokens of each of these pieces that belong to the list; `piece` in the rest of their last
            tile.
        num_runs: int32 `[B|1, H|1, num_q_blocks]`.
        slots: int32, likewise: tokens of all runs with each rounded up to whole pieces.
    """

    bodies: Tensor
    sources: Tensor
    valid: Tensor
    num_runs: Tensor
    slots: Tensor


def block_runs(block_mask: BlockMask, piece: int, tile: int) -> Runs:
    """The kv-blocks of each q-block as runs of neighbouring tokens, on the device of the mask, without waiting for it.

    Args:
        block_mask: the lists; the side of the keys may be uniform.
        piece: tokens of a piece, at most 127.
        tile: pieces of a tile, a power of two.

    Returns:
        The runs, 13 bytes for each that a list may have: no more than it has entries, nor than half the kv-blocks. Kept on
        the mask.
    """
    name = f"block_runs {piece} {tile}"
    if name not in block_mask._cache:
        counts, indices, offsets = block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.offsets("kv")
        batch, num_heads = torch.broadcast_shapes(counts.shape[:2], offsets.shape[:2])
        num_blocks, max_blocks = indices.shape[2:]
        # Between two runs there is a block that is empty or not listed.
        max_runs = max(1, min(max_blocks, (block_mask.num_kv_blocks + 1) // 2))
        max_first = triton.cdiv(max_runs + tile - 1, tile) * tile
        device = counts.device
        bodies = torch.empty(batch, num_heads, num_blocks, max_runs, dtype=torch.int64, device=device)
        sources = torch.empty(batch, num_heads, num_blocks, max_first, dtype=torch.int32, device=device)
        valid = torch.empty(batch, num_heads, num_blocks, max_first, dtype=torch.int8, device=device)
        num_runs, slots = (counts.new_empty(batch, num_heads, num_blocks) for _ in range(2))
        # Other strides are read in place; only neighbours have to be neighbours.
        counts, indices, offsets = (x if x.stride(-1) == 1 else x.contiguous() for x in (counts, indices, offsets))
        strides = [0 if x.shape[d] == 1 else x.stride(d) for x in (counts, indices, offsets) for d in (0, 1)]
        launch: Any = block_runs_kernel[(num_runs.numel(),)]
        if num_runs.numel():
            with torch.cuda.device_of(counts):
                launch(
                    counts, indices, offsets, bodies, sources, valid, num_runs, slots,
                    *strides[:4], indices.stride(2), *strides[4:], num_heads, num_blocks, max_runs, max_first,
                    block_mask.seq_len_kv, PIECE=piece, TILE=tile, BLOCK=max(16, triton.next_power_of_2(max_blocks)),
                    num_warps=4 if max_blocks <= 2048 else 8,
                )  # fmt: skip
        block_mask._cache[name] = Runs(bodies, sources, valid, num_runs, slots)
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


def tile_order(block_mask: BlockMask, tile_size: int, slots: Tensor) -> Tensor:
    """The q tiles of each head with long lists (text) first, then those more than half full, then the others, and last
    what is no tile; in one launch.

    Args:
        block_mask: the side of the queries may be uniform.
        tile_size: as for `query_tiles`.
        slots: of `block_runs`.

    Returns:
        int32 `[B|1, H|1, capacity]`: tiles as `query_tiles` lists them, those of uniform q-blocks of a multiple of
        `tile_size` tokens by position. Kept on the mask.
    """
    name = f"tile order {tile_size}"
    if name not in block_mask._cache:
        uniform = block_mask.q_offsets is None and block_mask.q_block_size % tile_size == 0
        blocks, tiles = (slots, slots) if uniform else query_tiles(block_mask, tile_size)
        lead = slots.shape[:2] if uniform else torch.broadcast_shapes(tiles.shape[:2], slots.shape[:2])
        capacity = triton.cdiv(block_mask.seq_len_q, tile_size) if uniform else tiles.shape[-1]
        order = slots.new_empty(*lead, capacity)
        strides = [0 if x.shape[d] == 1 else x.stride(d) for x in (tiles, slots) for d in (0, 1)]
        launch: Any = tile_order_kernel[(lead[0] * lead[1],)]
        if order.numel():
            with torch.cuda.device_of(slots):
                launch(
                    blocks, tiles, slots, order, *strides, lead[1], capacity, block_mask.seq_len_q,
                    TILE=tile_size, Q_BLOCK=block_mask.q_block_size if uniform else 0, LENGTH_BITS=LENGTH_BITS,
                    CAPACITY=triton.next_power_of_2(capacity), num_warps=4,
                )  # fmt: skip
        block_mask._cache[name] = order
    return block_mask._cache[name]
