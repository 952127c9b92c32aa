"""The specification of clustering in plain torch: any device, fp64 for fp64 tokens."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096
"""Tokens whose scores are held at once."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def assign_reference(x: Tensor, centroids: Tensor) -> Tensor:
    """The centroid with the largest x . c - |c|^2 / 2 of each token, equal ones by rising index.

    Centroids are rounded to the dtype of `x` first; products and sums are those of the rounded values.

    Args:
        x: `[batch, seq_len, num_heads, head_dim]`.
        centroids: `[batch, num_heads, num_clusters, head_dim]`.

    Returns:
        int32 `[batch, num_heads, seq_len]`.
    """
    dtype = compute_dtype(x)
    # [B, H, K, D]
    rounded = centroids.to(x.dtype).to(dtype)
    half_norms = rounded.square().sum(-1).unsqueeze(2) / 2
    labels = [
        (rows.transpose(1, 2).to(dtype) @ rounded.transpose(2, 3) - half_norms).argmax(-1) for rows in x.split(ROWS, 1)
    ]
    return torch.cat(labels, 2).to(torch.int32)


def order_reference(labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order, ranks and offsets as in `Clusters`, of labels int32 `[batch, num_heads, seq_len]`."""
    ordered, order = torch.sort(labels, dim=-1, stable=True)
    tokens = torch.arange(labels.shape[-1], dtype=order.dtype, device=labels.device)
    ranks = torch.empty_like(order).scatter_(-1, order, tokens.expand_as(order))
    bounds = torch.arange(num_clusters + 1, dtype=labels.dtype, device=labels.device)
    offsets = torch.searchsorted(ordered, bounds.expand(*labels.shape[:2], -1).contiguous())
    return order.to(torch.int32), ranks.to(torch.int32), offsets.to(torch.int32)


def update_reference(x: Tensor, labels: Tensor, num_clusters: int, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the tokens of each cluster, `previous` where it has none; and int32 counts.

    Args:
        x: `[batch, seq_len, num_heads, head_dim]`.
        labels: int32 `[batch, num_heads, seq_len]`.
        num_clusters: number of clusters.
        previous: `[batch, num_heads, num_clusters, head_dim]`.
    """
    dtype = compute_dtype(x)
    batch, _, num_heads, head_dim = x.shape
    index = labels.long()
    sums = torch.zeros(batch, num_heads, num_clusters, head_dim, dtype=dtype, device=x.device)
    sums.scatter_add_(2, index.unsqueeze(-1).expand(-1, -1, -1, head_dim), x.transpose(1, 2).to(dtype))
    counts = torch.zeros(batch, num_heads, num_clusters, dtype=torch.int64, device=x.device)
    counts.scatter_add_(2, index, torch.ones_like(index))
    size = counts.unsqueeze(-1)
    return torch.where(size > 0, sums / size.clamp(min=1), previous.to(dtype)), counts.to(torch.int32)
