"""Triton forward of the linear branch.

How the keys that count are summed, with M q-blocks and N kv-blocks of 64 keys, head_dim D and density p:

- A state per block (phi(K_j)^T V_j, D x D), and per q-block the total minus the states of its blocks, as SLA's first
  code does: in fp16/bf16 a state is as large as the k and v tile of the block together (32 KiB at D = 128), so a
  q-block reads as many bytes as by walking the tiles, adds D * D numbers a block on the plain cores, and rounds each
  state. At 75,600 tokens, 40 heads, D = 128 and blocks of 128 x 64 the states are 1,182 x 40 x 32 KiB = 1.55 GB, and
  those of the q-blocks, kept for the backward, 591 x 40 x 32 KiB = 0.77 GB.
- Here: one total per head, W = phi(K)^T V and z = sum phi(K); each q-tile starts from phi(q) W and takes off
  (phi(q) phi(K_j)^T) V_j for the blocks that do not count, walking their tiles as attention does. That costs
  4 * S * p * S * D operations on the tensor cores, those of the attention itself without its softmax (3 % of dense
  work for the totals), no state per block, and no rounding but that of the products. phi(K) is computed once into an
  array like key instead of in each of the p * M visits to a tile, which would cost as many exponentials as a softmax.

Memory beyond inputs and output, at the shape above: phi(K) 0.77 GB while the forward runs (none for coverage "all");
partial totals, at most 40 * 13 * 64 KiB = 34 MB; kept for the backward: W in two halves 2.6 MB, the denominators
12 MB and, in half precision, what rounding dropped from the output, 0.77 GB: the gradient of query is what is left of
two large sums where values have a mean, and with the rounded output alone its error grows with the square root of
the length (elu, mean 4, fp16, 2,048 tokens: 6e-2 instead of 5e-4). The backward adds arrays like query for phi(Q) and dO / denominator and one
like key for phi(K), 2.3 GB, while it runs.

The subtraction loses digits where little is left: a q-tile that lists more than half of the keys, or in which a row
keeps less than 1/64 of its total weight, is computed from the keys that count instead, by walking the gaps of its list.
W is kept as a rounded number and the rounded rest, in a power-of-two scale that suits fp16, so that no precision is
lost before the subtraction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from ..block_sparse_attention.backward import _device_limits, unsupported_backward
from ..block_sparse_attention.configs import (
    KILOBYTE,
    MIN_DESCRIPTOR_FLOPS,
    ForwardConfig,
    forward_config,
    padded_head_dim,
)
from ..block_sparse_attention.forward import TensorDescriptor, _broadcast_strides, _descriptor, _load_tile
from ..block_sparse_attention.forward import _tma_can_read as tma_can_read
from ..block_sparse_attention.forward import unsupported as unsupported_attention
from ..block_sparse_attention.tiles import own_tiles, tile_lists

TARGET_PROGRAMS = 264
"""Programs that the totals are split into: two for each multiprocessor of an H100 or H200."""
WHOLE_BLOCK = 128
"""Tokens per q-block and kv-block where there is no mask."""
ALL_BLOCK_M, ALL_WARPS = 64, 4
"""Tile of the kernel for all keys, and its warps: two programs share a multiprocessor of compute capability 9.0."""
KEY_TOTAL_WARPS = 4
"""Likewise two programs; totals of queries would spill in four warps."""
MIN_SHARE = 1.0 / 64
"""A row that keeps less of its total weight than this is summed anew from the keys that count."""

SHAPE_INTEGERS = [
    "counts_stride_b", "counts_stride_h", "indices_stride_b", "indices_stride_h", "indices_stride_m",
    "own_stride_b", "own_stride_h", "num_heads", "group_size", "seq_len_q", "seq_len_kv", "num_q_tiles",
]  # fmt: skip
"""What Triton may not compile into the kernel, so that one compilation serves every shape."""


@triton.jit
def _statistics(x, dims, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr):
    """What the feature map needs of whole rows of `x` `[N, BLOCK_D]` fp32: softmax's largest value and 1 / mass."""
    if FEATURES == "softmax":
        x = tl.where((dims < HEAD_DIM)[None, :], x, float("-inf"))
        peak = tl.max(x, 1)
        inverse = 1.0 / tl.sum(tl.exp(x - peak[:, None]), 1)  # pyright: ignore
    else:
        peak = tl.zeros([x.shape[0]], tl.float32)
        inverse = peak
    return peak, inverse


@triton.jit
def _features(x, peak, inverse, dims, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr):
    """phi of columns `dims` of rows with these statistics, fp32; 0 past the head_dim."""
    if FEATURES == "softmax":
        y = tl.exp(x - peak[:, None]) * inverse[:, None]
    elif FEATURES == "elu":
        y = tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        y = tl.maximum(x, 0.0)
    return tl.where((dims < HEAD_DIM)[None, :], y, 0.0)


