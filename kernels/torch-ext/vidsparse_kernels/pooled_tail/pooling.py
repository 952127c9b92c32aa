"""Triton kernel that pools key and value in one pass over both.

The first-order term needs sum_n (k_n - k̄_j)^T v_n = sum_n k_n^T v_n - n_j k̄_j^T v̄_j of every block j. The right side
needs no mean before the products, which then read key and value as they were loaded. It is taken block by block, so
that what cancels is one block's: where means are large the error is a few units of fp32 in k̄^T v̄, and so in the
output, relative to the values, a few units of fp32 times the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from ..block_sparse_attention.configs import padded_head_dim
from .pools import Pools, num_pools

TARGET_PROGRAMS = 528
"""Programs to aim at: four for each of an H200's multiprocessors, as each writes and another reads the square of
head_dim. The same on every device, so that sums are too."""
MAX_TILES = 4
"""Tiles of a block that one step of the loop over blocks holds; larger blocks get a loop of their own."""
MIN_TOKENS = 512
"""Tokens of a program, at least: its partial sum is as large as 256 tokens of 128 numbers."""
MIN_HOPPER_ELEMENTS = 1 << 24
"""Of keys: below this, making the descriptors of the kernel for Hopper GPUs on the host takes about as long as it."""
INTEGERS = [
    "offsets_stride_b", "offsets_stride_h", "num_pools", "group_size", "num_blocks", "per_program", "num_splits",
    "seq_len", "block_size",
]  # fmt: skip
"""Arguments that one compilation serves whatever their value. Not the strides of key and value: only where their
divisibility is known are 16 bytes loaded at once, and ahead of time."""


@triton.jit
def _load_rows(ptr, tokens, stop, dims, stride_s, stride_d, HEAD_DIM: tl.constexpr):
    """`[tokens, dims]`, 0 from `stop` and from HEAD_DIM on."""
    inside = (tokens < stop)[:, None] & (dims < HEAD_DIM)[None, :]
    pointers = ptr + tokens.to(tl.int64)[:, None] * stride_s + dims.to(tl.int64)[None, :] * stride_d
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _add_tile(
    acc, sum_k, sum_v, key_ptr, value_ptr, tokens, stop, dims, columns,
    key_stride_s, key_stride_d, value_stride_s, value_stride_d,
    HEAD_DIM: tl.constexpr, FIRST_ORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the tokens before `stop` to the sums of key and value and, for the first order, k^T v to acc."""
    k = _load_rows(key_ptr, tokens, stop, dims, key_stride_s, key_stride_d, HEAD_DIM)
    v = _load_rows(value_ptr, tokens, stop, columns, value_stride_s, value_stride_d, HEAD_DIM)
    sum_k += tl.sum(k.to(tl.float32), 0)
    sum_v += tl.sum(v.to(tl.float32), 0)
    if FIRST_ORDER:
        acc = tl.dot(tl.trans(k), v, acc, input_precision=PRECISION)
    return acc, sum_k, sum_v


