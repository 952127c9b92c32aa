"""Triton backward kernels of the pooled tail.

With p_ij the weight of virtual token j in row i, g the gradient of the output, H the first-order matrix and s the scale:

    dS_ij = p_ij (g_i . v̄_j - g_i . o_i + dLSE_i),    o = out - s q H,
    dq = s (dS k̄ + g H^T),    dk̄ = s dS^T q,    dv̄ = p^T g,    dH = s q^T g over rows that are not empty.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from ..block_sparse_attention.configs import padded_head_dim
from ..block_sparse_attention.forward import _load_tile
from .forward import SHAPE_INTEGERS, bias_of, load_columns, owned_tile, q_tiles, rounded, shared_memory_of, tile_limit
from .pooling import broadcast_strides
from .pools import Pools
from .words import listed_words

TARGET_PROGRAMS = 1024
"""Programs of the gradient of the pools to aim at; the same on every device, so that sums are too."""


@triton.jit(do_not_specialize=SHAPE_INTEGERS)
def tail_grad_query_kernel(
    query_ptr, out_ptr, grad_out_ptr, grad_lse_ptr, lse_ptr, keys_ptr, values_ptr, first_order_ptr,
    grad_query_ptr, shift_ptr, inverse_ptr, words_ptr, sizes_ptr, own_blocks_ptr, own_tiles_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    grad_out_stride_b, grad_out_stride_s, grad_out_stride_h, grad_out_stride_d,
    words_stride_b, words_stride_h, words_stride_m, sizes_stride_b, sizes_stride_h, own_stride_b, own_stride_h,
    num_heads, num_pools, num_kv_blocks, num_q_tiles, seq_len_q, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr, Q_BLOCK: tl.constexpr, FIRST_ORDER: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    VARIABLE: tl.constexpr, REFINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq for BLOCK_M queries of one head, and what their dS is shifted by; out and grad_query are contiguous.

    REFINE: the LSE was rounded, so the weights of a row miss 1 by as much; one over their sum makes it good.
    """
    program = tl.program_id(0)
    slot = program % num_q_tiles
    head = (program // num_q_tiles) % num_heads
    batch = program // num_q_tiles // num_heads
    pool = head // (num_heads // num_pools)
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    own = wide_batch * own_stride_b + wide_head * own_stride_h
    q_block, start_m, end_m = owned_tile(
        slot, own, own_blocks_ptr, own_tiles_ptr, seq_len_q, BLOCK_M, Q_BLOCK, VARIABLE
    )
    if end_m < 0:
        return
    pool_row = wide_batch * num_pools + pool
    keys_ptr += pool_row * num_kv_blocks * HEAD_DIM
    values_ptr += pool_row * num_kv_blocks * HEAD_DIM
    query_ptr += wide_batch * query_stride_b + wide_head * query_stride_h
    grad_out_ptr += wide_batch * grad_out_stride_b + wide_head * grad_out_stride_h
    words_ptr += wide_batch * words_stride_b + wide_head * words_stride_h + q_block.to(tl.int64) * words_stride_m
    sizes_ptr += wide_batch * sizes_stride_b + pool.to(tl.int64) * sizes_stride_h
    plain = (wide_batch * seq_len_q * num_heads + wide_head) * HEAD_DIM

    # [BLOCK_M, BLOCK_D]
    q = _load_tile(
        query_ptr, batch, head, start_m, end_m, query_stride_s, query_stride_d,
        HEAD_DIM, BLOCK_M, BLOCK_D, False, True,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    grad_o = _load_tile(
        grad_out_ptr, batch, head, start_m, end_m, grad_out_stride_s, grad_out_stride_d,
        HEAD_DIM, BLOCK_M, BLOCK_D, False, True,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    o = _load_tile(
        out_ptr + plain, batch, head, start_m, end_m, num_heads * HEAD_DIM, 1,
        HEAD_DIM, BLOCK_M, BLOCK_D, False, True,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    tokens = start_m + tl.arange(0, BLOCK_M)
    inside = tokens < end_m
    rows = (wide_batch * num_heads + wide_head) * seq_len_q + tokens
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("-inf"))
    empty = lse == float("-inf")
    # Base 2; infinite where a row has no weight.
    lse_log2 = tl.where(empty, float("inf"), lse * 1.4426950408889634)
    shift = 0.0 - tl.sum(grad_o.to(tl.float32) * o.to(tl.float32), 1)  # pyright: ignore[reportOperatorIssue]
    if HAS_GRAD_LSE:
        shift += tl.load(grad_lse_ptr + rows, mask=inside, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if FIRST_ORDER:
        first_order_ptr += pool_row * HEAD_DIM * HEAD_DIM
        dims = tl.arange(0, BLOCK_D)
        for start_d in tl.static_range(0, HEAD_DIM, SLICE):  # pyright: ignore[reportGeneralTypeIssues]
            part_dims = start_d + tl.arange(0, SLICE)
            # [SLICE, BLOCK_D], row d of it column d of the matrix
            matrix = tl.load(
                first_order_ptr + dims[None, :] * HEAD_DIM + part_dims[:, None],
                mask=(part_dims < HEAD_DIM)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
            )  # fmt: skip
            pointers = grad_out_ptr + tokens.to(tl.int64)[:, None] * grad_out_stride_s
            pointers += part_dims.to(tl.int64)[None, :] * grad_out_stride_d
            part = tl.load(pointers, mask=inside[:, None] & (part_dims < HEAD_DIM)[None, :], other=0.0)
            acc = tl.dot(part, matrix, acc, input_precision=PRECISION)
        # g . (s q H), which the matrix carries the scale for.
        shift += tl.sum(acc * q.to(tl.float32), 1)
        acc = tl.where(empty[:, None], 0.0, acc / scale)
    if REFINE:
        # Divided by the sum of the weights in the end, as the other terms are not.
        through_matrix = acc
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
    shift = tl.where(empty, 0.0, shift)
    tl.store(shift_ptr + rows, shift, mask=inside)
    word, size = load_columns(words_ptr, sizes_ptr, 0, num_kv_blocks, BLOCK_N)
    for start_n in tl.range(0, num_kv_blocks, BLOCK_N):  # pyright: ignore[reportGeneralTypeIssues]
        bias = bias_of(word, size, BLOCK_N)
        word, size = load_columns(words_ptr, sizes_ptr, start_n + BLOCK_N, num_kv_blocks, BLOCK_N)
        k = _load_tile(
            keys_ptr, batch, pool, start_n, num_kv_blocks, HEAD_DIM, 1,
            HEAD_DIM, BLOCK_N, BLOCK_D, False, True,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        v = _load_tile(
            values_ptr, batch, pool, start_n, num_kv_blocks, HEAD_DIM, 1,
            HEAD_DIM, BLOCK_N, BLOCK_D, False, True,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634) + bias[None, :]
        weights = tl.exp2(logits - lse_log2[:, None])
        if REFINE:
            mass += tl.sum(weights, 1)  # pyright: ignore[reportPossiblyUnboundVariable, reportOperatorIssue]
        grad_weights = tl.dot(grad_o, tl.trans(v), input_precision=PRECISION)
        grad_logits = weights * (grad_weights + shift[:, None])
        acc = tl.dot(grad_logits.to(k.dtype), k, acc, input_precision=PRECISION)
    if REFINE:
        inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, mass))  # pyright: ignore[reportPossiblyUnboundVariable]
        tl.store(inverse_ptr + rows, inverse, mask=inside)
        acc = acc * inverse[:, None] + through_matrix  # pyright: ignore[reportPossiblyUnboundVariable]
    dims = tl.arange(0, BLOCK_D)
    pointers = grad_query_ptr + plain + tokens.to(tl.int64)[:, None] * (num_heads * HEAD_DIM) + dims[None, :]
    tl.store(
        pointers, (acc * scale).to(grad_query_ptr.dtype.element_ty), mask=inside[:, None] & (dims < HEAD_DIM)[None, :]
    )


@triton.jit(do_not_specialize=[*SHAPE_INTEGERS, "num_splits", "per_split"])
def tail_grad_pools_kernel(
    query_ptr, grad_out_ptr, lse_ptr, shift_ptr, inverse_ptr, keys_ptr, values_ptr, grad_keys_ptr, grad_values_ptr,
    words_ptr, sizes_ptr, own_blocks_ptr, own_tiles_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    grad_out_stride_b, grad_out_stride_s, grad_out_stride_h, grad_out_stride_d,
    words_stride_b, words_stride_h, words_stride_m, sizes_stride_b, sizes_stride_h, own_stride_b, own_stride_h,
    num_heads, num_pools, num_kv_blocks, num_q_tiles, seq_len_q, num_splits, per_split, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    Q_BLOCK: tl.constexpr, VARIABLE: tl.constexpr, REFINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Part of dk̄ and dv̄ of BLOCK_N virtual tokens: what `per_split` tiles of queries of each head in the group add."""
    start_n = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    program = tl.program_id(2)
    pool = program % num_pools
    batch = program // num_pools
    group_size = num_heads // num_pools
    wide_batch, wide_pool = batch.to(tl.int64), pool.to(tl.int64)
    pool_row = wide_batch * num_pools + wide_pool
    place = pool_row * num_kv_blocks * HEAD_DIM
    # [BLOCK_N, BLOCK_D]
    k = _load_tile(
        keys_ptr + place, batch, pool, start_n, num_kv_blocks, HEAD_DIM, 1,
        HEAD_DIM, BLOCK_N, BLOCK_D, False, True,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    v = _load_tile(
        values_ptr + place, batch, pool, start_n, num_kv_blocks, HEAD_DIM, 1,
        HEAD_DIM, BLOCK_N, BLOCK_D, False, True,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sizes_ptr += wide_batch * sizes_stride_b + wide_pool * sizes_stride_h
    first_slot = split * per_split
    last_slot = tl.minimum(first_slot + per_split, num_q_tiles)
    for step in tl.range(0, (last_slot - first_slot) * group_size):  # pyright: ignore[reportGeneralTypeIssues]
        slot = first_slot + step // group_size
        head = pool * group_size + step % group_size
        wide_head = head.to(tl.int64)
        own = wide_batch * own_stride_b + wide_head * own_stride_h
        q_block, start_m, end_m = owned_tile(
            slot, own, own_blocks_ptr, own_tiles_ptr, seq_len_q, BLOCK_M, Q_BLOCK, VARIABLE
        )
        q = _load_tile(
            query_ptr + wide_batch * query_stride_b + wide_head * query_stride_h, batch, head, start_m, end_m,
            query_stride_s, query_stride_d,
            HEAD_DIM, BLOCK_M, BLOCK_D, False, True,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        grad_o = _load_tile(
            grad_out_ptr + wide_batch * grad_out_stride_b + wide_head * grad_out_stride_h, batch, head, start_m, end_m,
            grad_out_stride_s, grad_out_stride_d,
            HEAD_DIM, BLOCK_M, BLOCK_D, False, True,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        tokens = start_m + tl.arange(0, BLOCK_M)
        rows = (wide_batch * num_heads + wide_head) * seq_len_q + tokens
        lse = tl.load(lse_ptr + rows, mask=tokens < end_m, other=float("-inf"))
        lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
        shift = tl.load(shift_ptr + rows, mask=tokens < end_m, other=0.0)
        row_words = words_ptr + wide_batch * words_stride_b + wide_head * words_stride_h
        word, size = load_columns(
            row_words + q_block.to(tl.int64) * words_stride_m, sizes_ptr, start_n, num_kv_blocks, BLOCK_N
        )
        bias = bias_of(word, size, BLOCK_N)
        # [BLOCK_N, BLOCK_M]
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634) + bias[:, None]
        weights = tl.exp2(logits - lse_log2[None, :])
        if REFINE:
            weights = weights * tl.load(inverse_ptr + rows, mask=tokens < end_m, other=0.0)[None, :]
        grad_v = tl.dot(weights.to(grad_o.dtype), grad_o, grad_v, input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(grad_o), input_precision=PRECISION)
        grad_logits = weights * (grad_weights + shift[None, :])
        grad_k = tl.dot(grad_logits.to(q.dtype), q, grad_k, input_precision=PRECISION)
    columns = start_n + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    place = (pool_row * num_splits + split) * num_kv_blocks * HEAD_DIM
    places = place + columns.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    inside = (columns < num_kv_blocks)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(grad_keys_ptr + places, grad_k * scale, mask=inside)
    tl.store(grad_values_ptr + places, grad_v, mask=inside)


@triton.jit(do_not_specialize=["num_heads", "num_pools", "num_splits", "per_split", "seq_len_q"])
def tail_grad_first_order_kernel(
    query_ptr, grad_out_ptr, lse_ptr, partial_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    grad_out_stride_b, grad_out_stride_s, grad_out_stride_h, grad_out_stride_d,
    num_heads, num_pools, num_splits, per_split, seq_len_q, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Part of s q^T g: `per_split` tokens of every head in the group, BLOCK_E columns, empty rows left out."""
    split = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    program = tl.program_id(2)
    pool = program % num_pools
    wide_batch = (program // num_pools).to(tl.int64)
    group_size = num_heads // num_pools
    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, seq_len_q)
    for member in tl.range(0, group_size):  # pyright: ignore[reportGeneralTypeIssues]
        head = (pool * group_size + member).to(tl.int64)
        queries = query_ptr + wide_batch * query_stride_b + head * query_stride_h
        grads = grad_out_ptr + wide_batch * grad_out_stride_b + head * grad_out_stride_h
        for start in tl.range(first, last, ROWS):  # pyright: ignore[reportGeneralTypeIssues]
            tokens = start + tl.arange(0, ROWS)
            lse = tl.load(
                lse_ptr + (wide_batch * num_heads + head) * seq_len_q + tokens, mask=tokens < last, other=float("-inf")
            )
            full = lse > float("-inf")
            pointers = queries + tokens.to(tl.int64)[:, None] * query_stride_s
            pointers += dims.to(tl.int64)[None, :] * query_stride_d
            q = tl.load(pointers, mask=full[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
            pointers = grads + tokens.to(tl.int64)[:, None] * grad_out_stride_s
            pointers += columns.to(tl.int64)[None, :] * grad_out_stride_d
            g = tl.load(pointers, mask=full[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
            acc = tl.dot(tl.trans(q), g, acc, input_precision=PRECISION)
    partial_ptr += (program.to(tl.int64) * num_splits + split) * HEAD_DIM * HEAD_DIM
    inside = (dims < HEAD_DIM)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(partial_ptr + dims[:, None] * HEAD_DIM + columns[None, :], acc * scale, mask=inside)


def triton_tail_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    pools: Pools,
    out: Tensor,
    lse: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    first_order: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query (its dtype) and of the keys, values and first-order matrix of `pools` (fp32).

    Args:
        grad_out, grad_lse: gradients of what the forward gave; grad_lse may be None.
        query, pools, block_mask, scale, first_order: as for `triton_tail`.
        out, lse: what the forward gave, contiguous.
    """
    batch, seq_len_q, num_heads, head_dim = query.shape
    keys, values, matrix = rounded(pools, query.dtype, scale if first_order else None)
    num_pools, num_kv_blocks = keys.shape[1:3]
    block_d, half = padded_head_dim(head_dim), query.element_size() <= 2
    grad_out = grad_out.to(query.dtype)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    shift = torch.empty_like(lse)
    inverse = shift if half else torch.empty_like(lse)
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    rows, num_stages = _tile_rows(query, block_d)
    block_m, block_n = min(rows, tile_limit(block_mask.q_block_size)), rows
    variable, own_blocks, own_starts, num_q_tiles = q_tiles(block_mask, block_m)
    words, sizes = listed_words(block_mask), pools.counts.to(torch.float32).log2()
    lists = (words, sizes, own_blocks, own_starts)
    strides = (
        *query.stride(), *grad_out.stride(), *broadcast_strides(words), words.stride(2), *broadcast_strides(sizes),
        *broadcast_strides(own_starts), num_heads, num_pools, num_kv_blocks, num_q_tiles, seq_len_q,
    )  # fmt: skip
    tile: dict[str, Any] = dict(
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, Q_BLOCK=block_mask.q_block_size,
        VARIABLE=variable, REFINE=not half, PRECISION="ieee", num_warps=4 if half else 8, num_stages=num_stages,
    )  # fmt: skip
    n_tiles = triton.cdiv(num_kv_blocks, block_n)
    per_split = triton.cdiv(num_q_tiles * n_tiles * batch * num_pools, TARGET_PROGRAMS)
    splits = triton.cdiv(num_q_tiles, per_split)
    shape = (batch, num_pools, splits, num_kv_blocks, head_dim)
    grad_keys, grad_values = (torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2))
    grad_matrix = None
    with torch.cuda.device_of(query):
        launch: Any = tail_grad_query_kernel[(num_q_tiles * num_heads * batch,)]
        launch(
            query, out, grad_out, lse if grad_lse is None else grad_lse, lse, keys, values,
            keys if matrix is None else matrix, grad_query, shift, inverse, *lists, *strides, scale,
            SLICE=min(64 if half else 16, block_d), FIRST_ORDER=first_order, HAS_GRAD_LSE=grad_lse is not None,
            **tile,
        )  # fmt: skip
        launch = tail_grad_pools_kernel[(n_tiles, splits, batch * num_pools)]
        launch(
            query, grad_out, lse, shift, inverse, keys, values, grad_keys, grad_values, *lists, *strides, splits, per_split,
            scale, **tile,
        )  # fmt: skip
        if first_order:
            tokens = max(512, triton.cdiv(seq_len_q * batch * num_pools, TARGET_PROGRAMS))
            parts = triton.cdiv(seq_len_q, tokens)
            partial = torch.empty(
                batch, num_pools, parts, head_dim, head_dim, dtype=torch.float32, device=query.device
            )
            block_e = min(block_d, (128 if block_d <= 128 else 64) if half else (32 if block_d <= 128 else 16))
            launch = tail_grad_first_order_kernel[(parts, triton.cdiv(head_dim, block_e), batch * num_pools)]
            launch(
                query, grad_out, lse, partial, *query.stride(), *grad_out.stride(),
                num_heads, num_pools, parts, tokens, seq_len_q, scale,
                HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_E=block_e, ROWS=64 if half else 32, PRECISION="ieee",
                num_warps=8 if block_d > 64 else 4, num_stages=2,
            )  # fmt: skip
            grad_matrix = partial.sum(2)
    return grad_query, grad_keys.sum(2), grad_values.sum(2), grad_matrix


def _tile_rows(query: Tensor, block_d: int) -> tuple[int, int]:
    """Rows of a tile on both sides, and loop steps in flight, that fit the device.

    Chosen from the compiler's report for 9.0, not from times.
    """
    itemsize = query.element_size()
    if itemsize <= 2:
        rows, stages = (64, 2) if block_d <= 128 else (32, 2)
    else:
        rows, stages = (32, 1) if block_d <= 128 else (16, 1)
    shared_memory = shared_memory_of(query)
    # Two owned tiles, two a step in flight, one of the first-order matrix, and P and dS between products.
    while itemsize * (block_d * rows * (3 + 2 * stages) + 2 * rows * rows) > shared_memory:
        if stages > 1:
            stages -= 1
        elif rows > 16:
            rows //= 2
        else:
            break
    return rows, stages