@triton.jit
def _features_gradient(x, grad, peak, inverse, dims, HEAD_DIM: tl.constexpr, FEATURES: tl.constexpr):
    """Gradient of `x` from that of phi(x), both fp32 `[N, BLOCK_D]`."""
    if FEATURES == "softmax":
        y = _features(x, peak, inverse, dims, HEAD_DIM, FEATURES)
        result = y * (grad - tl.sum(y * grad, 1)[:, None])  # pyright: ignore
    elif FEATURES == "elu":
        result = grad * tl.where(x > 0.0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        result = tl.where(x > 0.0, grad, 0.0)
    return result


@triton.jit
def _load_columns(source, tokens, dims, length, stride_s, stride_d, HEAD_DIM: tl.constexpr):
    """Columns `dims` of rows `tokens`, zeros past the head_dim and the length."""
    pointers = source + tokens.to(tl.int64)[:, None] * stride_s + dims.to(tl.int64)[None, :] * stride_d
    return tl.load(pointers, mask=(tokens < length)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _through_memory(x, target, tokens, dims, length, stride_s, HEAD_DIM: tl.constexpr):
    """`x` written to rows that the program overwrites later, and read again.

    An operand that was computed stays in registers through the whole loop, one that was loaded goes to shared memory;
    for 128 rows of 128 numbers those registers are a quarter of all.
    """
    pointers = target + tokens.to(tl.int64)[:, None] * stride_s + dims[None, :]
    inside = (tokens < length)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, x, mask=inside)
    tl.debug_barrier()
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _times_state(
    acc, source, tokens, length, stride_s, stride_d, peak, factor, state_ptr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, FEATURES: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add X S, or X S^T, of a state S in halves `[2, BLOCK_D, BLOCK_D]` (fp32: one) onto `acc`, a few columns of X at a time.

    X are the features of the rows `tokens` of source, with statistics `peak`, `factor`; FEATURES "rows": the rows
    themselves, times `factor`.
    """
    columns = tl.arange(0, BLOCK_D)
    for start in tl.range(0, BLOCK_D, CHUNK, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        dims = start + tl.arange(0, CHUNK)
        loaded = _load_columns(source, tokens, dims, length, stride_s, stride_d, HEAD_DIM)
        if FEATURES == "rows":
            x = loaded.to(tl.float32) * factor[:, None]
        else:
            x = _features(loaded.to(tl.float32), peak, factor, dims, HEAD_DIM, FEATURES)
        x = x.to(loaded.dtype)
        # [CHUNK, BLOCK_D]
        if TRANSPOSED:
            pointers = state_ptr + columns[None, :] * BLOCK_D + dims[:, None]
        else:
            pointers = state_ptr + dims[:, None] * BLOCK_D + columns[None, :]
        acc = tl.dot(x, tl.load(pointers), acc, input_precision=PRECISION)
        if loaded.dtype != tl.float32:
            acc = tl.dot(x, tl.load(pointers + BLOCK_D * BLOCK_D), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _gap(indices_ptr, entry, count, seq_len, VARIABLE: tl.constexpr, BLOCK: tl.constexpr):
    """The unlisted tokens before an entry of a list, or after the last one: start and stop."""
    before = tl.load(indices_ptr + tl.maximum(entry - 1, 0))
    own = tl.load(indices_ptr + tl.minimum(entry, tl.maximum(count - 1, 0)))
    if VARIABLE:
        start = (before >> 8) + (before & 255) + 1
        stop = own >> 8
    else:
        start = (before + 1) * BLOCK
        stop = own * BLOCK
    return tl.where(entry > 0, start, 0), tl.where(entry < count, stop, seq_len)


@triton.jit(do_not_specialize=["num_heads", "group_size", "seq_len", "chunk_len", "num_chunks"])
def linear_state_kernel(
    source, value, out, rest, denominator_ptr, features_ptr, scaled_ptr, delta_ptr, key_sum_ptr, weak_ptr,
    state_ptr, sum_ptr,
    source_stride_b, source_stride_s, source_stride_h, source_stride_d,
    value_stride_b, value_stride_s, value_stride_h, value_stride_d,
    out_stride_b, out_stride_s, out_stride_h, out_stride_d,
    num_heads, group_size, seq_len, chunk_len, num_chunks, row_scale, eps, min_share,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STEP: tl.constexpr,
    FEATURES: tl.constexpr, QUERIES: tl.constexpr, STORE: tl.constexpr, TOTALS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Total over one chunk of tokens of phi(x)^T y, BLOCK_V of its columns, and of phi(x).

    Keys: x is key, y value; STORE: keep phi(key). QUERIES: x is query, value is the gradient of the output `out`, y
    its rows times row_scale / denominator, phi is weighed with delta = rowsum(y * out); STORE: keep phi(query), y and
    delta, and in weak `[batch, heads, chunks]` whether a row keeps less than min_share of its weight. state is `[batch, heads, chunks, BLOCK_D, BLOCK_D]` fp32, sum `[batch, heads, chunks, BLOCK_D]`.
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1) % num_heads
    batch = tl.program_id(1) // num_heads
    split = tl.program_id(2)
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    source += wide_batch * source_stride_b + wide_head * source_stride_h
    value += wide_batch * value_stride_b + wide_head * value_stride_h
    out += wide_batch * out_stride_b + wide_head * out_stride_h
    rest += wide_batch * out_stride_b + wide_head * out_stride_h
    # Arrays made by the launcher: contiguous in [batch, seq_len, heads, HEAD_DIM] and [batch, heads, seq_len].
    own = wide_batch * seq_len * num_heads * HEAD_DIM + wide_head * HEAD_DIM
    own_stride = num_heads * HEAD_DIM
    rows = (wide_batch * num_heads + wide_head) * seq_len
    dims = tl.arange(0, BLOCK_D)
    columns = split * BLOCK_V + tl.arange(0, BLOCK_V)
    state = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    weak = tl.zeros([STEP], tl.int32)
    if QUERIES and STORE:
        kv_head = wide_batch * (num_heads // group_size) + wide_head // group_size
        key_sum = tl.load(key_sum_ptr + kv_head * BLOCK_D + dims)
    stop = tl.minimum((chunk + 1) * chunk_len, seq_len)
    # What does not depend on the split is written by the first one.
    kept_dims = tl.where(split == 0, HEAD_DIM, 0)
    kept_stop = tl.where(split == 0, stop, 0)
    for start in tl.range(chunk * chunk_len, stop, STEP):  # pyright: ignore[reportGeneralTypeIssues]
        tokens = start + tl.arange(0, STEP)
        inside = tokens < stop
        loaded = _load_columns(source, tokens, dims, stop, source_stride_s, source_stride_d, HEAD_DIM)
        x = loaded.to(tl.float32)
        peak, inverse = _statistics(x, dims, HEAD_DIM, FEATURES)
        # Past the end there are no keys, whatever the features of 0 are.
        x = tl.where(inside[:, None], _features(x, peak, inverse, dims, HEAD_DIM, FEATURES), 0.0)
        features = x.to(loaded.dtype)
        y = _load_columns(value, tokens, columns, stop, value_stride_s, value_stride_d, HEAD_DIM)
        kept = inside[:, None] & (dims < kept_dims)[None, :]
        if QUERIES:
            mass = tl.load(denominator_ptr + rows + tokens, mask=inside, other=0.0)
            factor = tl.where(mass > 0.0, row_scale / mass, 0.0)
            y = (y.to(tl.float32) * factor[:, None]).to(y.dtype)
            grad = _load_columns(value, tokens, dims, stop, value_stride_s, value_stride_d, HEAD_DIM)
            # Rounded as in the products, so that the large parts of the gradients cancel.
            grad = (grad.to(tl.float32) * factor[:, None]).to(loaded.dtype).to(tl.float32)
            o = _load_columns(out, tokens, dims, stop, out_stride_s, out_stride_d, HEAD_DIM)
            o = o.to(tl.float32)
            if loaded.dtype != tl.float32:
                o += _load_columns(rest, tokens, dims, stop, out_stride_s, out_stride_d, HEAD_DIM).to(tl.float32)
            delta = tl.sum(grad * o, 1)
            total += tl.sum(features.to(tl.float32) * delta[:, None], 0)  # pyright: ignore
            if STORE:
                pointers = scaled_ptr + own + tokens.to(tl.int64)[:, None] * own_stride + dims[None, :]
                tl.store(pointers, grad.to(loaded.dtype), mask=kept)
                tl.store(delta_ptr + rows + tokens, delta, mask=tokens < kept_stop)
                whole = tl.sum(features.to(tl.float32) * key_sum[None, :], 1)  # pyright: ignore[reportPossiblyUnboundVariable]
                weak |= ((mass > 0.0) & (mass - eps < min_share * whole)).to(tl.int32)
        else:
            total += tl.sum(features.to(tl.float32), 0)
        if STORE:
            pointers = features_ptr + own + tokens.to(tl.int64)[:, None] * own_stride + dims[None, :]
            tl.store(pointers, features, mask=kept)
        if TOTALS:
            state = tl.dot(tl.trans(features), y, state, input_precision=PRECISION)
    if not TOTALS:
        return
    part = (wide_batch * num_heads + wide_head) * num_chunks + chunk
    if QUERIES and STORE:
        tl.store(weak_ptr + part, tl.max(weak, 0))
    tl.store(state_ptr + part * BLOCK_D * BLOCK_D + dims[:, None] * BLOCK_D + columns[None, :], state)
    tl.store(sum_ptr + part * BLOCK_D + dims, total, mask=dims < tl.where(split == 0, BLOCK_D, 0))


@triton.jit
def _add_keys(
    acc, mass, a, key_features, value, batch, kv_head, start, end, sign,
    key_stride_s, value_stride_s, value_stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WEIGHT_SCALE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, RAGGED: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys start .. start + BLOCK_N, `sign` times; past `end` only those that are not there anyway, unless CUT."""
    b = _load_tile(
        key_features, batch, kv_head, start, end, key_stride_s, 1,
        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, RAGGED,
    )  # fmt: skip
    v = _load_tile(
        value, batch, kv_head, start, end, value_stride_s, value_stride_d,
        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, RAGGED,
    )  # fmt: skip
    # [BLOCK_M, BLOCK_N]
    weights = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if CUT:
        weights = tl.where((start + tl.arange(0, BLOCK_N) < end)[None, :], weights, 0.0)
    mass += sign * tl.sum(weights, 1)
    acc = tl.dot((weights * (sign * WEIGHT_SCALE)).to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, mass


@triton.jit(do_not_specialize=SHAPE_INTEGERS)
def linear_forward_kernel(
    query, key_features, value, out, rest, denominator_ptr, state_ptr, sum_ptr, counts_ptr, indices_ptr,
    own_blocks_ptr, own_tiles_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    key_stride_b, key_stride_s, key_stride_h,
    value_stride_b, value_stride_s, value_stride_h, value_stride_d,
    out_stride_b, out_stride_s, out_stride_h,
    counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m,
    own_stride_b, own_stride_h,
    num_heads, group_size, seq_len_q, seq_len_kv, num_q_tiles, state_scale, eps, min_share,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, CHUNK: tl.constexpr, STATE_PARTS: tl.constexpr,
    FEATURES: tl.constexpr, WEIGHT_SCALE: tl.constexpr, HAS_LISTS: tl.constexpr, VARIABLE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, RAGGED: tl.constexpr, STORE_REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head over all keys but those of the listed kv-blocks.

    key_features and value are pointers or descriptors. state is `[batch, kv heads, STATE_PARTS, BLOCK_D, BLOCK_D]`,
    times 1 / state_scale the total phi(K)^T V; sum is `[batch, kv heads, BLOCK_D]` fp32. Lists as in attention. STORE_REST: what rounding the output
    drops goes into rest.
    """
    program = tl.program_id(0)
    slot = program % num_q_tiles
    head = (program // num_q_tiles) % num_heads
    batch = program // num_q_tiles // num_heads
    kv_head = head // group_size
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
    out += wide_batch * out_stride_b + wide_head * out_stride_h
    kv_state = wide_batch * (num_heads // group_size) + wide_kv_head
    state_ptr += kv_state * STATE_PARTS * BLOCK_D * BLOCK_D
    if not DESCRIPTORS:
        key_features += wide_batch * key_stride_b + wide_kv_head * key_stride_h
        value += wide_batch * value_stride_b + wide_kv_head * value_stride_h

    tokens = start_m + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    loaded = _load_columns(query, tokens, dims, seq_len_q, query_stride_s, query_stride_d, HEAD_DIM)
    peak, inverse = _statistics(loaded.to(tl.float32), dims, HEAD_DIM, FEATURES)
    # [BLOCK_M, BLOCK_D]
    a = _features(loaded.to(tl.float32), peak, inverse, dims, HEAD_DIM, FEATURES).to(loaded.dtype)
    total = tl.sum(a.to(tl.float32) * tl.load(sum_ptr + kv_state * BLOCK_D + dims)[None, :], 1)
    mass = total
    if HAS_LISTS:
        a = _through_memory(a, out, tokens, dims, end_m, out_stride_s, HEAD_DIM)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _times_state(
        acc, query, tokens, seq_len_q, query_stride_s, query_stride_d, peak, inverse, state_ptr,
        HEAD_DIM, BLOCK_D, CHUNK, FEATURES, False, PRECISION,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    acc *= WEIGHT_SCALE / state_scale

    if HAS_LISTS:
        CUT: tl.constexpr = VARIABLE and DESCRIPTORS  # pyright: ignore[reportAssignmentType]
        TILES: tl.constexpr = 1 if VARIABLE else KV_BLOCK // BLOCK_N  # pyright: ignore[reportAssignmentType]
        indices_ptr += (
            wide_batch * indices_stride_b + wide_head * indices_stride_h + q_block.to(tl.int64) * indices_stride_m
        )
        count = tl.load(counts_ptr + wide_batch * counts_stride_b + wide_head * counts_stride_h + q_block)
        num_tiles = count * TILES
        anew = 2 * num_tiles * BLOCK_N > seq_len_kv
        num_tiles = tl.where(anew, 0, num_tiles)
        for tile in tl.range(0, num_tiles):  # pyright: ignore[reportGeneralTypeIssues]
            entry = tl.load(indices_ptr + tile // TILES)
            if VARIABLE:
                start_n = entry >> 8
                end_n = start_n + (entry & 255) + 1
            else:
                start_n = entry * KV_BLOCK + (tile % TILES) * BLOCK_N
                end_n = seq_len_kv
            acc, mass = _add_keys(
                acc, mass, a, key_features, value, batch, kv_head, start_n, end_n, -1.0,
                key_stride_s, value_stride_s, value_stride_d,
                HEAD_DIM, BLOCK_N, BLOCK_D, WEIGHT_SCALE, DESCRIPTORS, RAGGED, CUT, PRECISION,
            )  # fmt: skip
        weak = (tokens < end_m) & (mass < min_share * total)
        if anew | (tl.max(weak.to(tl.int32), 0) != 0):
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            mass = tl.zeros([BLOCK_M], tl.float32)
            for entry in tl.range(0, count + 1, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
                first, stop = _gap(indices_ptr, entry, count, seq_len_kv, VARIABLE, KV_BLOCK)
                for start_n in tl.range(first, stop, BLOCK_N, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
                    acc, mass = _add_keys(
                        acc, mass, a, key_features, value, batch, kv_head, start_n, stop, 1.0,
                        key_stride_s, value_stride_s, value_stride_d,
                        HEAD_DIM, BLOCK_N, BLOCK_D, WEIGHT_SCALE, DESCRIPTORS, RAGGED, CUT, PRECISION,
                    )  # fmt: skip

    # 0 marks rows without weight: their output and gradients are 0.
    denominator = tl.where(mass > 0.0, mass + eps, 0.0)  # pyright: ignore
    tl.store(denominator_ptr + (wide_batch * num_heads + wide_head) * seq_len_q + tokens, denominator, tokens < end_m)
    acc *= tl.where(denominator > 0.0, (1.0 / WEIGHT_SCALE) / denominator, 0.0)[:, None]
    offsets = tokens.to(tl.int64)[:, None] * out_stride_s + dims[None, :]
    inside = (tokens < end_m)[:, None] & (dims < HEAD_DIM)[None, :]
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + offsets, rounded, mask=inside)
    if STORE_REST:
        rest += wide_batch * out_stride_b + wide_head * out_stride_h
        tl.store(rest + offsets, (acc - rounded.to(tl.float32)).to(rounded.dtype), mask=inside)


@triton.jit(do_not_specialize=["num_heads", "group_size", "seq_len", "num_tiles", "tiles_each"])
def linear_all_kernel(
    query, out, rest, denominator_ptr, state_ptr, sum_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    out_stride_b, out_stride_s, out_stride_h,
    num_heads, group_size, seq_len, num_tiles, tiles_each, state_scale, eps,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FEATURES: tl.constexpr,
    STORE_REST: tl.constexpr,
):  # fmt: skip
    """tiles_each tiles of BLOCK_M queries of one head over all keys, in half precision; both parts of the state stay.

    Arguments as for `linear_forward_kernel`, which would read the state, as large as 256 queries, for each of its tiles.
    """
    slot, head, batch = tl.program_id(0), tl.program_id(1) % num_heads, tl.program_id(1) // num_heads
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    query += wide_batch * query_stride_b + wide_head * query_stride_h
    out += wide_batch * out_stride_b + wide_head * out_stride_h
    rest += wide_batch * out_stride_b + wide_head * out_stride_h
    denominator_ptr += (wide_batch * num_heads + wide_head) * seq_len
    kv_state = wide_batch * (num_heads // group_size) + wide_head // group_size
    dims = tl.arange(0, BLOCK_D)
    pointers = state_ptr + kv_state * 2 * BLOCK_D * BLOCK_D + dims[:, None] * BLOCK_D + dims[None, :]
    # [BLOCK_D, BLOCK_D]
    rounded_state = tl.load(pointers)
    state_rest = tl.load(pointers + BLOCK_D * BLOCK_D)
    key_sum = tl.load(sum_ptr + kv_state * BLOCK_D + dims)
    for tile in tl.range(slot * tiles_each, tl.minimum((slot + 1) * tiles_each, num_tiles)):  # pyright: ignore[reportGeneralTypeIssues]
        tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        loaded = _load_columns(query, tokens, dims, seq_len, query_stride_s, query_stride_d, HEAD_DIM)
        x = loaded.to(tl.float32)
        peak, inverse = _statistics(x, dims, HEAD_DIM, FEATURES)
        # [BLOCK_M, BLOCK_D]
        a = _features(x, peak, inverse, dims, HEAD_DIM, FEATURES).to(loaded.dtype)
        mass = tl.sum(a.to(tl.float32) * key_sum[None, :], 1)
        acc = tl.dot(a, rounded_state)
        acc = tl.dot(a, state_rest, acc)
        # 0 marks rows without weight: their output and gradients are 0.
        denominator = tl.where(mass > 0.0, mass + eps, 0.0)  # pyright: ignore
        tl.store(denominator_ptr + tokens, denominator, tokens < seq_len)
        acc *= tl.where(denominator > 0.0, (1.0 / state_scale) / denominator, 0.0)[:, None]
        result = acc.to(loaded.dtype)
        offsets = tokens.to(tl.int64)[:, None] * out_stride_s + dims[None, :]
        inside = (tokens < seq_len)[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(out + offsets, result, mask=inside)
        if STORE_REST:
            tl.store(rest + offsets, (acc - result.to(tl.float32)).to(loaded.dtype), mask=inside)


def triton_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    excluded: BlockMask | None,
    *,
    feature_map: str,
    eps: float,
    keep_rest: bool = True,
    config: ForwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels; the same bits in every run.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]` bf16, fp16 or fp32, any strides.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        excluded: blocks that do not count (sizes are multiples of 16, with offsets any sizes), or None.
        feature_map, eps: as for `linear_branch`.
        keep_rest: whether a backward follows.
        config: tile shape and variant; default: the table of block_sparse_attention.

    Returns:
        Output like `query` (contiguous); for the backward the fp32 denominators `[batch, num_heads, seq_len_q]`, the
        scaled total `[batch, num_kv_heads, parts, D, D]` in the dtype of `query` and the sums of features
        `[batch, num_kv_heads, D]` in fp32, with D the padded head_dim; and what rounding dropped from the output, like
        it (the output itself for fp32, or if not kept).
    """
    batch, seq_len_q, num_heads, head_dim = query.shape
    seq_len_kv, num_kv_heads = key.shape[1:3]
    block_d = padded_head_dim(head_dim)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    denominator = torch.empty(batch, num_heads, seq_len_q, dtype=torch.float32, device=query.device)
    keep_rest = keep_rest and query.dtype != torch.float32
    rest = torch.empty(query.shape, dtype=query.dtype, device=query.device) if keep_rest else out
    if out.numel() == 0:
        return out, denominator, query.new_zeros(0), query.new_zeros(0), rest
    key_features = None
    if excluded is not None:
        key_features = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    state, key_sum = totals(key, value, key_features, feature_map=feature_map)
    state = in_parts(state, seq_len_kv, query.dtype)
    if excluded is None and _state_stays(query):
        _over_all_keys(query, out, rest, denominator, state, key_sum, feature_map, eps, keep_rest, seq_len_kv)
        return out, denominator, state, key_sum, rest
    if config is None:
        config = config_for(query, key, value, excluded)
    q_block, kv_block = block_sizes(excluded)
    arrays: list[Any] = [key_features if key_features is not None else key, value]
    strides = [*arrays[0].stride()[:3], *value.stride()]
    descriptors = config.descriptors and excluded is not None
    if descriptors:
        arrays = [_descriptor(x, config.block_n, block_d) for x in arrays]
    lists, own_blocks, own = walks(excluded, config.block_m, config.block_n, transposed=False, like=key_sum)
    counts, indices = lists
    variable = excluded is not None and excluded.variable
    num_q_tiles = own.shape[-1] if variable else triton.cdiv(seq_len_q, config.block_m)
    launch: Any = linear_forward_kernel[(num_q_tiles * num_heads * batch,)]
    with torch.cuda.device_of(query):
        launch(
            query, *arrays, out, rest, denominator, state, key_sum, counts, indices, own_blocks, own,
            *query.stride(), *strides, *out.stride()[:3],
            *_broadcast_strides(counts, 2), *_broadcast_strides(indices, 2), indices.stride(2),
            *_broadcast_strides(own, 2),
            num_heads, num_heads // num_kv_heads, seq_len_q, seq_len_kv, num_q_tiles,
            power_of_two(1.0 / seq_len_kv), eps, MIN_SHARE,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            Q_BLOCK=q_block, KV_BLOCK=kv_block, CHUNK=chunk_size(query, block_d), STATE_PARTS=state.shape[2],
            FEATURES=feature_map, WEIGHT_SCALE=weight_scale(feature_map, block_d), HAS_LISTS=excluded is not None,
            VARIABLE=variable, DESCRIPTORS=descriptors, RAGGED=variable or seq_len_kv % kv_block != 0,
            STORE_REST=keep_rest, PRECISION="ieee", num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, denominator, state, key_sum, rest


def _state_stays(query: Tensor) -> bool:
    """Whether both parts of a state and two tiles of queries fit into shared memory (the interpreter has no limit)."""
    if query.element_size() > 2:
        return False
    block_d = padded_head_dim(query.shape[3])
    needed = 2 * (block_d + ALL_BLOCK_M) * block_d * query.element_size()
    return query.device.type == "cpu" or needed <= _device_limits(query)[1]


def _over_all_keys(
    query: Tensor, out: Tensor, rest: Tensor, denominator: Tensor, state: Tensor, key_sum: Tensor,
    feature_map: str, eps: float, keep_rest: bool, seq_len_kv: int,
) -> None:  # fmt: skip
    """Fill out, rest and denominator for coverage "all"."""
    batch, seq_len, num_heads, head_dim = query.shape
    block_d = padded_head_dim(head_dim)
    num_tiles, tiles_each, grid = tiles_of_programs(query, ALL_BLOCK_M)
    launch: Any = linear_all_kernel[grid]
    with torch.cuda.device_of(query):
        launch(
            query, out, rest, denominator, state, key_sum, *query.stride(), *out.stride()[:3],
            num_heads, num_heads // state.shape[1], seq_len, num_tiles, tiles_each, power_of_two(1.0 / seq_len_kv), eps,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=ALL_BLOCK_M, FEATURES=feature_map, STORE_REST=keep_rest,
            num_warps=ALL_WARPS, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip


def tiles_of_programs(x: Tensor, block: int) -> tuple[int, int, tuple[int, int]]:
    """Tiles of a head, tiles of a program, and the grid: no more than TARGET_PROGRAMS, so that none waits for others."""
    batch, seq_len, heads, _ = x.shape
    num_tiles = triton.cdiv(seq_len, block)
    tiles_each = triton.cdiv(num_tiles, max(1, TARGET_PROGRAMS // (heads * batch)))
    return num_tiles, tiles_each, (triton.cdiv(num_tiles, tiles_each), heads * batch)


@dataclass
class QueryTotals:
    """What the totals of queries need beside query and the gradient of the output.

    Attributes:
        out, rest, denominator, key_sum: what the forward returned.
        group_size: query heads per kv head.
        row_scale: factor on u = dO / denominator.
        eps: as for `linear_branch`.
        scaled, delta: where row_scale * u and row_scale * delta go, with the features; None: nowhere.
        weak: written with the features: int32 `[batch, heads, chunks]`, whether a row keeps less than MIN_SHARE of its
            weight.
    """

    out: Tensor
    rest: Tensor
    denominator: Tensor
    key_sum: Tensor
    group_size: int
    row_scale: float
    eps: float
    scaled: Tensor | None = None
    delta: Tensor | None = None
    weak: Tensor | None = None


def totals(
    source: Tensor,
    value: Tensor,
    features: Tensor | None,
    *,
    feature_map: str,
    queries: QueryTotals | None = None,
) -> tuple[Tensor, Tensor]:
    """phi(source)^T value `[batch, heads, D, D]` and the sum of phi(source) `[batch, heads, D]`: the sums of
    `partial_totals`, whose arguments it takes."""
    state, total = partial_totals(source, value, features, feature_map=feature_map, queries=queries)
    return state.sum(2), total.sum(2)


def partial_totals(
    source: Tensor,
    value: Tensor,
    features: Tensor | None,
    *,
    feature_map: str,
    queries: QueryTotals | None = None,
    only_features: bool = False,
) -> tuple[Tensor, Tensor]:
    """phi(source)^T value and the sum of phi(source) per head and chunk of tokens, padded, in fp32; no atomics.

    Args:
        source, value: key and value, or query and the gradient of the output.
        features: where phi(source) goes, contiguous and like source, or None.
        feature_map: as for `linear_branch`.
        queries: for queries: what else goes in and out.
        only_features: fill `features`; the totals are not computed.

    Returns:
        `[batch, heads, chunks, D, D]` and `[batch, heads, chunks, D]` for the D of `padded_head_dim`.
    """
    batch, seq_len, heads, head_dim = source.shape
    block_d = padded_head_dim(head_dim)
    half = source.element_size() <= 2
    step, columns = (64, 128 if block_d <= 128 else 64) if half else (16, 32 if block_d <= 128 else 16)
    if half and _device_limits(source)[1] < 96 * KILOBYTE:
        step = 32
    columns = min(columns, block_d)
    chunks = max(1, min(TARGET_PROGRAMS // (batch * heads), triton.cdiv(seq_len, step)))
    chunk_len = triton.cdiv(triton.cdiv(seq_len, chunks), step) * step
    chunks = max(1, triton.cdiv(seq_len, chunk_len))
    state = torch.empty(batch, heads, chunks, block_d, block_d, dtype=torch.float32, device=source.device)
    total = torch.empty(batch, heads, chunks, block_d, dtype=torch.float32, device=source.device)
    if queries is None:
        queries = QueryTotals(value, value, total, total, 1, 1.0, 0.0)
        is_query = False
    else:
        is_query = True
        if features is not None:
            queries.weak = torch.empty(batch, heads, chunks, dtype=torch.int32, device=source.device)
    launch: Any = linear_state_kernel[(chunks, batch * heads, block_d // columns)]
    with torch.cuda.device_of(source):
        launch(
            source, value, queries.out, queries.rest, queries.denominator, features if features is not None else source,
            queries.scaled if queries.scaled is not None else source,
            queries.delta if queries.delta is not None else total, queries.key_sum,
            queries.weak if queries.weak is not None else total, state, total,
            *source.stride(), *value.stride(), *queries.out.stride(), heads, queries.group_size, seq_len, chunk_len,
            chunks, queries.row_scale, queries.eps, MIN_SHARE,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_V=columns, STEP=step, FEATURES=feature_map,
            QUERIES=is_query, STORE=features is not None, TOTALS=not only_features, PRECISION="ieee",
            num_warps=8 if block_d > 128 or block_d == 128 and (is_query or not half) else KEY_TOTAL_WARPS,
            num_stages=2 if half else 1,
        )  # fmt: skip
    return state, total


def in_parts(state: Tensor, seq_len: int, dtype: torch.dtype) -> Tensor:
    """A total as kernels read it: `[batch, heads, parts, D, D]`, times power_of_two(1 / seq_len) to stay in range.

    In half precision two parts, the rounded number and the rounded rest.
    """
    state = state * power_of_two(1.0 / seq_len)
    rounded = state.to(dtype)
    if dtype == torch.float32:
        return rounded.unsqueeze(2)
    return torch.stack([rounded, (state - rounded.to(torch.float32)).to(dtype)], 2)


def power_of_two(x: float) -> float:
    """The largest power of two up to x: a factor that rounds nothing."""
    return 2.0 ** math.floor(math.log2(x))


def weight_scale(feature_map: str, block_d: int) -> float:
    """Factor on a_i . b_j before it is rounded: features without a bound would leave the range of fp16."""
    return 1.0 if feature_map == "softmax" else 1.0 / block_d


def block_sizes(excluded: BlockMask | None) -> tuple[int, int]:
    if excluded is None:
        return WHOLE_BLOCK, WHOLE_BLOCK
    return excluded.q_block_size, excluded.kv_block_size


def chunk_size(query: Tensor, block_d: int) -> int:
    """Columns at a time of a product with a total."""
    if query.element_size() <= 2:
        return min(block_d, 64 if block_d <= 128 else 32)
    return 16


def walks(
    excluded: BlockMask | None, own_size: int, other_size: int, *, transposed: bool, like: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Lists (counts, indices) that the programs walk, and for variable blocks the block and tile that each owns."""
    if excluded is None:
        nothing = like.new_zeros(1, 1, 1, 1, dtype=torch.int32)
        return (nothing[..., 0], nothing), nothing[..., 0], nothing[..., 0]
    if excluded.variable:
        lists = tile_lists(excluded, other_size, transposed=transposed)
    else:
        lists = excluded.transpose() if transposed else (excluded.kv_num_blocks, excluded.kv_indices)
    counts, indices = (x if x.stride(-1) == 1 else x.contiguous() for x in lists)
    if indices.shape[-1] == 0:
        indices = torch.zeros(*indices.shape[:3], 1, dtype=torch.int32, device=indices.device)
    own_blocks, own = counts, counts
    if excluded.variable:
        own_blocks, own = own_tiles(excluded, own_size, transposed=transposed)
    return (counts, indices), own_blocks, own


def config_for(
    query: Tensor, key: Tensor, value: Tensor, excluded: BlockMask | None, *, descriptors: bool | None = None
) -> ForwardConfig:
    """What the table of block_sparse_attention says for these arguments on their device.

    `descriptors=None` uses tensor descriptors where they pay, True wherever they are possible, False nowhere.
    """
    if descriptors is None:
        work = 4 * query.shape[0] * query.shape[1] * key.shape[1] * query.shape[2] * query.shape[3]
        descriptors = work > MIN_DESCRIPTOR_FLOPS
    capability, shared_memory = _device_limits(query)
    q_block, kv_block = block_sizes(excluded)
    config = forward_config(
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
    if config.block_m == 128 and padded_head_dim(query.shape[3]) == 128:
        # In four warps 848 bytes a thread are spilled on 9.0 (Triton 3.6), in eight none.
        config = replace(config, num_warps=8)
    return config


def rows_are_aligned(x: Tensor) -> bool:
    """Whether TMA can read an array like `x` that is contiguous, as the features are."""
    return x.shape[3] * x.element_size() % 16 == 0


def unsupported(query: Tensor, excluded: BlockMask | None) -> str | None:
    """Why the kernels cannot do this case, as the end of a sentence that starts with their name; None if they can."""
    if excluded is None:
        # Any mask that attention can take.
        excluded = BlockMask.full(1, 1, q_block_size=WHOLE_BLOCK, kv_block_size=WHOLE_BLOCK)
    obstacle = unsupported_attention(query, excluded)
    if obstacle is None and torch.is_grad_enabled() and query.requires_grad:
        obstacle = unsupported_backward(query)
    return obstacle
