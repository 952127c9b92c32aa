"""The pooling of key and value for Hopper GPUs, written in Gluon: as `pooling.py`, at the rate of the memory.

A producer warp keeps several tiles of keys and values on their way into shared memory; the other warps multiply k^T v
from there and add up the tokens. One program per multiprocessor, so that few partial sums have to be written.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..block_sparse_attention.configs import padded_head_dim
from ..block_sparse_attention.forward import _tma_can_read
from ..block_sparse_attention.hopper import PRODUCER_REGISTERS, _descriptor, tma_load
from ..block_sparse_attention.hopper_schedule import warpgroup_barrier

MULTIPROCESSORS = 132
"""Of an H100 and an H200. A constant, so that sums are the same on every device."""
MAX_ROUNDS = 4
"""Programs for each multiprocessor, one after the other, at most."""
TILE = 64
"""Tokens of a tile."""
STAGE_BYTES = 192 * 1024
"""Shared memory for tiles on their way."""
SUMS_AT_ONCE = 1024
"""Numbers that a program adds up."""
RUNTIME_INTEGERS = ["num_pools", "num_blocks", "per_program", "num_splits", "seq_len", "block_size", "tiles"]
"""What Triton may not compile into the kernel, so that one compilation serves every shape."""


@triton.jit(do_not_specialize=["num_splits", "size"])
def add_partial_sums_kernel(partial_ptr, sum_ptr, num_splits, size, factor, BLOCK: tl.constexpr):
    """Sums over `num_splits` of `size` numbers, in their order, times a factor."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    partial_ptr += row * num_splits * size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.range(num_splits, loop_unroll_factor=4):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(partial_ptr + split * size + places, mask=places < size, other=0.0)
    tl.store(sum_ptr + row * size + places, total * factor, mask=places < size)


