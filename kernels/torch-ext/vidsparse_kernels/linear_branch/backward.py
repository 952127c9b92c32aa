"""Triton backward of the linear branch: totals of the queries, then one kernel for query and one for key and value.

With a = phi(q), b = phi(k), the denominators D, u_i = dO_i / D_i and delta_i = u_i . out_i, over the pairs that count:

    da_i = sum_j (u_i . v_j - delta_i) b_j = u_i W^T - delta_i z
    db_j = sum_i (u_i . v_j - delta_i) a_i = v_j T^T - t        dv_j = sum_i (a_i . b_j) u_i = b_j T

where W, z are the totals of the forward and T = sum_i a_i^T u_i, t = sum_i delta_i a_i. Each program starts from these
and takes off what its listed blocks add, or adds up what counts where that is less, as in the forward: 2 products a
pair of tiles for query and 4 for key and value, as in the backward of attention without recomputed exponentials. A
head in which some row keeps less than MIN_SHARE of its weight (but not nothing) is added up anew for all its keys. No
atomics, and the same bits in every run. u is kept times a power of two near a typical denominator, so that fp16 holds
it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from ..block_sparse_attention.backward import _device_limits
from ..block_sparse_attention.configs import MIN_DESCRIPTOR_FLOPS, BackwardConfig, backward_config, padded_head_dim
from ..block_sparse_attention.forward import TensorDescriptor, _broadcast_strides, _descriptor, _load_tile
from ..block_sparse_attention.forward import _tma_can_read as tma_can_read
from .forward import (
    MIN_SHARE,
    QueryTotals,
    _features,
    _features_gradient,
    _gap,
    _load_columns,
    _statistics,
    _through_memory,
    _times_state,
    block_sizes,
    chunk_size,
    in_parts,
    partial_totals,
    power_of_two,
    rows_are_aligned,
    totals,
    walks,
    weight_scale,
)

SHAPE_INTEGERS = [
    "counts_stride_b", "counts_stride_h", "indices_stride_b", "indices_stride_h", "own_stride_b", "own_stride_h",
    "num_heads", "seq_len_q", "seq_len_kv",
]  # fmt: skip
"""Arguments that one compilation serves whatever their value."""


@triton.jit
def _add_grad_query(
    acc, u, delta, key_features, value, batch, kv_head, start, end, sign,
    key_stride_s, value_stride_s, value_stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr, RAGGED: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add (u v^T - delta) b of the keys start .. start + BLOCK_N, `sign` times."""
    b = _load_tile(
        key_features, batch, kv_head, start, end, key_stride_s, 1,
        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, RAGGED,
    )  # fmt: skip
    v = _load_tile(
        value, batch, kv_head, start, end, value_stride_s, value_stride_d,
        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, RAGGED,
    )  # fmt: skip
    # [BLOCK_M, BLOCK_N]; keys that are not there have features 0.
    grad_weights = tl.dot(u, tl.trans(v), input_precision=PRECISION) - delta[:, None]
    if CUT:
        grad_weights = tl.where((start + tl.arange(0, BLOCK_N) < end)[None, :], grad_weights, 0.0)
    return tl.dot((grad_weights * sign).to(b.dtype), b, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=[*SHAPE_INTEGERS, "indices_stride_m", "num_q_tiles"])
