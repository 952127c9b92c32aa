"""Triton kernels for tiles that span clusters: an order of the clusters in which neighbours are alike, means of tokens in
an order, and what share of the softmax mass each tile of queries gives to each cluster of keys."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse_attention.configs import padded_head_dim


@triton.jit
def tour_kernel(distances_ptr, starts_ptr, order_ptr, num_clusters, BLOCK: tl.constexpr):
    """One head: from each cluster to the nearest one that is left, the lowest index of equally near ones."""
    row = tl.program_id(0).to(tl.int64)
    distances_ptr += row * num_clusters * num_clusters
    order_ptr += row * num_clusters
    columns = tl.arange(0, BLOCK)
    taken = columns >= num_clusters
    current = tl.load(starts_ptr + row)
    for step in tl.range(0, num_clusters):  # pyright: ignore[reportGeneralTypeIssues]
        tl.store(order_ptr + step, current)
        taken = taken | (columns == current)
        distance = tl.load(distances_ptr + current * num_clusters + columns, mask=columns < num_clusters, other=0.0)
        current = tl.argmin(tl.where(taken, float("inf"), distance), 0).to(tl.int64)


@triton.jit
def part_means_kernel(
    x_ptr, order_ptr, means_ptr, x_stride_b, x_stride_s, x_stride_h, x_stride_d,
    num_heads, seq_len, num_parts, shift,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean of one part of one head; 0 where it has no token."""
    program = tl.program_id(0)
    part = program % num_parts
    row = (program // num_parts).to(tl.int64)
    start = part * PART - shift
    begin, end = tl.maximum(start, 0), tl.minimum(start + PART, seq_len)
    x_ptr += (row // num_heads) * x_stride_b + (row % num_heads) * x_stride_h
    order_ptr += row * seq_len
    dims = tl.arange(0, BLOCK_D)
    # [ROWS, BLOCK_D]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in tl.static_range(0, PART, ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        places = start + first + tl.arange(0, ROWS)
        inside = (places >= begin) & (places < end)
        tokens = tl.load(order_ptr + places, mask=inside, other=0).to(tl.int64)
        total += tl.load(
            x_ptr + tokens[:, None] * x_stride_s + dims.to(tl.int64)[None, :] * x_stride_d,
            mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
    mean = tl.sum(total, 0) / tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(means_ptr + program.to(tl.int64) * HEAD_DIM + dims, mean, mask=dims < HEAD_DIM)


@triton.jit
def mean_shares_kernel(
    scores_ptr, sizes_ptr, shares_ptr, sizes_stride_b, sizes_stride_h,
    num_heads, group_size, seq_len, num_parts, num_tiles, num_clusters, shift,
    PART: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one head: the softmax over clusters of each of its parts, and the log of their mean by token."""
    program = tl.program_id(0).to(tl.int64)
    tile = program % num_tiles
    row = program // num_tiles
    columns = tl.arange(0, BLOCK)
    inside = columns < num_clusters
    sizes_ptr += (row // num_heads) * sizes_stride_b + (row % num_heads) // group_size * sizes_stride_h
    size = tl.load(sizes_ptr + columns, mask=inside, other=0).to(tl.float32)
    # An empty cluster has no share, and a division by its size is left out.
    log_size = tl.where(size > 0, tl.log(tl.maximum(size, 1.0)), float("-inf"))
    total = tl.zeros([BLOCK], tl.float32)
    tokens = 0.0
    for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        part = tile * PARTS + i
        start = part * PART - shift
        count = tl.maximum(tl.minimum(start + PART, seq_len) - tl.maximum(start, 0), 0).to(tl.float32)
        there = columns < tl.where(part < num_parts, num_clusters, 0)
        scores = tl.load(
            scores_ptr + (row * num_parts + part) * num_clusters + columns, mask=there, other=float("-inf")
        )
        weighted = scores + log_size
        peak = tl.max(weighted, 0)
        weights = tl.exp(weighted - tl.where(peak == float("-inf"), 0.0, peak))
        share = weights / tl.maximum(tl.sum(weights, 0), 1e-30)
        total += tl.where(count > 0, count * share, 0.0)
        tokens += count
    shares = tl.log(total / tl.maximum(tokens, 1.0)) - tl.where(size > 0, log_size, 0.0)
    tl.store(shares_ptr + program * num_clusters + columns, shares, mask=inside)


def triton_tour(distances: Tensor, starts: Tensor) -> Tensor:
    """Launch the kernel.

    Args:
        distances, starts: as for `tour_reference`.

    Returns:
        int64 `[rows, clusters]`.
    """
    rows, num_clusters = distances.shape[:2]
    order = torch.empty(rows, num_clusters, dtype=torch.int64, device=distances.device)
    block = triton.next_power_of_2(num_clusters)
    with torch.cuda.device_of(distances):
        launch: Any = tour_kernel[(rows,)]
        launch(distances, starts, order, num_clusters, BLOCK=block, num_warps=4 if block <= 2048 else 8)
    return order


def triton_part_means(x: Tensor, order: Tensor, part: int, shift: int, num_parts: int) -> Tensor:
    """Launch the kernel; arguments and result are those of `part_means_reference`."""
    batch, _, num_heads, head_dim = x.shape
    means = torch.empty(batch, num_heads, num_parts, head_dim, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        launch: Any = part_means_kernel[(batch * num_heads * num_parts,)]
        launch(
            x, order.contiguous(), means, *x.stride(), num_heads, order.shape[-1], num_parts, shift,
            HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), PART=part, ROWS=min(part, 16), num_warps=4,
        )  # fmt: skip
    return means


def triton_mean_shares(
    scores: Tensor, sizes: Tensor, seq_len: int, part: int, parts: int, shift: int, num_tiles: int
) -> Tensor:
    """Launch the kernel; arguments and result are those of `mean_shares_reference`."""
    batch, num_heads, num_parts, num_clusters = scores.shape
    shares = torch.empty(batch, num_heads, num_tiles, num_clusters, dtype=torch.float32, device=scores.device)
    block = triton.next_power_of_2(num_clusters)
    sizes = sizes.contiguous()
    with torch.cuda.device_of(scores):
        launch: Any = mean_shares_kernel[(batch * num_heads * num_tiles,)]
        launch(
            scores, sizes, shares, *sizes.stride()[:2], num_heads, num_heads // sizes.shape[1], seq_len, num_parts,
            num_tiles, num_clusters, shift, PART=part, PARTS=parts, BLOCK=block, num_warps=4 if block <= 2048 else 8,
        )  # fmt: skip
    return shares
