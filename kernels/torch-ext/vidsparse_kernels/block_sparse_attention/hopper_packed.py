"""Forward kernel for Hopper GPUs over blocks of variable size: the tokens of all listed blocks packed into full tiles.

A cluster of 75 keys fills half of a tile of 128, so a kernel that gives every cluster tiles of its own computes twice
what it should. Here producer warps, one for each 64 dims of keys and of values, write the rows of one listed block after
those of the other into a tile of shared memory until it is full, in pieces of 64, 32, 16 and 8 rows, each a TMA copy. What
is left of a run of blocks fills one piece of 8 rows in part. These last pieces come first in the list, so that only its
first tiles need a mask: a tenth of them for clusters of 75 tokens. After them, rows from beyond the last key, which TMA
fills with zeros, make the list a whole number of tiles. On the side of the queries a tile belongs to one block; a
warpgroup whose 64 rows lie past its end only lets the tiles pass. Uniform blocks of queries fill all their tiles.

Warpgroups, barriers and pipeline are those of `hopper.py`, and so is the softmax against the peak of the first tile: rows
for which fp32 has no room are done again with a running maximum.
"""

# In kernels every value is the compiler's, which its annotations for the host do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..block_mask import BlockMask
from .configs import padded_head_dim
from .forward import LOG2_E, _broadcast_strides, _tma_can_read
from .hopper import (
    BLOCK_M,
    CONSUMER_REGISTERS,
    LARGEST_MASS,
    MAX_AHEAD,
    PRODUCER_REGISTERS,
    _descriptor,
    _log2,
    _thread_sums,
    num_stages,
    tma_load,
)
from .hopper_schedule import next_work, warpgroup_barrier
from .runs import block_runs, query_tiles, tile_order

# Later versions of Triton name this differently.
_descriptor_class: Any = gl.shared_memory_descriptor
reinterpret: Any = getattr(_descriptor_class, "reinterpret", None) or _descriptor_class._reinterpret

KEYS = gl.constexpr(128)
"""Keys per tile."""
PIECE = gl.constexpr(8)
"""Rows of the smallest copy: a swizzled tile takes no fewer."""
PIECES = (64, 32, 16, 8) if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else (8,)
"""Rows of a copy; each is half of the one before. Since 3.8 Triton lets no view of shared memory be larger than the one it is
made of, which a larger copy from the place of a piece needs."""
ITEM_NUMBERS = gl.constexpr(7)
"""Numbers of an item, each with two places: place in the order head by head, list, first query, queries (none where there
is no tile), runs, slots, and state: 0 no more items, 1 one as it comes, 2 one that has to be done again with a running
maximum."""
RUNTIME_INTEGERS = [
    "own_stride_b", "own_stride_h", "order_stride_b", "order_stride_h", "list_stride_b", "list_stride_h", "max_runs",
    "max_first", "num_heads", "group_size", "seq_len_q", "num_q_tiles", "num_work",
]  # fmt: skip
"""What Triton may not compile into the kernel, so that one compilation serves every shape."""


