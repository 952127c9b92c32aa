"""Triton kernel that selects kv-blocks: one program finds the threshold of one row and writes its list."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _ordered_bits(x):
    """uint32 that compare as the fp32 do; 0 and 0xFFFFFFFF belong to no number."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def select_kernel(
    scores_ptr, forced_ptr, sizes_ptr, counts_ptr, indices_ptr,
    scores_stride_b, scores_stride_h, scores_stride_m,
    forced_stride_b, forced_stride_h, forced_stride_m, sizes_stride_b, sizes_stride_h,
    num_heads, num_q_blocks, num_kv_blocks, budget, capacity, top_p,
    BLOCK: tl.constexpr, HAS_FORCED: tl.constexpr, HAS_SIZES: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    """The rules are those of `select_reference`; sorting is replaced by a bitwise search for the last key taken."""
    row = tl.program_id(0)
    q_block = (row % num_q_blocks).to(tl.int64)
    head = (row // num_q_blocks % num_heads).to(tl.int64)
    batch = (row // num_q_blocks // num_heads).to(tl.int64)
    # [BLOCK]
    columns = tl.arange(0, BLOCK)
    inside = columns < num_kv_blocks
    scores_ptr += batch * scores_stride_b + head * scores_stride_h + q_block * scores_stride_m
    weight_log = tl.load(scores_ptr + columns, mask=inside, other=float("-inf"))
    weight_log = tl.where(weight_log != weight_log, float("-inf"), weight_log)
    if HAS_SIZES:
        sizes_ptr += batch * sizes_stride_b + head * sizes_stride_h
        size = tl.load(sizes_ptr + columns, mask=inside, other=0)
        weighted = weight_log + tl.log(tl.maximum(size, 1).to(tl.float32))
        weight_log = tl.where(size > 0, weighted, float("-inf"))
    # Padding has key 0, below every number.
    key = tl.where(inside, _ordered_bits(weight_log), 0)
    forced = columns < 0
    num_forced = 0
    if HAS_FORCED:
        forced_ptr += batch * forced_stride_b + head * forced_stride_h + q_block * forced_stride_m
        forced = tl.load(forced_ptr + columns, mask=inside, other=0) != 0
        num_forced = tl.sum(forced.to(tl.int32), 0)
        key = tl.where(forced, 0xFFFFFFFF, key)
    taken = tl.maximum(budget, num_forced)

    if TOP_P:
        peak = tl.max(weight_log, 0)
        # Where the peak is infinite, the blocks that attain it share all the mass.
        mass = tl.where(weight_log == peak, 1.0, tl.exp(weight_log - peak))
        mass = tl.where(inside & (mass == mass), mass, 0.0)
        target = tl.sum(mass, 0) * top_p
        mass_forced = tl.sum(tl.where(forced, mass, 0.0), 0)
        mass = tl.where(forced, 0.0, mass)
        # The largest key such that the blocks from it upwards reach the target.
        last = tl.zeros([], tl.uint32)
        step = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            candidate = last | step
            reached = mass_forced + tl.sum(tl.where(key >= candidate, mass, 0.0), 0) >= target
            last = tl.where(reached, candidate, last)
            step = step >> 1
        above = (key > last) & (forced == 0)
        equal = (key == last) & inside & (forced == 0)
        num_equal = tl.sum(equal.to(tl.int32), 0)
        missing = target - mass_forced - tl.sum(tl.where(above, mass, 0.0), 0)
        # Equal keys have equal mass, so their number follows by division.
        each = tl.maximum(tl.max(tl.where(equal, mass, 0.0), 0), 1e-38)
        needed = tl.ceil(tl.minimum(missing / each, num_equal.to(tl.float32))).to(tl.int32)
        needed = tl.minimum(tl.maximum(needed, 1), num_equal)
        taken = tl.maximum(taken, tl.sum((forced | above).to(tl.int32), 0) + needed)

    taken = tl.minimum(taken, capacity)
    # The largest key such that at least `taken` blocks have it or more.
    last = tl.zeros([], tl.uint32)
    step = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = last | step
        enough = tl.sum((key >= candidate).to(tl.int32), 0) >= taken
        last = tl.where(enough, candidate, last)
        step = step >> 1
    above = key > last
    equal = (key == last) & inside
    spare = taken - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
    slots = tl.cumsum(chosen.to(tl.int32), 0) - 1
    indices_ptr += row.to(tl.int64) * capacity
    tl.store(indices_ptr + slots, columns, mask=chosen)
    tl.store(indices_ptr + columns, tl.zeros([BLOCK], tl.int32), mask=(columns >= taken) & (columns < capacity))
    tl.store(counts_ptr + row, taken)


def triton_select(
    scores: Tensor,
    *,
    budget: int,
    top_p: float | None,
    forced: Tensor | None,
    kv_block_sizes: Tensor | None,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments and result as for `select_reference`, strides of 0 where something broadcasts."""
    batch, num_heads, num_q_blocks, num_kv_blocks = scores.shape
    counts = torch.empty(batch, num_heads, num_q_blocks, dtype=torch.int32, device=scores.device)
    indices = torch.empty(batch, num_heads, num_q_blocks, capacity, dtype=torch.int32, device=scores.device)
    if counts.numel() == 0:
        return counts, indices
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    forced, kv_block_sizes = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (forced, kv_block_sizes)
    )
    block = triton.next_power_of_2(num_kv_blocks)
    launch: Any = select_kernel[(counts.numel(),)]
    with torch.cuda.device_of(scores):
        launch(
            scores, forced.view(torch.uint8) if forced is not None else counts,
            kv_block_sizes if kv_block_sizes is not None else counts, counts, indices,
            *scores.stride()[:3], *(forced.stride()[:3] if forced is not None else (0, 0, 0)),
            *(kv_block_sizes.stride()[:2] if kv_block_sizes is not None else (0, 0)),
            num_heads, num_q_blocks, num_kv_blocks, budget, capacity, 1.0 if top_p is None else top_p,
            BLOCK=block, HAS_FORCED=forced is not None, HAS_SIZES=kv_block_sizes is not None,
            TOP_P=top_p is not None, num_warps=max(1, min(16, block // 1024)),
        )  # fmt: skip
    return counts, indices
