"""Triton forward and backward of out + projection(linear branch over all keys), in half precision.

With a = phi(q), b = phi(k), W = sum_j b_j^T v_j, z = sum_j b_j, the projection y -> y P^T + c and M = W P^T,

    out_i + (a_i M) / (a_i . z + eps) + c

so the projection is applied once to the total of a head, not to every row, and the branch is never written by itself. For
the backward, with D_i = a_i . z + eps, u_i = dO_i / D_i, T = sum_i a_i^T u_i and t = sum_i delta_i a_i:

    delta_i = (u_i M^T) . a_i / D_i     da_i = u_i M^T - delta_i z     dP = T^T W     dc = sum_i dO_i
    db_j = v_j (T P)^T - t              dv_j = b_j T P

Nothing is kept but the inputs, M, W and z, and no product over rows is needed for dP. q and dO are read twice, k and v once:
in one pass T, [D, D] in fp32, would spill 600 bytes a thread.
Programs keep the total of their head in shared memory and walk several tiles. No atomics: the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autocast import without_autocast
from ..block_selection.pooling import triton_pool
from ..block_sparse_attention.backward import _device_limits
from ..block_sparse_attention.configs import padded_head_dim
from .forward import (
    _features,
    _features_gradient,
    _load_columns,
    _statistics,
    partial_totals,
    power_of_two,
    tiles_of_programs,
)

BLOCK = 64
"""Tokens of a tile."""
FORWARD_WARPS, QUERY_WARPS, TOTAL_WARPS, KEY_WARPS = 4, 8, 8, 8
STAGES = 2
INTEGERS = ["num_heads", "group_size", "seq_len", "num_tiles", "tiles_each"]
"""What Triton may not compile into the kernels, so that one compilation serves every shape."""


@triton.jit(do_not_specialize=["num_parts"])
def finish_totals_kernel(
    partial_ptr, sums_ptr, weight_ptr, raw_ptr, state_ptr, sum_ptr, weight_stride_k, weight_stride_n, num_parts, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one total: the sum of its parts, raw, and scale times its product with the weight, in two halves."""
    start = tl.program_id(0) * ROWS
    total = tl.program_id(1).to(tl.int64)
    rows = start + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    own = rows[:, None] * BLOCK_D + dims[None, :]
    partial_ptr += total * num_parts * BLOCK_D * BLOCK_D
    sums_ptr += total * num_parts * BLOCK_D
    raw_ptr += total * BLOCK_D * BLOCK_D
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for part in tl.range(0, num_parts, loop_unroll_factor=4):  # pyright: ignore[reportGeneralTypeIssues]
        acc += tl.load(partial_ptr + part * BLOCK_D * BLOCK_D + own)
        mass += tl.load(sums_ptr + part * BLOCK_D + rows)
    tl.store(raw_ptr + own, acc)
    tl.store(sum_ptr + total * BLOCK_D + rows, mass)
    # Read again a few columns at a time: registers cannot be cut.
    tl.debug_barrier()
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in tl.range(0, HEAD_DIM, 16):  # pyright: ignore[reportGeneralTypeIssues]
        columns = first + tl.arange(0, 16)
        x = tl.load(raw_ptr + rows[:, None] * BLOCK_D + columns[None, :])
        inside = (columns < HEAD_DIM)[:, None] & (dims < HEAD_DIM)[None, :]
        pointers = weight_ptr + columns[:, None] * weight_stride_k + dims[None, :] * weight_stride_n
        acc = tl.dot(x, tl.load(pointers, mask=inside, other=0.0).to(tl.float32), acc, input_precision="ieee")
    acc *= scale
    rounded = acc.to(state_ptr.dtype.element_ty)
    state_ptr += total * 2 * BLOCK_D * BLOCK_D
    tl.store(state_ptr + own, rounded)
    tl.store(state_ptr + BLOCK_D * BLOCK_D + own, (acc - rounded.to(tl.float32)).to(rounded.dtype))


