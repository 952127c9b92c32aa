"""Which tile shapes and which way of loading the Triton kernels use on which GPU."""

from __future__ import annotations

from dataclasses import dataclass

KILOBYTE = 1024

MIN_DESCRIPTOR_FLOPS = 2e11
"""Below this much work (counted dense), making four descriptors on the host takes longer than they save."""


@dataclass(frozen=True)
class ForwardConfig:
    """How the forward kernel is compiled.

    Attributes:
        block_m: queries per program; divides the mask's q-block.
        block_n: keys per loop step; divides the mask's kv-block.
        num_warps: warps per program.
        num_stages: loop steps whose loads are in flight.
        descriptors: load and store through TMA tensor descriptors instead of pointers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool


def forward_config(
    *,
    capability: tuple[int, int] | None,
    shared_memory: int,
    head_dim: int,
    itemsize: int,
    q_block_size: int,
    kv_block_size: int,
    descriptors_possible: bool,
) -> ForwardConfig:
    """The configuration for a device and a shape.

    Args:
        capability: CUDA compute capability; None on any other device.
        shared_memory: bytes that one program may use.
        head_dim: real head size, padded to a power of two by the kernel.
        itemsize: bytes per element of query.
        q_block_size, kv_block_size: of the mask, multiples of 16.
        descriptors_possible: whether strides and alignment allow TMA; only compute capability 9.0 and later uses it.

    Returns:
        A configuration whose estimated shared memory fits, on devices that the table does not know too.
    """
    block_d = padded_head_dim(head_dim)
    capability = capability or (0, 0)
    descriptors = descriptors_possible and capability >= (9, 0)
    if itemsize > 2:
        # fp32 products run on the plain cores: small tiles and many warps keep the accumulators in registers.
        block_m, block_n, num_warps, num_stages = 64, 32, 8, 2
    elif block_d > 128:
        block_m, block_n, num_warps, num_stages = 128, 64, 8, 2
    elif block_d > 64 and (9, 0) <= capability < (10, 0):
        # On an H200 at density 0.2: 508 TFLOP/s with descriptors and 443 with pointers; a third stage made it 416.
        block_m, block_n, num_warps, num_stages = 128, 64, 4, 2
    elif block_d > 64:
        # Four warps would spill registers here: seen in the compiler's report for 8.0, 10.0 and 12.0.
        block_m, block_n, num_warps, num_stages = 128, 64, 8, 3
    else:
        # On an H200: 404 TFLOP/s; 128 x 64 made it 389.
        block_m, block_n, num_warps, num_stages = 64, 64, 4, 2
    block_m, block_n = largest_divisor(q_block_size, block_m), largest_divisor(kv_block_size, block_n)
    while _shared_memory(block_m, block_n, num_stages, block_d, itemsize) > shared_memory:
        if num_stages > 1:
            num_stages -= 1
        elif block_n > 16:
            block_n //= 2
        elif block_m > 16:
            block_m //= 2
        else:
            break
    if block_m < 64:
        num_warps = 4
    return ForwardConfig(block_m, block_n, num_warps, num_stages, descriptors)


@dataclass(frozen=True)
class BackwardTiles:
    """How one of the two backward kernels is compiled.

    Attributes:
        block_m: queries per tile; divides the mask's q-block.
        block_n: keys per tile; divides the mask's kv-block.
        num_warps: warps per program.
        num_stages: loop steps whose loads are in flight.
        descriptors: load through TMA tensor descriptors instead of pointers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool


@dataclass(frozen=True)
class BackwardConfig:
    """How the backward is compiled.

    Attributes:
        grad_query: for the kernel that owns a tile of queries and loops over keys.
        grad_key_value: for the kernel that owns a tile of keys and loops over queries.
    """

    grad_query: BackwardTiles
    grad_key_value: BackwardTiles


