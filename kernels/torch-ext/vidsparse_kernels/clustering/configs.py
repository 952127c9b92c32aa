"""Which tile shapes the clustering kernels use on which GPU."""

from __future__ import annotations

from dataclasses import dataclass

from ..block_sparse_attention.configs import padded_head_dim

KILOBYTE = 1024
PADDING = 128
"""Centroids are padded to a multiple of this, so that every tile of them is whole."""


@dataclass(frozen=True)
class AssignConfig:
    """How the assignment is compiled.

    Attributes:
        block_m: tokens per program.
        block_n: centroids per loop step, at most PADDING.
        num_warps: warps per program.
        num_stages: loop steps whose loads are in flight.
        descriptors: load centroids through a TMA tensor descriptor instead of pointers.
        heads_fastest: whether neighbouring programs take neighbouring heads, or neighbouring tokens of one head.
        running: keep the best score of every column of a tile and reduce once at the end, instead of every tile.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool
    heads_fastest: bool = False
    running: bool = True


@dataclass(frozen=True)
class SortConfig:
    """How tokens are ordered by label.

    Attributes:
        tile: tokens per histogram: a power of two, a multiple of `rows`. Twice as many halve the histograms and
            double the comparisons.
        rows: tokens per program of the scatter.
        num_warps: warps per program of the scatter.
    """

    tile: int = 512
    rows: int = 32
    num_warps: int = 4


@dataclass(frozen=True)
class UpdateConfig:
    """How tokens of a cluster are summed.

    Attributes:
        chunk: tokens of one partial sum; a larger cluster has several.
        rows: tokens per loop step.
        num_warps: warps per program.
        num_stages: loop steps whose loads are in flight.
    """

    chunk: int = 512
    rows: int = 32
    num_warps: int = 2
    num_stages: int = 3


def assign_config(
    *, capability: tuple[int, int] | None, shared_memory: int, head_dim: int, itemsize: int, num_clusters: int
) -> AssignConfig:
    """The configuration for a device and a shape.

    Args:
        capability: CUDA compute capability; None on any other device.
        shared_memory: bytes that one program may use.
        head_dim: real head size, padded to a power of two by the kernel.
        itemsize: bytes per element of the tokens.
        num_clusters: centroids of a head.

    Returns:
        A configuration whose estimated shared memory fits. Chosen from the compiler's report of registers.
    """
    block_d = padded_head_dim(head_dim)
    capability = capability or (0, 0)
    # With descriptors the fp32 product spills its operands by the kilobyte.
    descriptors = capability >= (9, 0) and itemsize <= 2
    if itemsize > 2:
        # fp32 products run on the plain cores: small tiles keep the operands in registers.
        block_m, block_n, num_warps, num_stages = 64, 32, 4, 2
    elif block_d > 128:
        block_m, block_n, num_warps, num_stages = 128, 64, 8, 2
    else:
        block_m, block_n, num_warps, num_stages = 128, 64, 8, 3
    while block_n > 16 and block_n // 2 >= num_clusters:
        block_n //= 2
    while _shared_memory(block_m, block_n, num_stages, block_d, itemsize) > shared_memory:
        if num_stages > 1:
            num_stages -= 1
        elif block_n > 16:
            block_n //= 2
        elif block_m > 16:
            block_m //= 2
        else:
            break
    if block_m < 128:
        num_warps = 4
    return AssignConfig(block_m, block_n, num_warps, num_stages, descriptors)


def _shared_memory(block_m: int, block_n: int, num_stages: int, block_d: int, itemsize: int) -> int:
    """Estimated bytes: the tokens, the centroids in flight, and some room for barriers and the last reduction."""
    return (block_m + num_stages * block_n) * block_d * itemsize + 4 * KILOBYTE
