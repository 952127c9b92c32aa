"""Forward kernel of the pooled tail for Hopper GPUs, written in Gluon: warp-specialised, on TMA and wgmma.

The scheme is that of block_sparse_attention's kernel for Hopper: a producer warp copies tiles to shared memory, two
warpgroups own 64 of the 128 queries each, programs are persistent. Here the keys are the virtual tokens, all of them,
and what a q-block lists is in a bias, -inf there and log2 of the block's size elsewhere, written beforehand: one number
for 128 queries. The first-order matrix comes as one more tile, and the state to merge into is copied to shared memory
while the tiles are multiplied.
"""

# In kernels every value is the compiler's, which its annotations for the host do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

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

from ..block_mask import BlockMask
from ..block_sparse_attention.configs import padded_head_dim
from ..block_sparse_attention.forward import LOG2_E, _tma_can_read
from ..block_sparse_attention.hopper import (
    BLOCK_M,
    CONSUMER_REGISTERS,
    MAX_LATE_P,
    PRODUCER_REGISTERS,
    _descriptor,
    num_stages,
    tma_load,
    tma_store,
    warpgroup_barrier,
)
from .pooling import broadcast_strides
from .words import listed_words

BIAS_COLUMNS = 128
"""Rows of the bias are padded to a multiple of this, so that tiles of either size read whole numbers of them."""
RUNTIME_INTEGERS = [
    "bias_stride_b", "bias_stride_h", "padded", "lse_stride_b", "lse_stride_h", "lse_stride_s",
    "num_heads", "group_size", "seq_len_q", "num_tiles", "num_q_tiles", "num_work",
]  # fmt: skip
"""What Triton may not compile into the kernel, so that one compilation serves every shape."""


