"""Triton kernels that order tokens by label: histograms of tiles, their prefix sums, and a scatter; no atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import SortConfig

INTEGERS = ["num_tiles", "seq_len", "num_clusters", "max_chunk"]


@triton.jit(do_not_specialize=INTEGERS)
def histogram_kernel(
    labels_ptr, histograms_ptr, num_tiles, seq_len, num_clusters, TILE: tl.constexpr, BINS: tl.constexpr
):
    """Tokens of each label in one tile of one row; BINS is more than num_clusters."""
    program = tl.program_id(0)
    tile = program % num_tiles
    row = (program // num_tiles).to(tl.int64)
    tokens = tile * TILE + tl.arange(0, TILE)
    # The last bin takes what is past the end; it is not stored.
    labels = tl.load(labels_ptr + row * seq_len + tokens, mask=tokens < seq_len, other=BINS - 1)
    counts = tl.histogram(labels, BINS)
    bins = tl.arange(0, BINS)
    tl.store(histograms_ptr + program.to(tl.int64) * num_clusters + bins, counts, mask=bins < num_clusters)


@triton.jit(do_not_specialize=INTEGERS)
def prefix_kernel(histograms_ptr, counts_ptr, num_tiles, num_clusters, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Replace each histogram by the number of such tokens in the tiles before it; counts are those of all tiles."""
    row = tl.program_id(0).to(tl.int64)
    bins = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    histograms_ptr += row * num_tiles * num_clusters
    before = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, num_tiles, ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        tiles = start + tl.arange(0, ROWS)
        # [ROWS, BLOCK]
        pointers = histograms_ptr + tiles.to(tl.int64)[:, None] * num_clusters + bins[None, :]
        mask = (tiles < num_tiles)[:, None] & (bins < num_clusters)[None, :]
        counts = tl.load(pointers, mask=mask, other=0)
        tl.store(pointers, tl.cumsum(counts, 0) - counts + before[None, :], mask=mask)
        before += tl.sum(counts, 0)
    tl.store(counts_ptr + row * num_clusters + bins, before, mask=bins < num_clusters)


@triton.jit(do_not_specialize=INTEGERS)
def offsets_kernel(counts_ptr, offsets_ptr, chunk_ends_ptr, num_clusters, max_chunk, BINS: tl.constexpr):
    """Where each cluster starts, and the running number of chunks of at most max_chunk tokens."""
    row = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    mask = bins < num_clusters
    counts = tl.load(counts_ptr + row * num_clusters + bins, mask=mask, other=0)
    offsets_ptr += row * (num_clusters + 1)
    tl.store(offsets_ptr + 1 + bins, tl.cumsum(counts, 0), mask=mask)
    tl.store(offsets_ptr + bins, tl.zeros([BINS], tl.int32), mask=bins == 0)
    chunks = (counts + max_chunk - 1) // max_chunk
    tl.store(chunk_ends_ptr + row * num_clusters + bins, tl.cumsum(chunks, 0), mask=mask)


@triton.jit(do_not_specialize=INTEGERS)
def scatter_kernel(
    labels_ptr, histograms_ptr, offsets_ptr, order_ptr, ranks_ptr, num_tiles, seq_len, num_clusters,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Place ROWS tokens: behind the smaller labels, the earlier tiles, and the earlier tokens of their own tile."""
    program = tl.program_id(0)
    PARTS: tl.constexpr = TILE // ROWS  # pyright: ignore[reportAssignmentType]
    part = program % PARTS
    tile = (program // PARTS) % num_tiles
    row = (program // PARTS // num_tiles).to(tl.int64)
    labels_ptr += row * seq_len
    first = tile * TILE + part * ROWS
    lanes = tl.arange(0, ROWS)
    tokens = first + lanes
    inside = tokens < seq_len
    labels = tl.load(labels_ptr + tokens, mask=inside, other=-1)
    others = tl.load(labels_ptr + tokens, mask=inside, other=-2)
    # [ROWS, ROWS]: summed once, after the loop, because a sum makes the threads exchange.
    earlier = ((labels[:, None] == others[None, :]) & (lanes[None, :] < lanes[:, None])).to(tl.int32)
    for start in tl.range(tile * TILE, first, ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        # All of these are before `first`, so inside whenever a token of this program is.
        others = tl.load(labels_ptr + start + lanes, mask=start + lanes < seq_len, other=-2)
        earlier += (labels[:, None] == others[None, :]).to(tl.int32)
    in_tile = tl.sum(earlier, 1)
    before = tl.load(histograms_ptr + (row * num_tiles + tile) * num_clusters + labels, mask=inside, other=0)
    begin = tl.load(offsets_ptr + row * (num_clusters + 1) + labels, mask=inside, other=0)
    ranks = begin + before + in_tile
    tl.store(ranks_ptr + row * seq_len + tokens, ranks, mask=inside)
    tl.store(order_ptr + row * seq_len + ranks, tokens, mask=inside)


def triton_order(
    labels: Tensor, num_clusters: int, *, max_chunk: int = 512, config: SortConfig | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels.

    Args:
        labels: int32 `[batch, num_heads, seq_len]`, each in 0 .. num_clusters - 1.
        num_clusters: number of clusters.
        max_chunk: tokens of a chunk.
        config: how to compile; None: the default.

    Returns:
        Order, ranks and offsets as in `Clusters`; int32 `[batch, num_heads, num_clusters]` counts and running number
        of chunks.
    """
    batch, num_heads, seq_len = labels.shape
    config = config or SortConfig()
    labels, device = labels.contiguous(), labels.device
    rows, tiles = batch * num_heads, triton.cdiv(seq_len, config.tile)
    histograms = torch.empty(rows, tiles, num_clusters, dtype=torch.int32, device=device)
    counts, chunk_ends = (
        torch.empty(batch, num_heads, num_clusters, dtype=torch.int32, device=device) for _ in range(2)
    )
    offsets = torch.empty(batch, num_heads, num_clusters + 1, dtype=torch.int32, device=device)
    order, ranks = torch.empty_like(labels), torch.empty_like(labels)
    bins = triton.next_power_of_2(num_clusters + 1)
    block, wide = min(128, bins), max(4, bins // 1024)
    with torch.cuda.device_of(labels):
        launch: Any = histogram_kernel[(rows * tiles,)]
        launch(labels, histograms, tiles, seq_len, num_clusters, TILE=config.tile, BINS=bins, num_warps=wide)
        launch = prefix_kernel[(rows, triton.cdiv(num_clusters, block))]
        launch(histograms, counts, tiles, num_clusters, ROWS=32, BLOCK=block, num_warps=4)
        launch = offsets_kernel[(rows,)]
        launch(counts, offsets, chunk_ends, num_clusters, max_chunk, BINS=bins, num_warps=wide)
        launch = scatter_kernel[(rows * tiles * (config.tile // config.rows),)]
        launch(
            labels, histograms, offsets, order, ranks, tiles, seq_len, num_clusters,
            TILE=config.tile, ROWS=config.rows, num_warps=config.num_warps,
        )  # fmt: skip
    return order, ranks, offsets, counts, chunk_ends
