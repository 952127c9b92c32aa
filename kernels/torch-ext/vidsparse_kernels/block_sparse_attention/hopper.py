"""Forward kernel for Hopper GPUs, written in Gluon: warp-specialised, on TMA and wgmma.

Four roles in one program of 10 warps. A scheduler warp (`hopper_schedule`) hands out q tiles. A producer warp walks the
list of one and copies q, k and v tiles to shared memory; two warpgroups each own 64 of the 128 queries and compute. They
share every key and value tile, and while one is in its softmax the other keeps the tensor cores busy. Barriers in shared
memory say which tile is full and which is free. The programs are persistent, as many as the GPU has multiprocessors, so
that the loads of the next tile run under the end of the last one.

The scheme is that of FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608, section 3.1), over block lists, but the softmax
keeps no running maximum. Any number may be taken from the logits of a row as long as nothing overflows, so every tile takes
the peak of the first one: no maximum, no rescaling, a third fewer instructions, and products of the next tile wait
for less. Up to head_dim 64 a warpgroup also has the product of query and the next keys computed during its softmax (section
3.2 there). fp32 has room for logits 69 above that peak. Where a sum went beyond, or a number is not finite, the scheduler
hands the q tile out again and it is done with a running maximum.
"""

# In kernels every value is the compiler's, which its annotations for the host do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..block_mask import BlockMask
from .configs import padded_head_dim
from .forward import LOG2_E, _broadcast_strides, _readable, _tma_can_read
from .hopper_schedule import ITEM_NUMBERS, item, longest_first, schedule, warpgroup_barrier
from .quantize_kernel import quantize_query_key
from .runs import MAX_LIST
from .tiles import MAX_TOKENS

# Later versions of Triton name these differently.
tma_load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store: Any = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

BLOCK_M = 128
"""Queries per program, 64 for each warpgroup."""
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
MAX_AHEAD = 64
"""Up to this head_dim the product of query and the next keys runs beside the softmax: on an H200 18 to 25 % more. Beyond,
registers are short; with a bias or integers it has not been tried."""
LARGEST_MASS = 2.0**100
"""Sums of weights beyond this are done again with a running maximum."""
BIAS_ALIGNMENT = 4
"""Rows of the bias start at multiples of this many numbers, so that two of them can be loaded at once."""
RUNTIME_INTEGERS = [
    "counts_stride_b", "counts_stride_h", "indices_stride_b", "indices_stride_h", "indices_stride_m",
    "order_stride_b", "order_stride_h", "has_order", "bias_stride_b", "bias_stride_h", "num_heads", "group_size",
    "seq_len_q", "seq_len_kv", "num_q_tiles", "num_work", "num_key_tiles",
]  # fmt: skip
"""What Triton may not compile into the kernel, so that one compilation serves every shape."""


@gluon.constexpr_function
def _log2(power):
    return power.bit_length() - 1


@gluon.jit
def _list(lists, batch, head, tile_m, Q_BLOCK: gl.constexpr):
    """The entries of the list of a q tile."""
    indices, stride_b, stride_h, stride_m = lists
    q_block = tile_m * 128 // Q_BLOCK
    return indices + batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h + q_block.to(gl.int64) * stride_m


