"""What the pooled tail needs to know of key and value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..block_mask import BlockMask


@dataclass(frozen=True, eq=False)
class Pools:
    """Means of all kv-blocks and the first-order term of their sum.

    One set per kv head; one per query head where the mask's kv_offsets differ between heads (`num_pools`).

    Attributes:
        keys: fp32 (fp64 for fp64 inputs) `[batch, num_pools, num_kv_blocks, head_dim]`, mean key k̄_j of each block.
        values: likewise, mean value v̄_j. Blocks without tokens have means of 0.
        counts: int32 `[B|1, num_pools|1, num_kv_blocks]`, tokens n_j in each block.
        first_order: like `keys` `[batch, num_pools, head_dim, head_dim]`, the mean over all tokens n, each in its
            block j, of (k_n - k̄_j)^T v_n; None where it was not asked for.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    first_order: Tensor | None


def num_pools(num_kv_heads: int, block_mask: BlockMask) -> int:
    """Sets of pools: one per kv head, or per head of the kv_offsets where there are several."""
    offsets = block_mask.kv_offsets
    return num_kv_heads if offsets is None or offsets.shape[1] == 1 else offsets.shape[1]


def owners(block_mask: BlockMask, side: str) -> Tensor:
    """int64 `[B|1, H|1, seq_len]`: the block that holds each token of side "q" or "kv"."""
    seq_len = block_mask.seq_len_q if side == "q" else block_mask.seq_len_kv
    offsets = block_mask.offsets(side).contiguous()
    tokens = torch.arange(seq_len, dtype=torch.int32, device=offsets.device)
    return torch.searchsorted(offsets, tokens.expand(*offsets.shape[:2], -1).contiguous(), right=True) - 1
