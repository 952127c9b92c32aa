"""Triton kernel that pools blocks of tokens: mean, max and min in one pass over the input."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse_attention.configs import padded_head_dim

TILE_ELEMENTS = 4096
"""Elements loaded at a time; 32 registers per thread and kind for the running results."""


@triton.jit
def pool_kernel(
    x_ptr, offsets_ptr, mean_ptr, max_ptr, min_ptr,
    x_stride_b, x_stride_s, x_stride_h, x_stride_d, offsets_stride_b, offsets_stride_h,
    num_heads, num_blocks, seq_len, block_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    MEAN: tl.constexpr, MAX: tl.constexpr, MIN: tl.constexpr,
):  # fmt: skip
    """One block of one head; heads run fastest, so that neighbouring programs read neighbouring memory."""
    program = tl.program_id(0)
    head = program % num_heads
    block = (program // num_heads) % num_blocks
    batch = program // num_heads // num_blocks
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    if HAS_OFFSETS:
        offsets_ptr += wide_batch * offsets_stride_b + wide_head * offsets_stride_h + block
        start = tl.load(offsets_ptr)
        stop = tl.load(offsets_ptr + 1)
    else:
        start = block * block_size
        stop = tl.minimum(start + block_size, seq_len)
    x_ptr += wide_batch * x_stride_b + wide_head * x_stride_h
    # [BLOCK_D]
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    highest = tl.full([ROWS, BLOCK_D], float("-inf"), tl.float32)
    lowest = tl.full([ROWS, BLOCK_D], float("inf"), tl.float32)
    # Unrolled so that the loads of two steps are in flight together.
    for first in tl.range(start, stop, ROWS, loop_unroll_factor=2):  # pyright: ignore[reportGeneralTypeIssues]
        # [ROWS]
        tokens = first + tl.arange(0, ROWS)
        inside = (tokens < stop)[:, None] & (dims < HEAD_DIM)[None, :]
        pointers = x_ptr + tokens.to(tl.int64)[:, None] * x_stride_s + dims.to(tl.int64)[None, :] * x_stride_d
        x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        if MEAN:
            total += x
        if MAX:
            highest = tl.maximum(highest, tl.where(inside, x, float("-inf")))
        if MIN:
            lowest = tl.minimum(lowest, tl.where(inside, x, float("inf")))
    row = ((wide_batch * num_heads + head) * num_blocks + block) * HEAD_DIM
    if MEAN:
        count = tl.maximum(stop - start, 1).to(tl.float32)
        tl.store(mean_ptr + row + dims, tl.sum(total, 0) / count, mask=dims < HEAD_DIM)
    if MAX:
        tl.store(max_ptr + row + dims, tl.max(highest, 0), mask=dims < HEAD_DIM)
    if MIN:
        tl.store(min_ptr + row + dims, tl.min(lowest, 0), mask=dims < HEAD_DIM)


def triton_pool(
    x: Tensor, block_size: int, *, kinds: tuple[str, ...], offsets: Tensor | None, num_blocks: int
) -> dict[str, Tensor]:
    """Launch the kernel; not differentiable.

    Args:
        x: `[batch, seq_len, num_heads, head_dim]` bf16, fp16 or fp32, any strides.
        block_size: tokens per block; not used with offsets.
        kinds: any of "mean", "max", "min".
        offsets: int32 `[batch, num_heads, num_blocks + 1]`, any strides (0 where it broadcasts), or None.
        num_blocks: blocks per head.

    Returns:
        For each kind fp32 `[batch, num_heads, num_blocks, head_dim]`.
    """
    batch, seq_len, num_heads, head_dim = x.shape
    shape = (batch, num_heads, num_blocks, head_dim)
    pooled = {kind: torch.empty(shape, dtype=torch.float32, device=x.device) for kind in kinds}
    programs = batch * num_heads * num_blocks
    if programs * head_dim == 0:
        return pooled
    if offsets is not None and offsets.stride(-1) != 1:
        offsets = offsets.contiguous()
    block_d = padded_head_dim(head_dim)
    unused = pooled[kinds[0]]
    launch: Any = pool_kernel[(programs,)]
    with torch.cuda.device_of(x):
        launch(
            x, offsets if offsets is not None else unused, *(pooled.get(kind, unused) for kind in ("mean", "max", "min")),
            *x.stride(), *(offsets.stride()[:2] if offsets is not None else (0, 0)),
            num_heads, num_blocks, seq_len, block_size,
            HEAD_DIM=head_dim, BLOCK_D=block_d, ROWS=max(1, min(64, TILE_ELEMENTS // block_d)),
            HAS_OFFSETS=offsets is not None, MEAN="mean" in kinds, MAX="max" in kinds, MIN="min" in kinds,
            num_warps=4,
        )  # fmt: skip
    return pooled
