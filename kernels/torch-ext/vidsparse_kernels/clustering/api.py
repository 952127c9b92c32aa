"""The public functions: they check the arguments once and choose the implementation."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..permutation.backends import use_triton
from .clusters import Clusters
from .initialize import INITIALIZATIONS, frame_centroids, plus_plus_centroids, strided_centroids
from .reference import (
    assign_reference,
    compute_dtype,
    mean_shares_reference,
    order_reference,
    part_means_reference,
    tour_reference,
    update_reference,
)

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
MAX_TRITON_CLUSTERS = 8191
"""A program of the sort holds a number for every cluster, and one more, in registers and shared memory."""
MAX_DISTANCES = 1 << 26
"""Distances between clusters held at once, 256 MB: those of as many heads as fit, of one head at least."""
PARTS = 4
"""Means that stand for the queries of a tile: twice as many change the error of attention by 1 %."""


def assign_clusters(x: Tensor, centroids: Tensor, *, backend: str = "auto") -> Tensor:
    """The nearest centroid of every token: the largest x . c - |c|^2 / 2, equal ones by rising index.

    Centroids are rounded to the dtype of `x`, so that the products run on tensor cores, and nearness is to the rounded
    ones; sums are in fp32. Nothing of size tokens x clusters is stored. The same input gives the same labels. A token
    with a NaN is in a valid cluster, which one is not said.

    Args:
        x: `[batch, seq_len, num_heads, head_dim]`, any strides.
        centroids: `[batch, num_heads, num_clusters, head_dim]`, floating point.
        backend: "auto", "reference" or "triton" (bf16, fp16, fp32; head_dim up to 256).

    Returns:
        int32 `[batch, num_heads, seq_len]`.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        UnsupportedBackendError: the backend asked for cannot do this case.
    """
    _check_tokens(x)
    _check_centroids("centroids", centroids, x)
    with torch.no_grad(), without_autocast(x.device.type):
        if use_triton(backend, x, _obstacle(x, centroids.shape[2])):
            from .assign import triton_assign

            return triton_assign(x, centroids)
        return assign_reference(x, centroids)


def order_by_label(labels: Tensor, num_clusters: int, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Put tokens in order of their label, those of one label by rising position.

    Args:
        labels: int32 `[batch, num_heads, seq_len]`, each in 0 .. num_clusters - 1, checked on the CPU only.
        num_clusters: number of clusters.
        backend: "auto", "reference" or "triton".

    Returns:
        `order`, `ranks` and `offsets` as in `Clusters`, int32.

    Raises:
        ValueError: a shape, dtype or value does not fit.
        UnsupportedBackendError: the backend asked for cannot do this case.

    Example:
        >>> order_by_label(torch.tensor([[[1, 0, 1]]], dtype=torch.int32), 2)[0].flatten()
        tensor([1, 0, 2], dtype=torch.int32)
    """
    _check_whole("num_clusters", num_clusters)
    if labels.ndim != 3 or labels.dtype != torch.int32 or labels.shape[2] == 0:
        raise ValueError(
            "`labels` must be int32 [batch, num_heads, seq_len] with at least one token, got "
            f"{labels.dtype} {tuple(labels.shape)}."
        )
    _check_label_values(labels, num_clusters)
    if use_triton(backend, labels, _too_many(num_clusters)):
        from .sort import triton_order

        return triton_order(labels, num_clusters)[:3]
    return order_reference(labels, num_clusters)


