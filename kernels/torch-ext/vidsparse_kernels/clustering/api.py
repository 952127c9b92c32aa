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
from .reference import assign_reference, compute_dtype, order_reference, update_reference

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
MAX_TRITON_CLUSTERS = 8191
"""A program of the sort holds a number for every cluster, and one more, in registers and shared memory."""


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
