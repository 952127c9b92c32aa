"""Triton kernels of the update: sums of tokens in the order by label, in two stages, always added in the same order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse_attention.configs import padded_head_dim
from .configs import SortConfig, UpdateConfig
from .sort import triton_order

INTEGERS = ["num_heads", "seq_len", "num_clusters", "max_chunks"]


@triton.jit(do_not_specialize=INTEGERS)
def chunk_sum_kernel(
    x_ptr, order_ptr, offsets_ptr, chunk_ends_ptr, sums_ptr, x_stride_b, x_stride_s, x_stride_h, x_stride_d,
    num_heads, seq_len, num_clusters, max_chunks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum of one chunk, up to CHUNK tokens of one cluster."""
    program = tl.program_id(0)
    chunk = program % max_chunks
    row = program // max_chunks
    wide_row = row.to(tl.int64)
    bins = tl.arange(0, BINS)
    ends = tl.load(chunk_ends_ptr + wide_row * num_clusters + bins, mask=bins < num_clusters, other=2147483647)
    # Clusters whose chunks all come before this one; the number of chunks up to there.
    done = ends <= chunk
    cluster = tl.sum(done.to(tl.int32), 0)
    if cluster >= num_clusters:
        return
    earlier = tl.max(tl.where(done, ends, 0), 0)
    offsets_ptr += wide_row * (num_clusters + 1) + cluster
    start = tl.load(offsets_ptr) + (chunk - earlier) * CHUNK
    stop = tl.minimum(start + CHUNK, tl.load(offsets_ptr + 1))
    x_ptr += (row // num_heads).to(tl.int64) * x_stride_b + (row % num_heads).to(tl.int64) * x_stride_h
    order_ptr += wide_row * seq_len
    dims = tl.arange(0, BLOCK_D)
    wide_dims = dims.to(tl.int64)[None, :] * x_stride_d
    lanes = tl.arange(0, ROWS)
    # [ROWS, BLOCK_D]
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in tl.range(start, stop, ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        inside = first + lanes < stop
        tokens = tl.load(order_ptr + first + lanes, mask=inside, other=0).to(tl.int64)
        rows = tl.load(
            x_ptr + tokens[:, None] * x_stride_s + wide_dims,
            mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        acc += rows.to(tl.float32)
    tl.store(sums_ptr + program.to(tl.int64) * HEAD_DIM + dims, tl.sum(acc, 0), mask=dims < HEAD_DIM)


@triton.jit(do_not_specialize=INTEGERS)
def mean_kernel(
    sums_ptr, chunk_ends_ptr, counts_ptr, previous_ptr, centroids_ptr, num_clusters, max_chunks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Means of ROWS clusters from the sums of their chunks; the previous centroid where there is no token."""
    row = tl.program_id(0).to(tl.int64)
    clusters = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = clusters < num_clusters
    place = row * num_clusters + clusters
    dims = tl.arange(0, BLOCK_D)
    inside = dims < HEAD_DIM
    begin = tl.load(chunk_ends_ptr + place - 1, mask=real & (clusters > 0), other=0)
    chunks = tl.load(chunk_ends_ptr + place, mask=real, other=0) - begin
    chunks = tl.where(real, chunks, 0)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for number in tl.range(0, tl.max(chunks, 0)):  # pyright: ignore[reportGeneralTypeIssues]
        acc += tl.load(
            sums_ptr + (row * max_chunks + begin + number)[:, None] * HEAD_DIM + dims[None, :],
            mask=(number < chunks)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
    counts = tl.load(counts_ptr + place, mask=real, other=0)
    pointers = place[:, None] * HEAD_DIM + dims[None, :]
    mask = real[:, None] & inside[None, :]
    previous = tl.load(previous_ptr + pointers, mask=mask & (counts == 0)[:, None], other=0.0)
    means = acc / tl.maximum(counts, 1).to(tl.float32)[:, None]
    tl.store(centroids_ptr + pointers, tl.where((counts > 0)[:, None], means, previous), mask=mask)


def triton_update(
    x: Tensor,
    labels: Tensor,
    num_clusters: int,
    previous: Tensor,
    *,
    config: UpdateConfig | None = None,
    sort: SortConfig | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Launch the kernels.

    Args:
        x, labels, num_clusters, previous: as for `update_reference`.
        config, sort: how to compile; None: the defaults.

    Returns:
        Centroids fp32, counts int32, and (order, ranks, offsets) of the labels.
    """
    config = config or UpdateConfig()
    order, ranks, offsets, counts, chunk_ends = triton_order(labels, num_clusters, max_chunk=config.chunk, config=sort)
    centroids = triton_means(x, order, offsets, counts, chunk_ends, previous, config=config)
    return centroids, counts, (order, ranks, offsets)


def triton_means(
    x: Tensor, order: Tensor, offsets: Tensor, counts: Tensor, chunk_ends: Tensor, previous: Tensor, *,
    config: UpdateConfig,
) -> Tensor:  # fmt: skip
    """Centroids fp32 from what `triton_order` gives with `max_chunk=config.chunk`."""
    batch, seq_len, num_heads, head_dim = x.shape
    num_clusters = counts.shape[-1]
    rows, block_d = batch * num_heads, padded_head_dim(head_dim)
    # Each cluster has at most one chunk that is not full.
    max_chunks = min(seq_len, num_clusters + seq_len // config.chunk)
    sums = torch.empty(rows, max_chunks, head_dim, dtype=torch.float32, device=x.device)
    centroids = torch.empty(batch, num_heads, num_clusters, head_dim, dtype=torch.float32, device=x.device)
    previous = previous.to(torch.float32).contiguous()
    with torch.cuda.device_of(x):
        launch: Any = chunk_sum_kernel[(rows * max_chunks,)]
        launch(
            x, order, offsets, chunk_ends, sums, *x.stride(), num_heads, seq_len, num_clusters, max_chunks,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BINS=triton.next_power_of_2(num_clusters), CHUNK=config.chunk,
            ROWS=config.rows, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        group = max(1, 2048 // block_d)
        launch = mean_kernel[(rows, triton.cdiv(num_clusters, group))]
        launch(
            sums, chunk_ends, counts, previous, centroids, num_clusters, max_chunks,
            HEAD_DIM=head_dim, BLOCK_D=block_d, ROWS=group, num_warps=4,
        )  # fmt: skip
    return centroids
