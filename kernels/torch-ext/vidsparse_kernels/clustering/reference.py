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


def tour_reference(distances: Tensor, starts: Tensor) -> Tensor:
    """From each cluster to the nearest one that is left, the lowest index of equally near ones.

    Args:
        distances: fp32 `[rows, clusters, clusters]`, finite.
        starts: int64 `[rows]`, where to begin.

    Returns:
        int64 `[rows, clusters]`: every cluster once.
    """
    rows = torch.arange(distances.shape[0], device=distances.device)
    taken = torch.zeros(distances.shape[:2], dtype=torch.bool, device=distances.device)
    path = [starts]
    for _ in range(distances.shape[1] - 1):
        taken[rows, path[-1]] = True
        path.append(distances[rows, path[-1]].masked_fill(taken, torch.inf).argmin(-1))
    return torch.stack(path, -1)


def part_means_reference(x: Tensor, order: Tensor, part: int, shift: int, num_parts: int) -> Tensor:
    """Mean of the tokens of each part, 0 where it has none: part m has those at m * part - shift and the next in `order`.

    Args:
        x: `[batch, seq_len, num_heads, head_dim]`.
        order: int32 `[batch, num_heads, seq_len]`.
        part: tokens of a part.
        shift: places by which parts begin earlier.
        num_parts: how many there are.

    Returns:
        `[batch, num_heads, num_parts, head_dim]`.
    """
    index = order.long().unsqueeze(-1).expand(-1, -1, -1, x.shape[3])
    ordered = x.transpose(1, 2).to(compute_dtype(x)).gather(2, index)
    places = (torch.arange(order.shape[-1], device=x.device) + shift) // part
    sums = ordered.new_zeros(*ordered.shape[:2], num_parts, x.shape[3]).index_add_(2, places, ordered)
    return sums / part_sizes(order.shape[-1], part, shift, num_parts, x.device).clamp(min=1)[:, None]


def mean_shares_reference(
    scores: Tensor, sizes: Tensor, seq_len: int, part: int, parts: int, shift: int, num_tiles: int
) -> Tensor:
    """Log of the mean softmax share of each cluster over the tokens of a tile, less the log of its size.

    Args:
        scores: `[batch, num_heads, num_parts, clusters]`, natural-log units.
        sizes: int32 `[batch, num_kv_heads, clusters]`: tokens of each cluster.
        seq_len: tokens in all parts.
        part, shift: as for `part_means_reference`.
        parts: parts of a tile.
        num_tiles: how many there are.

    Returns:
        `[batch, num_heads, num_tiles, clusters]`, -inf for empty clusters and in tiles without tokens.
    """
    batch, num_heads, num_parts, clusters = scores.shape
    logs = sizes.repeat_interleave(num_heads // sizes.shape[1], 1).to(scores.dtype).log().unsqueeze(2)
    # Nothing has a share where all clusters are empty.
    shares = torch.softmax(scores + logs, -1).masked_fill(logs == -torch.inf, 0)
    counts = part_sizes(seq_len, part, shift, num_tiles * parts, scores.device).to(scores.dtype)
    shares = torch.nn.functional.pad(shares, (0, 0, 0, num_tiles * parts - num_parts)) * counts[:, None]
    total = shares.unflatten(2, (num_tiles, parts)).sum(3)
    tokens = counts.unflatten(0, (num_tiles, parts)).sum(1).clamp(min=1)
    return (total / tokens[:, None]).log() - logs.masked_fill(logs == -torch.inf, 0)


def part_sizes(seq_len: int, part: int, shift: int, num_parts: int, device: torch.device) -> Tensor:
    """int64 `[num_parts]`: tokens of each part of `part_means_reference`."""
    starts = torch.arange(num_parts, device=device) * part - shift
    return ((starts + part).clamp(max=seq_len) - starts.clamp(min=0)).clamp(min=0)
