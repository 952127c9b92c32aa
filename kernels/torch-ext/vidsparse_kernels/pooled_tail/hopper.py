"""Block-sparse attention and its pooled tail in one kernel for Hopper GPUs, written in Gluon.

The kernel of `block_sparse_attention/hopper.py`, whose scheduler and helpers it uses, with the means of all kv-blocks as
tiles of keys and values like any others: into the same sums, against the same peak, so that nothing is merged. What is
listed is kept out by a bias, -inf there and the logarithm of the block's size elsewhere, one row for the 128 queries of a
tile, written beforehand and copied with the means; products start from it in place of 0.

The means come after the first listed tile, which gives the peak, and the rest of the list after them. One tile later, where
the products with all means are done, the first-order term adds t * scale * q H, t being their mass: the sums are divided by
t, q H is one product more onto them, and t goes back on. A q tile whose list is empty begins with the means. The first
tile has a finite logit in every row either way.

A q tile whose sums overflow or are not finite is done again in two passes: the first finds the largest logit of each row.
"""

# In kernels every value is the compiler's, which its annotations for the host do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
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
from ..block_sparse_attention.configs import padded_head_dim
from ..block_sparse_attention.forward import LOG2_E, _broadcast_strides, _readable, _tma_can_read
from ..block_sparse_attention.hopper import (
    BLOCK_M,
    CONSUMER_REGISTERS,
    LARGEST_MASS,
    PRODUCER_REGISTERS,
    _descriptor,
    _list,
    _log2,
    _thread_sums,
    num_stages,
    tma_load,
    tma_store,
)
from ..block_sparse_attention.hopper import unsupported as sparse_unsupported
from ..block_sparse_attention.hopper_schedule import ITEM_NUMBERS, item, longest_first, schedule, warpgroup_barrier

BIAS_COLUMNS = 128
"""Rows of the bias are padded to a multiple of this, so that tiles of either size read whole numbers of them."""
RUNTIME_INTEGERS = [
    "counts_stride_b", "counts_stride_h", "indices_stride_b", "indices_stride_h", "indices_stride_m",
    "order_stride_b", "order_stride_h", "has_order", "bias_stride_b", "bias_stride_h",
    "num_heads", "group_size", "seq_len_q", "seq_len_kv", "num_q_tiles", "num_work", "num_mean_tiles",
]  # fmt: skip
"""What Triton may not compile into the kernel, so that one compilation serves every shape."""