def backward_config(
    *,
    capability: tuple[int, int] | None,
    shared_memory: int,
    head_dim: int,
    itemsize: int,
    q_block_size: int,
    kv_block_size: int,
    descriptors_possible: bool,
) -> BackwardConfig:
    """The configuration for a device and a shape; arguments as for `forward_config`.

    Returns:
        A configuration whose estimated shared memory fits, on devices that the table does not know too.
    """
    block_d = padded_head_dim(head_dim)
    capability = capability or (0, 0)
    # Products whose sums live outside the operands' registers, so that large tiles do not spill.
    warpgroups = (9, 0) <= capability < (11, 0)
    # Rows that a program owns, rows per loop step, warps and stages, for the gradient of query, then key and value.
    # Half precision up to 128 with warpgroups: from times on 9.0 (docs/performance.md). All others from the compiler's
    # report, not from times. On 9.0 and 10.0 at most 24 bytes are spilled in half precision.
    if itemsize > 2:
        # fp32 products run on the plain cores: small tiles, as their operands are held in registers.
        rows = 32 if block_d <= 128 else 16
        query = key_value = (rows, rows, 8, 1)
    elif block_d > 128:
        query = key_value = (64, 32, 8, 2) if warpgroups else (32, 32, 8, 1)
    elif block_d > 64 and warpgroups:
        query, key_value = (64, 64, 4, 3), (64, 64, 4, 2)
    elif block_d > 64:
        query = key_value = (128 if shared_memory >= 128 * KILOBYTE else 64, 32, 8, 2)
    elif warpgroups:
        query, key_value = (128, 64, 8, 2), (64, 64, 4, 2)
    else:
        query, key_value = (64, 64, 4, 2), (64, 32, 4, 2)

    def fit(own_block: int, step_block: int, own: int, step: int, num_warps: int, num_stages: int) -> tuple[int, ...]:
        own, step = largest_divisor(own_block, own), largest_divisor(step_block, step)
        while _backward_shared_memory(own, step, num_stages, block_d, itemsize) > shared_memory:
            if num_stages > 1:
                num_stages -= 1
            elif step > 16:
                step //= 2
            elif own > 16:
                own //= 2
            else:
                break
        if warpgroups and own <= 64 and block_d <= 128 and itemsize <= 2:
            # 64 rows are what one warpgroup multiplies.
            num_warps = 4
        return own, step, num_warps, num_stages

    block_m, block_n, num_warps, num_stages = fit(q_block_size, kv_block_size, *query)
    # Elsewhere descriptors double the spilled registers of this kernel, and rid the other one of them.
    descriptors = descriptors_possible and warpgroups and itemsize <= 2
    grad_query = BackwardTiles(block_m, block_n, num_warps, num_stages, descriptors)
    block_n, block_m, num_warps, num_stages = fit(kv_block_size, q_block_size, *key_value)
    descriptors = descriptors_possible and capability >= (9, 0)
    return BackwardConfig(grad_query, BackwardTiles(block_m, block_n, num_warps, num_stages, descriptors))


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def largest_divisor(block_size: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `block_size`."""
    return min(limit, block_size & -block_size)


def _shared_memory(block_m: int, block_n: int, num_stages: int, block_d: int, itemsize: int) -> int:
    """Estimated bytes: the query tile, the key and value tiles in flight, and some room for barriers and layouts."""
    return (block_m + 2 * num_stages * block_n) * block_d * itemsize + 2 * KILOBYTE


def smallest_backward(head_dim: int, itemsize: int) -> int:
    """Estimated bytes of shared memory of the smallest configuration of the backward."""
    return _backward_shared_memory(16, 16, 1, padded_head_dim(head_dim), itemsize)


def _backward_shared_memory(own: int, step: int, num_stages: int, block_d: int, itemsize: int) -> int:
    """Estimated bytes: two owned tiles, two tiles a step in flight (three without a pipeline), P and dS on their way
    from one product to the next, and some room."""
    tiles = 2 * own + max(3, 2 * num_stages) * step
    return (tiles * block_d + 2 * own * step) * itemsize + 2 * KILOBYTE