@gluon.jit
def _schedule(
    items, verdicts, ready, ended, lists, order_ptr, order_stride_b, order_stride_h, counter_ptr,
    num_heads, seq_len_q, num_q_tiles, num_work, Q_BLOCK: gl.constexpr,
):  # fmt: skip
    """The warp that hands out q tiles, as `schedule` of `hopper_schedule`, but what an item says is of lists of runs."""
    (
        own_blocks_ptr,
        own_tiles_ptr,
        num_runs_ptr,
        slots_ptr,
        own_stride_b,
        own_stride_h,
        list_stride_b,
        list_stride_h,
    ) = lists
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    turn = 0
    state = 1
    while state > 0:
        slot = turn & 1
        work, state = next_work(turn, items, verdicts, ended, counter_ptr, num_work)
        head = (work // num_q_tiles) % num_heads
        batch = work // num_q_tiles // num_heads
        place = gl.load(
            order_ptr + batch * order_stride_b + head * order_stride_h + work % num_q_tiles, mask=state > 0, other=0
        )
        if Q_BLOCK > 0:
            block = place * 128 // Q_BLOCK
            start_m = place * 128
            queries = gl.where(state > 0, gl.minimum(seq_len_q - start_m, 128), 0)
        else:
            own = batch * own_stride_b + head * own_stride_h + place
            tile = gl.load(own_tiles_ptr + own, mask=state > 0, other=-1)
            block = gl.load(own_blocks_ptr + own, mask=state > 0, other=0)
            start_m = tile >> 8
            queries = gl.where(tile < 0, 0, (tile & 255) + 1)
        row = batch * list_stride_b + head * list_stride_h + block
        num_runs = gl.load(num_runs_ptr + row, mask=queries > 0, other=0)
        slots = gl.load(slots_ptr + row, mask=queries > 0, other=0)
        items.index(slot).store(gl.full([1], work, gl.int32, one))
        items.index(2 + slot).store(gl.full([1], row, gl.int32, one))
        items.index(4 + slot).store(gl.full([1], start_m, gl.int32, one))
        items.index(6 + slot).store(gl.full([1], queries, gl.int32, one))
        items.index(8 + slot).store(gl.full([1], num_runs, gl.int32, one))
        items.index(10 + slot).store(gl.full([1], slots, gl.int32, one))
        items.index(12 + slot).store(gl.full([1], state, gl.int32, one))
        warpgroup_barrier()
        mbarrier.arrive(ready.index(slot), count=1)
        turn += 1


@gluon.jit
def _item(turn, items, ready, WARPS: gl.constexpr):
    """The numbers of the item of this turn; waits for it."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    slot = turn & 1
    mbarrier.wait(ready.index(slot), (turn >> 1) & 1)
    return (
        gl.sum(items.index(slot).load(one), 0),
        gl.sum(items.index(2 + slot).load(one), 0),
        gl.sum(items.index(4 + slot).load(one), 0),
        gl.sum(items.index(6 + slot).load(one), 0),
        gl.sum(items.index(8 + slot).load(one), 0),
        gl.sum(items.index(10 + slot).load(one), 0),
        gl.sum(items.index(12 + slot).load(one), 0),
    )


@gluon.jit
def _open_tile(tile, full, empty, STAGES: gl.constexpr):
    """Before the first piece of a tile: wait until it is free, and say how many bytes will come."""
    LOG: gl.constexpr = _log2(STAGES)
    mbarrier.wait(empty.index(tile & (STAGES - 1)), ((tile >> LOG) & 1) ^ 1)
    mbarrier.expect(full.index(tile & (STAGES - 1)), KEYS * 64 * 2)


@gluon.jit
def _load_piece(descriptor, pieces_smem, place, coordinates, bar, dtype: gl.constexpr, ROWS: gl.constexpr):
    """Copy rows to the place of a piece, counted from the start of all tiles."""
    tma_load(
        descriptor, coordinates, bar,
        reinterpret(pieces_smem.index(place), dtype, [1, 1, ROWS, 64], descriptor.layout),
    )  # fmt: skip


@gluon.jit
def _load_rows(
    half: gl.constexpr, with_query: gl.constexpr, query, descriptors, q_smem, smem, barriers, full, empty,
    items, ready, ended, runs, num_heads, group_size, num_q_tiles,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    """A producer: 64 dims of keys or of values: the last pieces of all runs, rows past the last key, and the rest of
    all runs. One of the producers copies the queries, too. Its loops are as short as can be: every instruction of a
    copy counts."""
    q_full, q_empty = barriers
    bodies_ptr, sources_ptr, max_runs, max_first = runs
    TILE: gl.constexpr = KEYS // PIECE
    HALVES: gl.constexpr = BLOCK_D // 64
    LAST: gl.constexpr = len(SIZES) - 1
    DTYPE: gl.constexpr = smem.dtype
    # [pieces, batch, head, token, dim]
    pieces_smem = reinterpret(smem, DTYPE, [STAGES * HALVES * TILE, 1, 1, PIECE, 64], descriptors[LAST].layout)
    tile = 0
    turn = 0
    q_turn = 0
    work, row, start_m, queries, num_runs, slots, state = _item(0, items, ready, 1)
    while state > 0:
        # Read, so its place may be written again.
        warpgroup_barrier()
        mbarrier.arrive(ended.index(turn & 1), count=1)
        if queries > 0:
            head = (work // num_q_tiles) % num_heads
            batch = work // num_q_tiles // num_heads
            kv_head = head // group_size
            if with_query:
                mbarrier.wait(q_empty, (q_turn & 1) ^ 1)
                mbarrier.expect(q_full, 2 * query.block_type.nbytes)
                for consumer in gl.static_range(2):
                    tma_load(query, [batch, head, start_m + consumer * 64, 0], q_full, q_smem.index(consumer))
            # `first`, `slot`, `left` and `place` count in pieces.
            first = ((-slots >> 3) & (TILE - 1)) + num_runs
            sources = sources_ptr + row.to(gl.int64) * max_first
            for start in range(0, first, TILE):
                _open_tile(tile, full, empty, STAGES)
                stage = tile & (STAGES - 1)
                bar = full.index(stage)
                place = (stage * HALVES + half) * TILE
                for part in gl.static_range(2):
                    # Eight loads under way at once; past the last piece what is loaded is not used.
                    at = start + part * 8
                    source_0 = gl.load(sources + at)
                    source_1 = gl.load(sources + at + 1)
                    source_2 = gl.load(sources + at + 2)
                    source_3 = gl.load(sources + at + 3)
                    source_4 = gl.load(sources + at + 4)
                    source_5 = gl.load(sources + at + 5)
                    source_6 = gl.load(sources + at + 6)
                    source_7 = gl.load(sources + at + 7)
                    eight = source_0, source_1, source_2, source_3, source_4, source_5, source_6, source_7
                    for i in gl.static_range(8):
                        if at + i < first:
                            _load_piece(
                                descriptors[LAST], pieces_smem, place + part * 8 + i,
                                [batch, kv_head, eight[i], half * 64], bar, DTYPE, PIECE,
                            )  # fmt: skip
                if first - start >= TILE:
                    tile += 1
            slot = first & (TILE - 1)
            bodies = bodies_ptr + row.to(gl.int64) * max_runs
            next_body = gl.load(bodies, mask=num_runs > 0, other=0)
            for run in range(num_runs):
                source = next_body.to(gl.int32)
                left = (next_body >> 32).to(gl.int32)
                next_body = gl.load(bodies + run + 1, mask=run + 1 < num_runs, other=0)
                while left > 0:
                    if slot == 0:
                        _open_tile(tile, full, empty, STAGES)
                    stage = tile & (STAGES - 1)
                    bar = full.index(stage)
                    place = (stage * HALVES + half) * TILE + slot
                    pieces = gl.minimum(left, TILE - slot)
                    left -= pieces
                    slot += pieces
                    tile += slot >> 4
                    slot = slot & (TILE - 1)
                    for i in gl.static_range(LAST + 1):
                        if i == 0:
                            while pieces >= SIZES[i] // PIECE:
                                _load_piece(
                                    descriptors[i], pieces_smem, place, [batch, kv_head, source, half * 64], bar,
                                    DTYPE, SIZES[i],
                                )  # fmt: skip
                                source += SIZES[i]
                                place += SIZES[i] // PIECE
                                pieces -= SIZES[i] // PIECE
                        else:
                            # Half of the size before: there is at most one.
                            if (pieces & (SIZES[i] // PIECE)) > 0:
                                _load_piece(
                                    descriptors[i], pieces_smem, place, [batch, kv_head, source, half * 64], bar,
                                    DTYPE, SIZES[i],
                                )  # fmt: skip
                                source += SIZES[i]
                                place += SIZES[i] // PIECE
            q_turn += 1
        turn += 1
        work, row, start_m, queries, num_runs, slots, state = _item(turn, items, ready, 1)


@gluon.jit
def _valid_words(words, tile, masked_tiles):
    """How many rows of each of the 16 pieces of a tile hold keys of the list, four to a word; all of them past the tiles
    with last pieces."""
    inside = tile < masked_tiles
    words += tile * 4
    return (
        gl.load(words, mask=inside, other=0x08080808),
        gl.load(words + 1, mask=inside, other=0x08080808),
        gl.load(words + 2, mask=inside, other=0x08080808),
        gl.load(words + 3, mask=inside, other=0x08080808),
    )


@gluon.jit
def _masked(logits, valid, columns):
    """Logits with -inf where a slot holds no key of the list."""
    piece = columns >> 3
    word = gl.where(piece < 8, gl.where(piece < 4, valid[0], valid[1]), gl.where(piece < 12, valid[2], valid[3]))
    holds = (columns & 7) < ((word >> ((piece & 3) * 8)) & 255)
    return gl.where(holds[None, :], logits, float("-inf"))


@gluon.jit
def _keys(i, k_smem, barriers, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    """The keys of tile `i`, once they are there."""
    LOG: gl.constexpr = _log2(STAGES)
    mbarrier.wait(barriers[2].index(i & (STAGES - 1)), (i >> LOG) & 1)
    return k_smem.index(i & (STAGES - 1)).reshape([KEYS, BLOCK_D]).permute((1, 0))


@gluon.jit
def _values(i, v_smem, barriers, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    """The values of tile `i`, once they are there."""
    LOG: gl.constexpr = _log2(STAGES)
    mbarrier.wait(barriers[4].index(i & (STAGES - 1)), (i >> LOG) & 1)
    return v_smem.index(i & (STAGES - 1)).reshape([KEYS, BLOCK_D])


@gluon.jit
def _next_tile(
    i, masked: gl.constexpr, valid, columns, q, zeros, k_smem, v_smem, barriers, acc, p, peak, parts, qk_scale_log2,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Weights of tile i beside the product of those of the tile before with its values."""
    k = _keys(i, k_smem, barriers, BLOCK_D, STAGES)
    scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    v = _values(i - 1, v_smem, barriers, BLOCK_D, STAGES)
    acc = warpgroup_mma(p, v, acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    # One thread arrives for the warpgroup, so all of it has to be done with the tile.
    warpgroup_barrier()
    mbarrier.arrive(barriers[3].index(i & (STAGES - 1)), count=1)
    if masked:
        scores = _masked(scores, valid, columns)
    weights = gl.exp2(scores * qk_scale_log2 - peak[:, None])
    parts += _thread_sums(weights, KEYS)
    next_p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    warpgroup_barrier()
    mbarrier.arrive(barriers[5].index((i - 1) & (STAGES - 1)), count=1)
    return acc, next_p, parts


@gluon.jit
def _tile_ahead(
    i, scores, acc, p, peak, parts, q, zeros, k_smem, v_smem, barriers, qk_scale_log2,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Weights of tile `i`, whose scores are there, beside the products of the values before and of the keys after it."""
    v = _values(i - 1, v_smem, barriers, BLOCK_D, STAGES)
    acc = warpgroup_mma(p, v, acc, is_async=True)
    k = _keys(i + 1, k_smem, barriers, BLOCK_D, STAGES)
    next_scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    weights = gl.exp2(scores * qk_scale_log2 - peak[:, None])
    parts += _thread_sums(weights, KEYS)
    next_p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    acc, p, next_scores = warpgroup_mma_wait(0, deps=[acc, p, next_scores])
    warpgroup_barrier()
    mbarrier.arrive(barriers[3].index((i + 1) & (STAGES - 1)), count=1)
    mbarrier.arrive(barriers[5].index((i - 1) & (STAGES - 1)), count=1)
    return next_scores, acc, next_p, parts


@gluon.jit
def _attend(
    consumer: gl.constexpr, out_ptr, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, items, verdicts, ready, ended,
    valid_ptr, max_first, out_strides, num_heads, seq_len_q, num_q_tiles, qk_scale_log2,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, STORE_LSE: gl.constexpr,
    LARGEST_MASS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 queries of each q tile over the tiles of its list."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    out_stride_b, out_stride_s, out_stride_h = out_strides
    DTYPE: gl.constexpr = q_smem.dtype
    LOG: gl.constexpr = _log2(STAGES)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    # Rows of the output as they are stored: 16 bytes a thread.
    w_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    q = q_smem.index(consumer).reshape([64, BLOCK_D])
    o_tile = o_smem.index(consumer).reshape([64, BLOCK_D])
    zeros = gl.zeros([64, KEYS], gl.float32, s_layout)
    columns = gl.arange(0, KEYS, s_columns)
    base = 0
    turn = 0
    q_turn = 0
    work, row, start_m, length, num_runs, slots, state = _item(0, items, ready, 4)
    while state > 0:
        again = 0
        if length > 0:
            num_tiles = (slots + KEYS - 1) >> 7
            head = (work // num_q_tiles) % num_heads
            batch = work // num_q_tiles // num_heads
            tokens = consumer * 64 + gl.arange(0, 64, s_rows)
            acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
            # [64], peak in base 2
            peak = gl.full([64], float("-inf"), gl.float32, s_rows)
            mass = gl.zeros([64], gl.float32, s_rows)
            mbarrier.wait(q_full, q_turn & 1)
            if length <= consumer * 64:
                # None of these rows belongs to the block.
                mbarrier.arrive(q_empty, count=1)
                for i in range(base, base + num_tiles):
                    stage = i & (STAGES - 1)
                    mbarrier.wait(k_full.index(stage), (i >> LOG) & 1)
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    mbarrier.wait(v_full.index(stage), (i >> LOG) & 1)
                    mbarrier.arrive(v_empty.index(stage), count=1)
            elif num_tiles > 0:
                words = valid_ptr + row.to(gl.int64) * (max_first // 4)
                masked_tiles = (((-slots >> 3) & 15) + num_runs + 15) >> 4
                valid = _valid_words(words, 0, masked_tiles)
                last = base + num_tiles - 1
                k = _keys(base, k_smem, barriers, BLOCK_D, STAGES)
                scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                warpgroup_barrier()
                mbarrier.arrive(k_empty.index(base & (STAGES - 1)), count=1)
                # A list that is not empty has a last piece, so that the first tile has a key of it.
                scores = _masked(scores, valid, columns)
                peak = gl.max(scores, 1) * qk_scale_log2
                weights = gl.exp2(scores * qk_scale_log2 - peak[:, None])
                mass = gl.sum(weights, 1)
                p = gl.convert_layout(weights.to(DTYPE), p_layout)
                valid = _valid_words(words, 1, masked_tiles)
                # [64, 4], what the threads that share a row have added up.
                parts = _thread_sums(gl.zeros([64, KEYS], gl.float32, s_layout), KEYS)
                if state > 1:
                    for i in range(base + 1, last + 1):
                        k = _keys(i, k_smem, barriers, BLOCK_D, STAGES)
                        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                        v = _values(i - 1, v_smem, barriers, BLOCK_D, STAGES)
                        acc = warpgroup_mma(p, v, acc, is_async=True)
                        scores = warpgroup_mma_wait(1, deps=[scores])
                        warpgroup_barrier()
                        mbarrier.arrive(k_empty.index(i & (STAGES - 1)), count=1)
                        scores = _masked(scores, valid, columns)
                        valid = _valid_words(words, i - base + 1, masked_tiles)
                        new_peak = gl.maximum(peak, gl.max(scores, 1) * qk_scale_log2)
                        weights = gl.exp2(scores * qk_scale_log2 - new_peak[:, None])
                        decay = gl.exp2(peak - new_peak)
                        mass = mass * decay + gl.sum(weights, 1)
                        peak = new_peak
                        next_p = gl.convert_layout(weights.to(DTYPE), p_layout)
                        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
                        warpgroup_barrier()
                        mbarrier.arrive(v_empty.index((i - 1) & (STAGES - 1)), count=1)
                        acc = acc * gl.convert_layout(decay, o_rows)[:, None]
                        p = next_p
                else:
                    for i in range(base + 1, base + masked_tiles):
                        # Read a tile ahead.
                        next_valid = _valid_words(words, i - base + 1, masked_tiles)
                        acc, p, parts = _next_tile(
                            i, True, valid, columns, q, zeros, k_smem, v_smem, barriers, acc, p, peak, parts,
                            qk_scale_log2, BLOCK_D, STAGES,
                        )  # fmt: skip
                        valid = next_valid
                    start = base + gl.maximum(masked_tiles, 1)
                    if AHEAD:
                        if start <= last:
                            # The scores of a tile are there before the weights of the one before are used.
                            k = _keys(start, k_smem, barriers, BLOCK_D, STAGES)
                            scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                            scores = warpgroup_mma_wait(0, deps=[scores])
                            warpgroup_barrier()
                            mbarrier.arrive(k_empty.index(start & (STAGES - 1)), count=1)
                            # Two at a time, so that the two sets of scores change places without being copied.
                            for pair in range(0, (last - start) // 2):
                                i = start + 2 * pair
                                scores, acc, p, parts = _tile_ahead(
                                    i, scores, acc, p, peak, parts, q, zeros, k_smem, v_smem, barriers,
                                    qk_scale_log2, BLOCK_D, STAGES,
                                )  # fmt: skip
                                scores, acc, p, parts = _tile_ahead(
                                    i + 1, scores, acc, p, peak, parts, q, zeros, k_smem, v_smem, barriers,
                                    qk_scale_log2, BLOCK_D, STAGES,
                                )  # fmt: skip
                            if ((last - start) & 1) == 1:
                                scores, acc, p, parts = _tile_ahead(
                                    last - 1, scores, acc, p, peak, parts, q, zeros, k_smem, v_smem, barriers,
                                    qk_scale_log2, BLOCK_D, STAGES,
                                )  # fmt: skip
                            v = _values(last - 1, v_smem, barriers, BLOCK_D, STAGES)
                            acc = warpgroup_mma(p, v, acc, is_async=True)
                            weights = gl.exp2(scores * qk_scale_log2 - peak[:, None])
                            parts += _thread_sums(weights, KEYS)
                            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
                            warpgroup_barrier()
                            mbarrier.arrive(v_empty.index((last - 1) & (STAGES - 1)), count=1)
                            p = gl.convert_layout(weights.to(DTYPE), p_layout)
                    else:
                        for i in range(start, last + 1):
                            acc, p, parts = _next_tile(
                                i, False, valid, columns, q, zeros, k_smem, v_smem, barriers, acc, p, peak, parts,
                                qk_scale_log2, BLOCK_D, STAGES,
                            )  # fmt: skip
                v = _values(last, v_smem, barriers, BLOCK_D, STAGES)
                acc = warpgroup_mma(p, v, acc, is_async=True)
                mbarrier.arrive(q_empty, count=1)
                acc = warpgroup_mma_wait(0, deps=[acc])
                warpgroup_barrier()
                mbarrier.arrive(v_empty.index(last & (STAGES - 1)), count=1)
                mass += gl.convert_layout(gl.sum(parts, 1), s_rows)
                # 0, or NaN where a number is not finite.
                spoilt = gl.convert_layout(gl.sum(acc * 0.0, 1), s_rows)
                # Rows past the block's end are another tile's.
                right = ((mass < LARGEST_MASS) & (spoilt == 0.0)) | (tokens >= length)
                again = gl.where(state > 1, 0, gl.max(gl.where(right, 0, 1), 0))
                acc = acc * gl.convert_layout(1.0 / mass, o_rows)[:, None]
            else:
                warpgroup_barrier()
                mbarrier.arrive(q_empty, count=1)
            if again == 0:
                if STORE_LSE:
                    lse = gl.where(mass == 0.0, float("-inf"), (peak + gl.log2(mass)) * 0.6931471805599453)
                    lse_row = (batch.to(gl.int64) * num_heads + head) * seq_len_q + start_m
                    gl.store(lse_ptr + lse_row + tokens, lse, mask=tokens < length)
                # Through shared memory, where a row is put together.
                warpgroup_barrier()
                o_tile.store(acc.to(DTYPE))
                warpgroup_barrier()
                stored = o_tile.load(w_layout)
                rows = consumer * 64 + gl.arange(0, 64, gl.SliceLayout(1, w_layout))
                dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, w_layout))
                out_row = out_ptr + batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
                places = (start_m + rows).to(gl.int64)[:, None] * out_stride_s + dims[None, :]
                gl.store(out_row + places, stored, mask=(rows < length)[:, None] & (dims < HEAD_DIM)[None, :])
            base += num_tiles
            q_turn += 1
        slot = turn & 1
        verdicts.index(slot * 2 + consumer).store(gl.full([1], again, gl.int32, one))
        warpgroup_barrier()
        mbarrier.arrive(ended.index(slot), count=1)
        turn += 1
        work, row, start_m, length, num_runs, slots, state = _item(turn, items, ready, 4)


@gluon.jit(do_not_specialize=RUNTIME_INTEGERS)
def packed_forward_hopper_kernel(
    query, keys_64, keys_32, keys_16, keys_8, values_64, values_32, values_16, values_8, out_ptr, lse_ptr,
    own_blocks_ptr, own_tiles_ptr, order_ptr, counter_ptr, num_runs_ptr, slots_ptr, bodies_ptr, sources_ptr, valid_ptr,
    out_stride_b, out_stride_s, out_stride_h, own_stride_b, own_stride_h, order_stride_b, order_stride_h,
    list_stride_b, list_stride_h, max_runs, max_first,
    num_heads, group_size, seq_len_q, num_q_tiles, num_work, qk_scale_log2,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, Q_BLOCK: gl.constexpr,
    SIZES: gl.constexpr, STORE_LSE: gl.constexpr, LARGEST_MASS: gl.constexpr, AHEAD: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Queries of one block of one head over the tokens of its list, q tile after q tile; Q_BLOCK: of uniform q-blocks,
    0 where their tiles are listed."""
    DTYPE: gl.constexpr = query.dtype
    HALVES: gl.constexpr = BLOCK_D // 64
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # [stages, batch, head, token, dim]
    q_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, BLOCK_D], query.layout)
    o_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, BLOCK_D], query.layout)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, KEYS, BLOCK_D], tile_layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, KEYS, BLOCK_D], tile_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ended = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    single: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # [number and place, 1], [place and warpgroup, 1]
    items = gl.allocate_shared_memory(gl.int32, [2 * ITEM_NUMBERS, 1], single)
    verdicts = gl.allocate_shared_memory(gl.int32, [4, 1], single)
    for i in gl.static_range(4):
        verdicts.index(i).store(gl.zeros([1], gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    for slot in gl.static_range(2):
        mbarrier.init(ready.index(slot), count=1)
        # The producers have read it, the warpgroups have done it.
        mbarrier.init(ended.index(slot), count=2 * HALVES + 2)
    # Full: each producer arrives. Empty: each of the two warpgroups does.
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=HALVES)
        mbarrier.init(v_full.index(stage), count=HALVES)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    lists = (
        own_blocks_ptr, own_tiles_ptr, num_runs_ptr, slots_ptr, own_stride_b, own_stride_h, list_stride_b, list_stride_h,
    )  # fmt: skip
    runs = bodies_ptr, sources_ptr, max_runs, max_first
    keys = (keys_64, keys_32, keys_16, keys_8) if len(SIZES) == 4 else (keys_8,)
    values = (values_64, values_32, values_16, values_8) if len(SIZES) == 4 else (values_8,)
    out_strides = out_stride_b, out_stride_s, out_stride_h
    q_barriers = q_full, q_empty
    if BLOCK_D == 64:
        gl.warp_specialize(
            [
                (_attend, (
                    0, out_ptr, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, items, verdicts, ready, ended,
                    valid_ptr, max_first, out_strides, num_heads, seq_len_q, num_q_tiles, qk_scale_log2,
                    HEAD_DIM, BLOCK_D, STAGES, STORE_LSE, LARGEST_MASS, AHEAD,
                )),
                (_attend, (
                    1, out_ptr, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, items, verdicts, ready, ended,
                    valid_ptr, max_first, out_strides, num_heads, seq_len_q, num_q_tiles, qk_scale_log2,
                    HEAD_DIM, BLOCK_D, STAGES, STORE_LSE, LARGEST_MASS, AHEAD,
                )),
                (_load_rows, (
                    0, True, query, keys, q_smem, k_smem, q_barriers, k_full, k_empty, items, ready, ended, runs,
                    num_heads, group_size, num_q_tiles, BLOCK_D, STAGES, SIZES,
                )),
                (_load_rows, (
                    0, False, query, values, q_smem, v_smem, q_barriers, v_full, v_empty, items, ready, ended, runs,
                    num_heads, group_size, num_q_tiles, BLOCK_D, STAGES, SIZES,
                )),
                (_schedule, (
                    items, verdicts, ready, ended, lists, order_ptr, order_stride_b, order_stride_h, counter_ptr,
                    num_heads, seq_len_q, num_q_tiles, num_work, Q_BLOCK,
                )),
            ],
            [4, 1, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    0, out_ptr, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, items, verdicts, ready, ended,
                    valid_ptr, max_first, out_strides, num_heads, seq_len_q, num_q_tiles, qk_scale_log2,
                    HEAD_DIM, BLOCK_D, STAGES, STORE_LSE, LARGEST_MASS, AHEAD,
                )),
                (_attend, (
                    1, out_ptr, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, items, verdicts, ready, ended,
                    valid_ptr, max_first, out_strides, num_heads, seq_len_q, num_q_tiles, qk_scale_log2,
                    HEAD_DIM, BLOCK_D, STAGES, STORE_LSE, LARGEST_MASS, AHEAD,
                )),
                (_load_rows, (
                    0, True, query, keys, q_smem, k_smem, q_barriers, k_full, k_empty, items, ready, ended, runs,
                    num_heads, group_size, num_q_tiles, BLOCK_D, STAGES, SIZES,
                )),
                (_load_rows, (
                    1, False, query, keys, q_smem, k_smem, q_barriers, k_full, k_empty, items, ready, ended, runs,
                    num_heads, group_size, num_q_tiles, BLOCK_D, STAGES, SIZES,
                )),
                (_load_rows, (
                    0, False, query, values, q_smem, v_smem, q_barriers, v_full, v_empty, items, ready, ended, runs,
                    num_heads, group_size, num_q_tiles, BLOCK_D, STAGES, SIZES,
                )),
                (_load_rows, (
                    1, False, query, values, q_smem, v_smem, q_barriers, v_full, v_empty, items, ready, ended, runs,
                    num_heads, group_size, num_q_tiles, BLOCK_D, STAGES, SIZES,
                )),
                (_schedule, (
                    items, verdicts, ready, ended, lists, order_ptr, order_stride_b, order_stride_h, counter_ptr,
                    num_heads, seq_len_q, num_q_tiles, num_work, Q_BLOCK,
                )),
            ],
            [4, 1, 1, 1, 1, 1],
            [
                CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS,
                PRODUCER_REGISTERS,
            ],
        )  # fmt: skip


