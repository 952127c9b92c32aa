"""Kernel of the gradient of query for Hopper GPUs, written in Gluon: warp-specialised, on TMA and wgmma.

Roles, barriers and the order of the q tiles are those of `hopper.py`. A warpgroup computes for its 64 queries and each tile
of 64 keys the logits Q K^T and dP = dO V^T, from them P = exp(logits - LSE) and dS = P (dP - delta), and beside those of the
next tile the sum dS K. Two warpgroups share each tile, which halves what comes from the L2 cache beside the portable kernel.
The gradients of key and value stay with that one: in this form they took 2 to 6 % longer (docs/performance.md).
"""

# In kernels every value is the compiler's, which its annotations for the host do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false

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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..block_mask import BlockMask
from .configs import padded_head_dim
from .forward import LOG2_E, _broadcast_strides, _readable, _tma_can_read
from .hopper import (
    BLOCK_M,
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    _descriptor,
    _list,
    _log2,
    tma_load,
    tma_store,
)
from .hopper_schedule import ITEM_NUMBERS, item, longest_first, schedule, warpgroup_barrier

BLOCK_N = 64
"""Keys per tile."""
MIN_HEAD_DIM = 65
"""Below, the portable kernel is as fast."""
STAGES = 4
"""Tiles in flight: 128 KB at head_dim 128, beside 64 KB of query and dO and 32 KB of output."""
RUNTIME_INTEGERS = [
    "counts_stride_b", "counts_stride_h", "indices_stride_b", "indices_stride_h", "indices_stride_m",
    "order_stride_b", "order_stride_h", "has_order", "num_heads", "group_size", "num_rows", "seq_len_kv",
    "num_q_tiles", "num_work",
]  # fmt: skip
"""What Triton may not compile into the kernel, so that one compilation serves every shape."""


