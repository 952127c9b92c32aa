"""Forward kernel for Hopper GPUs, written in Gluon: warp-specialised, on TMA and wgmma.

Three roles in one program of 9 warps. A producer warp walks the list and copies q, k and v tiles to shared memory; two
warpgroups each own 64 of the 128 queries and compute. They share every key and value tile, and while one is in its
softmax the other keeps the tensor cores busy. Barriers in shared memory say which tile is full and which is free.
The programs are persistent: as many as the GPU has multiprocessors, each taking every n-th q tile, so that the loads
of the next tile run under the end of the last one.

The scheme is that of FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608, section 3.1), over block lists. Its overlap
of softmax and products within one warpgroup (section 3.2) was tried and made this kernel slower: docs/performance.md.
"""

# In kernels every value is the compiler's, which its annotations for the host do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

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
from .quantize_kernel import quantize_query_key
from .runs import MAX_LIST, balanced_programs
from .tiles import MAX_TOKENS

# Later versions of Triton name these differently.
tma_load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store: Any = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
warpgroup_barrier: Any = getattr(gl, "thread_barrier", None) or gl.barrier

BLOCK_M = 128
"""Queries per program, 64 for each warpgroup."""
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24
MAX_LATE_P = 64
"""Up to this head_dim the weights are rounded once the product of the last ones has ended, not before: on an H200 with
head_dim 64 that made 442 TFLOP/s of 409."""
MAX_TURNS = 64
"""Up to this head_dim exponentials take as long as products, and with tiles of 128 keys the warpgroups take turns: one
starts its products when the other has started its own, so that one is in its softmax while the other multiplies.
Without turns both wait for the same unit at the same time. At head_dim 64 on an H200 that made 442 TFLOP/s of 407, and
every eighth exponential on the multiply-add units 464 of that; at head_dim 128 turns changed nothing."""
BIAS_ALIGNMENT = 4
"""Rows of the bias start at multiples of this many numbers, so that two of them can be loaded at once."""
RUNTIME_INTEGERS = [
    "counts_stride_b", "counts_stride_h", "indices_stride_b", "indices_stride_h", "indices_stride_m",
    "bias_stride_b", "bias_stride_h", "num_heads", "group_size", "seq_len_q", "seq_len_kv", "num_q_tiles", "num_work",
    "num_key_tiles",
]  # fmt: skip
"""What Triton may not compile into the kernel, so that one compilation serves every shape."""


