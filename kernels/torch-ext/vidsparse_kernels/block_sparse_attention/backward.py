"""Triton backward kernels over block lists: one for the gradient of query, one for those of key and value.

Probabilities are recomputed from the LSE of the forward. The kernel of query walks the lists of the mask, that of key
and value the transposed lists, so each program owns what it writes: no atomics, and the same bits in every run. Masks with
blocks of variable size come as lists of tiles, in both directions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from .configs import (
    MIN_DESCRIPTOR_FLOPS,
    BackwardConfig,
    BackwardTiles,
    backward_config,
    padded_head_dim,
    smallest_backward,
)
from .forward import (
    LOG2_E,
    TensorDescriptor,
    _add_product,
    _broadcast_strides,
    _descriptor,
    _exp2,
    _listed_tiles,
    _load_tile,
    _own_rows,
    _product,
    _readable,
    _tma_can_read,
)
from .tiles import own_tiles, tile_lists

ROWS_BLOCK = 64
"""Rows per program of the kernel that prepares the LSE and delta."""

SHAPE_INTEGERS = [
    "counts_stride_b", "counts_stride_h", "indices_stride_b", "indices_stride_h", "bias_stride_b", "bias_stride_h",
    "own_stride_b", "own_stride_h", "num_heads", "seq_len_q", "seq_len_kv",
]  # fmt: skip
"""Arguments that one compilation serves whatever their value; strides of q, k, v and gradients decide how wide loads
are, and num_rows is always a multiple of 16."""


@triton.jit(do_not_specialize=["num_heads", "seq_len_q"])
def block_sparse_backward_rows_kernel(
    grad_out, out, lse_ptr, grad_lse_ptr, lse_log2_ptr, delta_ptr,
    grad_out_stride_b, grad_out_stride_s, grad_out_stride_h, grad_out_stride_d,
    out_stride_b, out_stride_s, out_stride_h, out_stride_d,
    num_heads, seq_len_q, num_rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    REFINE: tl.constexpr,
):  # fmt: skip
    """What the other kernels need per row: the LSE in base 2, and delta = rowsum(dO * O) - dLSE.

    REFINE: only -dLSE, as the kernel of query adds the rest. Rows that attend to nothing or lie past the end get +inf and
    0, which makes their probabilities 0 later on.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2)
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    start = tl.program_id(0) * BLOCK
    if REFINE:
        delta = tl.zeros([BLOCK], tl.float32)
    else:
        # [BLOCK, BLOCK_D]
        grad_o = _load_tile(
            grad_out + wide_batch * grad_out_stride_b + wide_head * grad_out_stride_h,
            batch, head, start, seq_len_q, grad_out_stride_s, grad_out_stride_d,
            HEAD_DIM, BLOCK, BLOCK_D, False, True,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        o = _load_tile(
            out + wide_batch * out_stride_b + wide_head * out_stride_h,
            batch, head, start, seq_len_q, out_stride_s, out_stride_d,
            HEAD_DIM, BLOCK, BLOCK_D, False, True,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        delta = tl.sum(grad_o.to(tl.float32) * o.to(tl.float32), 1)
    rows = start + tl.arange(0, BLOCK)
    source = (wide_batch * num_heads + wide_head) * seq_len_q
    lse = tl.load(lse_ptr + source + rows, mask=rows < seq_len_q, other=float("-inf"))
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + source + rows, mask=rows < seq_len_q, other=0.0).to(tl.float32)
    empty = lse == float("-inf")
    target = (wide_batch * num_heads + wide_head) * num_rows
    inside = rows < num_rows
    tl.store(lse_log2_ptr + target + rows, tl.where(empty, float("inf"), lse * 1.4426950408889634), mask=inside)
    tl.store(delta_ptr + target + rows, tl.where(empty, 0.0, delta), mask=inside)


@triton.jit
def _weights_of_tile(
    q, grad_o, lse, key, value, bias_ptr, batch, kv_head, start_n, end_n, qk_scale_log2,
    key_stride_s, key_stride_d, value_stride_s, value_stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, RAGGED: tl.constexpr, REFINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys start_n .. start_n + BLOCK_N `[BLOCK_N, BLOCK_D]`, their probabilities P and dP = dO V^T `[BLOCK_M, BLOCK_N]`."""
    k = _load_tile(
        key, batch, kv_head, start_n, end_n, key_stride_s, key_stride_d,
        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, RAGGED,
    )  # fmt: skip
    v = _load_tile(
        value, batch, kv_head, start_n, end_n, value_stride_s, value_stride_d,
        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, RAGGED,
    )  # fmt: skip
    logits = _product(q, k, BLOCK_D, REFINE, PRECISION)
    grad_weights = _product(grad_o, v, BLOCK_D, REFINE, PRECISION)
    if HAS_BIAS:
        columns = start_n + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + columns, mask=columns < end_n, other=float("-inf"))
        logits = logits * qk_scale_log2 + (bias.to(tl.float32) * 1.4426950408889634)[None, :]
        weights = _exp2(logits - lse[:, None], REFINE)
    else:
        # Scaling inside the exponent lets the compiler fuse multiply and subtract.
        weights = _exp2(logits * qk_scale_log2 - lse[:, None], REFINE)
    return k, weights, grad_weights


@triton.jit
def _add_row_sums(
    mass, delta, q, grad_o, lse, key, value, bias_ptr, batch, kv_head, start_n, end_n, qk_scale_log2,
    key_stride_s, key_stride_d, value_stride_s, value_stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add sum P and sum P dP of the keys start_n .. start_n + BLOCK_N up to end_n."""
    _, weights, grad_weights = _weights_of_tile(
        q, grad_o, lse, key, value, bias_ptr, batch, kv_head, start_n, end_n, qk_scale_log2,
        key_stride_s, key_stride_d, value_stride_s, value_stride_d,
        HEAD_DIM, BLOCK_N, BLOCK_D, HAS_BIAS, DESCRIPTORS, True, True, PRECISION,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    inside = (start_n + tl.arange(0, BLOCK_N) < end_n)[None, :]
    # Past the end the logits are 0 or those of other blocks, whose weight can overflow.
    weights = tl.where(inside, weights, 0.0)
    mass += tl.sum(weights, 1)
    delta += tl.sum(tl.where(inside, weights * grad_weights, 0.0), 1)
    return mass, delta


@triton.jit
def _add_grad_query(
    acc, low, q, grad_o, lse, delta, key, value, bias_ptr, batch, kv_head, start_n, end_n, qk_scale_log2,
    key_stride_s, key_stride_d, value_stride_s, value_stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, RAGGED: tl.constexpr, REFINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS K of the keys start_n .. start_n + BLOCK_N, where RAGGED up to end_n, onto `acc` + `low`, without the scale."""
    k, weights, grad_weights = _weights_of_tile(
        q, grad_o, lse, key, value, bias_ptr, batch, kv_head, start_n, end_n, qk_scale_log2,
        key_stride_s, key_stride_d, value_stride_s, value_stride_d,
        HEAD_DIM, BLOCK_N, BLOCK_D, HAS_BIAS, DESCRIPTORS, RAGGED, REFINE, PRECISION,
    )  # fmt: skip
    grad_logits = weights * (grad_weights - delta[:, None])
    if RAGGED:
        # Past the end the logits are 0 or those of other blocks, whose weight can overflow. Most tiles are whole.
        if end_n - start_n < BLOCK_N:
            columns = start_n + tl.arange(0, BLOCK_N)
            grad_logits = tl.where((columns < end_n)[None, :], grad_logits, 0.0)
    return _add_product(acc, low, grad_logits.to(k.dtype), k, BLOCK_N, REFINE, PRECISION)


@triton.jit(do_not_specialize=[*SHAPE_INTEGERS, "indices_stride_m", "num_q_tiles"])
def block_sparse_backward_query_kernel(
    query, key, value, grad_out, grad_query, lse_ptr, delta_ptr, inverse_ptr, counts_ptr, indices_ptr, bias_ptr,
    own_blocks_ptr, own_tiles_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    key_stride_b, key_stride_s, key_stride_h, key_stride_d,
    value_stride_b, value_stride_s, value_stride_h, value_stride_d,
    grad_out_stride_b, grad_out_stride_s, grad_out_stride_h, grad_out_stride_d,
    grad_query_stride_b, grad_query_stride_s, grad_query_stride_h,
    counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m,
    bias_stride_b, bias_stride_h, own_stride_b, own_stride_h,
    num_heads, seq_len_q, seq_len_kv, num_rows, num_q_tiles, scale, qk_scale_log2,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, RAGGED_KV: tl.constexpr,
    HAS_BIAS: tl.constexpr, DESCRIPTORS: tl.constexpr, VARIABLE: tl.constexpr, REFINE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries of one head over their listed kv-blocks.

    query, key, value, grad_out are pointers or descriptors; lse (base 2), delta and inverse are
    `[batch, heads, num_rows]`. REFINE: a first walk over the keys finds what a row's probabilities miss of 1, because the
    LSE was rounded, and delta from the same numbers that it is taken from, where dO . O does not cancel to the last bit;
    both are kept for the other kernel.
    VARIABLE: own_blocks and own_tiles are the tiles of queries, counts and indices the lists of tiles of keys, packed
    as in `tiles`.
    """
    program = tl.program_id(0)
    slot = program % num_q_tiles
    head = (program // num_q_tiles) % num_heads
    batch = program // num_q_tiles // num_heads
    kv_head = head // GROUP_SIZE
    wide_batch, wide_head, wide_kv_head = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    own = wide_batch * own_stride_b + wide_head * own_stride_h + slot
    q_block, start_m, end_m = _own_rows(
        own_blocks_ptr, own_tiles_ptr, own, slot, seq_len_q, BLOCK_M, Q_BLOCK, VARIABLE
    )
    if VARIABLE:
        if end_m == 0:
            return

    if not DESCRIPTORS:
        query += wide_batch * query_stride_b + wide_head * query_stride_h
        key += wide_batch * key_stride_b + wide_kv_head * key_stride_h
        value += wide_batch * value_stride_b + wide_kv_head * value_stride_h
        grad_out += wide_batch * grad_out_stride_b + wide_head * grad_out_stride_h
    if HAS_BIAS:
        bias_ptr += wide_batch * bias_stride_b + wide_head * bias_stride_h
    indices_ptr += (
        wide_batch * indices_stride_b + wide_head * indices_stride_h + q_block.to(tl.int64) * indices_stride_m
    )
    count = tl.load(counts_ptr + wide_batch * counts_stride_b + wide_head * counts_stride_h + q_block)

    # [BLOCK_M, BLOCK_D]
    q = _load_tile(
        query, batch, head, start_m, seq_len_q, query_stride_s, query_stride_d,
        HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS, True,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    grad_o = _load_tile(
        grad_out, batch, head, start_m, seq_len_q, grad_out_stride_s, grad_out_stride_d,
        HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS, True,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    # [BLOCK_M]; the rows of uniform blocks are padded to whole ones, so nothing is masked.
    tokens = start_m + tl.arange(0, BLOCK_M)
    rows = (wide_batch * num_heads + wide_head) * num_rows + tokens
    if VARIABLE:
        lse = tl.load(lse_ptr + rows, mask=tokens < end_m, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=tokens < end_m, other=0.0)
    else:
        lse = tl.load(lse_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    TILES: tl.constexpr = 1 if VARIABLE else KV_BLOCK // BLOCK_N  # pyright: ignore[reportAssignmentType]
    num_tiles, last, overhang = _listed_tiles(indices_ptr, count, seq_len_kv, KV_BLOCK, BLOCK_N, VARIABLE)
    inverse = tl.zeros([BLOCK_M], tl.float32)
    if REFINE:
        mass = tl.zeros([BLOCK_M], tl.float32)
        mean = tl.zeros([BLOCK_M], tl.float32)
        for tile in tl.range(0, num_tiles):  # pyright: ignore[reportGeneralTypeIssues]
            entry = tl.load(indices_ptr + tile // TILES)
            if VARIABLE:
                start_n = entry >> 8
                end_n = start_n + (entry & 255) + 1
            else:
                start_n = entry * KV_BLOCK + (tile % TILES) * BLOCK_N
                end_n = seq_len_kv
            mass, mean = _add_row_sums(
                mass, mean, q, grad_o, lse, key, value, bias_ptr, batch, kv_head, start_n, end_n, qk_scale_log2,
                key_stride_s, key_stride_d, value_stride_s, value_stride_d,
                HEAD_DIM, BLOCK_N, BLOCK_D, HAS_BIAS, DESCRIPTORS, PRECISION,
            )  # fmt: skip
        inverse = tl.where(mass > 0.0, tl.div_rn(tl.full([BLOCK_M], 1.0, tl.float32), mass), 0.0)
        delta += mean * inverse
        tl.store(inverse_ptr + rows, inverse, mask=tokens < end_m)
        tl.store(delta_ptr + rows, delta, mask=tokens < end_m)
    num_whole = num_tiles
    if RAGGED_KV and not VARIABLE:
        # The cut tile of the last block stays out of the loop.
        if overhang > 0:
            num_whole -= 1

    for tile in tl.range(0, num_whole):  # pyright: ignore[reportGeneralTypeIssues]
        entry = tl.load(indices_ptr + tile // TILES)
        if VARIABLE:
            start_n = entry >> 8
            end_n = start_n + (entry & 255) + 1
        else:
            start_n = entry * KV_BLOCK + (tile % TILES) * BLOCK_N
            end_n = seq_len_kv
        acc, low = _add_grad_query(
            acc, low, q, grad_o, lse, delta, key, value, bias_ptr, batch, kv_head, start_n, end_n, qk_scale_log2,
            key_stride_s, key_stride_d, value_stride_s, value_stride_d,
            HEAD_DIM, BLOCK_N, BLOCK_D, HAS_BIAS, DESCRIPTORS, VARIABLE, REFINE, PRECISION,
        )  # fmt: skip
    if RAGGED_KV and not VARIABLE:
        if num_whole < num_tiles:
            start_n = last * KV_BLOCK + (num_whole % TILES) * BLOCK_N
            acc, low = _add_grad_query(
                acc, low, q, grad_o, lse, delta, key, value, bias_ptr, batch, kv_head, start_n, seq_len_kv,
                qk_scale_log2, key_stride_s, key_stride_d, value_stride_s, value_stride_d,
                HEAD_DIM, BLOCK_N, BLOCK_D, HAS_BIAS, DESCRIPTORS, True, REFINE, PRECISION,  # pyright: ignore[reportArgumentType]
            )  # fmt: skip

    if REFINE:
        acc = (acc + low) * inverse[:, None]
    dims = tl.arange(0, BLOCK_D)
    grad_query += wide_batch * grad_query_stride_b + wide_head * grad_query_stride_h
    pointers = grad_query + tokens.to(tl.int64)[:, None] * grad_query_stride_s + dims[None, :]
    inside = (tokens < end_m)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, (acc * scale).to(grad_query.dtype.element_ty), mask=inside)


@triton.jit
def _add_grad_key_value(
    acc_k, acc_v, low_k, low_v, k, v, bias, query, grad_out, lse_ptr, delta_ptr, inverse_ptr, batch, head, start_m, end_m,
    qk_scale_log2, query_stride_s, query_stride_d, grad_out_stride_s, grad_out_stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, RAGGED: tl.constexpr, VARIABLE: tl.constexpr, REFINE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add P^T dO and dS^T Q of the queries start_m .. start_m + BLOCK_M, where RAGGED up to end_m, onto the sums.

    The scale is still missing.
    Everything is computed transposed, keys down: P^T and dS^T then are left operands as they come out of the products.
    """
    q = _load_tile(
        query, batch, head, start_m, end_m, query_stride_s, query_stride_d,
        HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS, RAGGED,
    )  # fmt: skip
    grad_o = _load_tile(
        grad_out, batch, head, start_m, end_m, grad_out_stride_s, grad_out_stride_d,
        HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS, RAGGED,
    )  # fmt: skip
    # [BLOCK_M]; the rows of uniform blocks are padded to whole ones, so nothing is masked.
    rows = start_m + tl.arange(0, BLOCK_M)
    if VARIABLE:
        # Rows of other blocks get probability 0.
        lse = tl.load(lse_ptr + rows, mask=rows < end_m, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < end_m, other=0.0)
    else:
        lse = tl.load(lse_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    # [BLOCK_N, BLOCK_M]
    logits = _product(k, q, BLOCK_D, REFINE, PRECISION)
    grad_weights = _product(v, grad_o, BLOCK_D, REFINE, PRECISION)
    if HAS_BIAS:
        weights = _exp2(logits * qk_scale_log2 + bias[:, None] - lse[None, :], REFINE)
    else:
        # Scaling inside the exponent lets the compiler fuse multiply and subtract.
        weights = _exp2(logits * qk_scale_log2 - lse[None, :], REFINE)
    if REFINE:
        weights *= tl.load(inverse_ptr + rows, mask=rows < end_m, other=0.0)[None, :]
    acc_v, low_v = _add_product(acc_v, low_v, weights.to(grad_o.dtype), grad_o, BLOCK_M, REFINE, PRECISION)
    grad_logits = weights * (grad_weights - delta[None, :])
    acc_k, low_k = _add_product(acc_k, low_k, grad_logits.to(q.dtype), q, BLOCK_M, REFINE, PRECISION)
    return acc_k, acc_v, low_k, low_v


@triton.jit(do_not_specialize=[*SHAPE_INTEGERS, "indices_stride_n", "num_kv_tiles"])
def block_sparse_backward_key_value_kernel(
    query, key, value, grad_out, grad_key, grad_value, lse_ptr, delta_ptr, inverse_ptr, counts_ptr, indices_ptr,
    bias_ptr, own_blocks_ptr, own_tiles_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    key_stride_b, key_stride_s, key_stride_h, key_stride_d,
    value_stride_b, value_stride_s, value_stride_h, value_stride_d,
    grad_out_stride_b, grad_out_stride_s, grad_out_stride_h, grad_out_stride_d,
    grad_key_stride_b, grad_key_stride_s, grad_key_stride_h,
    counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_n,
    bias_stride_b, bias_stride_h, own_stride_b, own_stride_h,
    num_heads, seq_len_q, seq_len_kv, num_rows, num_kv_tiles, scale, qk_scale_log2,
    GROUP_SIZE: tl.constexpr, MEMBERS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    RAGGED_Q: tl.constexpr, HAS_BIAS: tl.constexpr, DESCRIPTORS: tl.constexpr, VARIABLE: tl.constexpr,
    REFINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one kv head, over the q-blocks that list them in each head of its group.

    query, key, value, grad_out are pointers or descriptors; lse (base 2), delta and, where REFINE, inverse are
    `[batch, heads, num_rows]`; grad_key and grad_value share their strides. MEMBERS is GROUP_SIZE, or 1: then each query
    head gets gradients of its own. VARIABLE: own_blocks and own_tiles are the tiles of keys, counts and indices the lists
    of tiles of queries, packed as in `tiles`.
    """
    program = tl.program_id(0)
    num_owners = num_heads // MEMBERS
    slot = program % num_kv_tiles
    owner = (program // num_kv_tiles) % num_owners
    batch = program // num_kv_tiles // num_owners
    kv_head = owner // (GROUP_SIZE // MEMBERS)
    wide_batch, wide_owner, wide_kv_head = batch.to(tl.int64), owner.to(tl.int64), kv_head.to(tl.int64)
    # Heads that share a program share their blocks.
    own = wide_batch * own_stride_b + wide_owner * MEMBERS * own_stride_h + slot
    kv_block, start_n, end_n = _own_rows(
        own_blocks_ptr, own_tiles_ptr, own, slot, seq_len_kv, BLOCK_N, KV_BLOCK, VARIABLE
    )
    if VARIABLE:
        if end_n == 0:
            return

    if not DESCRIPTORS:
        query += wide_batch * query_stride_b
        key += wide_batch * key_stride_b + wide_kv_head * key_stride_h
        value += wide_batch * value_stride_b + wide_kv_head * value_stride_h
        grad_out += wide_batch * grad_out_stride_b
    # [BLOCK_N, BLOCK_D]; keys past the end of the tile only reach rows that are not stored.
    k = _load_tile(
        key, batch, kv_head, start_n, seq_len_kv, key_stride_s, key_stride_d,
        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, True,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    v = _load_tile(
        value, batch, kv_head, start_n, seq_len_kv, value_stride_s, value_stride_d,
        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, True,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    tokens = start_n + tl.arange(0, BLOCK_N)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    low_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    low_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    TILES: tl.constexpr = 1 if VARIABLE else Q_BLOCK // BLOCK_M  # pyright: ignore[reportAssignmentType]
    for member in tl.range(0, MEMBERS):  # pyright: ignore[reportGeneralTypeIssues]
        head = owner * MEMBERS + member
        wide_head = head.to(tl.int64)
        if DESCRIPTORS:
            queries = query
            grads = grad_out
        else:
            queries = query + wide_head * query_stride_h
            grads = grad_out + wide_head * grad_out_stride_h
        row_start = (wide_batch * num_heads + wide_head) * num_rows
        # [BLOCK_N]
        bias = tl.zeros([BLOCK_N], tl.float32)
        if HAS_BIAS:
            biases = bias_ptr + wide_batch * bias_stride_b + wide_head * bias_stride_h + tokens
            bias = tl.load(biases, mask=tokens < seq_len_kv, other=0.0).to(tl.float32) * 1.4426950408889634
        count = tl.load(counts_ptr + wide_batch * counts_stride_b + wide_head * counts_stride_h + kv_block)
        listed = indices_ptr + wide_batch * indices_stride_b + wide_head * indices_stride_h
        listed += kv_block.to(tl.int64) * indices_stride_n

        num_tiles, last, overhang = _listed_tiles(listed, count, seq_len_q, Q_BLOCK, BLOCK_M, VARIABLE)
        num_whole = num_tiles
        if RAGGED_Q and not VARIABLE:
            # Descriptors read zeros past the last query; pointers take a masked step after the loop.
            if overhang > 0:
                num_whole -= 1

        for tile in tl.range(0, num_whole):  # pyright: ignore[reportGeneralTypeIssues]
            entry = tl.load(listed + tile // TILES)
            if VARIABLE:
                start_m = entry >> 8
                end_m = start_m + (entry & 255) + 1
            else:
                start_m = entry * Q_BLOCK + (tile % TILES) * BLOCK_M
                end_m = seq_len_q
            acc_k, acc_v, low_k, low_v = _add_grad_key_value(
                acc_k, acc_v, low_k, low_v, k, v, bias, queries, grads, lse_ptr + row_start, delta_ptr + row_start,
                inverse_ptr + row_start, batch, head, start_m, end_m, qk_scale_log2,
                query_stride_s, query_stride_d, grad_out_stride_s, grad_out_stride_d,
                HEAD_DIM, BLOCK_M, BLOCK_D, HAS_BIAS, DESCRIPTORS, VARIABLE, VARIABLE, REFINE, PRECISION,
            )  # fmt: skip
        if RAGGED_Q and not VARIABLE:
            if num_whole < num_tiles:
                start_m = last * Q_BLOCK + (num_whole % TILES) * BLOCK_M
                acc_k, acc_v, low_k, low_v = _add_grad_key_value(
                    acc_k, acc_v, low_k, low_v, k, v, bias, queries, grads, lse_ptr + row_start, delta_ptr + row_start,
                    inverse_ptr + row_start, batch, head, start_m, seq_len_q, qk_scale_log2,
                    query_stride_s, query_stride_d, grad_out_stride_s, grad_out_stride_d,
                    HEAD_DIM, BLOCK_M, BLOCK_D, HAS_BIAS, DESCRIPTORS, True, False, REFINE, PRECISION,  # pyright: ignore[reportArgumentType]
                )  # fmt: skip

    if REFINE:
        acc_k += low_k
        acc_v += low_v
    dims = tl.arange(0, BLOCK_D)
    offsets = wide_batch * grad_key_stride_b + wide_owner * grad_key_stride_h
    offsets += tokens.to(tl.int64)[:, None] * grad_key_stride_s + dims[None, :]
    inside = (tokens < end_n)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(grad_key + offsets, (acc_k * scale).to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + offsets, acc_v.to(grad_value.dtype.element_ty), mask=inside)


def triton_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    key_bias: Tensor | None,
    config: BackwardConfig | None = None,
    hopper: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from what the forward returned; the same bits in every run.

    Args:
        grad_out: gradient of `out`, its shape and dtype, any strides.
        grad_lse: gradient of `lse`, its shape, or None where it is not used.
        query: `[batch, seq_len_q, num_heads, head_dim]` bf16, fp16 or fp32, any strides.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        out: result of the forward, like `query`.
        lse: its natural-log LSE, fp32 `[batch, num_heads, seq_len_q]`, -inf in rows that attend to nothing.
        block_mask, scale, key_bias: as in the forward.
        config: tile shapes and variants; default: the table in `configs`.
        hopper: whether the forward ran on the Hopper kernel; the gradient of query then does, where it can.

    Returns:
        Contiguous gradients in the shapes and dtypes of query, key and value; 0 in rows without any block and for
        keys that no q-block lists.
    """
    batch, seq_len_q, num_heads, head_dim = query.shape
    seq_len_kv, num_kv_heads = key.shape[1:3]
    if query.numel() == 0:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    variable, group_size = block_mask.variable, num_heads // num_kv_heads
    members, kv_shape, kv_dtype = group_size, key.shape, key.dtype
    if group_size > 1 and block_mask.kv_offsets is not None and block_mask.kv_offsets.shape[1] > 1:
        # Query heads that share a kv head cut its keys differently: each gets gradients of its own, added up below.
        members, kv_shape, kv_dtype = 1, (batch, seq_len_kv, num_heads, head_dim), torch.float32
    grad_key, grad_value = (torch.empty(kv_shape, dtype=kv_dtype, device=key.device) for _ in range(2))
    if config is None:
        config = backward_config_for(query, key, value, grad_out, block_mask)
    bias = None
    if key_bias is not None:
        bias = key_bias if key_bias.stride(-1) == 1 else key_bias.contiguous()
    block_d = padded_head_dim(head_dim)
    num_rows = -(-seq_len_q // 16) * 16 if variable else block_mask.num_q_blocks * block_mask.q_block_size
    per_row = torch.empty(3, batch, num_heads, num_rows, dtype=torch.float32, device=query.device)
    lse_log2, delta, inverse = per_row.unbind()

    def launch(kernel: Any, tiles: BackwardTiles, *grads: Tensor) -> None:
        """One of the two kernels, over the lists that it walks; it writes `grads`."""
        transposed = kernel is block_sparse_backward_key_value_kernel
        own_length, own_size, other_size = (
            (seq_len_kv, tiles.block_n, tiles.block_m) if transposed else (seq_len_q, tiles.block_m, tiles.block_n)
        )
        if variable:
            lists = tile_lists(block_mask, other_size, transposed=transposed)
        else:
            lists = block_mask.transpose() if transposed else (block_mask.kv_num_blocks, block_mask.kv_indices)
        counts, indices = _readable(*lists)
        own_blocks, own = counts, counts
        num_tiles = triton.cdiv(own_length, own_size)
        if variable:
            own_blocks, own = own_tiles(block_mask, own_size, transposed=transposed)
            num_tiles = own.shape[-1]
        arrays: list[Any] = [query, key, value, grad_out]
        if tiles.descriptors:
            sizes = (tiles.block_m, tiles.block_n, tiles.block_n, tiles.block_m)
            arrays = [_descriptor(x, size, block_d) for x, size in zip(arrays, sizes)]
        if transposed:
            ragged = seq_len_q % tiles.block_m != 0 and not tiles.descriptors and not variable
            special = {"RAGGED_Q": ragged, "MEMBERS": members}
        else:
            special = {"RAGGED_KV": seq_len_kv % tiles.block_n != 0 and not variable}
        kernel[(num_tiles * grads[0].shape[2] * batch,)](
            *arrays, *grads, lse_log2, delta, inverse, counts, indices, bias if bias is not None else lse_log2,
            own_blocks, own,
            *query.stride(), *key.stride(), *value.stride(), *grad_out.stride(), *grads[0].stride()[:3],
            *_broadcast_strides(counts, 2), *_broadcast_strides(indices, 2), indices.stride(2),
            *(_broadcast_strides(bias, 2) if bias is not None else (0, 0)), *_broadcast_strides(own, 2),
            num_heads, seq_len_q, seq_len_kv, num_rows, num_tiles, scale, scale * LOG2_E,
            GROUP_SIZE=group_size, HEAD_DIM=head_dim, BLOCK_D=block_d,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            Q_BLOCK=block_mask.q_block_size, KV_BLOCK=block_mask.kv_block_size,
            HAS_BIAS=bias is not None, DESCRIPTORS=tiles.descriptors, VARIABLE=variable,
            REFINE=query.dtype == torch.float32, PRECISION="ieee", **special,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    rows_kernel: Any = block_sparse_backward_rows_kernel
    with torch.cuda.device_of(query):
        rows_kernel[(triton.cdiv(num_rows, ROWS_BLOCK), num_heads, batch)](
            grad_out, out, lse.contiguous(), grad_lse.contiguous() if grad_lse is not None else lse, lse_log2, delta,
            *grad_out.stride(), *out.stride(), num_heads, seq_len_q, num_rows,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK=ROWS_BLOCK, HAS_GRAD_LSE=grad_lse is not None,
            REFINE=query.dtype == torch.float32, num_warps=4,
        )  # fmt: skip
        # In this order: in fp32 the first finds delta and what rounding the LSE did to each row, and the second uses them.
        on_hopper = hopper and bias is None
        if on_hopper:
            # Needs a later Triton than this file.
            from .hopper_backward import hopper_grad_query, takes

            on_hopper = takes(query, key, value, grad_out, block_mask)
            if on_hopper:
                hopper_grad_query(query, key, value, grad_out, grad_query, lse_log2, delta, block_mask, scale=scale)
        if not on_hopper:
            launch(block_sparse_backward_query_kernel, config.grad_query, grad_query)
        launch(block_sparse_backward_key_value_kernel, config.grad_key_value, grad_key, grad_value)
    if members != group_size:
        grad_key, grad_value = (
            x.unflatten(2, (num_kv_heads, group_size)).sum(3).to(key.dtype) for x in (grad_key, grad_value)
        )
    return grad_query, grad_key, grad_value


def backward_config_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    block_mask: BlockMask,
    *,
    descriptors: bool | None = None,
) -> BackwardConfig:
    """What the table says for these arguments on their device.

    `descriptors=None` uses tensor descriptors where they pay, True wherever they are possible, False nowhere.
    """
    if descriptors is None:
        work = 10 * query.shape[0] * query.shape[1] * key.shape[1] * query.shape[2] * query.shape[3]
        descriptors = work > MIN_DESCRIPTOR_FLOPS
    capability, shared_memory = _device_limits(query)
    return backward_config(
        capability=capability,
        shared_memory=shared_memory,
        head_dim=query.shape[3],
        itemsize=query.element_size(),
        q_block_size=block_mask.q_block_size,
        kv_block_size=block_mask.kv_block_size,
        descriptors_possible=descriptors
        and TensorDescriptor is not None
        and all(_tma_can_read(x) for x in (query, key, value, grad_out)),
    )


def unsupported_backward(query: Tensor) -> str | None:
    """Why the backward cannot do what the forward can, as the end of a sentence that starts with its name, or None."""
    if query.device.type == "cpu":
        return None
    shared_memory = _device_limits(query)[1]
    needed = smallest_backward(query.shape[3], query.element_size())
    if needed > shared_memory:
        size = f"head_dim {query.shape[3]} in {query.dtype}"
        return f"has no backward for {size} on a GPU with {shared_memory} bytes of shared memory"
    return None


def _device_limits(x: Tensor) -> tuple[tuple[int, int] | None, int]:
    """CUDA compute capability, None on any other device, and the bytes of shared memory that a program may use."""
    if x.device.type != "cuda":
        return None, 64 * 1024
    properties = torch.cuda.get_device_properties(x.device)
    capability = (properties.major, properties.minor) if torch.version.hip is None else None
    return capability, getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