@triton.jit(do_not_specialize=INTEGERS)
def projected_kernel(
    query, base, out, bias_ptr, state_ptr, sum_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    base_stride_b, base_stride_s, base_stride_h, base_stride_d,
    out_stride_b, out_stride_s, out_stride_h,
    num_heads, group_size, seq_len, num_tiles, tiles_each, state_scale, eps,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """tiles_each tiles of BLOCK_M queries of one head: out = base + projected branch."""
    slot, head, batch = tl.program_id(0), tl.program_id(1) % num_heads, tl.program_id(1) // num_heads
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    query += wide_batch * query_stride_b + wide_head * query_stride_h
    base += wide_batch * base_stride_b + wide_head * base_stride_h
    out += wide_batch * out_stride_b + wide_head * out_stride_h
    kv_state = wide_batch * (num_heads // group_size) + wide_head // group_size
    dims = tl.arange(0, BLOCK_D)
    pointers = state_ptr + kv_state * 2 * BLOCK_D * BLOCK_D + dims[:, None] * BLOCK_D + dims[None, :]
    # [BLOCK_D, BLOCK_D]
    state = tl.load(pointers)
    state_rest = tl.load(pointers + BLOCK_D * BLOCK_D)
    key_sum = tl.load(sum_ptr + kv_state * BLOCK_D + dims)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
    for tile in tl.range(slot * tiles_each, tl.minimum((slot + 1) * tiles_each, num_tiles)):  # pyright: ignore[reportGeneralTypeIssues]
        tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        loaded = _load_columns(query, tokens, dims, seq_len, query_stride_s, query_stride_d, HEAD_DIM)
        other = _load_columns(base, tokens, dims, seq_len, base_stride_s, base_stride_d, HEAD_DIM)
        x = loaded.to(tl.float32)
        peak, inverse = _statistics(x, dims, HEAD_DIM, FEATURES)
        # [BLOCK_M, BLOCK_D]
        a = _features(x, peak, inverse, dims, HEAD_DIM, FEATURES).to(loaded.dtype)
        mass = tl.sum(a.to(tl.float32) * key_sum[None, :], 1)
        acc = tl.dot(a, state)
        acc = tl.dot(a, state_rest, acc)
        # Rows without weight give 0, and the bias.
        acc *= tl.where(mass > 0.0, (1.0 / state_scale) / (mass + eps), 0.0)[:, None]  # pyright: ignore
        acc += other.to(tl.float32) + bias[None, :]
        targets = out + tokens.to(tl.int64)[:, None] * out_stride_s + dims[None, :]
        tl.store(targets, acc.to(loaded.dtype), mask=(tokens < seq_len)[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=INTEGERS)
def projected_query_kernel(
    query, grad_out, grad_query, state_ptr, sum_ptr, factor_ptr, delta_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    grad_out_stride_b, grad_out_stride_s, grad_out_stride_h, grad_out_stride_d,
    grad_query_stride_b, grad_query_stride_s, grad_query_stride_h,
    num_heads, group_size, seq_len, num_tiles, tiles_each, state_scale, row_scale, eps,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Gradient of tiles_each tiles of queries; row_scale / D and row_scale * delta of each row for the totals."""
    slot, head, batch = tl.program_id(0), tl.program_id(1) % num_heads, tl.program_id(1) // num_heads
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    query += wide_batch * query_stride_b + wide_head * query_stride_h
    grad_out += wide_batch * grad_out_stride_b + wide_head * grad_out_stride_h
    grad_query += wide_batch * grad_query_stride_b + wide_head * grad_query_stride_h
    factor_ptr += tl.program_id(1).to(tl.int64) * seq_len
    delta_ptr += tl.program_id(1).to(tl.int64) * seq_len
    kv_state = wide_batch * (num_heads // group_size) + wide_head // group_size
    dims = tl.arange(0, BLOCK_D)
    pointers = state_ptr + kv_state * 2 * BLOCK_D * BLOCK_D + dims[:, None] * BLOCK_D + dims[None, :]
    state = tl.load(pointers)
    state_rest = tl.load(pointers + BLOCK_D * BLOCK_D)
    key_sum = tl.load(sum_ptr + kv_state * BLOCK_D + dims)
    for tile in tl.range(slot * tiles_each, tl.minimum((slot + 1) * tiles_each, num_tiles)):  # pyright: ignore[reportGeneralTypeIssues]
        tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        loaded = _load_columns(query, tokens, dims, seq_len, query_stride_s, query_stride_d, HEAD_DIM)
        grad = _load_columns(grad_out, tokens, dims, seq_len, grad_out_stride_s, grad_out_stride_d, HEAD_DIM)
        x = loaded.to(tl.float32)
        peak, inverse = _statistics(x, dims, HEAD_DIM, FEATURES)
        # [BLOCK_M, BLOCK_D]
        a = _features(x, peak, inverse, dims, HEAD_DIM, FEATURES).to(loaded.dtype).to(tl.float32)
        mass = tl.sum(a * key_sum[None, :], 1)
        factor = tl.where(mass > 0.0, 1.0 / (mass + eps), 0.0)  # pyright: ignore
        u = (grad.to(tl.float32) * (factor * row_scale)[:, None]).to(loaded.dtype)
        grad_a = tl.dot(u, tl.trans(state))
        grad_a = tl.dot(u, tl.trans(state_rest), grad_a) / state_scale
        # Of the rounded factors, as in grad_a: the two large parts of the gradient then cancel.
        delta = tl.sum(grad_a * a, 1) * factor
        tl.store(factor_ptr + tokens, factor * row_scale, mask=tokens < seq_len)
        tl.store(delta_ptr + tokens, delta, mask=tokens < seq_len)
        grad_a = (grad_a - delta[:, None] * key_sum[None, :]) / row_scale
        result = _features_gradient(x, grad_a, peak, inverse, dims, HEAD_DIM, FEATURES)
        targets = grad_query + tokens.to(tl.int64)[:, None] * grad_query_stride_s + dims[None, :]
        tl.store(targets, result.to(loaded.dtype), mask=(tokens < seq_len)[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["num_heads", "seq_len", "num_tiles", "tiles_each"])
def projected_total_kernel(
    query, grad_out, factor_ptr, delta_ptr, partial_ptr, partial_sum_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    grad_out_stride_b, grad_out_stride_s, grad_out_stride_h, grad_out_stride_d,
    num_heads, seq_len, num_tiles, tiles_each,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """What tiles_each tiles of queries add to T and t, both row_scale times."""
    slot, head, batch = tl.program_id(0), tl.program_id(1) % num_heads, tl.program_id(1) // num_heads
    query += batch.to(tl.int64) * query_stride_b + head.to(tl.int64) * query_stride_h
    grad_out += batch.to(tl.int64) * grad_out_stride_b + head.to(tl.int64) * grad_out_stride_h
    factor_ptr += tl.program_id(1).to(tl.int64) * seq_len
    delta_ptr += tl.program_id(1).to(tl.int64) * seq_len
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    total_sum = tl.zeros([BLOCK_D], tl.float32)
    for tile in tl.range(slot * tiles_each, tl.minimum((slot + 1) * tiles_each, num_tiles)):  # pyright: ignore[reportGeneralTypeIssues]
        tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        loaded = _load_columns(query, tokens, dims, seq_len, query_stride_s, query_stride_d, HEAD_DIM)
        grad = _load_columns(grad_out, tokens, dims, seq_len, grad_out_stride_s, grad_out_stride_d, HEAD_DIM)
        # Both are 0 past the end, whatever the features of 0 are.
        factor = tl.load(factor_ptr + tokens, mask=tokens < seq_len, other=0.0)
        delta = tl.load(delta_ptr + tokens, mask=tokens < seq_len, other=0.0)
        x = loaded.to(tl.float32)
        peak, inverse = _statistics(x, dims, HEAD_DIM, FEATURES)
        a = _features(x, peak, inverse, dims, HEAD_DIM, FEATURES).to(loaded.dtype)
        total_sum += tl.sum(a.to(tl.float32) * delta[:, None], 0)  # pyright: ignore
        u = (grad.to(tl.float32) * factor[:, None]).to(loaded.dtype)
        total = tl.dot(tl.trans(a), u, total)
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + slot
    partial_ptr += part * BLOCK_D * BLOCK_D
    tl.store(partial_ptr + dims[:, None] * BLOCK_D + dims[None, :], total)
    tl.store(partial_sum_ptr + part * BLOCK_D + dims, total_sum)


@triton.jit(do_not_specialize=INTEGERS)
def projected_key_kernel(
    key, value, grad_key, grad_value, state_ptr, sum_ptr,
    key_stride_b, key_stride_s, key_stride_h, key_stride_d,
    value_stride_b, value_stride_s, value_stride_h, value_stride_d,
    grad_stride_b, grad_stride_s, grad_stride_h,
    num_heads, seq_len, num_tiles, tiles_each, state_scale, row_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Gradients of tiles_each tiles of keys and values of one kv head, from T P and t."""
    slot, head, batch = tl.program_id(0), tl.program_id(1) % num_heads, tl.program_id(1) // num_heads
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    key += wide_batch * key_stride_b + wide_head * key_stride_h
    value += wide_batch * value_stride_b + wide_head * value_stride_h
    offset = wide_batch * grad_stride_b + wide_head * grad_stride_h
    dims = tl.arange(0, BLOCK_D)
    pointers = state_ptr + tl.program_id(1).to(tl.int64) * 2 * BLOCK_D * BLOCK_D
    pointers += dims[:, None] * BLOCK_D + dims[None, :]
    state = tl.load(pointers)
    state_rest = tl.load(pointers + BLOCK_D * BLOCK_D)
    query_sum = tl.load(sum_ptr + tl.program_id(1).to(tl.int64) * BLOCK_D + dims)
    for tile in tl.range(slot * tiles_each, tl.minimum((slot + 1) * tiles_each, num_tiles)):  # pyright: ignore[reportGeneralTypeIssues]
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        loaded = _load_columns(key, tokens, dims, seq_len, key_stride_s, key_stride_d, HEAD_DIM)
        v = _load_columns(value, tokens, dims, seq_len, value_stride_s, value_stride_d, HEAD_DIM)
        x = loaded.to(tl.float32)
        peak, inverse = _statistics(x, dims, HEAD_DIM, FEATURES)
        # [BLOCK_N, BLOCK_D]
        b = _features(x, peak, inverse, dims, HEAD_DIM, FEATURES).to(loaded.dtype)
        offsets = offset + tokens.to(tl.int64)[:, None] * grad_stride_s + dims[None, :]
        inside = (tokens < seq_len)[:, None] & (dims < HEAD_DIM)[None, :]
        grad_v = tl.dot(b, state)
        grad_v = tl.dot(b, state_rest, grad_v) * (1.0 / (state_scale * row_scale))
        tl.store(grad_value + offsets, grad_v.to(loaded.dtype), mask=inside)
        grad_b = tl.dot(v, tl.trans(state))
        grad_b = tl.dot(v, tl.trans(state_rest), grad_b) / state_scale - query_sum[None, :]
        grad_k = _features_gradient(x, grad_b / row_scale, peak, inverse, dims, HEAD_DIM, FEATURES)
        tl.store(grad_key + offsets, grad_k.to(loaded.dtype), mask=inside)


def fits(query: Tensor) -> bool:
    """Whether the kernels take this dtype and head_dim on this device (the interpreter has no limit)."""
    block_d = padded_head_dim(query.shape[3])
    if query.element_size() > 2 or block_d > 128:
        return False
    # Two parts of a total, and two tensors of tiles in flight beside one that is multiplied.
    needed = (2 * block_d + (2 * STAGES + 1) * BLOCK) * block_d * query.element_size()
    return query.device.type == "cpu" or needed <= _device_limits(query)[1]


def triton_projected(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, *, feature_map: str,
    eps: float,
) -> Tensor:  # fmt: skip
    """out + linear(branch over all keys, weight, bias) as `fits` allows it, differentiable once in every tensor."""
    return _Projected.apply(out, query, key, value, weight, bias, feature_map, eps)  # pyright: ignore[reportReturnType]


def forward(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum, and for the backward W `[batch * kv heads, D, D]` fp32, M in two halves and z `[..., D]` fp32."""
    batch, seq_len, num_heads, head_dim = query.shape
    result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    state_scale = power_of_two(1.0 / max(1, key.shape[1]))
    parts = partial_totals(key, value, None, feature_map=feature_map)
    raw, state, key_sum = _finish(*parts, key.shape[2] * batch, weight.t(), state_scale, query.dtype)
    num_tiles, tiles_each, grid = tiles_of_programs(query, BLOCK)
    launch: Any = projected_kernel[grid]
    with torch.cuda.device_of(query):
        launch(
            query, out, result, bias if bias is not None else weight, state, key_sum,
            *query.stride(), *out.stride(), *result.stride()[:3],
            num_heads, num_heads // key.shape[2], seq_len, num_tiles, tiles_each, state_scale, eps,
            HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=BLOCK, FEATURES=feature_map,
            HAS_BIAS=bias is not None, num_warps=FORWARD_WARPS, num_stages=STAGES,
        )  # fmt: skip
    return result, raw, state, key_sum


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, raw: Tensor, state: Tensor,
    key_sum: Tensor, feature_map: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value (contiguous, in their dtype) and weight (fp32)."""
    batch, seq_len_q, num_heads, head_dim = query.shape
    seq_len_kv, num_kv_heads = key.shape[1:3]
    block_d = padded_head_dim(head_dim)
    # A softmax feature is about 1 / head_dim, others about 1.
    row_scale = power_of_two(seq_len_kv / head_dim if feature_map == "softmax" else seq_len_kv * head_dim)
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    num_tiles, tiles_each, grid = tiles_of_programs(query, BLOCK)
    partial = torch.empty(grid[1], grid[0], block_d, block_d, dtype=torch.float32, device=query.device)
    partial_sum = torch.empty_like(partial[..., 0])
    factor = torch.empty(batch, num_heads, seq_len_q, dtype=torch.float32, device=query.device)
    delta = torch.empty_like(factor)
    common: dict[str, Any] = dict(HEAD_DIM=head_dim, BLOCK_D=block_d, FEATURES=feature_map, num_stages=STAGES)
    launch: Any = projected_query_kernel[grid]
    with torch.cuda.device_of(query):
        launch(
            query, grad, grad_query, state, key_sum, factor, delta,
            *query.stride(), *grad.stride(), *grad_query.stride()[:3],
            num_heads, num_heads // num_kv_heads, seq_len_q, num_tiles, tiles_each, power_of_two(1.0 / seq_len_kv),
            row_scale, eps, BLOCK_M=BLOCK, num_warps=QUERY_WARPS, **common,
        )  # fmt: skip
        launch = projected_total_kernel[grid]
        launch(
            query, grad, factor, delta, partial, partial_sum, *query.stride(), *grad.stride(),
            num_heads, seq_len_q, num_tiles, tiles_each, BLOCK_M=BLOCK, num_warps=TOTAL_WARPS, **common,
        )  # fmt: skip
    state_scale = power_of_two(1.0 / seq_len_q)
    query_raw, query_state, query_sum = _finish(
        partial, partial_sum, batch * num_kv_heads, weight, state_scale, query.dtype
    )
    num_tiles, tiles_each, grid = tiles_of_programs(key, BLOCK)
    launch = projected_key_kernel[grid]
    with torch.cuda.device_of(query):
        launch(
            key, value, grad_key, grad_value, query_state, query_sum,
            *key.stride(), *value.stride(), *grad_key.stride()[:3],
            num_kv_heads, seq_len_kv, num_tiles, tiles_each, state_scale, row_scale,
            BLOCK_N=BLOCK, num_warps=KEY_WARPS, **common,
        )  # fmt: skip
    grad_weight = query_raw.flatten(0, 1).t() @ raw.flatten(0, 1) / row_scale
    return grad_query, grad_key, grad_value, grad_weight[:head_dim, :head_dim]


def _finish(
    partial: Tensor, sums: Tensor, number: int, weight: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `number` totals, whose parts stand one after the other: the sums, their scaled products with the weight
    `[k, n]` in two halves, and the sums of features."""
    block_d = partial.shape[-1]
    num_parts = partial.numel() // (number * block_d * block_d)
    raw = torch.empty(number, block_d, block_d, dtype=torch.float32, device=partial.device)
    state = torch.empty(number, 2, block_d, block_d, dtype=dtype, device=partial.device)
    total = torch.empty(number, block_d, dtype=torch.float32, device=partial.device)
    launch: Any = finish_totals_kernel[(block_d // 16, number)]
    with torch.cuda.device_of(partial):
        launch(
            partial, sums, weight, raw, state, total, *weight.stride(), num_parts, scale,
            HEAD_DIM=weight.shape[0], BLOCK_D=block_d, ROWS=16, num_warps=4,
        )  # fmt: skip
    return raw, state, total


def _sum_of_rows(x: Tensor) -> Tensor:
    """Sum over all tokens and heads, fp32 `[head_dim]`; torch's own reduction over these dimensions takes four times as long."""
    rows = 256
    blocks = triton.cdiv(x.shape[1], rows)
    means = triton_pool(x, rows, kinds=("mean",), offsets=None, num_blocks=blocks)["mean"].sum((0, 1))
    return means[:-1].sum(0) * rows + means[-1] * (x.shape[1] - (blocks - 1) * rows)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Any, feature_map: str,
        eps: float,
    ) -> Tensor:  # fmt: skip
        result, raw, state, key_sum = forward(out, query, key, value, weight, bias, feature_map, eps)
        ctx.save_for_backward(query, key, value, weight, bias, raw, state, key_sum)
        ctx.feature_map, ctx.eps = feature_map, eps
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        query, key, value, weight, bias, raw, state, key_sum = ctx.saved_tensors
        with without_autocast(query.device.type):
            *grads, grad_weight = backward(
                grad, query, key, value, weight, raw, state, key_sum, ctx.feature_map, ctx.eps
            )
            grad_bias = None if bias is None else _sum_of_rows(grad).to(bias.dtype)
        return grad, *grads, grad_weight.to(weight.dtype), grad_bias, None, None