def packed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; inference only.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]` bf16 or fp16. What TMA cannot read is copied, here and in key
            and value.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        block_mask: lists; either side may be uniform. Block sizes are not used: q tiles have 128 queries of one block,
            key tiles 128 keys of the list.
        scale: factor on query . key, positive.
        key_bias: must be None.
        return_lse: whether to compute the LSE.

    Returns:
        Output like `query` (contiguous) and the fp32 LSE `[batch, num_heads, seq_len_q]` or None.
    """
    assert key_bias is None
    batch, seq_len_q, num_heads, head_dim = query.shape
    query, key, value = (x if _tma_can_read(x) else x.contiguous() for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, num_heads, seq_len_q, dtype=torch.float32, device=query.device) if return_lse else None
    runs = block_runs(block_mask, PIECE.value, KEYS.value // PIECE.value)
    uniform = block_mask.q_offsets is None and block_mask.q_block_size % BLOCK_M == 0
    own_blocks, tiles = (runs.slots, runs.slots) if uniform else query_tiles(block_mask, BLOCK_M)
    order = tile_order(block_mask, BLOCK_M, runs.slots)
    block_d = padded_head_dim(head_dim)
    num_q_tiles = order.shape[-1]
    num_work = num_q_tiles * num_heads * batch
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    counter = torch.zeros(1, dtype=torch.int32, device=query.device)
    pieces = []
    for x in (key, value):
        described = [_rows_descriptor(x, rows) for rows in PIECES]
        pieces += [described[0]] * (4 - len(PIECES)) + described
    launch: Any = packed_forward_hopper_kernel[(min(num_work, multiprocessors),)]
    with torch.cuda.device_of(query):
        launch(
            _descriptor(query, 64, block_d), *pieces,
            out, lse if lse is not None else runs.slots,
            own_blocks, tiles, order, counter, runs.num_runs, runs.slots, runs.bodies, runs.sources,
            runs.valid.view(torch.int32),
            *out.stride()[:3], *_broadcast_strides(tiles, 2), *_broadcast_strides(order, 2),
            *_broadcast_strides(runs.slots, 2), runs.bodies.shape[3], runs.sources.shape[3],
            num_heads, num_heads // key.shape[2], seq_len_q, num_q_tiles, num_work, scale * LOG2_E,
            HEAD_DIM=head_dim, BLOCK_D=block_d, STAGES=num_stages(KEYS.value, block_d),
            Q_BLOCK=block_mask.q_block_size if uniform else 0, SIZES=PIECES,
            STORE_LSE=return_lse, LARGEST_MASS=LARGEST_MASS, AHEAD=block_d <= MAX_AHEAD,
            CONSUMER_REGISTERS=consumer_registers(block_d), PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def consumer_registers(block_d: int) -> int:
    """Registers of a thread that computes: five warps beside the two warpgroups take those of eight, three those of four."""
    return CONSUMER_REGISTERS if block_d <= 64 else CONSUMER_REGISTERS - 8


def _rows_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of 64 dims of some rows of `[batch, seq_len, num_heads, head_dim]`, in the order batch, head, token,
    dim."""
    batch, seq_len, num_heads, head_dim = x.shape
    strides = [x.stride(d) if x.shape[d] > 1 else head_dim for d in (0, 2, 1)]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, [batch, num_heads, seq_len, head_dim], [*strides, 1], [1, 1, rows, 64], layout)