@triton.jit(
    do_not_specialize=[
        "counts_stride_b", "counts_stride_h", "indices_stride_b", "indices_stride_h", "indices_stride_m",
        "num_heads", "num_rows", "seq_len_kv", "kv_block_size", "width",
    ]
)  # fmt: skip
def tail_bias_kernel(
    bias_ptr, counts_ptr, indices_ptr,
    counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m,
    num_heads, num_rows, seq_len_kv, kv_block_size, width, qk_scale_log2, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The row of one q-block: log2 of the sizes of kv-blocks over the scale, -inf where one is listed or not there."""
    program = tl.program_id(0)
    row = (program % num_rows).to(tl.int64)
    head = ((program // num_rows) % num_heads).to(tl.int64)
    batch = (program // num_rows // num_heads).to(tl.int64)
    bias_ptr += program.to(tl.int64) * width
    count = tl.load(counts_ptr + batch * counts_stride_b + head * counts_stride_h + row)
    indices_ptr += batch * indices_stride_b + head * indices_stride_h + row * indices_stride_m
    for start in tl.range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        size = tl.minimum(kv_block_size, seq_len_kv - columns * kv_block_size)
        bias = tl.where(size > 0, tl.log2(tl.maximum(size, 1).to(tl.float32)) / qk_scale_log2, float("-inf"))
        tl.store(bias_ptr + columns, bias, mask=columns < width)
    # Threads write -inf where others wrote the size before.
    tl.debug_barrier()
    for start in tl.range(0, count, COLUMNS):
        places = start + tl.arange(0, COLUMNS)
        block = tl.load(indices_ptr + places, mask=places < count, other=0)
        tl.store(bias_ptr + block, float("-inf"), mask=places < count)


@gluon.jit
def _ends(num_tiles, num_mean_tiles):
    """Where the tiles of means begin and how many tiles there are: one listed, the means, the rest of the list. Without a
    list the means begin, and a tile of means that are not there ends them, so that there are two tiles at least."""
    return gl.minimum(num_tiles, 1), gl.maximum(num_tiles, 1) + num_mean_tiles


@gluon.jit
def _with_bias(
    logits, bias, of_means, may_be_cut, start, seq_len_kv, qk_scale_log2, BLOCK_N: gl.constexpr, RAGGED_KV: gl.constexpr
):  # fmt: skip
    """Logits in base 2 of a tile of either kind: a listed one, cut at the last key, or one of means."""
    layout: gl.constexpr = logits.type.layout
    tile_bias = gl.where(of_means, bias.load(layout), 0.0)
    if RAGGED_KV:
        columns = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))[None, :]
        tile_bias = gl.where((columns >= seq_len_kv) & may_be_cut & (of_means == 0), float("-inf"), tile_bias)
    return (logits + tile_bias) * qk_scale_log2


@gluon.jit
def _load_tiles(
    query, key, value, mean_key, mean_value, matrix, bias, q_smem, k_smem, v_smem, b_smem, h_smem, barriers, items,
    ready, lists, bias_strides, num_heads, group_size, num_q_tiles, num_mean_tiles,
    Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    FIRST_ORDER: gl.constexpr,
):  # fmt: skip
    """The producer: copy what the warpgroups need, in their order, values one tile later: the last listed tile, the
    means, the rest of the list from its end; all of it twice for a q tile that comes again."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, h_full, h_empty = barriers
    bias_stride_b, bias_stride_h = bias_strides
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
        row = batch * bias_stride_b + head * bias_stride_h + tile_m * 128 // Q_BLOCK
        first_mean, all_tiles = _ends(num_tiles, num_mean_tiles)
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, 2 * query.block_type.nbytes)
        for consumer in gl.static_range(2):
            tma_load(query, [batch, head, tile_m * 128 + consumer * 64, 0], q_full, q_smem.index(consumer))
        if FIRST_ORDER:
            mbarrier.wait(h_empty, (turn & 1) ^ 1)
            mbarrier.expect(h_full, matrix.block_type.nbytes)
            tma_load(matrix, [batch, kv_head, 0, 0], h_full, h_smem.index(0))
        for _ in range(state):
            of_means = num_tiles == 0
            for i in range(all_tiles + 1):
                start_k = start_v
                after_means = of_means
                if i < all_tiles:
                    mean = i - first_mean
                    of_means = (mean >= 0) & ((mean < num_mean_tiles) | (num_tiles == 0))
                    stage = (base + i) & (STAGES - 1)
                    if of_means:
                        start_k = mean * BLOCK_N
                        mbarrier.wait(k_empty.index(stage), (((base + i) >> LOG) & 1) ^ 1)
                        mbarrier.expect(k_full.index(stage), mean_key.block_type.nbytes + bias.block_type.nbytes)
                        tma_load(mean_key, [batch, kv_head, start_k, 0], k_full.index(stage), k_smem.index(stage))
                        tma_load(bias, [row, start_k], k_full.index(stage), b_smem.index(stage))
                    else:
                        tile = num_tiles - 1 - gl.where(mean < 0, 0, i - num_mean_tiles)
                        start_k = gl.load(indices + tile // TILES) * KV_BLOCK + (tile % TILES) * BLOCK_N
                        mbarrier.wait(k_empty.index(stage), (((base + i) >> LOG) & 1) ^ 1)
                        mbarrier.expect(k_full.index(stage), key.block_type.nbytes)
                        tma_load(key, [batch, kv_head, start_k, 0], k_full.index(stage), k_smem.index(stage))
                if i > 0:
                    stage = (base + i - 1) & (STAGES - 1)
                    mbarrier.wait(v_empty.index(stage), (((base + i - 1) >> LOG) & 1) ^ 1)
                    mbarrier.expect(v_full.index(stage), value.block_type.nbytes)
                    if after_means:
                        tma_load(mean_value, [batch, kv_head, start_v, 0], v_full.index(stage), v_smem.index(stage))
                    else:
                        tma_load(value, [batch, kv_head, start_v, 0], v_full.index(stage), v_smem.index(stage))
                start_v = start_k
            base += all_tiles
        turn += 1
        work, tile_m, num_tiles, start_v, state = item(turn, items, ready, 1)


@gluon.jit
def _as_operand(weights, DTYPE: gl.constexpr, layout: gl.constexpr):
    """Weights as the left side of a product, rounded two at a time.

    Rounded one by one they would go from turn to turn of the loops as halves of registers, and one of the two warpgroups
    would put them together again with an instruction each.
    """
    if DTYPE == gl.bfloat16:
        rounded = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [weights], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        rounded = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [weights], dtype=gl.float16, is_pure=True, pack=2
        )
    return gl.convert_layout(rounded, layout)


