"""Triton kernels of the assignment: a product with every centroid and a running best, nothing of size tokens x
clusters."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_sparse_attention.configs import padded_head_dim
from .configs import PADDING, AssignConfig, assign_config

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

PREPARE_INTEGERS = ["num_clusters", "padded_clusters"]
ASSIGN_INTEGERS = ["num_heads", "num_rows", "num_tiles", "seq_len", "padded_clusters", "read_clusters"]


@triton.jit(do_not_specialize=PREPARE_INTEGERS)
def prepare_kernel(
    centroids_ptr, rounded_ptr, bias_ptr, num_clusters, padded_clusters,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round centroids to the dtype of `rounded`, pad them with zeros, and store -|c|^2 / 2, -inf past the last one."""
    row = tl.program_id(0).to(tl.int64)
    clusters = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    real = clusters < num_clusters
    c = tl.load(
        centroids_ptr + (row * num_clusters + clusters)[:, None] * HEAD_DIM + dims[None, :],
        mask=real[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    rounded = c.to(rounded_ptr.dtype.element_ty)
    tl.store(rounded_ptr + (row * padded_clusters + clusters)[:, None] * BLOCK_D + dims[None, :], rounded)
    wide = rounded.to(tl.float32)
    half_norms = tl.sum(wide * wide * 0.5, 1)
    bias = tl.where(real, -half_norms, float("-inf"))  # pyright: ignore[reportOperatorIssue]
    tl.store(bias_ptr + row * padded_clusters + clusters, bias)


@triton.jit(do_not_specialize=ASSIGN_INTEGERS)
def assign_kernel(
    x_ptr, centroids, bias_ptr, labels_ptr, x_stride_b, x_stride_s, x_stride_h, x_stride_d,
    num_heads, num_rows, num_tiles, seq_len, padded_clusters, read_clusters,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr, HEADS_FASTEST: tl.constexpr, RUNNING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Labels of BLOCK_M tokens of one head; `centroids` is a pointer or a descriptor `[rows, padded_clusters, D]`.

    RUNNING keeps, for each token and each column of a tile, the best score so far and the tile that it came from: four
    operations a score and no exchange between threads before the last tile.
    """
    program = tl.program_id(0)
    if HEADS_FASTEST:
        row = program % num_rows
        tile = program // num_rows
    else:
        tile = program % num_tiles
        row = program // num_tiles
    wide_row = row.to(tl.int64)
    x_ptr += (row // num_heads).to(tl.int64) * x_stride_b + (row % num_heads).to(tl.int64) * x_stride_h
    bias_ptr += wide_row * padded_clusters
    # [BLOCK_M], [BLOCK_D]
    tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    x = tl.load(
        x_ptr + tokens.to(tl.int64)[:, None] * x_stride_s + dims.to(tl.int64)[None, :] * x_stride_d,
        mask=(tokens < seq_len)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    if not DESCRIPTORS:
        centroids += wide_row * padded_clusters * BLOCK_D
    if RUNNING:
        best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        where = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    else:
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        where = tl.zeros([BLOCK_M], tl.int32)
    for start in tl.range(0, read_clusters, BLOCK_N):  # pyright: ignore[reportGeneralTypeIssues]
        # [BLOCK_N, BLOCK_D]
        if DESCRIPTORS:
            c = centroids.load([row, start, 0]).reshape([BLOCK_N, BLOCK_D])
        else:
            c = tl.load(centroids + (start + columns)[:, None] * BLOCK_D + dims[None, :])
        bias = tl.load(bias_ptr + start + columns)
        # [BLOCK_M, BLOCK_N]
        scores = tl.dot(x, tl.trans(c), input_precision=PRECISION) + bias[None, :]
        if RUNNING:
            # Strictly better, so that among equal scores the earlier tile stays; NaN is never better.
            better = scores > best
            best = tl.where(better, scores, best)
            where = tl.where(better, start, where)
        else:
            peak = tl.max(scores, 1)
            is_peak = scores == peak[:, None]  # pyright: ignore
            first = tl.min(tl.where(is_peak, columns[None, :], BLOCK_N), 1)
            better = peak > best
            best = tl.where(better, peak, best)
            where = tl.where(better, start + first, where)
    if RUNNING:
        peak = tl.max(best, 1)
        is_peak = best == peak[:, None]  # pyright: ignore
        candidates = tl.where(is_peak, where + columns[None, :], 2147483647)
        labels = tl.min(candidates, 1)
    else:
        labels = where
    tl.store(labels_ptr + wide_row * seq_len + tokens, labels, mask=tokens < seq_len)


def triton_prepare(centroids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Centroids `[B, H, K, D]` as the assignment reads them: rounded and padded, and their biases."""
    batch, num_heads, num_clusters, head_dim = centroids.shape
    block_d = padded_head_dim(head_dim)
    padded = triton.cdiv(num_clusters, PADDING) * PADDING
    rounded = torch.empty(batch * num_heads, padded, block_d, dtype=dtype, device=centroids.device)
    bias = torch.empty(batch * num_heads, padded, dtype=torch.float32, device=centroids.device)
    rows = 32
    launch: Any = prepare_kernel[(batch * num_heads, padded // rows)]
    with torch.cuda.device_of(centroids):
        launch(
            centroids.contiguous(), rounded, bias, num_clusters, padded,
            HEAD_DIM=head_dim, BLOCK_D=block_d, ROWS=rows, num_warps=4,
        )  # fmt: skip
    return rounded, bias


def triton_assign(x: Tensor, centroids: Tensor, *, config: AssignConfig | None = None) -> Tensor:
    """Launch both kernels. Arguments as for `assign_reference`; `config` says how to compile."""
    batch, seq_len, num_heads, head_dim = x.shape
    rounded, bias = triton_prepare(centroids, x.dtype)
    padded, block_d = rounded.shape[1:]
    config = config or device_config(x, centroids.shape[2])
    labels = torch.empty(batch, num_heads, seq_len, dtype=torch.int32, device=x.device)
    rows, tiles = batch * num_heads, triton.cdiv(seq_len, config.block_m)
    descriptors = config.descriptors and TensorDescriptor is not None
    source: Any = rounded
    if descriptors:
        assert TensorDescriptor is not None
        block = [1, config.block_n, block_d]
        source = TensorDescriptor(rounded, list(rounded.shape), list(rounded.stride()), block)
    # Only whole tiles that hold a real centroid are read.
    read = triton.cdiv(centroids.shape[2], config.block_n) * config.block_n
    launch: Any = assign_kernel[(rows * tiles,)]
    with torch.cuda.device_of(x):
        launch(
            x, source, bias, labels, *x.stride(), num_heads, rows, tiles, seq_len, padded, read,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            DESCRIPTORS=descriptors, HEADS_FASTEST=config.heads_fastest, RUNNING=config.running, PRECISION="ieee",
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return labels


def device_config(x: Tensor, num_clusters: int) -> AssignConfig:
    """The configuration for the device and shape of `x`."""
    capability, shared_memory = None, 64 * 1024
    if x.device.type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(x.device)
        capability = (properties.major, properties.minor)
        shared_memory = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return assign_config(
        capability=capability, shared_memory=shared_memory, head_dim=x.shape[3], itemsize=x.element_size(),
        num_clusters=num_clusters,
    )  # fmt: skip