@triton.jit(
    do_not_specialize=[
        "words_stride_b", "words_stride_h", "sizes_stride_b", "sizes_stride_h", "heads", "size_group", "num_rows",
        "num_words", "num_kv_blocks", "padded",
    ]
)  # fmt: skip
def tail_bias_kernel(
    bias_ptr, words_ptr, sizes_ptr, words_stride_b, words_stride_h, sizes_stride_b, sizes_stride_h,
    heads, size_group, num_rows, num_words, num_kv_blocks, padded, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of one q-block's row: log2 of the sizes, -inf where a block is listed, empty or not there."""
    program = tl.program_id(0)
    row = program % num_rows
    head = ((program // num_rows) % heads).to(tl.int64)
    batch = (program // num_rows // heads).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < num_kv_blocks
    words_ptr += batch * words_stride_b + head * words_stride_h + row.to(tl.int64) * num_words
    sizes_ptr += batch * sizes_stride_b + (head // size_group) * sizes_stride_h
    word = tl.load(words_ptr + columns // 64, mask=inside, other=0)
    size = tl.load(sizes_ptr + columns, mask=inside, other=float("-inf"))
    bias = tl.where((word >> (columns % 64)) & 1 == 0, size, float("-inf"))
    tl.store(bias_ptr + program.to(tl.int64) * padded + columns, bias, mask=columns < padded)


@gluon.jit
def _load_tiles(
    query, keys, values, matrix, q_smem, k_smem, v_smem, h_smem, barriers,
    num_heads, group_size, num_tiles, num_q_tiles, num_work,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FIRST_ORDER: gl.constexpr,
):  # fmt: skip
    """The producer: copy what the warpgroups need, in their order, values one tile later than keys."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, h_full, h_empty, _ = barriers
    base = 0
    turn = 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        head = (work // num_q_tiles) % num_heads
        batch = work // num_q_tiles // num_heads
        pool = head // group_size
        start_m = (work % num_q_tiles) * 128
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, 2 * query.block_type.nbytes)
        for consumer in gl.static_range(2):
            tma_load(query, [batch, head, start_m + consumer * 64, 0], q_full, q_smem.index(consumer))
        for i in range(num_tiles + 1):
            if i < num_tiles:
                stage = (base + i) % STAGES
                mbarrier.wait(k_empty.index(stage), (((base + i) // STAGES) & 1) ^ 1)
                mbarrier.expect(k_full.index(stage), keys.block_type.nbytes)
                tma_load(keys, [batch, pool, i * BLOCK_N, 0], k_full.index(stage), k_smem.index(stage))
            if i > 0:
                stage = (base + i - 1) % STAGES
                mbarrier.wait(v_empty.index(stage), (((base + i - 1) // STAGES) & 1) ^ 1)
                mbarrier.expect(v_full.index(stage), values.block_type.nbytes)
                tma_load(values, [batch, pool, (i - 1) * BLOCK_N, 0], v_full.index(stage), v_smem.index(stage))
        if FIRST_ORDER:
            mbarrier.wait(h_empty, (turn & 1) ^ 1)
            mbarrier.expect(h_full, matrix.block_type.nbytes)
            tma_load(matrix, [batch, pool, 0, 0], h_full, h_smem.index(0))
        base += num_tiles
        turn += 1


@gluon.jit
def _attend(
    consumer: gl.constexpr, out, lse_ptr, q_smem, k_smem, v_smem, h_smem, o_smem, barriers, biases, lse_strides,
    num_heads, seq_len_q, num_tiles, num_q_tiles, num_work, qk_scale_log2,
    Q_BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    FIRST_ORDER: gl.constexpr, MERGE: gl.constexpr, LATE_P: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 queries of each q tile over all tiles of virtual tokens."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, h_full, h_empty, o_full = barriers
    bias_ptr, bias_stride_b, bias_stride_h, padded = biases
    lse_stride_b, lse_stride_h, lse_stride_s = lse_strides
    DTYPE: gl.constexpr = q_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q = q_smem.index(consumer).reshape([64, BLOCK_D])
    zeros = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    columns = gl.arange(0, BLOCK_N, s_columns)
    base = 0
    turn = 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        head = (work // num_q_tiles) % num_heads
        batch = work // num_q_tiles // num_heads
        wide_batch, wide_head = batch.to(gl.int64), head.to(gl.int64)
        start_m = (work % num_q_tiles) * 128 + consumer * 64
        q_block = (work % num_q_tiles) * 128 // Q_BLOCK
        # Counted in rows of a multiple of 128 numbers, which tells the compiler how rows are aligned.
        row = wide_batch * bias_stride_b + wide_head * bias_stride_h + q_block
        bias = bias_ptr + row * padded * 128 + columns
        if MERGE:
            # Into the buffer that the last tile's result has left.
            tma.store_wait(0)
            warpgroup_barrier()
            mbarrier.expect(o_full.index(consumer), out.block_type.nbytes)
            tma_load(out, [batch, head, start_m, 0], o_full.index(consumer), o_smem.index(consumer))
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        mbarrier.wait(q_full, turn & 1)
        stage = base % STAGES
        mbarrier.wait(k_full.index(stage), (base // STAGES) & 1)
        k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
        logits = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
        tile_bias = gl.load(bias)
        logits = warpgroup_mma_wait(0, deps=[logits])
        # One thread arrives for the warpgroup, so all of it has to be done with the tile.
        warpgroup_barrier()
        mbarrier.arrive(k_empty.index(stage), count=1)
        logits = logits * qk_scale_log2 + tile_bias[None, :]
        # [64], peak in base 2
        peak = gl.max(logits, 1)
        # Where all logits are -inf, shifting by 0 keeps -inf - -inf out.
        weights = gl.exp2(logits - gl.where(peak == float("-inf"), 0.0, peak)[:, None])
        mass = gl.sum(weights, 1)
        p = gl.convert_layout(weights.to(DTYPE), p_layout)
        for i in range(base + 1, base + num_tiles):
            stage = i % STAGES
            before = (i - 1) % STAGES
            mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
            k = k_smem.index(stage).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
            logits = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
            v = v_smem.index(before).reshape([BLOCK_N, BLOCK_D])
            acc = warpgroup_mma(p, v, acc, is_async=True)
            tile_bias = gl.load(bias + (i - base) * BLOCK_N)
            logits = warpgroup_mma_wait(1, deps=[logits])
            warpgroup_barrier()
            mbarrier.arrive(k_empty.index(stage), count=1)
            logits = logits * qk_scale_log2 + tile_bias[None, :]
            new_peak = gl.maximum(peak, gl.max(logits, 1))
            shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
            weights = gl.exp2(logits - shift[:, None])
            decay = gl.exp2(peak - shift)
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
        acc = warpgroup_mma_wait(0, deps=[acc])
        warpgroup_barrier()
        mbarrier.arrive(v_empty.index(stage), count=1)
        empty = mass == 0.0
        safe = gl.where(empty, 1.0, mass)
        acc = acc * gl.convert_layout(1.0 / safe, o_rows)[:, None]
        if FIRST_ORDER:
            mbarrier.wait(h_full, turn & 1)
            h = h_smem.index(0).reshape([BLOCK_D, BLOCK_D])
            acc = warpgroup_mma(q, h, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            warpgroup_barrier()
            mbarrier.arrive(h_empty, count=1)
            acc = gl.where((gl.convert_layout(mass, o_rows) > 0.0)[:, None], acc, 0.0)
        mbarrier.arrive(q_empty, count=1)
        lse = gl.where(empty, float("-inf"), (peak + gl.log2(safe)) * 0.6931471805599453)
        tokens = start_m + gl.arange(0, 64, s_rows)
        lse_pointers = lse_ptr + wide_batch * lse_stride_b + wide_head * lse_stride_h
        lse_pointers = lse_pointers + tokens.to(gl.int64) * lse_stride_s
        if MERGE:
            other_lse = gl.load(lse_pointers, mask=tokens < seq_len_q, other=float("-inf"))
            top = gl.maximum(lse, other_lse)
            top = gl.where(top == float("-inf"), 0.0, top)
            own_mass = gl.exp(lse - top)
            other_mass = gl.exp(other_lse - top)
            both = own_mass + other_mass
            none = both == 0.0
            both = gl.where(none, 1.0, both)
            lse = gl.where(none, float("-inf"), top + gl.log(both))
            mbarrier.wait(o_full.index(consumer), turn & 1)
            other = o_smem.index(consumer).reshape([64, BLOCK_D]).load(o_layout).to(gl.float32)
            own_share = gl.convert_layout(own_mass / both, o_rows)[:, None]
            acc = acc * own_share + other * gl.convert_layout(other_mass / both, o_rows)[:, None]
        else:
            tma.store_wait(0)
        warpgroup_barrier()
        gl.store(lse_pointers, lse, mask=tokens < seq_len_q)
        o_smem.index(consumer).reshape([64, BLOCK_D]).store(acc.to(DTYPE))
        fence_async_shared()
        warpgroup_barrier()
        tma_store(out, [batch, head, start_m, 0], o_smem.index(consumer))
        base += num_tiles
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=RUNTIME_INTEGERS)
def pooled_tail_hopper_kernel(
    query, keys, values, matrix, out, lse_ptr, bias_ptr,
    bias_stride_b, bias_stride_h, padded, lse_stride_b, lse_stride_h, lse_stride_s,
    num_heads, group_size, seq_len_q, num_tiles, num_q_tiles, num_work, qk_scale_log2,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, Q_BLOCK: gl.constexpr, STAGES: gl.constexpr,
    FIRST_ORDER: gl.constexpr, MERGE: gl.constexpr, LATE_P: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """128 queries of one head over all virtual tokens, q tile after q tile; tensors with a head_dim are descriptors.

    MERGE: out and lse hold a state over other keys, and are replaced by the state over both.
    """
    DTYPE: gl.constexpr = query.dtype
    # [stages, batch, head, token, dim]
    q_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, BLOCK_D], query.layout)
    o_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, BLOCK_D], out.layout)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, BLOCK_D], keys.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, BLOCK_D], values.layout)
    if FIRST_ORDER:
        h_smem = gl.allocate_shared_memory(DTYPE, [1, 1, 1, BLOCK_D, BLOCK_D], matrix.layout)
    else:
        h_smem = q_smem
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    h_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    h_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    o_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # Full: the producer arrives (o: the warpgroup itself). Empty: each of the two warpgroups does.
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    mbarrier.init(h_full, count=1)
    mbarrier.init(h_empty, count=2)
    for consumer in gl.static_range(2):
        mbarrier.init(o_full.index(consumer), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, h_full, h_empty, o_full)
    biases = bias_ptr, bias_stride_b, bias_stride_h, padded
    lse_strides = lse_stride_b, lse_stride_h, lse_stride_s
    gl.warp_specialize(
        [
            (_attend, (
                0, out, lse_ptr, q_smem, k_smem, v_smem, h_smem, o_smem, barriers, biases, lse_strides,
                num_heads, seq_len_q, num_tiles, num_q_tiles, num_work, qk_scale_log2,
                Q_BLOCK, BLOCK_N, BLOCK_D, STAGES, FIRST_ORDER, MERGE, LATE_P,
            )),
            (_attend, (
                1, out, lse_ptr, q_smem, k_smem, v_smem, h_smem, o_smem, barriers, biases, lse_strides,
                num_heads, seq_len_q, num_tiles, num_q_tiles, num_work, qk_scale_log2,
                Q_BLOCK, BLOCK_N, BLOCK_D, STAGES, FIRST_ORDER, MERGE, LATE_P,
            )),
            (_load_tiles, (
                query, keys, values, matrix, q_smem, k_smem, v_smem, h_smem, barriers,
                num_heads, group_size, num_tiles, num_q_tiles, num_work, BLOCK_N, STAGES, FIRST_ORDER,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def hopper_tail(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    matrix: Tensor | None,
    sizes: Tensor,
    out: Tensor,
    lse: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    merge: bool,
    block_n: int | None = None,
) -> None:
    """Launch the kernels: write the tail into out and lse, or merge it into the state that they hold.

    Args:
        query, out: `[batch, seq_len_q, num_heads, head_dim]` bf16 or fp16, as TMA can read them.
        keys, values: `[batch, num_pools, num_kv_blocks, head_dim]`, contiguous, in the dtype of `query`.
        matrix: likewise `[batch, num_pools, head_dim, head_dim]`, times scale, or None.
        sizes: fp32 `[B|1, num_pools|1, num_kv_blocks]`, log2 of the blocks' sizes.
        lse: fp32 `[batch, num_heads, seq_len_q]`, any strides.
        block_mask: q-blocks of a multiple of 128 tokens, at least one kv-block.
        scale: factor on query . key, positive.
        merge: whether out and lse hold a state.
        block_n: virtual tokens per tile, 64 or 128; default: those that leave less of the last tile empty.
    """
    batch, seq_len_q, num_heads, head_dim = query.shape
    num_pools, num_kv_blocks = keys.shape[1:3]
    bias = tail_bias(block_mask, sizes, num_heads)
    block_d = padded_head_dim(head_dim)
    if block_n is None:
        block_n = 128 if triton.cdiv(num_kv_blocks, 64) % 2 == 0 else 64
    num_q_tiles = triton.cdiv(seq_len_q, BLOCK_M)
    num_work = num_q_tiles * num_heads * batch
    num_programs = min(num_work, torch.cuda.get_device_properties(query.device).multi_processor_count)
    # As [batch, token, head, dim], which is what `_descriptor` takes.
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    out_tiles = _descriptor(out, 64, block_d)
    matrix_tile = out_tiles if matrix is None else _descriptor(matrix.transpose(1, 2), block_d, block_d)
    # Strides of the bias count in its rows.
    rows = [x // bias.shape[3] for x in broadcast_strides(bias)]
    launch: Any = pooled_tail_hopper_kernel[(num_programs,)]
    with torch.cuda.device_of(query):
        launch(
            _descriptor(query, 64, block_d), _descriptor(keys, block_n, block_d), _descriptor(values, block_n, block_d),
            matrix_tile, out_tiles, lse, bias, *rows, bias.shape[3] // BIAS_COLUMNS, *lse.stride(),
            num_heads, num_heads // num_pools, seq_len_q, triton.cdiv(num_kv_blocks, block_n), num_q_tiles,
            num_work, scale * LOG2_E,
            BLOCK_D=block_d, BLOCK_N=block_n, Q_BLOCK=block_mask.q_block_size,
            STAGES=num_stages(block_n, block_d), FIRST_ORDER=matrix is not None, MERGE=merge,
            LATE_P=block_d <= MAX_LATE_P, CONSUMER_REGISTERS=CONSUMER_REGISTERS,
            PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def tail_bias(block_mask: BlockMask, sizes: Tensor, num_heads: int) -> Tensor:
    """fp32 `[B|1, H|1, num_q_blocks, padded]`: what is added to a logit in base 2; 34 MB for 12 heads of 591 x 1,182."""
    words = listed_words(block_mask)
    lead = max(words.shape[0], sizes.shape[0]), num_heads if max(words.shape[1], sizes.shape[1]) > 1 else 1
    num_rows, num_words = words.shape[2:]
    num_kv_blocks = sizes.shape[2]
    padded = triton.cdiv(num_kv_blocks, BIAS_COLUMNS) * BIAS_COLUMNS
    bias = torch.empty(*lead, num_rows, padded, dtype=torch.float32, device=words.device)
    columns = min(1024, triton.next_power_of_2(padded))
    launch: Any = tail_bias_kernel[(lead[0] * lead[1] * num_rows, triton.cdiv(padded, columns))]
    with torch.cuda.device_of(words):
        launch(
            bias, words, sizes, *broadcast_strides(words), *broadcast_strides(sizes),
            lead[1], max(1, lead[1] // sizes.shape[1]), num_rows, num_words, num_kv_blocks, padded,
            COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return bias


def unsupported(query: Tensor, out: Tensor, block_mask: BlockMask) -> str | None:
    """Why this kernel cannot do a case, as the end of a sentence that starts with its name; None if it can."""
    if query.device.type != "cuda" or torch.version.hip is not None:
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability(query.device) != (9, 0):
        return "needs a GPU of compute capability 9.0 (H100, H200)"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 and fp16, not {query.dtype}"
    if not 32 < query.shape[3] <= 128 or query.shape[3] % 8:
        return f"supports multiples of 8 from 40 to 128 as head_dim, got {query.shape[3]}"
    if block_mask.q_offsets is not None or block_mask.q_block_size % BLOCK_M:
        return f"needs uniform q-blocks of a multiple of {BLOCK_M} tokens, got {block_mask.q_block_size}"
    if not (_tma_can_read(query) and _tma_can_read(out)):
        return "needs query and output with rows that start at multiples of 16 bytes"
    if query.numel() == 0 or block_mask.num_kv_blocks == 0:
        return "needs at least one token"
    return None
