"""Forward kernel for Hopper GPUs over blocks of variable size: the tokens of all listed blocks packed into full tiles.

A cluster of 75 keys fills half of a tile of 128, so a kernel that gives every cluster tiles of its own computes twice
what it should. Here producer warps, one for each 64 dims of keys and of values, write the rows of one listed block after
those of the other into a tile of shared memory until it is full, in pieces of 64, 16 and 8 rows, each a TMA copy. What
is left of a run of blocks fills one piece of 8 rows in part. These last pieces come first in the list, so that only its
first tiles need a mask: a tenth of them for clusters of 75 tokens. Before them, rows from beyond the last key, which TMA
fills with zeros, make the list a whole number of tiles. On the side of the queries a tile belongs to one block; a
warpgroup whose 64 rows lie past its end only lets the tiles pass.

Warpgroups, barriers and pipeline are those of `hopper.py`.
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
    MAX_LATE_P,
    PRODUCER_REGISTERS,
    _descriptor,
    num_stages,
    tma_load,
    warpgroup_barrier,
)
from .runs import balanced_programs, block_runs, query_tiles

# Later versions of Triton name this differently.
_descriptor_class: Any = gl.shared_memory_descriptor
reinterpret: Any = getattr(_descriptor_class, "reinterpret", None) or _descriptor_class._reinterpret

KEYS = gl.constexpr(128)
"""Keys per tile."""
PIECE = gl.constexpr(8)
"""Rows of the smallest copy: a swizzled tile takes no fewer."""
PIECES = (64, 16, 8) if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else (8,)
"""Rows of a copy; each divides the one before. Since 3.8 Triton lets no view of shared memory be larger than the one it is
made of, which a larger copy from the place of a piece needs."""
RUNTIME_INTEGERS = [
    "own_stride_b", "own_stride_h", "list_stride_b", "list_stride_h", "max_runs",
    "num_heads", "group_size", "seq_len_q", "seq_len_kv", "num_q_tiles", "num_work",
]  # fmt: skip
"""What Triton may not compile into the kernel, so that one compilation serves every shape."""


@gluon.jit
def _work_item(work, num_work, lists, num_heads, num_q_tiles):
    """(list, first query, queries, runs, slots) of a q tile; no queries past the work or where there is no tile."""
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
    head = (work // num_q_tiles) % num_heads
    batch = work // num_q_tiles // num_heads
    place = batch * own_stride_b + head * own_stride_h + work % num_q_tiles
    tile = gl.load(own_tiles_ptr + place, mask=work < num_work, other=-1)
    block = gl.load(own_blocks_ptr + place, mask=work < num_work, other=0)
    row = batch * list_stride_b + head * list_stride_h + block
    num_runs = gl.load(num_runs_ptr + row, mask=tile >= 0, other=0)
    slots = gl.load(slots_ptr + row, mask=tile >= 0, other=0)
    return row, tile >> 8, gl.where(tile < 0, 0, (tile & 255) + 1), num_runs, slots


@gluon.jit
def _open_tile(tile, slot, full, empty, STAGES: gl.constexpr):
    """Before the first piece of a tile: wait until it is free, and say how many bytes will come."""
    if slot == 0:
        mbarrier.wait(empty.index(tile % STAGES), ((tile // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(tile % STAGES), KEYS * 64 * 2)


@gluon.jit
def _load_rows(
    half: gl.constexpr, with_query: gl.constexpr, query, descriptors, q_smem, smem, barriers, full, empty, lists, runs,
    num_heads, group_size, seq_len_kv, num_q_tiles, num_work,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    """A producer: 64 dims of keys or of values: rows past the last key, the last pieces of all runs, and the rest of
    all runs. One of the producers copies the queries, too. Its loops are as short as can be: every instruction of a
    copy counts."""
    q_full, q_empty = barriers
    starts_ptr, lengths_ptr, max_runs = runs
    TILE: gl.constexpr = KEYS // PIECE
    HALVES: gl.constexpr = BLOCK_D // 64
    NUM_SIZES: gl.constexpr = len(SIZES)
    # [pieces, batch, head, token, dim]
    pieces_smem = reinterpret(
        smem, smem.dtype, [STAGES * HALVES * TILE, 1, 1, PIECE, 64], descriptors[NUM_SIZES - 1].layout
    )
    tile = 0
    turn = 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        row, start_m, queries, num_runs, slots = _work_item(work, num_work, lists, num_heads, num_q_tiles)
        if queries > 0:
            head = (work // num_q_tiles) % num_heads
            batch = work // num_q_tiles // num_heads
            kv_head = head // group_size
            run_starts = starts_ptr + row.to(gl.int64) * max_runs
            run_lengths = lengths_ptr + row.to(gl.int64) * max_runs
            if with_query:
                mbarrier.wait(q_empty, (turn & 1) ^ 1)
                mbarrier.expect(q_full, 2 * query.block_type.nbytes)
                for consumer in gl.static_range(2):
                    tma_load(query, [batch, head, start_m + consumer * 64, 0], q_full, q_smem.index(consumer))
            # `slot`, `left` and `place` count in pieces from here on.
            slot = 0
            source = seq_len_kv
            next_start = gl.load(run_starts, mask=num_runs > 0, other=0)
            next_length = gl.load(run_lengths, mask=num_runs > 0, other=0)
            for run in range(-((-slots // PIECE) & (TILE - 1)), num_runs):
                if run >= 0:
                    # A run is read while the piece before is copied.
                    source = next_start + ((next_length - 1) & -PIECE)
                    next_start = gl.load(run_starts + run + 1, mask=run + 1 < num_runs, other=0)
                    next_length = gl.load(run_lengths + run + 1, mask=run + 1 < num_runs, other=0)
                _open_tile(tile, slot, full, empty, STAGES)
                stage = tile % STAGES
                target = pieces_smem.index((stage * HALVES + half) * TILE + slot)
                tma_load(
                    descriptors[NUM_SIZES - 1], [batch, kv_head, source, half * 64], full.index(stage),
                    reinterpret(target, smem.dtype, [1, 1, PIECE, 64], descriptors[NUM_SIZES - 1].layout),
                )  # fmt: skip
                slot += 1
                tile += slot // TILE
                slot = slot & (TILE - 1)
            next_start = gl.load(run_starts, mask=num_runs > 0, other=0)
            next_length = gl.load(run_lengths, mask=num_runs > 0, other=0)
            for run in range(num_runs):
                source = next_start
                left = (next_length - 1) >> 3
                next_start = gl.load(run_starts + run + 1, mask=run + 1 < num_runs, other=0)
                next_length = gl.load(run_lengths + run + 1, mask=run + 1 < num_runs, other=0)
                while left > 0:
                    _open_tile(tile, slot, full, empty, STAGES)
                    stage = tile % STAGES
                    place = (stage * HALVES + half) * TILE + slot
                    pieces = gl.minimum(left, TILE - slot)
                    left -= pieces
                    slot += pieces
                    tile += slot // TILE
                    slot = slot & (TILE - 1)
                    for i in gl.static_range(NUM_SIZES):
                        while pieces >= SIZES[i] // PIECE:
                            target = pieces_smem.index(place)
                            tma_load(
                                descriptors[i], [batch, kv_head, source, half * 64], full.index(stage),
                                reinterpret(target, smem.dtype, [1, 1, SIZES[i], 64], descriptors[i].layout),
                            )  # fmt: skip
                            source += SIZES[i]
                            place += SIZES[i] // PIECE
                            pieces -= SIZES[i] // PIECE
            turn += 1


@gluon.jit
def _masked(logits, tile, slots, num_runs, lengths, columns):
    """Logits of one of the first tiles, -inf where a slot holds no key of the list."""
    run = tile * (KEYS // PIECE) - (-slots & (KEYS - 1)) // PIECE + (columns // PIECE)
    # Past the last pieces of the runs, length 0 makes a piece whole.
    length = gl.load(lengths + run, mask=(run >= 0) & (run < num_runs), other=0)
    holds = (columns % PIECE <= ((length - 1) & (PIECE - 1))) & (run >= 0)
    return gl.where(holds[None, :], logits, float("-inf"))


@gluon.jit
def _next_tile(
    i, masked: gl.constexpr, tile, slots, num_runs, lengths, columns,
    q, zeros, k_smem, v_smem, barriers, acc, p, peak, mass, qk_scale_log2,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, LATE_P: gl.constexpr,
    o_rows: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Weights of tile i beside the product of those of the tile before with its values: (acc, p, peak, mass)."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    stage = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
    k = k_smem.index(stage).reshape([KEYS, BLOCK_D]).permute((1, 0))
    logits = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    v = v_smem.index(before).reshape([KEYS, BLOCK_D])
    acc = warpgroup_mma(p, v, acc, is_async=True)
    logits = warpgroup_mma_wait(1, deps=[logits])
    warpgroup_barrier()
    mbarrier.arrive(k_empty.index(stage), count=1)
    if masked:
        logits = _masked(logits, tile, slots, num_runs, lengths, columns)
    new_peak = gl.maximum(peak, gl.max(logits, 1) * qk_scale_log2)
    weights = gl.exp2(logits * qk_scale_log2 - new_peak[:, None])
    decay = gl.exp2(peak - new_peak)
    mass = mass * decay + gl.sum(weights, 1)
    if not LATE_P:
        next_p = gl.convert_layout(weights.to(p.dtype), p_layout)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    warpgroup_barrier()
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(decay, o_rows)[:, None]
    if LATE_P:
        next_p = gl.convert_layout(weights.to(p.dtype), p_layout)
    return acc, next_p, new_peak, mass


@gluon.jit
def _attend(
    consumer: gl.constexpr, out_ptr, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, lists, runs, out_strides,
    num_heads, seq_len_q, num_q_tiles, num_work, qk_scale_log2,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, LATE_P: gl.constexpr, STORE_LSE: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 queries of each q tile over the tiles of its list."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    starts_ptr, lengths_ptr, max_runs = runs
    out_stride_b, out_stride_s, out_stride_h = out_strides
    DTYPE: gl.constexpr = q_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    # Rows of the output as they are stored: 16 bytes a thread.
    w_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    q = q_smem.index(consumer).reshape([64, BLOCK_D])
    o_tile = o_smem.index(consumer).reshape([64, BLOCK_D])
    zeros = gl.zeros([64, KEYS], gl.float32, s_layout)
    columns = gl.arange(0, KEYS, s_columns)
    base = 0
    turn = 0
    step = gl.num_programs(0)
    row, start_m, length, num_runs, slots = _work_item(gl.program_id(0), num_work, lists, num_heads, num_q_tiles)
    for work in range(gl.program_id(0), num_work, step):
        # The next item is read a whole list ahead.
        next_row, next_start_m, next_length, next_num_runs, next_slots = _work_item(
            work + step, num_work, lists, num_heads, num_q_tiles
        )
        if length > 0:
            num_tiles = (slots + KEYS - 1) // KEYS
            head = (work // num_q_tiles) % num_heads
            batch = work // num_q_tiles // num_heads
            acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
            # [64], peak in base 2
            peak = gl.full([64], float("-inf"), gl.float32, s_rows)
            mass = gl.zeros([64], gl.float32, s_rows)
            mbarrier.wait(q_full, turn & 1)
            if length <= consumer * 64:
                # None of these rows belongs to the block.
                mbarrier.arrive(q_empty, count=1)
                for i in range(base, base + num_tiles):
                    stage = i % STAGES
                    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
                    mbarrier.arrive(v_empty.index(stage), count=1)
            elif num_tiles > 0:
                lengths = lengths_ptr + row.to(gl.int64) * max_runs
                masked_tiles = ((-slots & (KEYS - 1)) + num_runs * PIECE + KEYS - 1) // KEYS
                stage = base % STAGES
                mbarrier.wait(k_full.index(stage), (base // STAGES) & 1)
                k = k_smem.index(stage).reshape([KEYS, BLOCK_D]).permute((1, 0))
                logits = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                logits = warpgroup_mma_wait(0, deps=[logits])
                # One thread arrives for the warpgroup, so all of it has to be done with the tile.
                warpgroup_barrier()
                mbarrier.arrive(k_empty.index(stage), count=1)
                # Less than a tile is filled up, so that the first tile has a key of the list.
                logits = _masked(logits, 0, slots, num_runs, lengths, columns)
                peak = gl.max(logits, 1) * qk_scale_log2
                weights = gl.exp2(logits * qk_scale_log2 - peak[:, None])
                mass = gl.sum(weights, 1)
                p = gl.convert_layout(weights.to(DTYPE), p_layout)
                for i in range(base + 1, base + masked_tiles):
                    acc, p, peak, mass = _next_tile(
                        i, True, i - base, slots, num_runs, lengths, columns,
                        q, zeros, k_smem, v_smem, barriers, acc, p, peak, mass, qk_scale_log2,
                        BLOCK_D, STAGES, LATE_P, o_rows, p_layout,
                    )  # fmt: skip
                for i in range(base + masked_tiles, base + num_tiles):
                    acc, p, peak, mass = _next_tile(
                        i, False, i - base, slots, num_runs, lengths, columns,
                        q, zeros, k_smem, v_smem, barriers, acc, p, peak, mass, qk_scale_log2,
                        BLOCK_D, STAGES, LATE_P, o_rows, p_layout,
                    )  # fmt: skip
                stage = (base + num_tiles - 1) % STAGES
                mbarrier.wait(v_full.index(stage), ((base + num_tiles - 1) // STAGES) & 1)
                v = v_smem.index(stage).reshape([KEYS, BLOCK_D])
                acc = warpgroup_mma(p, v, acc, is_async=True)
                mbarrier.arrive(q_empty, count=1)
                acc = warpgroup_mma_wait(0, deps=[acc])
                warpgroup_barrier()
                mbarrier.arrive(v_empty.index(stage), count=1)
                acc = acc * gl.convert_layout(1.0 / mass, o_rows)[:, None]
            else:
                warpgroup_barrier()
                mbarrier.arrive(q_empty, count=1)
            if STORE_LSE:
                tokens = consumer * 64 + gl.arange(0, 64, s_rows)
                lse = gl.where(mass == 0.0, float("-inf"), (peak + gl.log2(mass)) * 0.6931471805599453)
                lse_row = (batch.to(gl.int64) * num_heads + head) * seq_len_q + start_m
                gl.store(lse_ptr + lse_row + tokens, lse, mask=tokens < length)
            # Through shared memory, where a row is put together; the rows past the block's end are another tile's.
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
            turn += 1
        row = next_row
        start_m = next_start_m
        length = next_length
        num_runs = next_num_runs
        slots = next_slots


@gluon.jit(do_not_specialize=RUNTIME_INTEGERS)
def packed_forward_hopper_kernel(
    query, keys_64, keys_16, keys_8, values_64, values_16, values_8, out_ptr, lse_ptr,
    own_blocks_ptr, own_tiles_ptr, num_runs_ptr, slots_ptr, starts_ptr, lengths_ptr,
    out_stride_b, out_stride_s, out_stride_h, own_stride_b, own_stride_h, list_stride_b, list_stride_h, max_runs,
    num_heads, group_size, seq_len_q, seq_len_kv, num_q_tiles, num_work, qk_scale_log2,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    SIZES: gl.constexpr, LATE_P: gl.constexpr, STORE_LSE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Queries of one block of one head over the tokens of its list, q tile after q tile."""
    DTYPE: gl.constexpr = query.dtype
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
    # Full: each producer arrives. Empty: each of the two warpgroups does.
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=BLOCK_D // 64)
        mbarrier.init(v_full.index(stage), count=BLOCK_D // 64)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    lists = (
        own_blocks_ptr, own_tiles_ptr, num_runs_ptr, slots_ptr, own_stride_b, own_stride_h, list_stride_b, list_stride_h,
    )  # fmt: skip
    runs = starts_ptr, lengths_ptr, max_runs
    keys = (keys_64, keys_16, keys_8) if len(SIZES) == 3 else (keys_8,)
    values = (values_64, values_16, values_8) if len(SIZES) == 3 else (values_8,)
    out_strides = out_stride_b, out_stride_s, out_stride_h
    q_barriers = q_full, q_empty
    if BLOCK_D == 64:
        gl.warp_specialize(
            [
                (_attend, (
                    0, out_ptr, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, lists, runs, out_strides,
                    num_heads, seq_len_q, num_q_tiles, num_work, qk_scale_log2,
                    HEAD_DIM, BLOCK_D, STAGES, LATE_P, STORE_LSE,
                )),
                (_attend, (
                    1, out_ptr, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, lists, runs, out_strides,
                    num_heads, seq_len_q, num_q_tiles, num_work, qk_scale_log2,
                    HEAD_DIM, BLOCK_D, STAGES, LATE_P, STORE_LSE,
                )),
                (_load_rows, (
                    0, True, query, keys, q_smem, k_smem, q_barriers, k_full, k_empty, lists, runs, num_heads, group_size,
                    seq_len_kv, num_q_tiles, num_work, BLOCK_D, STAGES, SIZES,
                )),
                (_load_rows, (
                    0, False, query, values, q_smem, v_smem, q_barriers, v_full, v_empty, lists, runs, num_heads, group_size,
                    seq_len_kv, num_q_tiles, num_work, BLOCK_D, STAGES, SIZES,
                )),
            ],
            [4, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    0, out_ptr, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, lists, runs, out_strides,
                    num_heads, seq_len_q, num_q_tiles, num_work, qk_scale_log2,
                    HEAD_DIM, BLOCK_D, STAGES, LATE_P, STORE_LSE,
                )),
                (_attend, (
                    1, out_ptr, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, lists, runs, out_strides,
                    num_heads, seq_len_q, num_q_tiles, num_work, qk_scale_log2,
                    HEAD_DIM, BLOCK_D, STAGES, LATE_P, STORE_LSE,
                )),
                (_load_rows, (
                    0, True, query, keys, q_smem, k_smem, q_barriers, k_full, k_empty, lists, runs, num_heads, group_size,
                    seq_len_kv, num_q_tiles, num_work, BLOCK_D, STAGES, SIZES,
                )),
                (_load_rows, (
                    1, False, query, keys, q_smem, k_smem, q_barriers, k_full, k_empty, lists, runs, num_heads, group_size,
                    seq_len_kv, num_q_tiles, num_work, BLOCK_D, STAGES, SIZES,
                )),
                (_load_rows, (
                    0, False, query, values, q_smem, v_smem, q_barriers, v_full, v_empty, lists, runs, num_heads, group_size,
                    seq_len_kv, num_q_tiles, num_work, BLOCK_D, STAGES, SIZES,
                )),
                (_load_rows, (
                    1, False, query, values, q_smem, v_smem, q_barriers, v_full, v_empty, lists, runs, num_heads, group_size,
                    seq_len_kv, num_q_tiles, num_work, BLOCK_D, STAGES, SIZES,
                )),
            ],
            [4, 1, 1, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
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
    seq_len_kv = key.shape[1]
    query, key, value = (x if _tma_can_read(x) else x.contiguous() for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, num_heads, seq_len_q, dtype=torch.float32, device=query.device) if return_lse else None
    starts, lengths, num_runs, slots = block_runs(block_mask, PIECE.value)
    own_blocks, tiles = query_tiles(block_mask, BLOCK_M)
    block_d = padded_head_dim(head_dim)
    num_q_tiles = tiles.shape[-1]
    num_work = num_q_tiles * num_heads * batch
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    num_programs = balanced_programs(num_q_tiles, num_heads * batch, multiprocessors)
    pieces = []
    for x in (key, value):
        described = [_rows_descriptor(x, rows) for rows in PIECES]
        pieces += [described[0]] * (3 - len(PIECES)) + described
    launch: Any = packed_forward_hopper_kernel[(num_programs,)]
    with torch.cuda.device_of(query):
        launch(
            _descriptor(query, 64, block_d), *pieces,
            out, lse if lse is not None else slots,
            own_blocks, tiles, num_runs, slots, starts, lengths,
            *out.stride()[:3], *_broadcast_strides(tiles, 2), *_broadcast_strides(slots, 2), starts.shape[3],
            num_heads, num_heads // key.shape[2], seq_len_q, seq_len_kv, num_q_tiles, num_work, scale * LOG2_E,
            HEAD_DIM=head_dim, BLOCK_D=block_d, STAGES=num_stages(KEYS.value, block_d), SIZES=PIECES,
            LATE_P=block_d <= MAX_LATE_P, STORE_LSE=return_lse,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def _rows_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of 64 dims of some rows of `[batch, seq_len, num_heads, head_dim]`, in the order batch, head, token,
    dim."""
    batch, seq_len, num_heads, head_dim = x.shape
    strides = [x.stride(d) if x.shape[d] > 1 else head_dim for d in (0, 2, 1)]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, [batch, num_heads, seq_len, head_dim], [*strides, 1], [1, 1, rows, 64], layout)
