"""Triton forward kernel over block lists."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from .configs import MIN_DESCRIPTOR_FLOPS, ForwardConfig, forward_config, padded_head_dim
from .quantize import scale_block
from .quantize_kernel import quantize_query_key
from .tiles import MAX_TOKENS, own_tiles, tile_lists

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

MAX_HEAD_DIM = 256
LOG2_E = 1.4426950408889634
SHAPE_INTEGERS = [
    "counts_stride_b", "counts_stride_h", "indices_stride_b", "indices_stride_h", "indices_stride_m",
    "bias_stride_b", "bias_stride_h", "own_stride_b", "own_stride_h",
    "num_heads", "group_size", "seq_len_q", "seq_len_kv", "num_q_tiles", "num_scales",
]  # fmt: skip
"""What Triton may not compile into the kernel, so that one compilation serves every shape."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _load_tile(
    source, batch, head, start, length, stride_s, stride_d,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Tokens start .. start + BLOCK as `[BLOCK, BLOCK_D]`, zeros past the head_dim and, where RAGGED, the length."""
    if DESCRIPTORS:
        loaded = source.load([batch, head, start, 0]).reshape([BLOCK, BLOCK_D])
    else:
        # [BLOCK], [BLOCK_D]
        tokens = start + tl.arange(0, BLOCK)
        dims = tl.arange(0, BLOCK_D)
        pointers = source + tokens.to(tl.int64)[:, None] * stride_s + dims.to(tl.int64)[None, :] * stride_d
        if RAGGED:
            loaded = tl.load(pointers, mask=(tokens < length)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        elif HEAD_DIM != BLOCK_D:
            loaded = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        else:
            loaded = tl.load(pointers)
    return loaded


@triton.jit
def _exp2(x, EXACT: tl.constexpr):
    """2^x. EXACT: within 1.4 units in the last place of fp32, where the special-function unit is up to 2 off and not the
    same way in the backward as in the forward; for whole exponents it is exact."""
    if EXACT:
        # -inf would be -inf - -inf below.
        x = tl.where(x < -160.0, -160.0, x)
        whole = tl.floor(x + 0.5)
        part = x - whole
        # Least relative error over -0.5 .. 0.5 in degree 6: 1.9e-9.
        power = part * 0.00015345810970757157 + 0.0013399930903688073
        power = power * part + 0.009618489071726799
        power = power * part + 0.05550328642129898
        power = power * part + 0.24022646248340607
        power = power * part + 0.6931471824645996
        power = power * part + 1.0
        result = power * tl.exp2(whole)
    else:
        result = tl.exp2(x)
    return result


@triton.jit
def _add_product(acc, low, a, b, K: tl.constexpr, REFINE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b of `[M, K]` and `[K, N]`. REFINE: what that sum rounds off goes into `low`, with which the next product
    starts, since without it all the tokens (in the backward of all the heads of a group) are one chain, whose rounding
    grows with its length (Kahan 1965)."""
    if REFINE:
        product = _product_in_chains(low, a, tl.trans(b), K, PRECISION)
        total = acc + product
        low = product - (total - acc)
        acc = total
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc, low


@triton.jit
def _product(a, b, K: tl.constexpr, REFINE: tl.constexpr, PRECISION: tl.constexpr):
    """`[M, N]`: a b^T of `[M, K]` and `[N, K]`. REFINE: in chains."""
    if REFINE:
        result = _product_in_chains(tl.zeros([a.shape[0], b.shape[0]], tl.float32), a, b, K, PRECISION)
    else:
        result = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return result


