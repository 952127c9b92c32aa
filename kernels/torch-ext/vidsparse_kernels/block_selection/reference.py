"""The specification of block pooling and block selection in plain torch: any device."""

from __future__ import annotations

import torch
from torch import Tensor

IDENTITY = {"mean": 0.0, "max": -torch.inf, "min": torch.inf}
"""Result for a block without tokens."""
REDUCTION = {"mean": "sum", "max": "amax", "min": "amin"}


def pool_uniform(x: Tensor, block_size: int, kind: str) -> Tensor:
    """Blocks of `block_size` tokens, the last one perhaps shorter: `[B, S, H, D]` -> fp32 `[B, H, M, D]`."""
    whole = x.shape[1] // block_size * block_size
    parts = []
    if whole:
        parts.append(_reduce(x[:, :whole].unflatten(1, (-1, block_size)), kind))
    if whole < x.shape[1]:
        parts.append(_reduce(x[:, whole:].unsqueeze(1), kind))
    return torch.cat(parts, 1).transpose(1, 2)


def _reduce(blocks: Tensor, kind: str) -> Tensor:
    """`[B, M, block_size, H, D]` -> fp32 `[B, M, H, D]`."""
    if kind == "mean":
        return blocks.mean(2, dtype=torch.float32)
    return (blocks.amax(2) if kind == "max" else blocks.amin(2)).to(torch.float32)


def pool_variable(x: Tensor, offsets: Tensor, kind: str) -> Tensor:
    """Blocks offsets[m] .. offsets[m + 1]: `[B, S, H, D]` and `[B, H, M + 1]` -> fp32 `[B, H, M, D]`.

    Tokens outside all blocks count for nothing.
    """
    batch, seq_len, num_heads, head_dim = x.shape
    num_blocks = offsets.shape[-1] - 1
    tokens = torch.arange(seq_len, dtype=offsets.dtype, device=x.device).expand(batch, num_heads, -1).contiguous()
    # Slot 0 takes the tokens before the first block, slot num_blocks + 1 those after the last.
    slots = torch.searchsorted(offsets.contiguous(), tokens, right=True)
    pooled = x.new_full((batch, num_heads, num_blocks + 2, head_dim), IDENTITY[kind], dtype=torch.float32)
    slots = slots.unsqueeze(-1).expand(-1, -1, -1, head_dim)
    pooled = pooled.scatter_reduce(2, slots, x.transpose(1, 2).to(torch.float32), REDUCTION[kind])[:, :, 1:-1]
    if kind == "mean":
        pooled = pooled / (offsets[..., 1:] - offsets[..., :-1]).clamp(min=1).unsqueeze(-1)
    return pooled


def select_reference(
    scores: Tensor,
    *,
    budget: int,
    top_p: float | None,
    forced: Tensor | None,
    kv_block_sizes: Tensor | None,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """Block lists by sorting.

    The blocks of a row are put in order: forced ones first, then by falling weight (score plus log of the block's
    size), ties towards the lower index; NaN counts as -inf. The row takes the first n of them. Without `top_p`,
    n = budget; with it, n is the smallest number whose softmax mass reaches `top_p`, and at least budget. Forced blocks
    are all taken even where n is smaller.

    Args:
        scores: fp32 `[batch, num_heads, num_q_blocks, num_kv_blocks]`.
        budget: number of blocks (top-k), or the smallest number (top-p).
        top_p: share of the softmax mass in (0, 1), or None.
        forced: bool, shape of `scores`, or None.
        kv_block_sizes: tokens per kv-block `[batch, num_heads, num_kv_blocks]`, or None: all alike.
        capacity: length of the returned lists.

    Returns:
        Counts int32 `[batch, num_heads, num_q_blocks]` and indices int32 `[..., capacity]`, ascending, 0 past the
        count.
    """
    num_kv_blocks = scores.shape[-1]
    key = torch.where(scores.isnan(), -torch.inf, scores)
    if kv_block_sizes is not None:
        sizes = kv_block_sizes.unsqueeze(2)
        key = torch.where(sizes > 0, key + sizes.clamp(min=1).to(torch.float32).log(), -torch.inf)
    order = torch.sort(key, dim=-1, descending=True, stable=True).indices
    if forced is not None:
        forced_first = torch.sort(forced.gather(-1, order).to(torch.uint8), dim=-1, descending=True, stable=True)
        order = order.gather(-1, forced_first.indices)
    counts = torch.full(scores.shape[:3], budget, dtype=torch.int64, device=scores.device)
    if top_p is not None:
        peak = key.amax(-1, keepdim=True)
        # Where the peak is infinite, the blocks that attain it share all the mass.
        weights = torch.where(key == peak, 1.0, torch.exp(key - peak)).to(torch.float64)
        weights = torch.where(weights.isnan(), 0.0, weights)
        reached = weights.gather(-1, order).cumsum(-1) >= top_p * weights.sum(-1, keepdim=True)
        crossing = num_kv_blocks - reached.sum(-1) + 1
        counts = torch.maximum(counts, crossing)
    if forced is not None:
        counts = torch.maximum(counts, forced.sum(-1))
    counts = counts.clamp(max=capacity)
    rank = torch.arange(num_kv_blocks, device=scores.device)
    listed = torch.where(rank < counts.unsqueeze(-1), order, num_kv_blocks).sort(-1).values[..., :capacity]
    listed = torch.where(listed < num_kv_blocks, listed, 0)
    return counts.to(torch.int32), listed.to(torch.int32)