@gluon.jit
def _load_tiles(
    query, grad_out, key, value, q_smem, g_smem, k_smem, v_smem, barriers, items, ready, lists,
    num_heads, group_size, num_q_tiles,
    Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: query and dO of an item, then the tiles of its list from the end."""
    own_full, own_empty, full, empty = barriers
    TILES: gl.constexpr = KV_BLOCK // 64
    LOG: gl.constexpr = _log2(STAGES)
    base = 0
    turn = 0
    work, tile_m, num_tiles, _, state = item(0, items, ready, 1)
    while state > 0:
        head = (work // num_q_tiles) % num_heads
        batch = work // num_q_tiles // num_heads
        kv_head = head // group_size
        indices = _list(lists, batch, head, tile_m, Q_BLOCK)
        mbarrier.wait(own_empty, (turn & 1) ^ 1)
        mbarrier.expect(own_full, 4 * query.block_type.nbytes)
        for consumer in gl.static_range(2):
            start_m = tile_m * 128 + consumer * 64
            tma_load(query, [batch, head, start_m, 0], own_full, q_smem.index(consumer))
            tma_load(grad_out, [batch, head, start_m, 0], own_full, g_smem.index(consumer))
        for i in range(num_tiles):
            tile = num_tiles - 1 - i
            start = gl.load(indices + tile // TILES) * KV_BLOCK + (tile % TILES) * 64
            stage = (base + i) & (STAGES - 1)
            mbarrier.wait(empty.index(stage), (((base + i) >> LOG) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * key.block_type.nbytes)
            tma_load(key, [batch, kv_head, start, 0], full.index(stage), k_smem.index(stage))
            tma_load(value, [batch, kv_head, start, 0], full.index(stage), v_smem.index(stage))
        base += num_tiles
        turn += 1
        work, tile_m, num_tiles, _, state = item(turn, items, ready, 1)


@gluon.jit
def _products(q, g, k_smem, v_smem, full, tile, zeros, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    """Start Q K^T and dO V^T of a tile once it is there."""
    LOG: gl.constexpr = _log2(STAGES)
    stage = tile & (STAGES - 1)
    mbarrier.wait(full.index(stage), (tile >> LOG) & 1)
    k = k_smem.index(stage).reshape([64, BLOCK_D]).permute((1, 0))
    v = v_smem.index(stage).reshape([64, BLOCK_D]).permute((1, 0))
    logits = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
    grad_weights = warpgroup_mma(g, v, zeros, use_acc=False, is_async=True)
    return logits, grad_weights


@gluon.jit
def _differentiate(
    consumer: gl.constexpr, grad_query, q_smem, g_smem, k_smem, v_smem, out_smem, barriers, items, ready, ended,
    lse_ptr, delta_ptr, num_heads, num_rows, seq_len_kv, num_q_tiles, scale, qk_scale_log2,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, RAGGED_KV: gl.constexpr,
):  # fmt: skip
    """A warpgroup: the gradient of 64 queries of each item. A cut tile comes first, so its mask stays out of the loop."""
    own_full, own_empty, full, empty = barriers
    DTYPE: gl.constexpr = out_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    zeros = gl.zeros([64, 64], gl.float32, s_layout)
    q = q_smem.index(consumer).reshape([64, BLOCK_D])
    g = g_smem.index(consumer).reshape([64, BLOCK_D])
    base = 0
    turn = 0
    work, tile_m, num_tiles, last_start, state = item(0, items, ready, 4)
    while state > 0:
        head = (work // num_q_tiles) % num_heads
        batch = work // num_q_tiles // num_heads
        start_m = tile_m * 128 + consumer * 64
        rows = (batch.to(gl.int64) * num_heads + head) * num_rows + start_m + gl.arange(0, 64, s_rows)
        # Rows that attend to nothing or lie past the end have +inf.
        lse = gl.load(lse_ptr + rows)
        delta = gl.load(delta_ptr + rows)
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        mbarrier.wait(own_full, turn & 1)
        if num_tiles > 0:
            logits, grad_weights = _products(q, g, k_smem, v_smem, full, base, zeros, BLOCK_D, STAGES)
            logits, grad_weights = warpgroup_mma_wait(0, deps=[logits, grad_weights])
            weights = gl.exp2(logits * qk_scale_log2 - lse[:, None])
            if RAGGED_KV:
                # Past the last key logits are 0, and their weights may overflow.
                inside = last_start + gl.arange(0, 64, s_columns) < seq_len_kv
                weights = gl.where(inside[None, :], weights, 0.0)
            ds = gl.convert_layout((weights * (grad_weights - delta[:, None])).to(DTYPE), p_layout)
            for i in range(base + 1, base + num_tiles):
                before = (i - 1) & (STAGES - 1)
                logits, grad_weights = _products(q, g, k_smem, v_smem, full, i, zeros, BLOCK_D, STAGES)
                acc = warpgroup_mma(ds, k_smem.index(before).reshape([64, BLOCK_D]), acc, is_async=True)
                logits, grad_weights = warpgroup_mma_wait(1, deps=[logits, grad_weights])
                weights = gl.exp2(logits * qk_scale_log2 - lse[:, None])
                next_ds = gl.convert_layout((weights * (grad_weights - delta[:, None])).to(DTYPE), p_layout)
                acc, ds = warpgroup_mma_wait(0, deps=[acc, ds])
                # One thread arrives for the warpgroup, so all of it has to be done with the tile.
                warpgroup_barrier()
                mbarrier.arrive(empty.index(before), count=1)
                ds = next_ds
            stage = (base + num_tiles - 1) & (STAGES - 1)
            acc = warpgroup_mma(ds, k_smem.index(stage).reshape([64, BLOCK_D]), acc, is_async=True)
            mbarrier.arrive(own_empty, count=1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            warpgroup_barrier()
            mbarrier.arrive(empty.index(stage), count=1)
        else:
            warpgroup_barrier()
            mbarrier.arrive(own_empty, count=1)
        tma.store_wait(0)
        warpgroup_barrier()
        out_smem.index(consumer).reshape([64, BLOCK_D]).store((acc * scale).to(DTYPE))
        fence_async_shared()
        warpgroup_barrier()
        tma_store(grad_query, [batch, head, start_m, 0], out_smem.index(consumer))
        mbarrier.arrive(ended.index(turn & 1), count=1)
        base += num_tiles
        turn += 1
        work, tile_m, num_tiles, last_start, state = item(turn, items, ready, 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUNTIME_INTEGERS)
def block_sparse_backward_query_hopper_kernel(
    query, grad_out, key, value, grad_query, lse_ptr, delta_ptr, counts_ptr, indices_ptr, order_ptr, counter_ptr,
    counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m,
    order_stride_b, order_stride_h, has_order,
    num_heads, group_size, num_rows, seq_len_kv, num_q_tiles, num_work, scale, qk_scale_log2,
    BLOCK_D: gl.constexpr, Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr, STAGES: gl.constexpr,
    RAGGED_KV: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradient of 128 queries of one head over their listed kv-blocks, q tile after q tile; tensors are descriptors."""
    DTYPE: gl.constexpr = query.dtype
    # [stages, batch, head, token, dim]
    q_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, BLOCK_D], query.layout)
    g_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, BLOCK_D], grad_out.layout)
    out_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, BLOCK_D], grad_query.layout)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 64, BLOCK_D], key.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, 64, BLOCK_D], value.layout)
    own_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    own_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ended = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    single: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    items = gl.allocate_shared_memory(gl.int32, [2 * ITEM_NUMBERS, 1], single)
    # They stay 0: no item has to come again here.
    verdicts = gl.allocate_shared_memory(gl.int32, [4, 1], single)
    for i in gl.static_range(4):
        verdicts.index(i).store(gl.zeros([1], gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    # Full: the producer arrives. Empty: each of the two warpgroups does.
    mbarrier.init(own_full, count=1)
    mbarrier.init(own_empty, count=2)
    for slot in gl.static_range(2):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(ended.index(slot), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    barriers = own_full, own_empty, full, empty
    lists = indices_ptr, indices_stride_b, indices_stride_h, indices_stride_m
    gl.warp_specialize(
        [
            (_differentiate, (
                0, grad_query, q_smem, g_smem, k_smem, v_smem, out_smem, barriers, items, ready, ended,
                lse_ptr, delta_ptr, num_heads, num_rows, seq_len_kv, num_q_tiles, scale, qk_scale_log2,
                BLOCK_D, STAGES, RAGGED_KV,
            )),
            (_differentiate, (
                1, grad_query, q_smem, g_smem, k_smem, v_smem, out_smem, barriers, items, ready, ended,
                lse_ptr, delta_ptr, num_heads, num_rows, seq_len_kv, num_q_tiles, scale, qk_scale_log2,
                BLOCK_D, STAGES, RAGGED_KV,
            )),
            (_load_tiles, (
                query, grad_out, key, value, q_smem, g_smem, k_smem, v_smem, barriers, items, ready, lists,
                num_heads, group_size, num_q_tiles, Q_BLOCK, KV_BLOCK, STAGES,
            )),
            (schedule, (
                items, verdicts, ready, ended, counts_ptr, indices_ptr, counts_stride_b, counts_stride_h,
                indices_stride_b, indices_stride_h, indices_stride_m, order_ptr, order_stride_b, order_stride_h,
                has_order, counter_ptr, num_heads, num_q_tiles, seq_len_kv, num_work, Q_BLOCK, KV_BLOCK, 64,
            )),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def hopper_grad_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_query: Tensor,
    lse: Tensor,
    delta: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
) -> None:
    """Launch the kernel for a case that it `takes`: write `grad_query`.

    Args:
        query, key, value, grad_out: as for `triton_backward`, as TMA can read them.
        grad_query: like `query`, contiguous.
        lse, delta: fp32 `[batch, num_heads, num_rows]` as `backward.py` prepares them: the LSE in base 2, +inf in rows that
            attend to nothing and up to whole q-blocks.
        block_mask: the lists of the forward.
        scale: factor on query . key, positive.
    """
    batch, seq_len_q, num_heads, head_dim = query.shape
    counts, indices = _readable(block_mask.kv_num_blocks, block_mask.kv_indices)
    order = longest_first(block_mask, BLOCK_M)
    block_d = padded_head_dim(head_dim)
    num_q_tiles = triton.cdiv(seq_len_q, BLOCK_M)
    num_work = num_q_tiles * num_heads * batch
    counter = torch.zeros(1, dtype=torch.int32, device=query.device)
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    launch: Any = block_sparse_backward_query_hopper_kernel[(min(num_work, multiprocessors),)]
    launch(
        _descriptor(query, 64, block_d), _descriptor(grad_out, 64, block_d), _descriptor(key, BLOCK_N, block_d),
        _descriptor(value, BLOCK_N, block_d), _descriptor(grad_query, 64, block_d),
        lse, delta, counts, indices, order if order is not None else counts, counter,
        *_broadcast_strides(counts, 2), *_broadcast_strides(indices, 2), indices.stride(2),
        *(_broadcast_strides(order, 2) if order is not None else (0, 0)), int(order is not None),
        num_heads, num_heads // key.shape[2], lse.shape[2], key.shape[1], num_q_tiles, num_work,
        scale, scale * LOG2_E,
        BLOCK_D=block_d, Q_BLOCK=block_mask.q_block_size, KV_BLOCK=block_mask.kv_block_size, STAGES=STAGES,
        RAGGED_KV=key.shape[1] % BLOCK_N != 0,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def takes(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, block_mask: BlockMask) -> bool:
    """Whether the kernel computes a case whose forward the Hopper kernel can do (`hopper.unsupported`)."""
    if block_mask.variable or query.shape[3] < MIN_HEAD_DIM:
        return False
    return all(_tma_can_read(x) for x in (query, key, value, grad_out))
