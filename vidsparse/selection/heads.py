"""One selection out of several: each head's block lists come from the method chosen for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vidsparse.errors import ConfigError
from vidsparse_kernels import BlockMask


def refine(mask: BlockMask, q_block_size: int, kv_block_size: int) -> BlockMask:
    """The same pairs in smaller blocks of uniform size.

    Args:
        mask: with uniform blocks.
        q_block_size, kv_block_size: that divide the mask's own.
    """
    rows, columns = mask.q_block_size // q_block_size, mask.kv_block_size // kv_block_size
    counts, indices = mask.kv_num_blocks, mask.kv_indices
    if columns > 1:
        places = torch.arange(columns, dtype=torch.int32, device=indices.device)
        indices = (indices[..., None] * columns + places).flatten(-2)
        # The last block may be shorter, so that its last parts are no blocks: they stand at the end of a list.
        total = -(-mask.seq_len_kv // kv_block_size)
        listed = torch.arange(indices.shape[-1], device=indices.device) < (counts * columns)[..., None]
        counts = (listed & (indices < total)).sum(-1, dtype=torch.int32)
    if rows > 1:
        total = -(-mask.seq_len_q // q_block_size)
        counts = counts.repeat_interleave(rows, 2)[:, :, :total]
        indices = indices.repeat_interleave(rows, 2)[:, :, :total]
    keep = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    return BlockMask(
        counts.contiguous(), torch.where(keep, indices, 0), mask.seq_len_q, mask.seq_len_kv, q_block_size, kv_block_size
    )  # fmt: skip


def join_heads(masks: Sequence[BlockMask], heads: Sequence[Sequence[int]], num_heads: int, batch: int) -> BlockMask:
    """One mask in which each head has the lists of its own mask.

    Args:
        masks: with uniform blocks, each for its heads in their order or the same for all of them; their block sizes may
            differ, the result has the largest that divides them all.
        heads: of each mask; all together every head once.
        num_heads: of the result.
        batch: of the call.

    Raises:
        ConfigError: a mask has blocks of any sizes (clusters), which heads of another method cannot share.
    """
    if any(mask.variable for mask in masks):
        raise ConfigError("Heads that attend by clusters cannot share a call with heads of another method.")
    q_size = math.gcd(*(mask.q_block_size for mask in masks))
    kv_size = math.gcd(*(mask.kv_block_size for mask in masks))
    masks = [refine(mask, q_size, kv_size) for mask in masks]
    first, longest = masks[0], max(mask.kv_indices.shape[-1] for mask in masks)
    samples = batch if any(mask.batch_size > 1 for mask in masks) else 1
    counts = first.kv_num_blocks.new_zeros(samples, num_heads, first.num_q_blocks)
    indices = first.kv_indices.new_zeros(samples, num_heads, first.num_q_blocks, longest)
    for mask, own in zip(masks, heads, strict=True):
        for place, head in enumerate(own):
            # Head by head: an index by a list would be copied to the device in every call.
            source = place if mask.num_heads > 1 else 0
            counts[:, head] = mask.kv_num_blocks[:, source]
            indices[:, head, :, : mask.kv_indices.shape[-1]] = mask.kv_indices[:, source]
    return BlockMask(counts, indices, first.seq_len_q, first.seq_len_kv, q_size, kv_size)