def linear_backward_query_kernel(
    query, grad_out, out, rest, key_features, value, grad_query, denominator_ptr, state_ptr, sum_ptr, counts_ptr,
    indices_ptr, own_blocks_ptr, own_tiles_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    grad_out_stride_b, grad_out_stride_s, grad_out_stride_h, grad_out_stride_d,
    out_stride_b, out_stride_s, out_stride_h,
    key_stride_b, key_stride_s, key_stride_h,
    value_stride_b, value_stride_s, value_stride_h, value_stride_d,
    grad_query_stride_b, grad_query_stride_s, grad_query_stride_h,
    counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m,
    own_stride_b, own_stride_h,
    num_heads, seq_len_q, seq_len_kv, num_q_tiles, state_scale, row_scale, eps, min_share,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    STATE_PARTS: tl.constexpr, FEATURES: tl.constexpr, HAS_LISTS: tl.constexpr, VARIABLE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M queries of one head; arguments as in the forward kernel."""
    program = tl.program_id(0)
    slot = program % num_q_tiles
    head = (program // num_q_tiles) % num_heads
    batch = program // num_q_tiles // num_heads
    kv_head = head // GROUP_SIZE
    wide_batch, wide_head, wide_kv_head = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64)
    if VARIABLE:
        own = wide_batch * own_stride_b + wide_head * own_stride_h + slot
        own_tile = tl.load(own_tiles_ptr + own)
        if own_tile < 0:
            return
        q_block = tl.load(own_blocks_ptr + own)
        start_m = own_tile >> 8
        end_m = start_m + (own_tile & 255) + 1
    else:
        start_m = slot * BLOCK_M
        end_m = seq_len_q
        q_block = start_m // Q_BLOCK
    query += wide_batch * query_stride_b + wide_head * query_stride_h
    grad_out += wide_batch * grad_out_stride_b + wide_head * grad_out_stride_h
    out += wide_batch * out_stride_b + wide_head * out_stride_h
    rest += wide_batch * out_stride_b + wide_head * out_stride_h
    grad_query += wide_batch * grad_query_stride_b + wide_head * grad_query_stride_h
    kv_state = wide_batch * (num_heads // GROUP_SIZE) + wide_kv_head
    state_ptr += kv_state * STATE_PARTS * BLOCK_D * BLOCK_D
    if not DESCRIPTORS:
        key_features += wide_batch * key_stride_b + wide_kv_head * key_stride_h
        value += wide_batch * value_stride_b + wide_kv_head * value_stride_h

    tokens = start_m + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    rows = (wide_batch * num_heads + wide_head) * seq_len_q + tokens
    denominator = tl.load(denominator_ptr + rows, mask=tokens < end_m, other=0.0)
    factor = tl.where(denominator > 0.0, row_scale / denominator, 0.0)
    loaded = _load_columns(grad_out, tokens, dims, seq_len_q, grad_out_stride_s, grad_out_stride_d, HEAD_DIM)
    scaled = loaded.to(tl.float32) * factor[:, None]
    # [BLOCK_M, BLOCK_D], [BLOCK_M]
    u = scaled.to(loaded.dtype)
    if HAS_LISTS:
        u = _through_memory(u, grad_query, tokens, dims, end_m, grad_query_stride_s, HEAD_DIM)
    o = _load_columns(out, tokens, dims, seq_len_q, out_stride_s, 1, HEAD_DIM).to(tl.float32)
    if loaded.dtype != tl.float32:
        o += _load_columns(rest, tokens, dims, seq_len_q, out_stride_s, 1, HEAD_DIM).to(tl.float32)
    # Of the rounded u, as in the products: the two large parts of the gradient then cancel.
    delta = tl.sum(scaled.to(loaded.dtype).to(tl.float32) * o, 1)
    key_sum = tl.load(sum_ptr + kv_state * BLOCK_D + dims)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _times_state(
        acc, grad_out, tokens, seq_len_q, grad_out_stride_s, grad_out_stride_d, factor, factor, state_ptr,
        HEAD_DIM, BLOCK_D, CHUNK, "rows", True, PRECISION,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    acc = acc / state_scale - delta[:, None] * key_sum[None, :]  # pyright: ignore

    if HAS_LISTS:
        CUT: tl.constexpr = VARIABLE and DESCRIPTORS  # pyright: ignore[reportAssignmentType]
        TILES: tl.constexpr = 1 if VARIABLE else KV_BLOCK // BLOCK_N  # pyright: ignore[reportAssignmentType]
        indices_ptr += (
            wide_batch * indices_stride_b + wide_head * indices_stride_h + q_block.to(tl.int64) * indices_stride_m
        )
        count = tl.load(counts_ptr + wide_batch * counts_stride_b + wide_head * counts_stride_h + q_block)
        num_tiles = count * TILES
        q = _load_columns(query, tokens, dims, seq_len_q, query_stride_s, query_stride_d, HEAD_DIM)
        peak, inverse = _statistics(q.to(tl.float32), dims, HEAD_DIM, FEATURES)
        a = _features(q.to(tl.float32), peak, inverse, dims, HEAD_DIM, FEATURES)
        total = tl.sum(a * key_sum[None, :], 1)
        weak = (denominator > 0.0) & (denominator - eps < min_share * total)
        anew = (2 * num_tiles * BLOCK_N > seq_len_kv) | (tl.max(weak.to(tl.int32), 0) != 0)
        num_tiles = tl.where(anew, 0, num_tiles)
        for tile in tl.range(0, num_tiles):  # pyright: ignore[reportGeneralTypeIssues]
            entry = tl.load(indices_ptr + tile // TILES)
            if VARIABLE:
                start_n = entry >> 8
                end_n = start_n + (entry & 255) + 1
            else:
                start_n = entry * KV_BLOCK + (tile % TILES) * BLOCK_N
                end_n = seq_len_kv
            acc = _add_grad_query(
                acc, u, delta, key_features, value, batch, kv_head, start_n, end_n, -1.0,
                key_stride_s, value_stride_s, value_stride_d,
                HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, RAGGED, CUT, PRECISION,
            )  # fmt: skip
        if anew:
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for entry in tl.range(0, count + 1, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
                first, stop = _gap(indices_ptr, entry, count, seq_len_kv, VARIABLE, KV_BLOCK)
                for start_n in tl.range(first, stop, BLOCK_N, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
                    acc = _add_grad_query(
                        acc, u, delta, key_features, value, batch, kv_head, start_n, stop, 1.0,
                        key_stride_s, value_stride_s, value_stride_d,
                        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, RAGGED, CUT, PRECISION,
                    )  # fmt: skip

    # Read again, so that it takes no registers in the loop.
    x = _load_columns(query, tokens, dims, seq_len_q, query_stride_s, query_stride_d, HEAD_DIM).to(tl.float32)
    peak, inverse = _statistics(x, dims, HEAD_DIM, FEATURES)
    grad = _features_gradient(x, acc / row_scale, peak, inverse, dims, HEAD_DIM, FEATURES)
    pointers = grad_query + tokens.to(tl.int64)[:, None] * grad_query_stride_s + dims[None, :]
    inside = (tokens < end_m)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, grad.to(grad_query.dtype.element_ty), mask=inside)


@triton.jit
def _add_grad_key_value(
    acc_b, acc_v, b, v, query_features, scaled, delta_ptr, batch, head, start, end, sign,
    features_stride_s,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WEIGHT_SCALE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, RAGGED: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the queries start .. start + BLOCK_M give, `sign` times; keys down, as the products then need it."""
    a = _load_tile(
        query_features, batch, head, start, end, features_stride_s, 1,
        HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS, RAGGED,
    )  # fmt: skip
    u = _load_tile(
        scaled, batch, head, start, end, features_stride_s, 1,
        HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS, RAGGED,
    )  # fmt: skip
    rows = start + tl.arange(0, BLOCK_M)
    delta = tl.load(delta_ptr + rows, mask=rows < end, other=0.0)
    # [BLOCK_N, BLOCK_M]; queries that are not there have a = u = 0.
    weights = tl.dot(b, tl.trans(a), input_precision=PRECISION)
    grad_weights = tl.dot(v, tl.trans(u), input_precision=PRECISION) - delta[None, :]
    if CUT:
        weights = tl.where((rows < end)[None, :], weights, 0.0)
        grad_weights = tl.where((rows < end)[None, :], grad_weights, 0.0)
    acc_v = tl.dot((weights * (sign * WEIGHT_SCALE)).to(u.dtype), u, acc_v, input_precision=PRECISION)
    acc_b = tl.dot((grad_weights * sign).to(a.dtype), a, acc_b, input_precision=PRECISION)
    return acc_b, acc_v


@triton.jit
def _add_query_totals(
    acc_b, acc_v, key, value, tokens, seq_len_kv, key_stride_s, key_stride_d, value_stride_s, value_stride_d,
    peak, inverse, ones, state, sums, state_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, FEATURES: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what all queries of a head give, from their totals `state` and `sums`."""
    # Powers of two, so that nothing is rounded.
    acc_v = _times_state(
        acc_v * (state_scale / WEIGHT_SCALE), key, tokens, seq_len_kv, key_stride_s, key_stride_d,
        peak, inverse, state, HEAD_DIM, BLOCK_D, CHUNK, FEATURES, False, PRECISION,  # pyright: ignore[reportArgumentType]
    ) * (WEIGHT_SCALE / state_scale)  # fmt: skip
    acc_b = _times_state(
        acc_b * state_scale, value, tokens, seq_len_kv, value_stride_s, value_stride_d,
        ones, ones, state, HEAD_DIM, BLOCK_D, CHUNK, "rows", True, PRECISION,  # pyright: ignore[reportArgumentType]
    ) / state_scale  # fmt: skip
    return acc_b - tl.load(sums)[None, :], acc_v


@triton.jit(do_not_specialize=[*SHAPE_INTEGERS, "indices_stride_n", "num_kv_tiles"])
def linear_backward_key_value_kernel(
    key, value, query_features, scaled, grad_key, grad_value, delta_ptr, weak_ptr, state_ptr, sum_ptr, counts_ptr,
    indices_ptr, own_blocks_ptr, own_tiles_ptr,
    key_stride_b, key_stride_s, key_stride_h, key_stride_d,
    value_stride_b, value_stride_s, value_stride_h, value_stride_d,
    features_stride_b, features_stride_s, features_stride_h,
    grad_stride_b, grad_stride_s, grad_stride_h,
    counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_n,
    own_stride_b, own_stride_h,
    num_heads, seq_len_q, seq_len_kv, num_kv_tiles, state_scale, row_scale,
    GROUP_SIZE: tl.constexpr, MEMBERS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    STATE_PARTS: tl.constexpr, FEATURES: tl.constexpr, WEIGHT_SCALE: tl.constexpr, HAS_LISTS: tl.constexpr,
    VARIABLE: tl.constexpr, DESCRIPTORS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values, summed over MEMBERS query heads.

    query_features and scaled (phi(query), row_scale * dO / denominator) are pointers or descriptors; state and sum are
    the totals of the query heads.
    """
    program = tl.program_id(0)
    slot = program % num_kv_tiles
    owners = num_heads // MEMBERS
    owner = (program // num_kv_tiles) % owners
    batch = program // num_kv_tiles // owners
    first_head = owner * MEMBERS
    kv_head = first_head // GROUP_SIZE
    wide_batch, wide_owner, wide_kv_head = batch.to(tl.int64), owner.to(tl.int64), kv_head.to(tl.int64)
    if VARIABLE:
        own = wide_batch * own_stride_b + first_head.to(tl.int64) * own_stride_h + slot
        own_tile = tl.load(own_tiles_ptr + own)
        if own_tile < 0:
            return
        kv_block = tl.load(own_blocks_ptr + own)
        start_n = own_tile >> 8
        end_n = start_n + (own_tile & 255) + 1
    else:
        start_n = slot * BLOCK_N
        end_n = seq_len_kv
        kv_block = start_n // KV_BLOCK
    key += wide_batch * key_stride_b + wide_kv_head * key_stride_h
    value += wide_batch * value_stride_b + wide_kv_head * value_stride_h

    tokens = start_n + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    loaded = _load_columns(key, tokens, dims, seq_len_kv, key_stride_s, key_stride_d, HEAD_DIM)
    peak, inverse = _statistics(loaded.to(tl.float32), dims, HEAD_DIM, FEATURES)
    # [BLOCK_N, BLOCK_D]
    b = _features(loaded.to(tl.float32), peak, inverse, dims, HEAD_DIM, FEATURES).to(loaded.dtype)
    offsets = wide_batch * grad_stride_b + wide_owner * grad_stride_h
    if HAS_LISTS and grad_key.dtype.element_ty == loaded.dtype:
        b = _through_memory(b, grad_key + offsets, tokens, dims, end_n, grad_stride_s, HEAD_DIM)
    v = _load_columns(value, tokens, dims, seq_len_kv, value_stride_s, value_stride_d, HEAD_DIM)
    ones = tl.full([BLOCK_N], 1.0, tl.float32)
    acc_b = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(MEMBERS):
        head = first_head + member
        wide_head = head.to(tl.int64)
        head_state = wide_batch * num_heads + wide_head
        state = state_ptr + head_state * STATE_PARTS * BLOCK_D * BLOCK_D
        sums = sum_ptr + head_state * BLOCK_D + dims
        # Compiled for itself where nothing is listed: names of the lists do not exist there.
        if HAS_LISTS:
            CUT: tl.constexpr = VARIABLE and DESCRIPTORS  # pyright: ignore[reportAssignmentType]
            TILES: tl.constexpr = 1 if VARIABLE else Q_BLOCK // BLOCK_M  # pyright: ignore[reportAssignmentType]
            lists = (
                indices_ptr + wide_batch * indices_stride_b + wide_head * indices_stride_h
                + kv_block.to(tl.int64) * indices_stride_n
            )  # fmt: skip
            count = tl.load(counts_ptr + wide_batch * counts_stride_b + wide_head * counts_stride_h + kv_block)
            num_tiles = count * TILES
            deltas = delta_ptr + head_state * seq_len_q
            features, grads = query_features, scaled
            if not DESCRIPTORS:
                features += wide_batch * features_stride_b + wide_head * features_stride_h
                grads += wide_batch * features_stride_b + wide_head * features_stride_h
            # Rows with little weight left have a large u, which would have to cancel in the totals.
            anew = (2 * num_tiles * BLOCK_M > seq_len_q) | (tl.load(weak_ptr + head_state) != 0)
            if anew:
                for entry in tl.range(0, count + 1, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
                    first, stop = _gap(lists, entry, count, seq_len_q, VARIABLE, Q_BLOCK)
                    for start_m in tl.range(first, stop, BLOCK_M, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
                        acc_b, acc_v = _add_grad_key_value(
                            acc_b, acc_v, b, v, features, grads, deltas, batch, head, start_m, stop, 1.0,
                            features_stride_s,
                            HEAD_DIM, BLOCK_M, BLOCK_D, WEIGHT_SCALE, DESCRIPTORS, RAGGED, CUT, PRECISION,
                        )  # fmt: skip
            else:
                acc_b, acc_v = _add_query_totals(
                    acc_b, acc_v, key, value, tokens, seq_len_kv, key_stride_s, key_stride_d, value_stride_s,
                    value_stride_d, peak, inverse, ones, state, sums, state_scale,
                    HEAD_DIM, BLOCK_D, CHUNK, FEATURES, WEIGHT_SCALE, PRECISION,
                )  # fmt: skip
                for tile in tl.range(0, num_tiles):  # pyright: ignore[reportGeneralTypeIssues]
                    entry = tl.load(lists + tile // TILES)
                    if VARIABLE:
                        start_m = entry >> 8
                        end_m = start_m + (entry & 255) + 1
                    else:
                        start_m = entry * Q_BLOCK + (tile % TILES) * BLOCK_M
                        end_m = seq_len_q
                    acc_b, acc_v = _add_grad_key_value(
                        acc_b, acc_v, b, v, features, grads, deltas, batch, head, start_m, end_m, -1.0,
                        features_stride_s,
                        HEAD_DIM, BLOCK_M, BLOCK_D, WEIGHT_SCALE, DESCRIPTORS, RAGGED, CUT, PRECISION,
                    )  # fmt: skip
        else:
            acc_b, acc_v = _add_query_totals(
                acc_b, acc_v, key, value, tokens, seq_len_kv, key_stride_s, key_stride_d, value_stride_s,
                value_stride_d, peak, inverse, ones, state, sums, state_scale,
                HEAD_DIM, BLOCK_D, CHUNK, FEATURES, WEIGHT_SCALE, PRECISION,
            )  # fmt: skip

    offsets += tokens.to(tl.int64)[:, None] * grad_stride_s + dims[None, :]
    inside = (tokens < end_n)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(grad_value + offsets, (acc_v / (WEIGHT_SCALE * row_scale)).to(grad_value.dtype.element_ty), mask=inside)
    # Read again, so that it takes no registers in the loop.
    x = _load_columns(key, tokens, dims, seq_len_kv, key_stride_s, key_stride_d, HEAD_DIM).to(tl.float32)
    peak, inverse = _statistics(x, dims, HEAD_DIM, FEATURES)
    grad = _features_gradient(x, acc_b / row_scale, peak, inverse, dims, HEAD_DIM, FEATURES)
    tl.store(grad_key + offsets, grad.to(grad_key.dtype.element_ty), mask=inside)


def triton_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    denominator: Tensor,
    state: Tensor,
    key_sum: Tensor,
    rest: Tensor,
    excluded: BlockMask | None,
    *,
    feature_map: str,
    eps: float,
    config: BackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from what the forward returned; the same bits in every run.

    Args:
        grad_out: gradient of `out`, its shape and dtype, any strides.
        query, key, value, excluded, feature_map, eps: as in the forward.
        out, denominator, state, key_sum, rest: what it returned.
        config: tile shapes and variants; default: the table of block_sparse_attention.

    Returns:
        Contiguous gradients in the shapes and dtypes of query, key and value.
    """
    batch, seq_len_q, num_heads, head_dim = query.shape
    seq_len_kv, num_kv_heads = key.shape[1:3]
    if query.numel() == 0:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    block_d = padded_head_dim(head_dim)
    group_size, masked = num_heads // num_kv_heads, excluded is not None
    if config is None:
        config = backward_config_for(query, key, value, excluded)

    def like(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    # A softmax feature is about 1 / head_dim, others about 1.
    row_scale = power_of_two(seq_len_kv / head_dim if feature_map == "softmax" else seq_len_kv * head_dim)
    query_features, scaled, delta, key_features = None, None, None, None
    if masked:
        query_features, scaled, delta = like(query), like(query), torch.empty_like(denominator)
        key_features = like(key)
        partial_totals(key, value, key_features, feature_map=feature_map, only_features=True)
    queries = QueryTotals(out, rest, denominator, key_sum, group_size, row_scale, eps, scaled, delta)
    query_state, query_sum = totals(query, grad_out, query_features, feature_map=feature_map, queries=queries)
    weak = queries.weak.amax(2) if queries.weak is not None else query_sum
    query_state = in_parts(query_state, seq_len_q, query.dtype)

    variable = excluded is not None and excluded.variable
    members, kv_shape, kv_dtype = group_size, key.shape, key.dtype
    if excluded is not None and group_size > 1 and excluded.kv_offsets is not None:
        if excluded.kv_offsets.shape[1] > 1:
            # Query heads that share a kv head cut its keys differently: each gets gradients of its own, added up below.
            members, kv_shape, kv_dtype = 1, (batch, seq_len_kv, num_heads, head_dim), torch.float32
    grad_query = like(query)
    grad_key, grad_value = (torch.empty(kv_shape, dtype=kv_dtype, device=key.device) for _ in range(2))
    q_block, kv_block = block_sizes(excluded)
    common: dict[str, Any] = dict(
        GROUP_SIZE=group_size, HEAD_DIM=head_dim, BLOCK_D=block_d, Q_BLOCK=q_block, KV_BLOCK=kv_block,
        CHUNK=chunk_size(query, block_d), STATE_PARTS=state.shape[2], FEATURES=feature_map, HAS_LISTS=masked,
        VARIABLE=variable, PRECISION="ieee", enable_fp_fusion=True,
    )  # fmt: skip

    with torch.cuda.device_of(query):
        tiles = config.grad_query
        lists, own_blocks, own = walks(excluded, tiles.block_m, tiles.block_n, transposed=False, like=key_sum)
        num_tiles = own.shape[-1] if variable else triton.cdiv(seq_len_q, tiles.block_m)
        streamed: list[Any] = [key_features if key_features is not None else key, value]
        strides = [*streamed[0].stride()[:3], *value.stride()]
        descriptors = tiles.descriptors and masked
        if descriptors:
            streamed = [_descriptor(x, tiles.block_n, block_d) for x in streamed]
        query_kernel: Any = linear_backward_query_kernel
        query_kernel[(num_tiles * num_heads * batch,)](
            query, grad_out, out, rest, *streamed, grad_query, denominator, state, key_sum, *lists, own_blocks, own,
            *query.stride(), *grad_out.stride(), *out.stride()[:3], *strides, *grad_query.stride()[:3],
            *_broadcast_strides(lists[0], 2), *_broadcast_strides(lists[1], 2), lists[1].stride(2),
            *_broadcast_strides(own, 2), num_heads, seq_len_q, seq_len_kv, num_tiles,
            power_of_two(1.0 / seq_len_kv), row_scale, eps, MIN_SHARE,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, DESCRIPTORS=descriptors,
            RAGGED=variable or seq_len_kv % kv_block != 0,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, **common,
        )  # fmt: skip

        tiles = config.grad_key_value
        lists, own_blocks, own = walks(excluded, tiles.block_n, tiles.block_m, transposed=True, like=key_sum)
        num_tiles = own.shape[-1] if variable else triton.cdiv(seq_len_kv, tiles.block_n)
        streamed = [query_features, scaled] if masked else [query, query]
        strides = [*streamed[0].stride()[:3]]
        descriptors = tiles.descriptors and masked
        if descriptors:
            streamed = [_descriptor(x, tiles.block_m, block_d) for x in streamed]
        # On an H200 (Triton 3.6) this kernel in two warpgroups over 64 rows read past shared memory (compute-sanitizer) or
        # gave a wrong gradient of key; in one it was right in all three cases tried.
        num_warps = 4 if block_d > 128 and query.element_size() <= 2 else tiles.num_warps
        key_value_kernel: Any = linear_backward_key_value_kernel
        key_value_kernel[(num_tiles * (num_heads // members) * batch,)](
            key, value, *streamed, grad_key, grad_value, delta if delta is not None else denominator, weak,
            query_state, query_sum, *lists, own_blocks, own,
            *key.stride(), *value.stride(), *strides, *grad_key.stride()[:3],
            *_broadcast_strides(lists[0], 2), *_broadcast_strides(lists[1], 2), lists[1].stride(2),
            *_broadcast_strides(own, 2), num_heads, seq_len_q, seq_len_kv, num_tiles,
            power_of_two(1.0 / seq_len_q), row_scale,
            MEMBERS=members, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, DESCRIPTORS=descriptors,
            RAGGED=variable or seq_len_q % q_block != 0, WEIGHT_SCALE=weight_scale(feature_map, block_d),
            num_warps=num_warps, num_stages=tiles.num_stages, **common,
        )  # fmt: skip
    if members != group_size:
        grad_key, grad_value = (
            x.unflatten(2, (num_kv_heads, group_size)).sum(3).to(key.dtype) for x in (grad_key, grad_value)
        )
    return grad_query, grad_key, grad_value


def backward_config_for(
    query: Tensor, key: Tensor, value: Tensor, excluded: BlockMask | None, *, descriptors: bool | None = None
) -> BackwardConfig:
    """What the table of block_sparse_attention says for these arguments on their device.

    `descriptors=None` uses tensor descriptors where they pay, True wherever they are possible, False nowhere.
    """
    if descriptors is None:
        work = 10 * query.shape[0] * query.shape[1] * key.shape[1] * query.shape[2] * query.shape[3]
        descriptors = work > MIN_DESCRIPTOR_FLOPS
    capability, shared_memory = _device_limits(query)
    q_block, kv_block = block_sizes(excluded)
    return backward_config(
        capability=capability,
        shared_memory=shared_memory,
        head_dim=query.shape[3],
        itemsize=query.element_size(),
        q_block_size=q_block,
        kv_block_size=kv_block,
        descriptors_possible=descriptors
        and TensorDescriptor is not None
        and rows_are_aligned(query)
        and tma_can_read(value),
    )
