"""First centroids: tokens chosen by position or by distance, on the device, from a generator of one's own."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import compute_dtype

INITIALIZATIONS = ("strided", "frames", "kmeans++")
MAX_CANDIDATES = 16384
"""k-means++ draws among this many evenly spaced tokens, or eight per cluster where that is more."""


def strided_centroids(x: Tensor, num_clusters: int) -> Tensor:
    """`num_clusters` evenly spaced tokens of each head: `[B, S, H, D]` -> `[B, H, K, D]`; no random numbers."""
    return _take(x, _even(x.shape[1], num_clusters, x.device))


def frame_centroids(x: Tensor, num_clusters: int, frames: int, generator: torch.Generator) -> Tensor:
    """As many tokens from every frame, up to one, at random places within it; the same places in every head."""
    per_frame = x.shape[1] // frames
    # Clusters k with the same k * frames // K belong to one frame.
    frame = torch.arange(num_clusters, device=x.device) * frames // num_clusters
    first = -(-torch.arange(frames, device=x.device) * num_clusters // frames)
    slot = torch.arange(num_clusters, device=x.device) - first[frame]
    draws = torch.rand(frames, per_frame, generator=generator, device=generator.device).to(x.device)
    places = torch.sort(draws, dim=-1, stable=True).indices[frame, slot]
    return _take(x, frame * per_frame + places)


def plus_plus_centroids(x: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007) on evenly spaced tokens: one pass over them for every cluster.

    A token is drawn with a probability proportional to its squared distance d to the nearest centroid so far: the
    largest d / e wins, e being independent and exponentially distributed. No sum over tokens decides, so equal seeds
    give equal centroids.
    """
    dtype = compute_dtype(x)
    batch, seq_len, num_heads, head_dim = x.shape
    count = min(seq_len, max(MAX_CANDIDATES, 8 * num_clusters))
    # [B, H, M, D]
    tokens = _take(x, _even(seq_len, count, x.device)).to(dtype)
    norms = tokens.square().sum(-1)
    distances = torch.full_like(norms, torch.inf)
    centroids = tokens.new_empty(batch, num_heads, num_clusters, head_dim)
    for number in range(num_clusters):
        noise = torch.empty(norms.shape, device=generator.device).exponential_(generator=generator).to(norms)
        # All distances are infinite at first, then some are 0 and never chosen while another is not.
        weights = (distances if number else 1.0) / noise.clamp(min=1e-30)
        chosen = weights.argmax(-1)[..., None, None].expand(-1, -1, 1, head_dim)
        centroid = tokens.gather(2, chosen)
        centroids[:, :, number] = centroid[:, :, 0]
        products = (tokens @ centroid.transpose(2, 3)).squeeze(-1)
        new = norms - 2 * products + centroid.square().sum(-1)
        distances = torch.minimum(distances, new.clamp(min=0))
        # Rounding must not let a token be chosen twice.
        distances = distances.scatter(2, chosen[..., 0], 0.0)
    return centroids


def _even(seq_len: int, count: int, device: torch.device) -> Tensor:
    """Middles of `count` equal parts of the sequence."""
    return (2 * torch.arange(count, device=device) + 1) * seq_len // (2 * count)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """`[B, S, H, D]` at places `[K]` -> `[B, H, K, D]`."""
    return x.index_select(1, places).transpose(1, 2)