@gluon.jit
def _next_tile(
    i, acc, p, peak, parts, q, zeros, k_smem, v_smem, b_smem, barriers, qk_scale_log2, of_means,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Weights of tile `i` against a peak that stays, beside the product of the weights and values before it. Its bias counts
    where it is of means."""
    _, _, k_full, k_empty, v_full, v_empty, _, _ = barriers
    LOG: gl.constexpr = _log2(STAGES)
    stage = i & (STAGES - 1)
    before = (i - 1) & (STAGES - 1)
    mbarrier.wait(k_full.index(stage), (i >> LOG) & 1)
    k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    if HAS_BIAS:
        tile_bias = gl.where(of_means, b_smem.index(stage).load(zeros.type.layout), 0.0)
        tile_bias, _ = gl.broadcast(tile_bias, zeros)
        scores = warpgroup_mma(q, k, tile_bias, is_async=True)
    else:
        scores = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((i - 1) >> LOG) & 1)
    v = v_smem.index(before).reshape([BLOCK_N, BLOCK_D])
    acc = warpgroup_mma(p, v, acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    # One thread arrives for the warpgroup, so all of it has to be done with the tile.
    warpgroup_barrier()
    mbarrier.arrive(k_empty.index(stage), count=1)
    weights = gl.exp2(scores * qk_scale_log2 - peak[:, None])
    parts += _thread_sums(weights, BLOCK_N)
    P_LAYOUT: gl.constexpr = p.type.layout
    next_p = _as_operand(weights, p.dtype, P_LAYOUT)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    warpgroup_barrier()
    mbarrier.arrive(v_empty.index(before), count=1)
    return acc, next_p, parts


@gluon.jit
def _attend(
    consumer: gl.constexpr, out, lse_ptr, q_smem, k_smem, v_smem, b_smem, h_smem, o_smem, barriers, items, verdicts,
    ready, ended, num_heads, seq_len_q, seq_len_kv, num_q_tiles, num_mean_tiles, qk_scale_log2,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, RAGGED_KV: gl.constexpr,
    FIRST_ORDER: gl.constexpr, STORE_LSE: gl.constexpr, LARGEST_MASS: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 queries of each q tile over the tiles that the producer copies.

    The peak is that of the first tile; for a q tile that comes again, of a pass over the logits of all tiles.
    """
    q_full, q_empty, k_full, k_empty, v_full, v_empty, h_full, h_empty = barriers
    DTYPE: gl.constexpr = o_smem.dtype
    LOG: gl.constexpr = _log2(STAGES)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    q = q_smem.index(consumer).reshape([64, BLOCK_D])
    zeros = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    base = 0
    turn = 0
    work, tile_m, num_tiles, last_start, state = item(0, items, ready, 4)
    while state > 0:
        head = (work // num_q_tiles) % num_heads
        batch = work // num_q_tiles // num_heads
        start_m = tile_m * 128 + consumer * 64
        first_mean, all_tiles = _ends(num_tiles, num_mean_tiles)
        end_means = num_mean_tiles + 1
        # [64], peak in base 2
        peak = gl.full([64], float("-inf"), gl.float32, s_rows)
        mbarrier.wait(q_full, turn & 1)
        if state > 1:
            for i in range(all_tiles):
                stage = (base + i) & (STAGES - 1)
                phase = ((base + i) >> LOG) & 1
                mbarrier.wait(k_full.index(stage), phase)
                k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
                logits = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
                logits = warpgroup_mma_wait(0, deps=[logits])
                of_means = (i >= first_mean) & (i < end_means)
                logits = _with_bias(
                    logits, b_smem.index(stage), of_means, i == 0, last_start, seq_len_kv, qk_scale_log2,
                    BLOCK_N, RAGGED_KV,
                )  # fmt: skip
                # Before the barrier: a warp that came here after the stage was filled again would wait for the fill after that.
                mbarrier.wait(v_full.index(stage), phase)
                warpgroup_barrier()
                mbarrier.arrive(k_empty.index(stage), count=1)
                mbarrier.arrive(v_empty.index(stage), count=1)
                peak = gl.maximum(peak, gl.max(logits, 1))
            base += all_tiles
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        stage = base & (STAGES - 1)
        mbarrier.wait(k_full.index(stage), (base >> LOG) & 1)
        k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
        logits = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(0, deps=[logits])
        logits = _with_bias(
            logits, b_smem.index(stage), num_tiles == 0, True, last_start, seq_len_kv, qk_scale_log2,
            BLOCK_N, RAGGED_KV,
        )  # fmt: skip
        warpgroup_barrier()
        mbarrier.arrive(k_empty.index(stage), count=1)
        peak = gl.maximum(peak, gl.max(logits, 1))
        weights = gl.exp2(logits - peak[:, None])
        mass = gl.sum(weights, 1)
        # What of the mass came from the means.
        tail = gl.where(num_tiles == 0, mass, 0.0)
        p = _as_operand(weights, DTYPE, p_layout)
        # [64, 4], what the threads that share a row have added up.
        parts = _thread_sums(gl.zeros([64, BLOCK_N], gl.float32, s_layout), BLOCK_N)
        turning = gl.minimum(end_means, all_tiles - 1)
        for i in range(1, turning):
            acc, p, parts = _next_tile(
                base + i, acc, p, peak, parts, q, zeros, k_smem, v_smem, b_smem, barriers, qk_scale_log2, True,
                BLOCK_N, BLOCK_D, STAGES, True,
            )  # fmt: skip
        # The first listed tile after the means; or, where there is none, the last of the means.
        of_means = num_tiles <= 1
        tail_parts = parts
        acc, p, parts = _next_tile(
            base + turning, acc, p, peak, parts, q, zeros, k_smem, v_smem, b_smem, barriers, qk_scale_log2, of_means,
            BLOCK_N, BLOCK_D, STAGES, True,
        )  # fmt: skip
        if FIRST_ORDER:
            tail += gl.convert_layout(gl.sum(gl.where(of_means, parts, tail_parts), 1), s_rows)
            # Without a tail the term is rounded away: 2^64 is far beyond what fp32 can add to a mass of 1.
            tail = gl.maximum(tail, 5.421010862427522e-20)
            acc = acc * gl.convert_layout(1.0 / tail, o_rows)[:, None]
            mbarrier.wait(h_full, turn & 1)
            # Index 0, which the compiler does not know: its descriptors of a fixed place would spill, 1 % of the time.
            h = h_smem.index(turn >> 30).reshape([BLOCK_D, BLOCK_D])
            acc = warpgroup_mma(q, h, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            warpgroup_barrier()
            mbarrier.arrive(h_empty, count=1)
            acc = acc * gl.convert_layout(tail, o_rows)[:, None]
        for i in range(turning + 1, all_tiles):
            acc, p, parts = _next_tile(
                base + i, acc, p, peak, parts, q, zeros, k_smem, v_smem, b_smem, barriers, qk_scale_log2, False,
                BLOCK_N, BLOCK_D, STAGES, False,
            )  # fmt: skip
        place = base + all_tiles - 1
        stage = place & (STAGES - 1)
        mbarrier.wait(v_full.index(stage), (place >> LOG) & 1)
        v = v_smem.index(stage).reshape([BLOCK_N, BLOCK_D])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        warpgroup_barrier()
        mbarrier.arrive(v_empty.index(stage), count=1)
        mbarrier.arrive(q_empty, count=1)
        mass += gl.convert_layout(gl.sum(parts, 1), s_rows)
        # 0, or NaN where a number is not finite.
        spoilt = gl.convert_layout(gl.sum(acc * 0.0, 1), s_rows)
        right = (mass < LARGEST_MASS) & (spoilt == 0.0)
        again = gl.where(state > 1, 0, gl.max(gl.where(right, 0, 1), 0))
        acc = acc * gl.convert_layout(1.0 / mass, o_rows)[:, None]
        if STORE_LSE:
            tokens = start_m + gl.arange(0, 64, s_rows)
            lse = (peak + gl.log2(mass)) * 0.6931471805599453
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
        base += all_tiles
        turn += 1
        work, tile_m, num_tiles, last_start, state = item(turn, items, ready, 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUNTIME_INTEGERS)
def block_sparse_forward_with_tail_kernel(
    query, key, value, mean_key, mean_value, matrix, out, lse_ptr, counts_ptr, indices_ptr, order_ptr, counter_ptr,
    bias, counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m,
    order_stride_b, order_stride_h, has_order, bias_stride_b, bias_stride_h,
    num_heads, group_size, seq_len_q, seq_len_kv, num_q_tiles, num_work, num_mean_tiles, qk_scale_log2,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr,
    STAGES: gl.constexpr, RAGGED_KV: gl.constexpr, FIRST_ORDER: gl.constexpr, STORE_LSE: gl.constexpr,
    LARGEST_MASS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """128 queries of one head over their listed kv-blocks and all means, q tile after q tile; tensors with a head_dim
    are descriptors."""
    # [stages, batch, head, token, dim]
    q_smem = gl.allocate_shared_memory(query.dtype, [2, 1, 1, 64, BLOCK_D], query.layout)
    o_smem = gl.allocate_shared_memory(out.dtype, [2, 1, 1, 64, BLOCK_D], out.layout)
    k_smem = gl.allocate_shared_memory(key.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], key.layout)
    v_smem = gl.allocate_shared_memory(value.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], value.layout)
    b_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_N], bias.layout)
    if FIRST_ORDER:
        h_smem = gl.allocate_shared_memory(matrix.dtype, [1, 1, 1, BLOCK_D, BLOCK_D], matrix.layout)
    else:
        h_smem = q_smem
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    h_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    h_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
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
    mbarrier.init(h_full, count=1)
    mbarrier.init(h_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    barriers = q_full, q_empty, k_full, k_empty, v_full, v_empty, h_full, h_empty
    lists = indices_ptr, indices_stride_b, indices_stride_h, indices_stride_m
    bias_strides = bias_stride_b, bias_stride_h
    gl.warp_specialize(
        [
            (_attend, (
                0, out, lse_ptr, q_smem, k_smem, v_smem, b_smem, h_smem, o_smem, barriers, items, verdicts, ready, ended,
                num_heads, seq_len_q, seq_len_kv, num_q_tiles, num_mean_tiles, qk_scale_log2,
                BLOCK_N, BLOCK_D, STAGES, RAGGED_KV, FIRST_ORDER, STORE_LSE, LARGEST_MASS,
            )),
            (_attend, (
                1, out, lse_ptr, q_smem, k_smem, v_smem, b_smem, h_smem, o_smem, barriers, items, verdicts, ready, ended,
                num_heads, seq_len_q, seq_len_kv, num_q_tiles, num_mean_tiles, qk_scale_log2,
                BLOCK_N, BLOCK_D, STAGES, RAGGED_KV, FIRST_ORDER, STORE_LSE, LARGEST_MASS,
            )),
            (_load_tiles, (
                query, key, value, mean_key, mean_value, matrix, bias, q_smem, k_smem, v_smem, b_smem, h_smem, barriers,
                items, ready, lists, bias_strides, num_heads, group_size, num_q_tiles, num_mean_tiles,
                Q_BLOCK, KV_BLOCK, BLOCK_N, STAGES, FIRST_ORDER,
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


def hopper_forward_with_tail(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mean_key: Tensor,
    mean_value: Tensor,
    matrix: Tensor | None,
    block_mask: BlockMask,
    *,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernels; inference only.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]` bf16 or fp16. What TMA cannot read (rows that do not start at
            multiples of 16 bytes, elements apart) is copied, here and in key and value.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        mean_key, mean_value: `[batch, num_kv_heads, num_kv_blocks, head_dim]`, contiguous, in the dtype of `query`.
        matrix: likewise `[batch, num_kv_heads, head_dim, head_dim]`, times scale; None leaves the first order out.
        block_mask: lists; q-blocks of a multiple of 128 tokens, kv-blocks of a multiple of 64.
        scale: factor on query . key, positive.
        return_lse: whether to compute the LSE.

    Returns:
        Output like `query` (contiguous) and the fp32 LSE `[batch, num_heads, seq_len_q]` or None.
    """
    batch, seq_len_q, num_heads, head_dim = query.shape
    seq_len_kv = key.shape[1]
    query, key, value = (x if _tma_can_read(x) else x.contiguous() for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, num_heads, seq_len_q, dtype=torch.float32, device=query.device) if return_lse else None
    counts, indices = _readable(block_mask.kv_num_blocks, block_mask.kv_indices)
    bias = tail_bias(block_mask, scale * LOG2_E)
    block_d = padded_head_dim(head_dim)
    block_n = 128 if block_mask.kv_block_size % 128 == 0 else 64
    num_q_tiles = triton.cdiv(seq_len_q, BLOCK_M)
    num_work = num_q_tiles * num_heads * batch
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    counter = torch.zeros(1, dtype=torch.int32, device=query.device)
    order = longest_first(block_mask, BLOCK_M)
    # As [batch, token, head, dim], which is what `_descriptor` takes.
    means = [_descriptor(x.transpose(1, 2), block_n, block_d) for x in (mean_key, mean_value)]
    out_tiles = _descriptor(out, 64, block_d)
    rows = bias.view(-1, bias.shape[3])
    # Without swizzling: a row is read by itself.
    bias_layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    bias_rows = TensorDescriptor(rows, list(rows.shape), [rows.shape[1], 1], [1, block_n], bias_layout)
    # Strides of the bias count in its rows.
    bias_strides = [x // bias.shape[3] for x in _broadcast_strides(bias, 2)]
    launch: Any = block_sparse_forward_with_tail_kernel[(min(num_work, multiprocessors),)]
    with torch.cuda.device_of(query):
        launch(
            _descriptor(query, 64, block_d), _descriptor(key, block_n, block_d), _descriptor(value, block_n, block_d),
            *means, out_tiles if matrix is None else _descriptor(matrix.transpose(1, 2), block_d, block_d),
            out_tiles, lse if lse is not None else counts, counts, indices,
            order if order is not None else counts, counter, bias_rows,
            *_broadcast_strides(counts, 2), *_broadcast_strides(indices, 2), indices.stride(2),
            *(_broadcast_strides(order, 2) if order is not None else (0, 0)), int(order is not None),
            *bias_strides, num_heads, num_heads // key.shape[2], seq_len_q, seq_len_kv, num_q_tiles, num_work,
            triton.cdiv(block_mask.num_kv_blocks, block_n), scale * LOG2_E,
            BLOCK_D=block_d, BLOCK_N=block_n, Q_BLOCK=block_mask.q_block_size, KV_BLOCK=block_mask.kv_block_size,
            STAGES=num_stages(block_n, block_d), RAGGED_KV=seq_len_kv % block_n != 0, FIRST_ORDER=matrix is not None,
            STORE_LSE=return_lse, LARGEST_MASS=LARGEST_MASS,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def tail_bias(block_mask: BlockMask, qk_scale_log2: float) -> Tensor:
    """fp32 `[B|1, H|1, num_q_blocks, padded]`: what products of queries and mean keys start from, before their scale (in
    base 2); 40 MB for 12 heads of 591 x 1,182 blocks. A tile more than there are means is -inf."""
    counts, indices = _readable(block_mask.kv_num_blocks, block_mask.kv_indices)
    batch, heads, num_rows = counts.shape
    width = (triton.cdiv(block_mask.num_kv_blocks, BIAS_COLUMNS) + 1) * BIAS_COLUMNS
    bias = torch.empty(batch, heads, num_rows, width, dtype=torch.float32, device=counts.device)
    launch: Any = tail_bias_kernel[(batch * heads * num_rows,)]
    with torch.cuda.device_of(counts):
        launch(
            bias, counts, indices, *_broadcast_strides(counts, 2), *_broadcast_strides(indices, 2), indices.stride(2),
            heads, num_rows, block_mask.seq_len_kv, block_mask.kv_block_size, width, qk_scale_log2,
            COLUMNS=min(1024, triton.next_power_of_2(width)), num_warps=4,
        )  # fmt: skip
    return bias


def unsupported(query: Tensor, key: Tensor, block_mask: BlockMask) -> str | None:
    """Why this kernel cannot do a case, as the end of a sentence that starts with its name; None if it can."""
    if block_mask.variable:
        return "needs blocks of uniform size"
    if not 64 < query.shape[3] <= 128:
        return f"supports head_dim from 65 to 128, got {query.shape[3]}"
    return sparse_unsupported(query, key, block_mask)