@gluon.jit
def _work_item(
    work, num_work, lists, num_heads, num_q_tiles, seq_len_kv,
    Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """(pointer to the list, number of key tiles, first key of the last one) of a q tile; no tiles past the work."""
    counts_ptr, indices_ptr, counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m = (
        lists
    )
    TILES: gl.constexpr = KV_BLOCK // BLOCK_N
    head = ((work // num_q_tiles) % num_heads).to(gl.int64)
    batch = (work // num_q_tiles // num_heads).to(gl.int64)
    q_block = (work % num_q_tiles) * 128 // Q_BLOCK
    indices = (
        indices_ptr + batch * indices_stride_b + head * indices_stride_h + q_block.to(gl.int64) * indices_stride_m
    )
    count = gl.load(
        counts_ptr + batch * counts_stride_b + head * counts_stride_h + q_block, mask=work < num_work, other=0
    )
    # Lists ascend, so only their last entry can be the shorter last block, which may lack some whole tiles.
    last = gl.load(indices + gl.maximum(count - 1, 0), mask=count > 0, other=0)
    overhang = gl.maximum((last + 1) * KV_BLOCK - seq_len_kv, 0)
    num_tiles = gl.where(count > 0, count * TILES - overhang // BLOCK_N, 0)
    return indices, num_tiles, last * KV_BLOCK + ((num_tiles - 1) % TILES) * BLOCK_N


@gluon.jit
def _load_tiles(
    query, key, value, q_smem, k_smem, v_smem, barriers, lists,
    num_heads, group_size, seq_len_kv, num_q_tiles, num_work,
    Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: copy what the warpgroups need, in their order: each list from its end, values one tile later."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    TILES: gl.constexpr = KV_BLOCK // BLOCK_N
    base = 0
    turn = 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        indices, num_tiles, start_v = _work_item(
            work, num_work, lists, num_heads, num_q_tiles, seq_len_kv, Q_BLOCK, KV_BLOCK, BLOCK_N
        )
        head = (work // num_q_tiles) % num_heads
        batch = work // num_q_tiles // num_heads
        kv_head = head // group_size
        start_m = (work % num_q_tiles) * 128
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, 2 * query.block_type.nbytes)
        for consumer in gl.static_range(2):
            tma_load(query, [batch, head, start_m + consumer * 64, 0], q_full, q_smem.index(consumer))
        for i in range(num_tiles + 1):
            start_k = start_v
            if i < num_tiles:
                tile = num_tiles - 1 - i
                start_k = gl.load(indices + tile // TILES) * KV_BLOCK + (tile % TILES) * BLOCK_N
                stage = (base + i) % STAGES
                mbarrier.wait(k_empty.index(stage), (((base + i) // STAGES) & 1) ^ 1)
                mbarrier.expect(k_full.index(stage), key.block_type.nbytes)
                tma_load(key, [batch, kv_head, start_k, 0], k_full.index(stage), k_smem.index(stage))
            if i > 0:
                stage = (base + i - 1) % STAGES
                mbarrier.wait(v_empty.index(stage), (((base + i - 1) // STAGES) & 1) ^ 1)
                mbarrier.expect(v_full.index(stage), value.block_type.nbytes)
                tma_load(value, [batch, kv_head, start_v, 0], v_full.index(stage), v_smem.index(stage))
            start_v = start_k
        base += num_tiles
        turn += 1


@gluon.jit
def _load_bias(bias, start, seq_len_kv, BLOCK_N: gl.constexpr, layout: gl.constexpr, RAGGED: gl.constexpr):
    """Bias of the keys start .. start + BLOCK_N in base 2, where RAGGED -inf past the last key."""
    columns = start + gl.arange(0, BLOCK_N, layout)
    if RAGGED:
        loaded = gl.load(bias + columns, mask=columns < seq_len_kv, other=float("-inf"))
    else:
        loaded = gl.load(bias + columns)
    return loaded.to(gl.float32) * 1.4426950408889634


@gluon.constexpr_function
def _exp2_instructions():
    """PTX for 8 exponentials: one in 8 on the multiply-add units, which have time when the special ones have none.

    2^x = 2^n 2^f with n the nearest integer and f in [-0.5, 0.5], 2^f by a polynomial of degree 3 with a relative error
    of at most 7.5e-5, a fiftieth of the rounding to bf16 and a sixth of that to fp16 (FlashAttention-4's way). Weights
    below 2^-126 become 2^-126. The number added and taken away again is 1.5 * 2^23, which rounds to integers.
    """
    lines = [f"ex2.approx.ftz.f32 ${i}, ${i + 8};" for i in range(7)]
    lines.append("""max.ftz.NaN.f32 x, $15, 0fC2FC0000;
        add.rn.ftz.f32 n, x, 0f4B400000;
        sub.rn.ftz.f32 f, n, 0f4B400000;
        sub.rn.ftz.f32 f, x, f;
        fma.rn.ftz.f32 p, f, 0f3D61FB71, 0f3E786EF8;
        fma.rn.ftz.f32 p, p, f, 0f3F31798D;
        fma.rn.ftz.f32 p, p, f, 0f3F7FFB4A;
        mov.b32 bits, n;
        shl.b32 bits, bits, 23;
        mov.b32 mantissa, p;
        add.s32 bits, bits, mantissa;
        mov.b32 $7, bits;""")
    return "{ .reg .f32 x, n, f, p; .reg .b32 bits, mantissa; " + " ".join(lines) + " }"


@gluon.jit
def _scale_of(key_scales, indices, tile, TILES: gl.constexpr):
    """Scale of the keys of a tile, and of the first one for all before it."""
    tile = gl.maximum(tile, 0)
    return gl.load(key_scales + gl.load(indices + tile // TILES) * TILES + tile % TILES)


EXP2 = gl.constexpr(_exp2_instructions())
EXP2_CONSTRAINTS = gl.constexpr(",".join(["=f"] * 8 + ["f"] * 8))


@gluon.jit
def _attend(
    consumer: gl.constexpr, out, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, lists, biases, scales,
    num_heads, seq_len_q, seq_len_kv, num_q_tiles, num_work, qk_scale_log2,
    Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, RAGGED_KV: gl.constexpr, HAS_BIAS: gl.constexpr, LATE_P: gl.constexpr,
    STORE_LSE: gl.constexpr, TURNS: gl.constexpr, QUANTIZED: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 queries of each q tile over their list, from its end, so that a cut tile comes first and its
    mask stays out of the loop.

    QUANTIZED: products of query and key are integers, below 2^21, and become floating point numbers by adding the bits
    of MAGIC = 1.5 * 2^23, whose last bit counts ones; MAGIC goes away again in the subtraction of the peak. A
    conversion would go through the units that the exponentials need.
    """
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
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
    # Turns taken by this warpgroup.
    taken = 0
    step = gl.num_programs(0)
    indices, num_tiles, last_start = _work_item(
        gl.program_id(0), num_work, lists, num_heads, num_q_tiles, seq_len_kv, Q_BLOCK, KV_BLOCK, BLOCK_N
    )
    for work in range(gl.program_id(0), num_work, step):
        # The next list's length is read a whole list ahead.
        next_indices, next_num_tiles, next_last_start = _work_item(
            work + step, num_work, lists, num_heads, num_q_tiles, seq_len_kv, Q_BLOCK, KV_BLOCK, BLOCK_N
        )
        head = (work // num_q_tiles) % num_heads
        batch = work // num_q_tiles // num_heads
        start_m = (work % num_q_tiles) * 128 + consumer * 64
        # Strides count in steps of the alignment, which tells the compiler that rows have it.
        bias = bias_ptr + (batch.to(gl.int64) * bias_stride_b + head.to(gl.int64) * bias_stride_h) * 4
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        # [64], peak in base 2
        peak = gl.full([64], float("-inf"), gl.float32, s_rows)
        mass = gl.zeros([64], gl.float32, s_rows)
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
            stage = base % STAGES
            mbarrier.wait(k_full.index(stage), (base // STAGES) & 1)
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
            for i in range(base + 1, base + num_tiles):
                stage = i % STAGES
                before = (i - 1) % STAGES
                if HAS_BIAS:
                    tile = base + num_tiles - 1 - i
                    start = gl.load(indices + tile // TILES) * KV_BLOCK + (tile % TILES) * BLOCK_N
                if QUANTIZED:
                    key_scale = next_scale
                    next_scale = _scale_of(key_scales, indices, base + num_tiles - 2 - i, TILES)
                if TURNS:
                    # The first warpgroup's first turn is there from the start.
                    mbarrier.wait(turns.index(consumer), (taken & 1) ^ (1 - consumer))
                    taken += 1
                mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
                k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
                logits = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
                v = v_smem.index(before).reshape([BLOCK_N, BLOCK_D])
                acc = warpgroup_mma(p, v, acc, is_async=True)
                if TURNS:
                    mbarrier.arrive(turns.index(1 - consumer), count=1)
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
                        weights = logits * factor[:, None] - (MAGIC * factor + new_peak)[:, None]
                    else:
                        new_peak = gl.maximum(peak, gl.max(logits, 1) * qk_scale_log2)
                        weights = logits * qk_scale_log2 - new_peak[:, None]
                    if TURNS:
                        weights = gl.inline_asm_elementwise(EXP2, EXP2_CONSTRAINTS, [weights], gl.float32, True, 8)
                    else:
                        weights = gl.exp2(weights)
                    decay = gl.exp2(peak - new_peak)
                mass = mass * decay + gl.sum(weights, 1)
                peak = new_peak
                if not LATE_P:
                    next_p = gl.convert_layout(weights.to(DTYPE), p_layout)
                acc, p = warpgroup_mma_wait(0, deps=[acc, p])
                warpgroup_barrier()
                mbarrier.arrive(v_empty.index(before), count=1)
                acc = acc * gl.convert_layout(decay, o_rows)[:, None]
                if LATE_P:
                    next_p = gl.convert_layout(weights.to(DTYPE), p_layout)
                p = next_p
            stage = (base + num_tiles - 1) % STAGES
            mbarrier.wait(v_full.index(stage), ((base + num_tiles - 1) // STAGES) & 1)
            v = v_smem.index(stage).reshape([BLOCK_N, BLOCK_D])
            acc = warpgroup_mma(p, v, acc, is_async=True)
            mbarrier.arrive(q_empty, count=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            warpgroup_barrier()
            mbarrier.arrive(v_empty.index(stage), count=1)
            inverse = 1.0 / gl.where(mass == 0.0, 1.0, mass) if HAS_BIAS else 1.0 / mass
            acc = acc * gl.convert_layout(inverse, o_rows)[:, None]
        else:
            warpgroup_barrier()
            mbarrier.arrive(q_empty, count=1)
        if STORE_LSE:
            tokens = start_m + gl.arange(0, 64, s_rows)
            lse = gl.where(mass == 0.0, float("-inf"), (peak + gl.log2(mass)) * 0.6931471805599453)
            lse_row = (batch.to(gl.int64) * num_heads + head) * seq_len_q
            gl.store(lse_ptr + lse_row + tokens, lse, mask=tokens < seq_len_q)
        tma.store_wait(0)
        warpgroup_barrier()
        o_smem.index(consumer).reshape([64, BLOCK_D]).store(acc.to(DTYPE))
        fence_async_shared()
        warpgroup_barrier()
        tma_store(out, [batch, head, start_m, 0], o_smem.index(consumer))
        base += num_tiles
        turn += 1
        indices = next_indices
        num_tiles = next_num_tiles
        last_start = next_last_start
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUNTIME_INTEGERS)
def block_sparse_forward_hopper_kernel(
    query, key, value, out, lse_ptr, counts_ptr, indices_ptr, bias_ptr, query_scale_ptr, key_scale_ptr,
    counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m,
    bias_stride_b, bias_stride_h,
    num_heads, group_size, seq_len_q, seq_len_kv, num_q_tiles, num_work, num_key_tiles, qk_scale_log2,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr,
    STAGES: gl.constexpr, RAGGED_KV: gl.constexpr, HAS_BIAS: gl.constexpr, LATE_P: gl.constexpr,
    STORE_LSE: gl.constexpr, TURNS: gl.constexpr, QUANTIZED: gl.constexpr,
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
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for consumer in gl.static_range(2):
        mbarrier.init(turns.index(consumer), count=1)
    # Full: the producer arrives. Empty: each of the two warpgroups does.
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    lists = (
        counts_ptr, indices_ptr, counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m,
    )  # fmt: skip
    biases = bias_ptr, bias_stride_b, bias_stride_h
    scales = query_scale_ptr, key_scale_ptr, group_size, num_key_tiles
    gl.warp_specialize(
        [
            (_attend, (
                0, out, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, lists, biases, scales,
                num_heads, seq_len_q, seq_len_kv, num_q_tiles, num_work, qk_scale_log2,
                Q_BLOCK, KV_BLOCK, BLOCK_N, BLOCK_D, STAGES, RAGGED_KV, HAS_BIAS, LATE_P, STORE_LSE, TURNS,
                QUANTIZED,
            )),
            (_attend, (
                1, out, lse_ptr, q_smem, k_smem, v_smem, o_smem, barriers, lists, biases, scales,
                num_heads, seq_len_q, seq_len_kv, num_q_tiles, num_work, qk_scale_log2,
                Q_BLOCK, KV_BLOCK, BLOCK_N, BLOCK_D, STAGES, RAGGED_KV, HAS_BIAS, LATE_P, STORE_LSE, TURNS,
                QUANTIZED,
            )),
            (_load_tiles, (
                query, key, value, q_smem, k_smem, v_smem, barriers, lists,
                num_heads, group_size, seq_len_kv, num_q_tiles, num_work,
                Q_BLOCK, KV_BLOCK, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
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
    num_programs = balanced_programs(num_q_tiles, num_heads * batch, multiprocessors)
    launch: Any = block_sparse_forward_hopper_kernel[(num_programs,)]
    with torch.cuda.device_of(query):
        launch(
            _descriptor(query, 64, block_d), _descriptor(key, block_n, block_d), _descriptor(value, block_n, block_d),
            _descriptor(out, 64, block_d), lse if lse is not None else counts, counts, indices,
            bias if bias is not None else counts, query_scale, key_scale,
            *_broadcast_strides(counts, 2), *_broadcast_strides(indices, 2), indices.stride(2),
            *((x // BIAS_ALIGNMENT for x in _broadcast_strides(bias, 2)) if bias is not None else (0, 0)),
            num_heads, num_heads // key.shape[2], seq_len_q, seq_len_kv, num_q_tiles, num_work,
            triton.cdiv(seq_len_kv, block_n), scale * LOG2_E,
            BLOCK_D=block_d, BLOCK_N=block_n, Q_BLOCK=block_mask.q_block_size, KV_BLOCK=block_mask.kv_block_size,
            STAGES=num_stages(block_n, block_d), RAGGED_KV=seq_len_kv % block_n != 0, HAS_BIAS=bias is not None,
            LATE_P=block_d <= MAX_LATE_P, STORE_LSE=return_lse,
            TURNS=block_d <= MAX_TURNS and block_n == 128 and bias is None, QUANTIZED=quantize is not None,
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