@gluon.jit
def _load_tiles(
    key, value, k_smem, v_smem, full, empty, batch, pool, first_block, last_block, block_size, tiles,
    TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: copy the tiles of a program's blocks in their order."""
    first = first_block * tiles
    for i in range(first, last_block * tiles):
        stage = (i - first) % STAGES
        start = (i // tiles) * block_size + (i % tiles) * TILE
        mbarrier.wait(empty.index(stage), (((i - first) // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), key.block_type.nbytes + value.block_type.nbytes)
        tma_load(key, [batch, pool, start, 0], full.index(stage), k_smem.index(stage))
        tma_load(value, [batch, pool, start, 0], full.index(stage), v_smem.index(stage))


@gluon.jit
def _pool(
    keys_ptr, values_ptr, partial_ptr, k_smem, v_smem, ones_smem, full, empty, row, program_row, first_block,
    last_block, num_blocks, seq_len, block_size, tiles,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, FIRST_ORDER: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Means of a program's blocks and its part of the sum of (k - mean k)^T v.

    Sums over tokens are products with ones, of which every column is the same. Adding numbers up by themselves took as
    long as all else together.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_D, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, 16, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    dims = gl.arange(0, BLOCK_D, line)
    # [TILE, 16]
    ones = ones_smem.index(0).permute((1, 0))
    acc = gl.zeros([BLOCK_D, BLOCK_D], gl.float32, layout)
    first = first_block * tiles
    for block in range(first_block, last_block):
        sum_k = gl.zeros([BLOCK_D, 16], gl.float32, narrow)
        sum_v = gl.zeros([BLOCK_D, 16], gl.float32, narrow)
        for tile in range(tiles):
            i = block * tiles + tile - first
            stage = i % STAGES
            mbarrier.wait(full.index(stage), (i // STAGES) & 1)
            k = k_smem.index(stage).reshape([TILE, BLOCK_D]).permute((1, 0))
            v = v_smem.index(stage).reshape([TILE, BLOCK_D])
            sum_k = warpgroup_mma(k, ones, sum_k, is_async=True)
            sum_v = warpgroup_mma(v.permute((1, 0)), ones, sum_v, is_async=True)
            if FIRST_ORDER:
                acc = warpgroup_mma(k, v, acc, is_async=True)
                sum_k, sum_v, acc = warpgroup_mma_wait(0, deps=[sum_k, sum_v, acc])
            else:
                sum_k, sum_v = warpgroup_mma_wait(0, deps=[sum_k, sum_v])
            # One thread arrives for all, so all have to be done with the tile.
            warpgroup_barrier()
            mbarrier.arrive(empty.index(stage), count=1)
        size = gl.minimum(block_size, seq_len - block * block_size).to(gl.float32)
        # [BLOCK_D]
        sum_k = gl.max(sum_k, 1)
        mean_v = gl.max(sum_v, 1) / size
        if FIRST_ORDER:
            acc -= gl.convert_layout(sum_k, rows)[:, None] * gl.convert_layout(mean_v, columns)[None, :]
        place = (row * num_blocks + block) * HEAD_DIM
        mean_k = gl.convert_layout(sum_k / size, line)
        gl.store(keys_ptr + place + dims, mean_k, mask=dims < HEAD_DIM)
        mean_v = gl.convert_layout(mean_v, line)
        gl.store(values_ptr + place + dims, mean_v, mask=dims < HEAD_DIM)
    if FIRST_ORDER:
        k_dims = gl.arange(0, BLOCK_D, rows)
        v_dims = gl.arange(0, BLOCK_D, columns)
        inside = (k_dims < HEAD_DIM)[:, None] & (v_dims < HEAD_DIM)[None, :]
        square = k_dims[:, None] * HEAD_DIM + v_dims[None, :]
        gl.store(partial_ptr + program_row * HEAD_DIM * HEAD_DIM + square, acc, mask=inside)


@gluon.jit(do_not_specialize=RUNTIME_INTEGERS)
def tail_pool_hopper_kernel(
    key, value, keys_ptr, values_ptr, partial_ptr,
    num_pools, num_blocks, per_program, num_splits, seq_len, block_size, tiles,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, FIRST_ORDER: gl.constexpr,
    NUM_WARPS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """`per_program` blocks of one head, of `tiles` tiles each; key and value are descriptors."""
    k_smem = gl.allocate_shared_memory(key.dtype, [STAGES, 1, 1, TILE, BLOCK_D], key.layout)
    v_smem = gl.allocate_shared_memory(value.dtype, [STAGES, 1, 1, TILE, BLOCK_D], value.layout)
    ones_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, TILE], key.dtype)
    ones_smem = gl.allocate_shared_memory(key.dtype, [1, 16, TILE], ones_layout)
    ones_smem.index(0).store(
        gl.full([16, TILE], 1.0, key.dtype, gl.BlockedLayout([1, 8], [4, 8], [NUM_WARPS, 1], [1, 0]))
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    program = gl.program_id(0)
    # Heads run fastest, so that neighbouring programs read neighbouring memory.
    pool = program % num_pools
    split = (program // num_pools) % num_splits
    batch = program // num_pools // num_splits
    first_block = split * per_program
    last_block = gl.minimum(first_block + per_program, num_blocks)
    row = batch.to(gl.int64) * num_pools + pool
    program_row = row * num_splits + split
    gl.warp_specialize(
        [
            (_pool, (
                keys_ptr, values_ptr, partial_ptr, k_smem, v_smem, ones_smem, full, empty, row, program_row,
                first_block, last_block, num_blocks, seq_len, block_size, tiles,
                HEAD_DIM, BLOCK_D, TILE, STAGES, FIRST_ORDER, NUM_WARPS,
            )),
            (_load_tiles, (
                key, value, k_smem, v_smem, full, empty, batch, pool, first_block, last_block, block_size, tiles,
                TILE, STAGES,
            )),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


def hopper_pool(
    key: Tensor,
    value: Tensor,
    kv_block_size: int,
    *,
    first_order: bool,
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the kernels; not differentiable.

    Args:
        key, value: `[batch, seq_len, num_kv_heads, head_dim]` bf16 or fp16, as TMA can read them.
        kv_block_size: a multiple of 64.
        first_order: whether to compute the matrix.
        dtype: of the results; sums are in fp32.
        factor: on the matrix.

    Returns:
        Mean keys and mean values `[batch, num_kv_heads, num_kv_blocks, head_dim]`, and the mean over all tokens of
        (k - mean k of its block)^T v `[batch, num_kv_heads, head_dim, head_dim]` or None.
    """
    batch, seq_len, pools, head_dim = key.shape
    num_blocks = triton.cdiv(seq_len, kv_block_size)
    keys, values = (torch.empty(batch, pools, num_blocks, head_dim, dtype=dtype, device=key.device) for _ in range(2))
    splits = num_splits(batch * pools, num_blocks)
    per_program = triton.cdiv(num_blocks, splits)
    splits = triton.cdiv(num_blocks, per_program)
    partial = keys
    if first_order:
        partial = torch.empty(batch, pools, splits, head_dim, head_dim, dtype=torch.float32, device=key.device)
    block_d = padded_head_dim(head_dim)
    launch: Any = tail_pool_hopper_kernel[(batch * pools * splits,)]
    with torch.cuda.device_of(key):
        launch(
            _descriptor(key, TILE, block_d), _descriptor(value, TILE, block_d), keys, values, partial,
            pools, num_blocks, per_program, splits, seq_len, kv_block_size, kv_block_size // TILE,
            HEAD_DIM=head_dim, BLOCK_D=block_d, TILE=TILE, STAGES=STAGE_BYTES // (4 * TILE * block_d),
            FIRST_ORDER=first_order, NUM_WARPS=block_d // 16, PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=block_d // 16,
        )  # fmt: skip
    if not first_order:
        return keys, values, None
    matrix = torch.empty(batch, pools, head_dim, head_dim, dtype=dtype, device=key.device)
    launch = add_partial_sums_kernel[(batch * pools, triton.cdiv(head_dim**2, SUMS_AT_ONCE))]
    with torch.cuda.device_of(key):
        launch(partial, matrix, splits, head_dim**2, factor / seq_len, BLOCK=SUMS_AT_ONCE, num_warps=4)
    return keys, values, matrix


def num_splits(rows: int, num_blocks: int) -> int:
    """Programs of each head: as many as fill rounds of all multiprocessors, in few rounds."""
    best = 1
    for rounds in range(1, MAX_ROUNDS + 1):
        slots = rounds * MULTIPROCESSORS
        best = max(1, slots // rows)
        if best * rows >= 0.95 * slots:
            break
    return min(best, num_blocks)


def unsupported(key: Tensor, value: Tensor, kv_block_size: int) -> str | None:
    """Why this kernel cannot do a case, as the end of a sentence that starts with its name; None if it can."""
    if key.device.type != "cuda" or torch.version.hip is not None:
        return "needs a CUDA GPU"
    if torch.cuda.get_device_capability(key.device) != (9, 0):
        return "needs a GPU of compute capability 9.0 (H100, H200)"
    if key.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 and fp16, not {key.dtype}"
    if not 32 < key.shape[3] <= 128 or key.shape[3] % 8:
        return f"supports multiples of 8 from 40 to 128 as head_dim, got {key.shape[3]}"
    if kv_block_size % TILE:
        return f"needs a kv_block_size that is a multiple of {TILE}, got {kv_block_size}"
    if not (_tma_can_read(key) and _tma_can_read(value)):
        return "needs keys and values with rows that start at multiples of 16 bytes"
    if key.numel() == 0:
        return "needs at least one token"
    return None