@gluon.jit
def _load_tiles(
    query, key, value, q_smem, k_smem, v_smem, barriers, items, ready, lists,
    num_heads, group_size, num_q_tiles,
    Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: copy what the warpgroups need, in their order: each list from its end, values one tile later."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    TILES: gl.constexpr = KV_BLOCK // BLOCK_N
    LOG: gl.constexpr = _log2(STAGES)
    base = 0
    turn = 0
    work, tile_m, num_tiles, start_v, state = item(0, items, ready, 1)
    while state > 0:
        head = (work // num_q_tiles) % num_heads
        batch = work // num_q_tiles // num_heads
        kv_head = head // group_size
        indices = _list(lists, batch, head, tile_m, Q_BLOCK)
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, 2 * query.block_type.nbytes)
        for consumer in gl.static_range(2):
            tma_load(query, [batch, head, tile_m * 128 + consumer * 64, 0], q_full, q_smem.index(consumer))
        for i in range(num_tiles + 1):
            start_k = start_v
            if i < num_tiles:
                tile = num_tiles - 1 - i
                start_k = gl.load(indices + tile // TILES) * KV_BLOCK + (tile % TILES) * BLOCK_N
                stage = (base + i) & (STAGES - 1)
                mbarrier.wait(k_empty.index(stage), (((base + i) >> LOG) & 1) ^ 1)
                mbarrier.expect(k_full.index(stage), key.block_type.nbytes)
                tma_load(key, [batch, kv_head, start_k, 0], k_full.index(stage), k_smem.index(stage))
            if i > 0:
                stage = (base + i - 1) & (STAGES - 1)
                mbarrier.wait(v_empty.index(stage), (((base + i - 1) >> LOG) & 1) ^ 1)
                mbarrier.expect(v_full.index(stage), value.block_type.nbytes)
                tma_load(value, [batch, kv_head, start_v, 0], v_full.index(stage), v_smem.index(stage))
            start_v = start_k
        base += num_tiles
        turn += 1
        work, tile_m, num_tiles, start_v, state = item(turn, items, ready, 1)


@gluon.jit
def _load_bias(bias, start, seq_len_kv, BLOCK_N: gl.constexpr, layout: gl.constexpr, RAGGED: gl.constexpr):
    """Bias of the keys start .. start + BLOCK_N in base 2, where RAGGED -inf past the last key."""
    columns = start + gl.arange(0, BLOCK_N, layout)
    if RAGGED:
        loaded = gl.load(bias + columns, mask=columns < seq_len_kv, other=float("-inf"))
    else:
        loaded = gl.load(bias + columns)
    return loaded.to(gl.float32) * 1.4426950408889634


@gluon.jit
def _scale_of(key_scales, indices, tile, TILES: gl.constexpr):
    """Scale of the keys of a tile, and of the first one for all before it."""
    tile = gl.maximum(tile, 0)
    return gl.load(key_scales + gl.load(indices + tile // TILES) * TILES + tile % TILES)


@gluon.jit
def _thread_sums(weights, BLOCK_N: gl.constexpr):
    """`[64, 4]`: sums of `[64, BLOCK_N]` within each of the four threads that share a row, without a word between them."""
    return gl.sum(gl.sum(weights.reshape([64, BLOCK_N // 8, 4, 2]), 3), 1)


@gluon.jit
def _tile_ahead(
    i, scores, acc, p, peak, parts, q, zeros, k_smem, v_smem, barriers, qk_scale_log2,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Weights of tile `i`, whose scores are there, beside the products of the values before and of the keys after it."""
    _, _, k_full, k_empty, v_full, v_empty = barriers
    LOG: gl.constexpr = _log2(STAGES)
    ahead = (i + 1) & (STAGES - 1)
    before = (i - 1) & (STAGES - 1)
    mbarrier.wait(v_full.index(before), ((i - 1) >> LOG) & 1)
    v = v_smem.index(before).reshape([BLOCK_N, BLOCK_D])
    acc = warpgroup_mma(p, v, acc, is_async=True)
    mbarrier.wait(k_full.index(ahead), ((i + 1) >> LOG) & 1)
    k = k_smem.index(ahead).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    next_scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    weights = gl.exp2(scores * qk_scale_log2 - peak[:, None])
    parts += _thread_sums(weights, BLOCK_N)
    next_p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    acc, p, next_scores = warpgroup_mma_wait(0, deps=[acc, p, next_scores])
    warpgroup_barrier()
    mbarrier.arrive(k_empty.index(ahead), count=1)
    mbarrier.arrive(v_empty.index(before), count=1)
    return next_scores, acc, next_p, parts


@gluon.jit
def _weights(logits, peak, row_scale, key_scale, qk_scale_log2, QUANTIZED: gl.constexpr):
    """Exponentials of a tile against a peak that stays."""
    MAGIC: gl.constexpr = 12582912.0
    if QUANTIZED:
        logits = (logits + 0x4B400000).to(gl.float32, bitcast=True)
        factor = row_scale * key_scale
        weights = gl.exp2(logits * factor[:, None] - (MAGIC * factor + peak)[:, None])
    else:
        weights = gl.exp2(logits * qk_scale_log2 - peak[:, None])
    return weights


@gluon.jit
def _attend(
    consumer: gl.constexpr, out, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, items, verdicts, ready, ended,
    lists, biases, scales, num_heads, seq_len_q, seq_len_kv, num_q_tiles, qk_scale_log2,
    Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, RAGGED_KV: gl.constexpr, HAS_BIAS: gl.constexpr, STORE_LSE: gl.constexpr,
    QUANTIZED: gl.constexpr, LARGEST_MASS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 queries of each q tile over their list, from its end, so that a cut tile comes first and its
    mask stays out of the loop.

    QUANTIZED: products of query and key are integers, below 2^21, and become floating point numbers by adding the bits
    of MAGIC = 1.5 * 2^23, whose last bit counts ones; MAGIC goes away again in the subtraction of the peak. A
    conversion would go through the units that the exponentials need.
    """
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    bias_ptr, bias_stride_b, bias_stride_h = biases
    query_scale_ptr, key_scale_ptr, group_size, num_key_tiles = scales
    DTYPE: gl.constexpr = o_smem.dtype
    PRODUCT: gl.constexpr = gl.int32 if QUANTIZED else gl.float32
    MAGIC: gl.constexpr = 12582912.0
    TILES: gl.constexpr = KV_BLOCK // BLOCK_N
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32 if QUANTIZED else 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q = q_smem.index(consumer).reshape([64, BLOCK_D])
    zeros = gl.zeros([64, BLOCK_N], PRODUCT, s_layout)
    base = 0
    turn = 0
    LOG: gl.constexpr = _log2(STAGES)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    work, tile_m, num_tiles, last_start, state = item(0, items, ready, 4)
    while state > 0:
        head = (work // num_q_tiles) % num_heads
        batch = work // num_q_tiles // num_heads
        start_m = tile_m * 128 + consumer * 64
        indices = _list(lists, batch, head, tile_m, Q_BLOCK)
        again = 0
        # Strides count in steps of the alignment, which tells the compiler that rows have it.
        bias = bias_ptr + (batch.to(gl.int64) * bias_stride_b + head.to(gl.int64) * bias_stride_h) * 4
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        # [64], peak in base 2
        peak = gl.full([64], float("-inf"), gl.float32, s_rows)
        mass = gl.zeros([64], gl.float32, s_rows)
        row_scale = 0.0
        key_scale = 0.0
        if QUANTIZED:
            tokens = start_m + gl.arange(0, 64, s_rows)
            query_scales = query_scale_ptr + (batch.to(gl.int64) * num_heads + head) * seq_len_q
            row_scale = gl.load(query_scales + tokens, mask=tokens < seq_len_q, other=1.0) * qk_scale_log2
            kv_row = batch.to(gl.int64) * (num_heads // group_size) + head // group_size
            key_scales = key_scale_ptr + kv_row * num_key_tiles
        mbarrier.wait(q_full, turn & 1)
        if num_tiles > 0:
            if QUANTIZED:
                key_scale = _scale_of(key_scales, indices, num_tiles - 1, TILES)
                # Read a tile ahead.
                next_scale = _scale_of(key_scales, indices, num_tiles - 2, TILES)
            stage = base & (STAGES - 1)
            mbarrier.wait(k_full.index(stage), (base >> LOG) & 1)
            k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
            logits = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
            if HAS_BIAS:
                tile_bias = _load_bias(bias, last_start, seq_len_kv, BLOCK_N, s_columns, RAGGED_KV)
            logits = warpgroup_mma_wait(0, deps=[logits])
            # One thread arrives for the warpgroup, so all of it has to be done with the tile.
            warpgroup_barrier()
            mbarrier.arrive(k_empty.index(stage), count=1)
            if HAS_BIAS:
                logits = logits * qk_scale_log2 + tile_bias[None, :]
                peak = gl.max(logits, 1)
                # Where all logits are -inf, shifting by 0 keeps -inf - -inf out.
                weights = gl.exp2(logits - gl.where(peak == float("-inf"), 0.0, peak)[:, None])
            else:
                if QUANTIZED:
                    logits = (logits + 0x4B400000).to(gl.float32, bitcast=True)
                if RAGGED_KV:
                    columns = last_start + gl.arange(0, BLOCK_N, s_columns)
                    logits = gl.where((columns < seq_len_kv)[None, :], logits, float("-inf"))
                if QUANTIZED:
                    factor = row_scale * key_scale
                    peak = (gl.max(logits, 1) - MAGIC) * factor
                    weights = gl.exp2(logits * factor[:, None] - (MAGIC * factor + peak)[:, None])
                else:
                    peak = gl.max(logits, 1) * qk_scale_log2
                    weights = gl.exp2(logits * qk_scale_log2 - peak[:, None])
            mass = gl.sum(weights, 1)
            p = gl.convert_layout(weights.to(DTYPE), p_layout)
            careful = state > 1
            if HAS_BIAS:
                # A row that has met nothing but -inf has no peak yet.
                careful = careful | (gl.max(gl.where(peak == float("-inf"), 1, 0), 0) > 0)
            # [64, 4], what the threads that share a row have added up.
            parts = _thread_sums(gl.zeros([64, BLOCK_N], gl.float32, s_layout), BLOCK_N)
            if careful:
                for i in range(base + 1, base + num_tiles):
                    stage = i & (STAGES - 1)
                    before = (i - 1) & (STAGES - 1)
                    if HAS_BIAS:
                        tile = base + num_tiles - 1 - i
                        start = gl.load(indices + tile // TILES) * KV_BLOCK + (tile % TILES) * BLOCK_N
                    if QUANTIZED:
                        key_scale = next_scale
                        next_scale = _scale_of(key_scales, indices, base + num_tiles - 2 - i, TILES)
                    mbarrier.wait(k_full.index(stage), (i >> LOG) & 1)
                    k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
                    logits = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                    mbarrier.wait(v_full.index(before), ((i - 1) >> LOG) & 1)
                    v = v_smem.index(before).reshape([BLOCK_N, BLOCK_D])
                    acc = warpgroup_mma(p, v, acc, is_async=True)
                    if HAS_BIAS:
                        tile_bias = _load_bias(bias, start, seq_len_kv, BLOCK_N, s_columns, False)
                    logits = warpgroup_mma_wait(1, deps=[logits])
                    warpgroup_barrier()
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    if HAS_BIAS:
                        logits = logits * qk_scale_log2 + tile_bias[None, :]
                        new_peak = gl.maximum(peak, gl.max(logits, 1))
                        shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
                        weights = gl.exp2(logits - shift[:, None])
                        decay = gl.exp2(peak - shift)
                    else:
                        if QUANTIZED:
                            logits = (logits + 0x4B400000).to(gl.float32, bitcast=True)
                            factor = row_scale * key_scale
                            new_peak = gl.maximum(peak, (gl.max(logits, 1) - MAGIC) * factor)
                            weights = gl.exp2(logits * factor[:, None] - (MAGIC * factor + new_peak)[:, None])
                        else:
                            new_peak = gl.maximum(peak, gl.max(logits, 1) * qk_scale_log2)
                            weights = gl.exp2(logits * qk_scale_log2 - new_peak[:, None])
                        decay = gl.exp2(peak - new_peak)
                    mass = mass * decay + gl.sum(weights, 1)
                    peak = new_peak
                    next_p = gl.convert_layout(weights.to(DTYPE), p_layout)
                    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
                    warpgroup_barrier()
                    mbarrier.arrive(v_empty.index(before), count=1)
                    acc = acc * gl.convert_layout(decay, o_rows)[:, None]
                    p = next_p
            elif AHEAD:
                if num_tiles > 1:
                    # The scores of a tile are there before the weights of the one before are used.
                    stage = (base + 1) & (STAGES - 1)
                    mbarrier.wait(k_full.index(stage), ((base + 1) >> LOG) & 1)
                    k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
                    scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                    scores = warpgroup_mma_wait(0, deps=[scores])
                    warpgroup_barrier()
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    last = base + num_tiles - 1
                    # Two at a time, so that the two sets of scores change places without being copied.
                    for pair in range(0, (num_tiles - 2) // 2):
                        i = base + 1 + 2 * pair
                        scores, acc, p, parts = _tile_ahead(
                            i, scores, acc, p, peak, parts, q, zeros, k_smem, v_smem, barriers, qk_scale_log2,
                            BLOCK_N, BLOCK_D, STAGES,
                        )  # fmt: skip
                        scores, acc, p, parts = _tile_ahead(
                            i + 1, scores, acc, p, peak, parts, q, zeros, k_smem, v_smem, barriers, qk_scale_log2,
                            BLOCK_N, BLOCK_D, STAGES,
                        )  # fmt: skip
                    if (num_tiles & 1) == 1:
                        scores, acc, p, parts = _tile_ahead(
                            last - 1, scores, acc, p, peak, parts, q, zeros, k_smem, v_smem, barriers, qk_scale_log2,
                            BLOCK_N, BLOCK_D, STAGES,
                        )  # fmt: skip
                    before = (last - 1) & (STAGES - 1)
                    mbarrier.wait(v_full.index(before), ((last - 1) >> LOG) & 1)
                    v = v_smem.index(before).reshape([BLOCK_N, BLOCK_D])
                    acc = warpgroup_mma(p, v, acc, is_async=True)
                    weights = gl.exp2(scores * qk_scale_log2 - peak[:, None])
                    parts += _thread_sums(weights, BLOCK_N)
                    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
                    warpgroup_barrier()
                    mbarrier.arrive(v_empty.index(before), count=1)
                    p = gl.convert_layout(weights.to(DTYPE), p_layout)
            else:
                for i in range(base + 1, base + num_tiles):
                    stage = i & (STAGES - 1)
                    before = (i - 1) & (STAGES - 1)
                    if HAS_BIAS:
                        tile = base + num_tiles - 1 - i
                        start = gl.load(indices + tile // TILES) * KV_BLOCK + (tile % TILES) * BLOCK_N
                    if QUANTIZED:
                        key_scale = next_scale
                        next_scale = _scale_of(key_scales, indices, base + num_tiles - 2 - i, TILES)
                    mbarrier.wait(k_full.index(stage), (i >> LOG) & 1)
                    k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
                    scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                    mbarrier.wait(v_full.index(before), ((i - 1) >> LOG) & 1)
                    v = v_smem.index(before).reshape([BLOCK_N, BLOCK_D])
                    acc = warpgroup_mma(p, v, acc, is_async=True)
                    if HAS_BIAS:
                        tile_bias = _load_bias(bias, start, seq_len_kv, BLOCK_N, s_columns, False)
                    scores = warpgroup_mma_wait(1, deps=[scores])
                    warpgroup_barrier()
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    if HAS_BIAS:
                        weights = gl.exp2(scores * qk_scale_log2 + (tile_bias[None, :] - peak[:, None]))
                    else:
                        weights = _weights(scores, peak, row_scale, key_scale, qk_scale_log2, QUANTIZED)
                    parts += _thread_sums(weights, BLOCK_N)
                    next_p = gl.convert_layout(weights.to(DTYPE), p_layout)
                    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
                    warpgroup_barrier()
                    mbarrier.arrive(v_empty.index(before), count=1)
                    p = next_p
            stage = (base + num_tiles - 1) & (STAGES - 1)
            mbarrier.wait(v_full.index(stage), ((base + num_tiles - 1) >> LOG) & 1)
            v = v_smem.index(stage).reshape([BLOCK_N, BLOCK_D])
            acc = warpgroup_mma(p, v, acc, is_async=True)
            mbarrier.arrive(q_empty, count=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            warpgroup_barrier()
            mbarrier.arrive(v_empty.index(stage), count=1)
            mass += gl.convert_layout(gl.sum(parts, 1), s_rows)
            # 0, or NaN where a number is not finite.
            spoilt = gl.convert_layout(gl.sum(acc * 0.0, 1), s_rows)
            right = (mass < LARGEST_MASS) & (spoilt == 0.0)
            again = gl.where(state > 1, 0, gl.max(gl.where(right, 0, 1), 0))
            inverse = 1.0 / gl.where(mass == 0.0, 1.0, mass) if HAS_BIAS else 1.0 / mass
            acc = acc * gl.convert_layout(inverse, o_rows)[:, None]
        else:
            warpgroup_barrier()
            mbarrier.arrive(q_empty, count=1)
        if STORE_LSE:
            tokens = start_m + gl.arange(0, 64, s_rows)
            lse = gl.where(mass == 0.0, float("-inf"), (peak + gl.log2(mass)) * 0.6931471805599453)
            lse_row = (batch.to(gl.int64) * num_heads + head) * seq_len_q
            gl.store(lse_ptr + lse_row + tokens, lse, mask=(tokens < seq_len_q) & (again == 0))
        if again == 0:
            tma.store_wait(0)
            warpgroup_barrier()
            o_smem.index(consumer).reshape([64, BLOCK_D]).store(acc.to(DTYPE))
            fence_async_shared()
            warpgroup_barrier()
            tma_store(out, [batch, head, start_m, 0], o_smem.index(consumer))
        slot = turn & 1
        verdicts.index(slot * 2 + consumer).store(gl.full([1], again, gl.int32, one))
        warpgroup_barrier()
        mbarrier.arrive(ended.index(slot), count=1)
        base += num_tiles
        turn += 1
        work, tile_m, num_tiles, last_start, state = item(turn, items, ready, 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUNTIME_INTEGERS)
def block_sparse_forward_hopper_kernel(
    query, key, value, out, lse_ptr, counts_ptr, indices_ptr, order_ptr, counter_ptr, bias_ptr, query_scale_ptr,
    key_scale_ptr,
    counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m,
    order_stride_b, order_stride_h, has_order, bias_stride_b, bias_stride_h,
    num_heads, group_size, seq_len_q, seq_len_kv, num_q_tiles, num_work, num_key_tiles, qk_scale_log2,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr,
    STAGES: gl.constexpr, RAGGED_KV: gl.constexpr, HAS_BIAS: gl.constexpr, STORE_LSE: gl.constexpr,
    QUANTIZED: gl.constexpr, LARGEST_MASS: gl.constexpr, AHEAD: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """128 queries of one head over their listed kv-blocks, q tile after q tile; query, key, value, out are
    descriptors."""
    # [stages, batch, head, token, dim]
    q_smem = gl.allocate_shared_memory(query.dtype, [2, 1, 1, 64, BLOCK_D], query.layout)
    o_smem = gl.allocate_shared_memory(out.dtype, [2, 1, 1, 64, BLOCK_D], out.layout)
    k_smem = gl.allocate_shared_memory(key.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], key.layout)
    v_smem = gl.allocate_shared_memory(value.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], value.layout)
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
        mbarrier.init(ended.index(slot), count=2)
    # Full: the producer arrives. Empty: each of the two warpgroups does.
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    barriers = q_full, q_empty, k_full, k_empty, v_full, v_empty
    lists = indices_ptr, indices_stride_b, indices_stride_h, indices_stride_m
    biases = bias_ptr, bias_stride_b, bias_stride_h
    scales = query_scale_ptr, key_scale_ptr, group_size, num_key_tiles
    gl.warp_specialize(
        [
            (_attend, (
                0, out, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, items, verdicts, ready, ended, lists, biases,
                scales, num_heads, seq_len_q, seq_len_kv, num_q_tiles, qk_scale_log2,
                Q_BLOCK, KV_BLOCK, BLOCK_N, BLOCK_D, STAGES, RAGGED_KV, HAS_BIAS, STORE_LSE, QUANTIZED, LARGEST_MASS,
                AHEAD,
            )),
            (_attend, (
                1, out, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, items, verdicts, ready, ended, lists, biases,
                scales, num_heads, seq_len_q, seq_len_kv, num_q_tiles, qk_scale_log2,
                Q_BLOCK, KV_BLOCK, BLOCK_N, BLOCK_D, STAGES, RAGGED_KV, HAS_BIAS, STORE_LSE, QUANTIZED, LARGEST_MASS,
                AHEAD,
            )),
            (_load_tiles, (
                query, key, value, q_smem, k_smem, v_smem, barriers, items, ready, lists,
                num_heads, group_size, num_q_tiles,
                Q_BLOCK, KV_BLOCK, BLOCK_N, STAGES,
            )),
            (schedule, (
                items, verdicts, ready, ended, counts_ptr, indices_ptr, counts_stride_b, counts_stride_h,
                indices_stride_b, indices_stride_h, indices_stride_m, order_ptr, order_stride_b, order_stride_h,
                has_order, counter_ptr, num_heads, num_q_tiles, seq_len_kv, num_work, Q_BLOCK, KV_BLOCK, BLOCK_N,
            )),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def hopper_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    return_lse: bool,
    quantize: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; inference only.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]` bf16 or fp16. What TMA cannot read (rows that do not start at
            multiples of 16 bytes, elements apart) is copied, here and in key and value.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        block_mask: lists; q-blocks of a multiple of 128 tokens, kv-blocks of a multiple of 64.
        scale: factor on query . key, positive.
        key_bias: fp32 `[B|1, H|1, seq_len_kv]`, natural-log units, or None. Read in place where its rows start at
            multiples of 16 bytes.
        return_lse: whether to compute the LSE.
        quantize: "int8" multiplies query and key as integers, without key_bias and LSE; None does not.

    Returns:
        Output like `query` (contiguous) and the fp32 LSE `[batch, num_heads, seq_len_q]` or None.
    """
    batch, seq_len_q, num_heads, head_dim = query.shape
    seq_len_kv = key.shape[1]
    query, key, value = (x if _tma_can_read(x) else x.contiguous() for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, num_heads, seq_len_q, dtype=torch.float32, device=query.device) if return_lse else None
    counts, indices = _readable(block_mask.kv_num_blocks, block_mask.kv_indices)
    bias = None
    if key_bias is not None:
        bias = key_bias.to(torch.float32)
        apart = [bias.stride(d) for d in range(2) if bias.shape[d] > 1]
        if bias.stride(2) != 1 or bias.data_ptr() % 16 or any(stride % BIAS_ALIGNMENT for stride in apart):
            bias = F.pad(bias, (0, -seq_len_kv % BIAS_ALIGNMENT)).contiguous()
    block_d = padded_head_dim(head_dim)
    block_n = 128 if block_mask.kv_block_size % 128 == 0 else 64
    query_scale = key_scale = counts
    if quantize is not None:
        query, query_scale, key, key_scale = quantize_query_key(query, key, block_n)
    num_q_tiles = triton.cdiv(seq_len_q, BLOCK_M)
    num_work = num_q_tiles * num_heads * batch
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    counter = torch.zeros(1, dtype=torch.int32, device=query.device)
    order = longest_first(block_mask, BLOCK_M)
    launch: Any = block_sparse_forward_hopper_kernel[(min(num_work, multiprocessors),)]
    with torch.cuda.device_of(query):
        launch(
            _descriptor(query, 64, block_d), _descriptor(key, block_n, block_d), _descriptor(value, block_n, block_d),
            _descriptor(out, 64, block_d), lse if lse is not None else counts, counts, indices,
            order if order is not None else counts, counter, bias if bias is not None else counts,
            query_scale, key_scale,
            *_broadcast_strides(counts, 2), *_broadcast_strides(indices, 2), indices.stride(2),
            *(_broadcast_strides(order, 2) if order is not None else (0, 0)), int(order is not None),
            *((x // BIAS_ALIGNMENT for x in _broadcast_strides(bias, 2)) if bias is not None else (0, 0)),
            num_heads, num_heads // key.shape[2], seq_len_q, seq_len_kv, num_q_tiles, num_work,
            triton.cdiv(seq_len_kv, block_n), scale * LOG2_E,
            BLOCK_D=block_d, BLOCK_N=block_n, Q_BLOCK=block_mask.q_block_size, KV_BLOCK=block_mask.kv_block_size,
            STAGES=num_stages(block_n, block_d), RAGGED_KV=seq_len_kv % block_n != 0, HAS_BIAS=bias is not None,
            STORE_LSE=return_lse, QUANTIZED=quantize is not None, LARGEST_MASS=LARGEST_MASS,
            AHEAD=block_d <= MAX_AHEAD and bias is None and quantize is None,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def reads_in_place(*tensors: Tensor) -> bool:
    """Whether TMA can read all of them; one element expanded to a shape stands for a tensor with ordinary strides."""
    return all(_tma_can_read(x) or x.untyped_storage().nbytes() == x.element_size() for x in tensors)


def num_stages(block_n: int, block_d: int) -> int:
    """Tiles in flight: 64 KB of keys and as much of values, beside 32 KB each of queries and of output."""
    return 64 * 1024 // (2 * block_n * block_d)


def unsupported(query: Tensor, key: Tensor, block_mask: BlockMask) -> str | None:
    """Why this kernel cannot do a case, as the end of a sentence that starts with its name; None if it can."""
    if query.device.type != "cuda" or torch.version.hip is not None:
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability(query.device) != (9, 0):
        return "needs a GPU of compute capability 9.0 (H100, H200)"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 and fp16, not {query.dtype}"
    if not 32 < query.shape[3] <= 128:
        return f"supports head_dim from 33 to 128, got {query.shape[3]}"
    if block_mask.variable:
        longest = max(block_mask.seq_len_q, block_mask.seq_len_kv)
        if longest > MAX_TOKENS:
            return f"supports up to {MAX_TOKENS} tokens with blocks of variable size, got {longest}"
        if block_mask.kv_indices.shape[-1] > MAX_LIST:
            return f"takes lists of at most {MAX_LIST} blocks of variable size, got {block_mask.kv_indices.shape[-1]}"
    elif block_mask.q_block_size % BLOCK_M:
        return f"needs a q_block_size that is a multiple of {BLOCK_M}, got {block_mask.q_block_size}"
    elif block_mask.kv_block_size % 64:
        return f"needs a kv_block_size that is a multiple of 64, got {block_mask.kv_block_size}"
    if query.shape[3] % 8:
        return f"needs a head_dim that is a multiple of 8, got {query.shape[3]}"
    if query.numel() == 0 or key.numel() == 0:
        return "needs at least one token"
    return None


def _descriptor(x: Tensor, block: int, block_d: int) -> TensorDescriptor:
    """Descriptor of `[batch, seq_len, num_heads, head_dim]` in the order batch, head, token, dim, tokens in tiles."""
    batch, seq_len, num_heads, head_dim = x.shape
    strides = [x.stride(d) if x.shape[d] > 1 else head_dim for d in (0, 2, 1)]
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int8: gl.int8}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, block, block_d], element)
    return TensorDescriptor(x, [batch, num_heads, seq_len, head_dim], [*strides, 1], [1, 1, block, block_d], layout)