@triton.jit
def _product_in_chains(start, a, b, K: tl.constexpr, PRECISION: tl.constexpr):
    """start + a b^T of `[M, K]` and `[N, K]`, as sums over every second column, from 64 on over every fourth.

    Products on the plain cores add one term at a time, and the rounding of such a chain grows with its length. The sum of
    two products the compiler would make one chain again, but not the first less the negative of the second.
    """
    if K >= 32:
        first_a, second_a = tl.split(a.reshape([a.shape[0], K // 2, 2]))
        first_b, second_b = tl.split(b.reshape([b.shape[0], K // 2, 2]))
        result = _product_of_half(start, first_a, first_b, K // 2, PRECISION)
        result -= _product_of_half(tl.zeros_like(start), -second_a, second_b, K // 2, PRECISION)
    else:
        result = tl.dot(a, tl.trans(b), start, input_precision=PRECISION)
    return result


@triton.jit
def _product_of_half(start, a, b, K: tl.constexpr, PRECISION: tl.constexpr):
    """`_product_in_chains` of half of the columns."""
    if K >= 32:
        first_a, second_a = tl.split(a.reshape([a.shape[0], K // 2, 2]))
        first_b, second_b = tl.split(b.reshape([b.shape[0], K // 2, 2]))
        result = tl.dot(first_a, tl.trans(first_b), start, input_precision=PRECISION)
        result -= tl.dot(-second_a, tl.trans(second_b), input_precision=PRECISION)
    else:
        result = tl.dot(a, tl.trans(b), start, input_precision=PRECISION)
    return result


@triton.jit
def _own_rows(
    blocks_ptr, tiles_ptr, own, slot, seq_len,
    OWN: tl.constexpr, BLOCK: tl.constexpr, VARIABLE: tl.constexpr,
):  # fmt: skip
    """(block, first row, end) of a program's tile of OWN rows; where VARIABLE from `own_tiles`, and end 0 for no tile."""
    if VARIABLE:
        tile = tl.load(tiles_ptr + own)
        block = tl.load(blocks_ptr + own)
        start = tile >> 8
        end = tl.where(tile < 0, 0, start + (tile & 255) + 1)
    else:
        start = slot * OWN
        end = seq_len
        block = start // BLOCK
    return block, start, end


@triton.jit
def _listed_tiles(indices_ptr, count, seq_len, BLOCK: tl.constexpr, TILE: tl.constexpr, VARIABLE: tl.constexpr):
    """(number of tiles, last block, tokens that it lacks) of a list of blocks; where VARIABLE the list holds tiles.

    Lists ascend, so only their last entry can be the shorter last block, which may lack some whole tiles.
    """
    num_tiles, last, overhang = count, 0, 0
    if not VARIABLE:
        last = tl.load(indices_ptr + tl.maximum(count - 1, 0), mask=count > 0, other=0)
        overhang = tl.where(count > 0, tl.maximum((last + 1) * BLOCK - seq_len, 0), 0)
        num_tiles = count * (BLOCK // TILE) - overhang // TILE
    return num_tiles, last, overhang


@triton.jit
def _attend(
    acc, low, peak, mass, q, key, value, bias_ptr, batch, kv_head, start_n, end_n, voters, row_scale, key_scale_ptr,
    qk_scale_log2, skip_log2, key_stride_s, key_stride_d, value_stride_s, value_stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, RAGGED: tl.constexpr, SKIP: tl.constexpr, SCALE_BLOCK: tl.constexpr,
    REFINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys start_n .. start_n + BLOCK_N, where RAGGED up to end_n; base 2."""
    k = _load_tile(
        key, batch, kv_head, start_n, end_n, key_stride_s, key_stride_d,
        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, RAGGED,
    )  # fmt: skip
    # [BLOCK_M, BLOCK_N]
    if SCALE_BLOCK:
        # The scales of rows and keys take the place of the softmax scale.
        logits = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
        logits *= (row_scale * tl.load(key_scale_ptr + start_n // SCALE_BLOCK))[:, None]
        qk_scale_log2 = 1.0
    else:
        logits = _product(q, k, BLOCK_D, REFINE, PRECISION)
    columns = start_n + tl.arange(0, BLOCK_N)
    if RAGGED:
        # Most tiles are whole: a branch costs less than the selects.
        if end_n - start_n < BLOCK_N:
            logits = tl.where((columns < end_n)[None, :], logits, float("-inf"))
    if HAS_BIAS:
        if RAGGED:
            bias = tl.load(bias_ptr + columns, mask=columns < end_n, other=0.0)
        else:
            bias = tl.load(bias_ptr + columns)
        logits = logits * qk_scale_log2 + (bias.to(tl.float32) * 1.4426950408889634)[None, :]
        tile_peak = tl.max(logits, 1)
    else:
        tile_peak = tl.max(logits, 1) * qk_scale_log2  # pyright: ignore[reportOperatorIssue]
    if SKIP:
        # The comparison fails where both are -inf: nothing is lost.
        votes = voters & (tile_peak - peak >= skip_log2)
        if tl.max(votes.to(tl.int32), 0) != 0:
            acc, low, peak, mass = _accumulate(
                acc, low, peak, mass, logits, tile_peak, value, batch, kv_head, start_n, end_n, qk_scale_log2,
                value_stride_s, value_stride_d,
                HEAD_DIM, BLOCK_N, BLOCK_D, HAS_BIAS, DESCRIPTORS, RAGGED, REFINE, PRECISION,
            )  # fmt: skip
    else:
        acc, low, peak, mass = _accumulate(
            acc, low, peak, mass, logits, tile_peak, value, batch, kv_head, start_n, end_n, qk_scale_log2,
            value_stride_s, value_stride_d,
            HEAD_DIM, BLOCK_N, BLOCK_D, HAS_BIAS, DESCRIPTORS, RAGGED, REFINE, PRECISION,
        )  # fmt: skip
    return acc, low, peak, mass


@triton.jit
def _accumulate(
    acc, low, peak, mass, logits, tile_peak, value, batch, kv_head, start_n, end_n, qk_scale_log2,
    value_stride_s, value_stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, RAGGED: tl.constexpr, REFINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the values of a tile with these logits, not yet scaled unless HAS_BIAS."""
    new_peak = tl.maximum(peak, tile_peak)
    if HAS_BIAS:
        # A row may have met nothing but -inf so far; shifting by 0 keeps -inf - -inf out.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = _exp2(logits - shift[:, None], REFINE)
        decay = _exp2(peak - shift, REFINE)
    else:
        # Scaling inside the exponent lets the compiler fuse multiply and subtract. Each tile has a key that counts.
        weights = _exp2(logits * qk_scale_log2 - new_peak[:, None], REFINE)
        decay = _exp2(peak - new_peak, REFINE)
    mass = mass * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    low = low * decay[:, None]
    v = _load_tile(
        value, batch, kv_head, start_n, end_n, value_stride_s, value_stride_d,
        HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, RAGGED,
    )  # fmt: skip
    acc, low = _add_product(acc, low, weights.to(v.dtype), v, BLOCK_N, REFINE, PRECISION)
    return acc, low, new_peak, mass


@triton.jit(do_not_specialize=SHAPE_INTEGERS)
def block_sparse_forward_kernel(
    query, key, value, out, lse_ptr, counts_ptr, indices_ptr, bias_ptr, own_blocks_ptr, own_tiles_ptr,
    query_scale_ptr, key_scale_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    key_stride_b, key_stride_s, key_stride_h, key_stride_d,
    value_stride_b, value_stride_s, value_stride_h, value_stride_d,
    out_stride_b, out_stride_s, out_stride_h,
    counts_stride_b, counts_stride_h, indices_stride_b, indices_stride_h, indices_stride_m,
    bias_stride_b, bias_stride_h, own_stride_b, own_stride_h,
    num_heads, group_size, seq_len_q, seq_len_kv, num_q_tiles, num_scales, qk_scale_log2, skip_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, RAGGED_KV: tl.constexpr, HAS_BIAS: tl.constexpr,
    STORE_LSE: tl.constexpr, DESCRIPTORS: tl.constexpr, VARIABLE: tl.constexpr, SKIP: tl.constexpr,
    SCALE_BLOCK: tl.constexpr, REFINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head over their listed kv-blocks; query, key, value, out are pointers or descriptors.

    VARIABLE: own_blocks and own_tiles are the tiles of queries, counts and indices the lists of tiles of keys, packed
    as in `tiles`; out is then a pointer, because a descriptor would also write the rows past the end of a tile.
    SCALE_BLOCK: 0, or query and key are int8 and so many keys share a scale.
    Descriptors also read the values past the end of a run, with weight 0: they must be finite.
    """
    program = tl.program_id(0)
    slot = program % num_q_tiles
    head = (program // num_q_tiles) % num_heads
    batch = program // num_q_tiles // num_heads
    kv_head = head // group_size
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
    if VARIABLE or not DESCRIPTORS:
        out += wide_batch * out_stride_b + wide_head * out_stride_h
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
    tokens = start_m + tl.arange(0, BLOCK_M)
    row_scale = 0.0
    if SCALE_BLOCK:
        query_scale_ptr += (wide_batch * num_heads + wide_head) * seq_len_q
        row_scale = tl.load(query_scale_ptr + tokens, mask=tokens < end_m, other=1.0) * qk_scale_log2
        key_scale_ptr += (wide_batch * (num_heads // group_size) + wide_kv_head) * num_scales
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # [BLOCK_M], peak in base 2
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)

    TILES: tl.constexpr = 1 if VARIABLE else KV_BLOCK // BLOCK_N  # pyright: ignore[reportAssignmentType]
    # Keys past the end of a run belong to other blocks, those past the last token to nobody.
    RAGGED: tl.constexpr = VARIABLE or RAGGED_KV  # pyright: ignore[reportAssignmentType]
    num_tiles, _, _ = _listed_tiles(indices_ptr, count, seq_len_kv, KV_BLOCK, BLOCK_N, VARIABLE)
    for tile in tl.range(0, num_tiles):  # pyright: ignore[reportGeneralTypeIssues]
        entry = tl.load(indices_ptr + tile // TILES)
        if VARIABLE:
            start_n = entry >> 8
            end_n = start_n + (entry & 255) + 1
        else:
            start_n = entry * KV_BLOCK + (tile % TILES) * BLOCK_N
            end_n = seq_len_kv
        acc, low, peak, mass = _attend(
            acc, low, peak, mass, q, key, value, bias_ptr, batch, kv_head,
            start_n, end_n, tokens < end_m, row_scale, key_scale_ptr, qk_scale_log2, skip_log2,
            key_stride_s, key_stride_d, value_stride_s, value_stride_d,
            HEAD_DIM, BLOCK_N, BLOCK_D, HAS_BIAS, DESCRIPTORS, RAGGED, SKIP, SCALE_BLOCK, REFINE, PRECISION,
        )  # fmt: skip

    mass_or_one = tl.where(mass == 0.0, 1.0, mass)[:, None]
    if REFINE:
        # A plain division is up to two units off.
        acc = tl.div_rn(acc + low, mass_or_one)
    else:
        acc = acc / mass_or_one
    if STORE_LSE:
        lse = tl.where(mass == 0.0, float("-inf"), (peak + tl.log2(mass)) * 0.6931471805599453)
        lse_row = (wide_batch * num_heads + head) * seq_len_q
        tl.store(lse_ptr + lse_row + tokens, lse, mask=tokens < end_m)
    if DESCRIPTORS and not VARIABLE:
        out.store([batch, head, start_m, 0], acc.to(out.dtype).reshape([1, 1, BLOCK_M, BLOCK_D]))
    else:
        dims = tl.arange(0, BLOCK_D)
        pointers = out + tokens.to(tl.int64)[:, None] * out_stride_s + dims[None, :]
        inside = (tokens < end_m)[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside)


def triton_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool,
    skip_threshold: float | None = None,
    quantize: str | None = None,
    config: ForwardConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; inference only.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]` bf16, fp16 or fp32, any strides.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        block_mask: lists; block sizes are multiples of 16, blocks with offsets have any sizes.
        scale: factor on query . key, positive.
        key_bias: fp32 `[B|1, H|1, seq_len_kv]`, natural-log units, or None.
        return_lse: whether to compute the LSE.
        skip_threshold: None or 0: exact; else tiles of block_m x block_n of the config are left out as in `reference`.
        quantize: "int8" multiplies query and key as integers, without key_bias, LSE, skipping, blocks with offsets.
        config: tile shape and variant; default: the table in `configs`.

    Returns:
        Output like `query` (contiguous) and the fp32 LSE `[batch, num_heads, seq_len_q]` or None.
    """
    batch, seq_len_q, num_heads, head_dim = query.shape
    seq_len_kv = key.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, num_heads, seq_len_q, dtype=torch.float32, device=query.device) if return_lse else None
    if out.numel() == 0:
        return out, lse
    if config is None:
        config = config_for(query, key, value, out, block_mask)
    lists, own = (block_mask.kv_num_blocks, block_mask.kv_indices), None
    if block_mask.variable:
        lists, own = tile_lists(block_mask, config.block_n), own_tiles(block_mask, config.block_m)
    counts, indices = _readable(*lists)
    bias = None
    if key_bias is not None:
        bias = key_bias if key_bias.stride(-1) == 1 else key_bias.contiguous()
    block_d = padded_head_dim(head_dim)
    query_scale = key_scale = counts
    if quantize is not None:
        query, query_scale, key, key_scale = quantize_query_key(query, key, scale_block(block_mask.kv_block_size))
        # Rows of 8-bit numbers may end where TMA cannot start.
        config = replace(config, descriptors=config.descriptors and _tma_can_read(query) and _tma_can_read(key))
    arrays: list[Any] = [query, key, value, out]
    if config.descriptors:
        rows = (config.block_m, config.block_n, config.block_n, config.block_m)
        described = [_descriptor(x, block, block_d) for x, block in zip(arrays, rows)]
        arrays = [*described[:3], out] if block_mask.variable else described
    own_blocks, own_starts = own if own is not None else (counts, counts)
    num_q_tiles = own_starts.shape[-1] if own is not None else triton.cdiv(seq_len_q, config.block_m)
    launch: Any = block_sparse_forward_kernel[(num_q_tiles * num_heads * batch,)]
    with torch.cuda.device_of(query):
        launch(
            *arrays, lse if return_lse else out, counts, indices, bias if bias is not None else out,
            own_blocks, own_starts, query_scale, key_scale,
            *query.stride(), *key.stride(), *value.stride(), *out.stride()[:3],
            *_broadcast_strides(counts, 2), *_broadcast_strides(indices, 2), indices.stride(2),
            *(_broadcast_strides(bias, 2) if bias is not None else (0, 0)), *_broadcast_strides(own_starts, 2),
            num_heads, num_heads // key.shape[2], seq_len_q, seq_len_kv, num_q_tiles, key_scale.shape[-1],
            scale * LOG2_E,
            math.log2(skip_threshold) if skip_threshold else -math.inf,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            Q_BLOCK=block_mask.q_block_size, KV_BLOCK=block_mask.kv_block_size,
            RAGGED_KV=seq_len_kv % config.block_n != 0, HAS_BIAS=bias is not None, STORE_LSE=return_lse,
            DESCRIPTORS=config.descriptors, VARIABLE=block_mask.variable, SKIP=bool(skip_threshold),
            SCALE_BLOCK=scale_block(block_mask.kv_block_size) if quantize is not None else 0,
            REFINE=value.dtype == torch.float32, PRECISION="ieee",
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def config_for(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, block_mask: BlockMask, *, descriptors: bool | None = None
) -> ForwardConfig:
    """What the table says for these arguments on their device.

    `descriptors=None` uses tensor descriptors where they pay, True wherever they are possible, False nowhere.
    """
    if descriptors is None:
        work = 4 * query.shape[0] * query.shape[1] * key.shape[1] * query.shape[2] * query.shape[3]
        descriptors = work > MIN_DESCRIPTOR_FLOPS
    capability, shared_memory = None, 64 * 1024
    if query.device.type == "cuda":
        properties = torch.cuda.get_device_properties(query.device)
        shared_memory = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
        if torch.version.hip is None:
            capability = (properties.major, properties.minor)
    return forward_config(
        capability=capability,
        shared_memory=shared_memory,
        head_dim=query.shape[3],
        itemsize=query.element_size(),
        q_block_size=block_mask.q_block_size,
        kv_block_size=block_mask.kv_block_size,
        descriptors_possible=descriptors
        and TensorDescriptor is not None
        and all(_tma_can_read(x) for x in (query, key, value, out)),
    )


def unsupported(query: Tensor, block_mask: BlockMask) -> str | None:
    """Why Triton cannot do this case, as the end of a sentence that starts with its name; None if it can."""
    if query.dtype not in DTYPES:
        return f"computes in bf16, fp16 and fp32, not {query.dtype}"
    if query.shape[3] > MAX_HEAD_DIM:
        return f"supports head_dim up to {MAX_HEAD_DIM}, got {query.shape[3]}"
    for name in ("q_block_size", "kv_block_size"):
        if getattr(block_mask, name) % 16:
            return f"needs a {name} that is a multiple of 16, got {getattr(block_mask, name)}"
    longest = max(block_mask.seq_len_q, block_mask.seq_len_kv)
    if block_mask.variable and longest > MAX_TOKENS:
        return f"supports up to {MAX_TOKENS} tokens with blocks of variable size, got {longest}"
    if query.device.type == "cpu":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "needs a GPU"
    if query.device.type != "cuda":
        return f"needs a CUDA or ROCm GPU, got {query.device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "needs compute capability 8.0 or later"
    return None


def _readable(counts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Lists as kernels read them: in place whatever the strides are, but the innermost one 1, and no list of width 0."""
    counts, indices = (x if x.stride(-1) == 1 else x.contiguous() for x in (counts, indices))
    if indices.shape[-1] == 0:
        indices = indices.new_zeros(*indices.shape[:3], 1)
    return counts, indices


def _broadcast_strides(x: Tensor, ndim: int) -> tuple[int, ...]:
    """The first strides, 0 where the dimension broadcasts."""
    return tuple(0 if x.shape[d] == 1 else x.stride(d) for d in range(ndim))


def _tma_can_read(x: Tensor) -> bool:
    """TMA wants 16-byte aligned rows and contiguous elements; strides of dimensions of size 1 are never used."""
    rows = (x.stride(d) * x.element_size() for d in range(3) if x.shape[d] > 1)
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(row > 0 and row % 16 == 0 for row in rows)


def _descriptor(x: Tensor, block: int, block_d: int) -> Any:
    """Descriptor of `[batch, seq_len, num_heads, head_dim]` in the order batch, head, token, dim, tokens in tiles."""
    assert TensorDescriptor is not None
    batch, seq_len, num_heads, head_dim = x.shape
    row = -(-head_dim * x.element_size() // 16) * 16 // x.element_size()
    strides = [x.stride(d) if x.shape[d] > 1 else row for d in (0, 2, 1)]
    return TensorDescriptor(x, [batch, num_heads, seq_len, head_dim], [*strides, 1], [1, 1, block, block_d])
