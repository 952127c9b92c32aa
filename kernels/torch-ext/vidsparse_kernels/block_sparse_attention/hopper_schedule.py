"""Which program of a Hopper kernel computes which q tile: whoever is free takes the next one, the longest first.

A mask whose rows list unlike numbers of blocks (radial masks; tiles of text, whose lists are full) leaves some programs
with more than others where each takes every n-th tile: on a radial mask of 32,760 tokens 10 % more than the mean, where
this order has 1 %. Tiles come head after head, so that those computed together share keys and values in the L2 cache.
"""

# In kernels every value is the compiler's, which its annotations for the host do not describe.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..block_mask import BlockMask

# Later versions of Triton name this differently.
warpgroup_barrier: Any = getattr(gl, "thread_barrier", None) or gl.barrier

ITEM_NUMBERS = gl.constexpr(5)
"""Numbers of an item, each with two places: place in the order head by head, q tile, key tiles, first key of the last one,
and state: 0 no more items, 1 one as it comes, 2 one that has to be done again with a running maximum."""


@gluon.jit
def next_work(turn, items, verdicts, ended, counter_ptr, num_work):
    """Place in the order and state of the item of this turn, its first and last number, once its slot is free.

    A warpgroup that has ended an item leaves a verdict, other than 0 where the item has to come again.
    """
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = turn & 1
    mbarrier.wait(ended.index(slot), ((turn >> 1) & 1) ^ 1)
    again = gl.sum(verdicts.index(slot * 2).load(one) | verdicts.index(slot * 2 + 1).load(one), 0)
    work = 0
    if again > 0:
        work = gl.sum(items.index(slot).load(one), 0)
    else:
        work = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    if (work >= num_work) & (again == 0):
        # The item before, which has not ended, may have to come again too.
        other = slot ^ 1
        mbarrier.wait(ended.index(other), ((turn - 1) >> 1) & 1)
        again = gl.sum(verdicts.index(other * 2).load(one) | verdicts.index(other * 2 + 1).load(one), 0)
        if again > 0:
            work = gl.sum(items.index(other).load(one), 0)
            verdicts.index(other * 2).store(gl.zeros([1], gl.int32, one))
            verdicts.index(other * 2 + 1).store(gl.zeros([1], gl.int32, one))
    state = gl.where(work < num_work, gl.where(again > 0, 2, 1), 0)
    return work, state


@gluon.jit
def schedule(
    items, verdicts, ready, ended, counts_ptr, indices_ptr, counts_stride_b, counts_stride_h, indices_stride_b,
    indices_stride_h, indices_stride_m, order_ptr, order_stride_b, order_stride_h, has_order, counter_ptr,
    num_heads, num_q_tiles, seq_len_kv, num_work,
    Q_BLOCK: gl.constexpr, KV_BLOCK: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """One warp: writes items into shared memory, at most two ahead of the warpgroups, until `num_work` are taken."""
    TILES: gl.constexpr = KV_BLOCK // BLOCK_N
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    turn = 0
    state = 1
    while state > 0:
        slot = turn & 1
        work, state = next_work(turn, items, verdicts, ended, counter_ptr, num_work)
        head = ((work // num_q_tiles) % num_heads).to(gl.int64)
        batch = (work // num_q_tiles // num_heads).to(gl.int64)
        place = work % num_q_tiles
        ordered = gl.load(
            order_ptr + batch * order_stride_b + head * order_stride_h + place,
            mask=(state > 0) & (has_order > 0),
            other=0,
        )
        tile_m = gl.where(has_order > 0, ordered, place)
        q_block = tile_m * 128 // Q_BLOCK
        indices = (
            indices_ptr + batch * indices_stride_b + head * indices_stride_h + q_block.to(gl.int64) * indices_stride_m
        )
        count = gl.load(
            counts_ptr + batch * counts_stride_b + head * counts_stride_h + q_block, mask=state > 0, other=0
        )
        # Lists ascend, so only their last entry can be the shorter last block, which may lack some whole tiles.
        last = gl.load(indices + gl.maximum(count - 1, 0), mask=count > 0, other=0)
        overhang = gl.maximum((last + 1) * KV_BLOCK - seq_len_kv, 0)
        num_tiles = gl.where(count > 0, count * TILES - overhang // BLOCK_N, 0)
        items.index(slot).store(gl.full([1], work, gl.int32, one))
        items.index(2 + slot).store(gl.full([1], tile_m, gl.int32, one))
        items.index(4 + slot).store(gl.full([1], num_tiles, gl.int32, one))
        items.index(6 + slot).store(gl.full([1], last * KV_BLOCK + ((num_tiles - 1) % TILES) * BLOCK_N, gl.int32, one))
        items.index(8 + slot).store(gl.full([1], state, gl.int32, one))
        warpgroup_barrier()
        mbarrier.arrive(ready.index(slot), count=1)
        turn += 1


@gluon.jit
def item(turn, items, ready, WARPS: gl.constexpr):
    """The numbers of the item of this turn; waits for it."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    slot = turn & 1
    mbarrier.wait(ready.index(slot), (turn >> 1) & 1)
    return (
        gl.sum(items.index(slot).load(one), 0),
        gl.sum(items.index(2 + slot).load(one), 0),
        gl.sum(items.index(4 + slot).load(one), 0),
        gl.sum(items.index(6 + slot).load(one), 0),
        gl.sum(items.index(8 + slot).load(one), 0),
    )


def longest_first(block_mask: BlockMask, block_m: int) -> Tensor | None:
    """int32 `[B|1, H|1, num_q_tiles]`, the q tiles of each head with the longest lists first; None for as they come.

    Sorting costs 0.1 ms and pays for itself from the second call with a mask, so the first one goes without. Kept on the
    mask; the result of attention does not depend on it.

    Args:
        block_mask: with blocks of uniform size, of a multiple of `block_m` queries.
        block_m: queries of a q tile.
    """
    cache = block_mask._cache
    if cache.get("longest first") is None:
        capturing = block_mask.kv_num_blocks.is_cuda and torch.cuda.is_current_stream_capturing()
        if "longest first" not in cache or capturing:
            # What a graph being captured computes is not there before its first replay.
            cache["longest first"] = None
            return None
        counts = block_mask.kv_num_blocks.repeat_interleave(block_mask.q_block_size // block_m, -1)
        counts = counts[..., : -(-block_mask.seq_len_q // block_m)]
        cache["longest first"] = torch.argsort(counts, dim=-1, descending=True, stable=True).int()
    return cache["longest first"]