def update_centroids(
    x: Tensor, labels: Tensor, num_clusters: int, previous: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The mean of the tokens of every cluster; an empty cluster keeps its previous centroid.

    Sums are in fp32 over the tokens in order of their label, so the same input gives the same bits.

    Args:
        x: `[batch, seq_len, num_heads, head_dim]`, any strides.
        labels: int32 `[batch, num_heads, seq_len]`, each in 0 .. num_clusters - 1, checked on the CPU only.
        num_clusters: number of clusters.
        previous: `[batch, num_heads, num_clusters, head_dim]`, floating point.
        backend: "auto", "reference" or "triton".

    Returns:
        Centroids fp32 (fp64 for fp64 tokens) like `previous`, and counts int32 `[batch, num_heads, num_clusters]`.

    Raises:
        ValueError: a shape, dtype, device or value does not fit.
        UnsupportedBackendError: the backend asked for cannot do this case.
    """
    _check_tokens(x)
    _check_whole("num_clusters", num_clusters)
    _check_centroids("previous", previous, x, num_clusters)
    expected = (x.shape[0], x.shape[2], x.shape[1])
    if labels.shape != expected or labels.dtype != torch.int32 or labels.device != x.device:
        raise ValueError(
            f"`labels` must be int32 {list(expected)} on {x.device}, got {labels.dtype} {tuple(labels.shape)} on "
            f"{labels.device}."
        )
    _check_label_values(labels, num_clusters)
    with torch.no_grad():
        if use_triton(backend, x, _obstacle(x, num_clusters)):
            from .update import triton_update

            return triton_update(x, labels, num_clusters, previous)[:2]
        return update_reference(x, labels, num_clusters, previous)


def cluster(
    x: Tensor,
    num_clusters: int,
    *,
    iterations: int,
    centroids: Tensor | None = None,
    initialization: str = "strided",
    frames: int | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Clusters:
    """Lloyd's k-means of the tokens of every (batch, head), a fixed number of iterations, without waiting for a GPU.

    An iteration assigns every token to its nearest centroid, then moves the centroids. The labels are those of the
    last assignment, the centroids the means of these labels: what Sparse VideoGen 2 uses, and where the next
    denoising step starts from. With "strided" initialization or given centroids a CUDA graph can capture the call.

    Args:
        x: `[batch, seq_len, num_heads, head_dim]`, any strides: query or key after norm and RoPE, video tokens only.
        num_clusters: clusters of every head, at most seq_len. Some may be empty.
        iterations: at least 1.
        centroids: `[batch, num_heads, num_clusters, head_dim]` to start from, for example those of the step before;
            `initialization` is then not used.
        initialization: "strided": evenly spaced tokens, no random numbers; "frames": as many random tokens of every
            frame; "kmeans++": tokens drawn by distance among at most max(16384, 8 * num_clusters) evenly spaced ones,
            one pass over these for every cluster, so meant for a first step.
        frames: latent frames, a divisor of seq_len; needed for "frames".
        generator: random numbers for "frames" and "kmeans++", best on the device of `x`; None: a fresh one with seed
            0. The global generator is not used.
        backend: "auto", "reference" or "triton".

    Returns:
        Labels, centroids, counts, and the order of the tokens by label. Not differentiable.

    Raises:
        ValueError: an argument does not fit; the message names it.
        UnsupportedBackendError: the backend asked for cannot do this case.

    Source: Sparse VideoGen 2 (arXiv 2505.18875).

    Example:
        >>> clusters = cluster(torch.randn(1, 300, 2, 32), 8, iterations=2)
        >>> clusters.counts.sum(-1)
        tensor([[300, 300]])
    """
    _check_tokens(x)
    _check_whole("num_clusters", num_clusters)
    _check_whole("iterations", iterations)
    if num_clusters > x.shape[1]:
        raise ValueError(f"`num_clusters` must be at most the {x.shape[1]} tokens there are, got {num_clusters}.")
    if centroids is not None:
        _check_centroids("centroids", centroids, x, num_clusters)
    triton = use_triton(backend, x, _obstacle(x, num_clusters))
    with torch.no_grad(), without_autocast(x.device.type):
        if centroids is None:
            centroids = _first_centroids(x, num_clusters, initialization, frames, generator)
        centroids = centroids.to(compute_dtype(x))
        labels = counts = ordered = None
        for number in range(iterations):
            if triton:
                from .assign import triton_assign
                from .update import triton_update

                labels = triton_assign(x, centroids)
                centroids, counts, ordered = triton_update(x, labels, num_clusters, centroids)
            else:
                labels = assign_reference(x, centroids)
                centroids, counts = update_reference(x, labels, num_clusters, centroids)
                if number == iterations - 1:
                    ordered = order_reference(labels, num_clusters)
        assert labels is not None and counts is not None and ordered is not None
        return Clusters(labels, centroids, counts, *ordered)


def arrange_clusters(clusters: Clusters, *, backend: str = "auto") -> Clusters:
    """The same clusters, numbered so that neighbours are alike: each is followed by the nearest one that is left.

    The first is the one farthest from the mean of the tokens, empty ones come last. The same input gives the same
    numbers. Tiles that cut through the order of the tokens then span clusters that are alike, and clusters that are
    listed together are neighbours more often.

    Args:
        clusters: any. The tour takes as many steps as a head has clusters, in one launch, so it is meant to be made once,
            when the first centroids are found.
        backend: "auto", "reference" or "triton".

    Returns:
        Clusters with every field renumbered.

    Raises:
        UnsupportedBackendError: the backend asked for cannot do this case.

    Example:
        >>> found = arrange_clusters(cluster(torch.randn(1, 300, 2, 32), 8, iterations=2))
        >>> found.counts.sum(-1)
        tensor([[300, 300]])
    """
    centroids = clusters.centroids
    num_clusters = centroids.shape[2]
    triton = use_triton(backend, centroids, _too_many(num_clusters))
    with torch.no_grad(), without_autocast(centroids.device.type):
        heads = max(1, MAX_DISTANCES // num_clusters**2)
        chunks = []
        for points, sizes in zip(
            centroids.flatten(0, 1).float().split(heads), clusters.counts.flatten(0, 1).split(heads)
        ):
            empty = sizes == 0
            weights = sizes[..., None] / sizes.sum(-1)[:, None, None]
            # About the mean of the tokens, so that little is lost in the differences.
            points = points.masked_fill(empty[..., None], 0.0)
            points = points - (weights * points).sum(1, keepdim=True)
            norms = points.square().sum(-1)
            distances = norms[:, :, None] + norms[:, None] - 2 * points @ points.transpose(1, 2)
            # Finite, so that the tour can tell them from clusters it has taken.
            distances.nan_to_num_(3e38, 3e38).masked_fill_(empty[:, None], 3e38)
            starts = norms.nan_to_num(0.0).masked_fill(empty, -1.0).argmax(-1)
            if triton:
                from .arrange import triton_tour

                chunks.append(triton_tour(distances, starts))
            else:
                chunks.append(tour_reference(distances, starts))
        tour = torch.cat(chunks).view(*centroids.shape[:3])
        numbers = torch.arange(num_clusters, dtype=torch.int32, device=tour.device).expand_as(tour)
        number = torch.empty_like(clusters.counts).scatter_(2, tour, numbers)
        labels = number.gather(2, clusters.labels.long())
        ordered = order_by_label(labels, num_clusters, backend=backend)
        moved = centroids.gather(2, tour.unsqueeze(-1).expand_as(centroids))
        return Clusters(labels, moved, clusters.counts.gather(2, tour), *ordered)


def score_tiles(
    x: Tensor,
    order: Tensor,
    centroids: Tensor,
    counts: Tensor,
    tile_size: int,
    *,
    shift: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scores of clusters of keys for tiles of queries that may span clusters of queries.

    A tile counts as its quarters, each by its mean: a score is the log of the mean of their softmax shares of a cluster,
    less the log of the cluster's size. The mean of all its queries would stand for none of them where the tile spans
    two clusters.

    Args:
        x: queries `[batch, seq_len, num_heads, head_dim]`, any strides.
        order: int32 `[batch, num_heads, seq_len]`: position p takes token order[p].
        centroids: of the keys, `[batch, num_kv_heads, clusters, head_dim]`; num_heads is a multiple of num_kv_heads.
        counts: int32 `[batch, num_kv_heads, clusters]`: their tokens.
        tile_size: queries of a tile, a power of two of at least 16.
        shift: positions before the first, which belong to the first tiles: text.
        scale: factor on query . key, default 1 / sqrt(head_dim).
        backend: "auto", "reference" or "triton".

    Returns:
        fp32 (fp64 for fp64 queries) `[batch, num_heads, ceil((shift + seq_len) / tile_size), clusters]`, natural-log
        units; -inf for empty clusters and in tiles before the first token. With the sizes of the clusters these are what
        `select_block_lists` takes. Not differentiable.

    Raises:
        ValueError: a shape, dtype or value does not fit.
        UnsupportedBackendError: the backend asked for cannot do this case.
    """
    from ..block_selection import score_blocks

    _check_tokens(x)
    _check_whole("tile_size", tile_size)
    if tile_size < 16 or tile_size & (tile_size - 1):
        raise ValueError(f"`tile_size` must be a power of two of at least 16, got {tile_size}.")
    if not isinstance(shift, Integral) or shift < 0:
        raise ValueError(f"`shift` must be a whole number of at least 0, got {shift!r}.")
    batch, seq_len, num_heads, head_dim = x.shape
    if tuple(order.shape) != (batch, num_heads, seq_len) or order.dtype != torch.int32:
        raise ValueError(
            f"`order` must be int32 [{batch}, {num_heads}, {seq_len}], got {order.dtype} {tuple(order.shape)}."
        )
    if centroids.ndim != 4 or centroids.shape[::3] != (batch, head_dim) or num_heads % max(1, centroids.shape[1]):
        raise ValueError(
            f"`centroids` must be [{batch}, num_kv_heads, clusters, {head_dim}] with a number of heads that divides "
            f"{num_heads}, got {tuple(centroids.shape)}."
        )
    if counts.shape != centroids.shape[:3]:
        raise ValueError(f"`counts` must be {list(centroids.shape[:3])} as `centroids`, got {tuple(counts.shape)}.")
    part = tile_size // PARTS
    num_tiles, num_parts = (-(-(shift + seq_len) // size) for size in (tile_size, part))
    triton = use_triton(backend, x, _obstacle(x, centroids.shape[2]))
    with torch.no_grad(), without_autocast(x.device.type):
        if triton:
            from .arrange import triton_mean_shares, triton_part_means

            scores = score_blocks(triton_part_means(x, order, part, shift, num_parts), centroids, scale)
            return triton_mean_shares(scores, counts, seq_len, part, PARTS, shift, num_tiles)
        means = part_means_reference(x, order, part, shift, num_parts)
        scores = score_blocks(means, centroids.to(means.dtype), scale)
        return mean_shares_reference(scores, counts, seq_len, part, PARTS, shift, num_tiles)


def _first_centroids(
    x: Tensor, num_clusters: int, initialization: str, frames: int | None, generator: torch.Generator | None
) -> Tensor:
    if initialization not in INITIALIZATIONS:
        raise ValueError(f"`initialization` must be one of {', '.join(INITIALIZATIONS)}, got {initialization!r}.")
    if initialization == "strided":
        return strided_centroids(x, num_clusters)
    if generator is None:
        generator = torch.Generator(x.device).manual_seed(0)
    if initialization == "kmeans++":
        return plus_plus_centroids(x, num_clusters, generator)
    if frames is None or frames < 1 or x.shape[1] % frames:
        raise ValueError(f'`frames` must divide the {x.shape[1]} tokens for initialization "frames", got {frames}.')
    return frame_centroids(x, num_clusters, frames, generator)


def _check_whole(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")


def _check_tokens(x: Tensor) -> None:
    if x.ndim != 4 or not x.dtype.is_floating_point or 0 in x.shape:
        raise ValueError(
            "`x` must be floating point [batch, seq_len, num_heads, head_dim] with no dimension empty, got "
            f"{x.dtype} {tuple(x.shape)}."
        )


def _check_centroids(name: str, centroids: Tensor, x: Tensor, num_clusters: int | None = None) -> None:
    batch, _, num_heads, head_dim = x.shape
    fits = centroids.ndim == 4 and centroids.shape[2] > 0 and num_clusters in (None, centroids.shape[2])
    fits = fits and (*centroids.shape[:2], centroids.shape[3]) == (batch, num_heads, head_dim)
    if not fits or not centroids.dtype.is_floating_point or centroids.device != x.device:
        clusters = "num_clusters" if num_clusters is None else num_clusters
        raise ValueError(
            f"`{name}` must be floating point [{batch}, {num_heads}, {clusters}, {head_dim}] on {x.device}, got "
            f"{centroids.dtype} {tuple(centroids.shape)} on {centroids.device}."
        )


def _check_label_values(labels: Tensor, num_clusters: int) -> None:
    if labels.device.type == "cpu" and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_clusters:
            raise ValueError(f"`labels` must be in 0 .. {num_clusters - 1}, got {low} to {high}.")


def _too_many(num_clusters: int) -> str | None:
    if num_clusters > MAX_TRITON_CLUSTERS:
        return f"has up to {MAX_TRITON_CLUSTERS} clusters, got {num_clusters}"
    return None


def _obstacle(x: Tensor, num_clusters: int) -> str | None:
    """Why the kernels cannot do this case, as the end of a sentence; None if they can."""
    if x.dtype not in TRITON_DTYPES:
        return f"clusters bf16, fp16 and fp32, not {x.dtype}"
    if x.shape[3] > MAX_HEAD_DIM:
        return f"has head_dim up to {MAX_HEAD_DIM}, got {x.shape[3]}"
    return _too_many(num_clusters)