@triton.jit(do_not_specialize=INTEGERS)
def tail_pool_kernel(
    key_ptr, value_ptr, offsets_ptr, keys_ptr, values_ptr, partial_ptr,
    key_stride_b, key_stride_s, key_stride_h, key_stride_d,
    value_stride_b, value_stride_s, value_stride_h, value_stride_d,
    offsets_stride_b, offsets_stride_h,
    num_pools, group_size, num_blocks, per_program, num_splits, seq_len, block_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, TILES: tl.constexpr, FIRST_ORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`per_program` blocks of one head; BLOCK_E columns of the values. TILES of ROWS tokens cover a block; 0: who knows."""
    program = tl.program_id(0)
    # Heads run fastest, so that neighbouring programs read neighbouring memory.
    pool = program % num_pools
    split = (program // num_pools) % num_splits
    batch = (program // num_pools) // num_splits
    slice_e = tl.program_id(1)
    wide_batch, wide_pool = batch.to(tl.int64), pool.to(tl.int64)
    kv_head = (pool // group_size).to(tl.int64)
    key_ptr += wide_batch * key_stride_b + kv_head * key_stride_h
    value_ptr += wide_batch * value_stride_b + kv_head * value_stride_h
    if HAS_OFFSETS:
        offsets_ptr += wide_batch * offsets_stride_b + wide_pool * offsets_stride_h
    row = wide_batch * num_pools + wide_pool
    dims = tl.arange(0, BLOCK_D)
    # Columns of the values, and where they are in memory.
    columns = slice_e * BLOCK_E + tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    first_block = split * per_program
    last_block = tl.minimum(first_block + per_program, num_blocks)
    for block in tl.range(first_block, last_block):  # pyright: ignore[reportGeneralTypeIssues]
        if HAS_OFFSETS:
            start = tl.load(offsets_ptr + block)
            stop = tl.load(offsets_ptr + block + 1)
        else:
            start = block * block_size
            stop = tl.minimum(start + block_size, seq_len)
        size = tl.maximum(stop - start, 1).to(tl.float32)
        sum_k = tl.zeros([BLOCK_D], tl.float32)
        sum_v = tl.zeros([BLOCK_E], tl.float32)
        if TILES > 0:
            for part in tl.static_range(TILES):  # pyright: ignore[reportGeneralTypeIssues]
                acc, sum_k, sum_v = _add_tile(
                    acc, sum_k, sum_v, key_ptr, value_ptr, start + part * ROWS + tl.arange(0, ROWS), stop, dims, columns,
                    key_stride_s, key_stride_d, value_stride_s, value_stride_d, HEAD_DIM, FIRST_ORDER, PRECISION,
                )  # fmt: skip
        else:
            for first in tl.range(start, stop, ROWS):  # pyright: ignore[reportGeneralTypeIssues]
                acc, sum_k, sum_v = _add_tile(
                    acc, sum_k, sum_v, key_ptr, value_ptr, first + tl.arange(0, ROWS), stop, dims, columns,
                    key_stride_s, key_stride_d, value_stride_s, value_stride_d, HEAD_DIM, FIRST_ORDER, PRECISION,
                )  # fmt: skip
        mean_k, mean_v = sum_k / size, sum_v / size
        if FIRST_ORDER:
            acc -= sum_k[:, None] * mean_v[None, :]
        place = (row * num_blocks + block) * HEAD_DIM
        if slice_e == 0:
            tl.store(keys_ptr + place + dims, mean_k, mask=dims < HEAD_DIM)
        tl.store(values_ptr + place + columns, mean_v, mask=columns < HEAD_DIM)
    if FIRST_ORDER:
        partial_ptr += (row * num_splits + split) * HEAD_DIM * HEAD_DIM
        inside = (dims < HEAD_DIM)[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(partial_ptr + dims[:, None] * HEAD_DIM + columns[None, :], acc, mask=inside)


def triton_pool_for_tail(key: Tensor, value: Tensor, block_mask: BlockMask, *, first_order: bool) -> Pools:
    """Launch the kernel; not differentiable. Arguments as for `pool_for_tail`, strides of any kind.

    The sum of (k - k̄)^T v is cut into about TARGET_PROGRAMS parts, added in a fixed order: 64 KB each at head_dim 128.
    """
    batch, seq_len, num_kv_heads, head_dim = key.shape
    pools, num_blocks = num_pools(num_kv_heads, block_mask), block_mask.num_kv_blocks
    offsets = block_mask.kv_offsets
    if hopper_pools(key, value, block_mask):
        from .hopper_pooling import hopper_pool

        means = hopper_pool(key, value, block_mask.kv_block_size, first_order=first_order)
        return Pools(means[0], means[1], block_counts(block_mask), means[2])
    if offsets is not None and offsets.stride(-1) != 1:
        offsets = offsets.contiguous()
    shape = (batch, pools, num_blocks, head_dim)
    keys, values = (torch.empty(shape, dtype=torch.float32, device=key.device) for _ in range(2))
    counts = block_counts(block_mask)
    mean_size = max(1, seq_len // num_blocks)
    per_program = max(triton.cdiv(num_blocks * batch * pools, TARGET_PROGRAMS), triton.cdiv(MIN_TOKENS, mean_size))
    splits = triton.cdiv(num_blocks, per_program)
    partial = keys
    if first_order:
        partial = torch.empty(batch, pools, splits, head_dim, head_dim, dtype=torch.float32, device=key.device)
    if keys.numel() == 0:
        return Pools(keys, values, counts, partial.sum(2) if first_order else None)
    block_d = padded_head_dim(head_dim)
    half = key.element_size() <= 2
    rows = max(16, triton.next_power_of_2(block_mask.kv_block_size))
    rows = min(rows, (128 if block_d <= 64 else 64) if half else 32)
    tiles = triton.cdiv(block_mask.kv_block_size, rows)
    if offsets is not None or tiles > MAX_TILES:
        tiles = 0
    # Up to 64 KB of sums in registers; in fp32 the operands of a product are there as well.
    block_e = min(block_d, (128 if block_d <= 128 else 64) if half else (32 if block_d <= 128 else 16))
    options: dict[str, Any] = dict(num_warps=8 if block_d > 64 else 4, num_stages=2)
    if first_order and half and block_d == 128 and torch.version.hip is None:
        # Two programs a multiprocessor instead of one; the compiler's report for 9.0: 8 to 40 bytes spilled.
        options["maxnreg"] = 128
    launch: Any = tail_pool_kernel[(batch * pools * splits, triton.cdiv(head_dim, block_e))]
    with torch.cuda.device_of(key):
        launch(
            key, value, offsets if offsets is not None else counts, keys, values, partial,
            *key.stride(), *value.stride(), *broadcast_strides(offsets),
            pools, pools // num_kv_heads, num_blocks, per_program, splits, seq_len, block_mask.kv_block_size,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_E=block_e, ROWS=rows,
            HAS_OFFSETS=offsets is not None, TILES=tiles, FIRST_ORDER=first_order, PRECISION="ieee",
            **options,
        )  # fmt: skip
    return Pools(keys, values, counts, partial.sum(2) / seq_len if first_order else None)


def hopper_pools(key: Tensor, value: Tensor, block_mask: BlockMask) -> bool:
    """Whether the kernel for Hopper GPUs pools; its language is in Triton from 3.5 on."""
    if block_mask.kv_offsets is not None or key.numel() < MIN_HOPPER_ELEMENTS:
        return False
    try:
        from .hopper_pooling import unsupported
    except ImportError:
        return False
    return unsupported(key, value, block_mask.kv_block_size) is None


def block_counts(block_mask: BlockMask) -> Tensor:
    """int32 `[B|1, H|1, num_kv_blocks]`: tokens of each kv-block; kept on the mask."""
    if "kv_counts" not in block_mask._cache:
        block_mask._cache["kv_counts"] = block_mask.offsets("kv").diff()
    return block_mask._cache["kv_counts"]


def broadcast_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides of batch and heads, 0 where the dimension broadcasts or there is no tensor."""
    if x is None:
        return 0, 0
    return tuple(0 if x.shape[d] == 1 else x.stride(d) for d in range(2))  # pyright: ignore[reportReturnType]
