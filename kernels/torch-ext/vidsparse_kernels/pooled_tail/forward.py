"""Triton forward kernel of the pooled tail, alone or merged into an attention state as it is written."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from ..block_sparse_attention.configs import ForwardConfig, forward_config, padded_head_dim
from ..block_sparse_attention.forward import (
    DTYPES,
    LOG2_E,
    MAX_HEAD_DIM,
    TensorDescriptor,
    _descriptor,
    _load_tile,
    _tma_can_read,
)
from ..block_sparse_attention.tiles import MAX_TOKENS, own_tiles
from .pooling import broadcast_strides
from .pools import Pools
from .words import WORD_BITS, listed_words

MIN_DESCRIPTOR_FLOPS = 2e10
"""Below this much work, making two descriptors on the host takes about as long as the kernel."""
SHAPE_INTEGERS = [
    "words_stride_b", "words_stride_h", "words_stride_m", "sizes_stride_b", "sizes_stride_h",
    "own_stride_b", "own_stride_h", "lse_stride_b", "lse_stride_h", "lse_stride_s",
    "num_heads", "num_pools", "num_kv_blocks", "num_q_tiles", "seq_len_q",
]  # fmt: skip
"""What Triton may not compile into the kernel, so that one compilation serves every shape."""


@triton.jit
def owned_tile(
    slot, own, own_blocks_ptr, own_tiles_ptr, seq_len,
    BLOCK: tl.constexpr, Q_BLOCK: tl.constexpr, VARIABLE: tl.constexpr,
):  # fmt: skip
    """Block, first token and end of a tile of queries; end before first where there is no tile."""
    if VARIABLE:
        tile = tl.load(own_tiles_ptr + own + slot)
        block = tl.load(own_blocks_ptr + own + slot)
        start = tl.maximum(tile, 0) >> 8
        end = tl.where(tile < 0, -1, start + (tile & 255) + 1)
    else:
        start = slot * BLOCK
        end = seq_len
        block = start // Q_BLOCK
    return block, start, end


@triton.jit
def load_columns(words_ptr, sizes_ptr, start_n, num_kv_blocks, BLOCK_N: tl.constexpr):
    """Bits of the blocks start_n .. start_n + BLOCK_N in the lowest places, and log2 of the blocks' sizes."""
    columns = start_n + tl.arange(0, BLOCK_N)
    word = tl.load(words_ptr + start_n // 64, mask=start_n < num_kv_blocks, other=0) >> (start_n % 64)
    size = tl.load(sizes_ptr + columns, mask=columns < num_kv_blocks, other=float("-inf"))
    return word, size


@triton.jit
def bias_of(word, size, BLOCK_N: tl.constexpr):
    """log2 of the sizes, -inf where a block is listed, empty or not there."""
    bits = tl.arange(0, BLOCK_N)
    # Shifts of 32 bits are one instruction.
    half = tl.where(bits < 32, word.to(tl.int32), (word >> 32).to(tl.int32))
    return tl.where((half >> (bits & 31)) & 1 == 0, size, float("-inf"))


@triton.jit(do_not_specialize=SHAPE_INTEGERS)
def pooled_tail_kernel(
    query_ptr, keys, values, first_order_ptr, out_ptr, lse_ptr, words_ptr, sizes_ptr, own_blocks_ptr, own_tiles_ptr,
    query_stride_b, query_stride_s, query_stride_h, query_stride_d,
    out_stride_b, out_stride_s, out_stride_h, out_stride_d,
    lse_stride_b, lse_stride_h, lse_stride_s,
    words_stride_b, words_stride_h, words_stride_m, sizes_stride_b, sizes_stride_h, own_stride_b, own_stride_h,
    num_heads, num_pools, num_kv_blocks, num_q_tiles, seq_len_q, qk_scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr, Q_BLOCK: tl.constexpr, FIRST_ORDER: tl.constexpr, MERGE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, VARIABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head over all virtual tokens; keys and values are pointers or descriptors.

    MERGE: out and lse hold a state over other keys, and are replaced by the state over both.
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
    if not DESCRIPTORS:
        keys += pool_row * num_kv_blocks * HEAD_DIM
        values += pool_row * num_kv_blocks * HEAD_DIM
    query_ptr += wide_batch * query_stride_b + wide_head * query_stride_h
    words_ptr += wide_batch * words_stride_b + wide_head * words_stride_h + q_block.to(tl.int64) * words_stride_m
    # The sizes of blocks are one row for all heads, or one per pool.
    sizes_ptr += wide_batch * sizes_stride_b + pool.to(tl.int64) * sizes_stride_h

    # [BLOCK_M, BLOCK_D]
    q = _load_tile(
        query_ptr, batch, head, start_m, seq_len_q, query_stride_s, query_stride_d,
        HEAD_DIM, BLOCK_M, BLOCK_D, False, True,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    tokens = start_m + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # [BLOCK_M], peak in base 2
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    # Read one step ahead, because the products of a step wait for it.
    word, size = load_columns(words_ptr, sizes_ptr, 0, num_kv_blocks, BLOCK_N)
    for start_n in tl.range(0, num_kv_blocks, BLOCK_N):  # pyright: ignore[reportGeneralTypeIssues]
        bias = bias_of(word, size, BLOCK_N)
        word, size = load_columns(words_ptr, sizes_ptr, start_n + BLOCK_N, num_kv_blocks, BLOCK_N)
        k = _load_tile(
            keys, batch, pool, start_n, num_kv_blocks, HEAD_DIM, 1,
            HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, True,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale_log2 + bias[None, :]
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        # A row may have met nothing but -inf so far; shifting by 0 keeps -inf - -inf out.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(peak - shift)
        mass = mass * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        v = _load_tile(
            values, batch, pool, start_n, num_kv_blocks, HEAD_DIM, 1,
            HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, True,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak

    empty = mass == 0.0
    safe = tl.where(empty, 1.0, mass)
    acc = acc / safe[:, None]
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(safe)) * 0.6931471805599453)
    dims = tl.arange(0, BLOCK_D)
    if FIRST_ORDER:
        first_order_ptr += pool_row * HEAD_DIM * HEAD_DIM
        acc_low = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        # Slices of the queries are read again: registers cannot be cut.
        for start_d in tl.static_range(0, HEAD_DIM, SLICE):  # pyright: ignore[reportGeneralTypeIssues]
            rows = start_d + tl.arange(0, SLICE)
            inside = (rows < HEAD_DIM)[:, None] & (dims < HEAD_DIM)[None, :]
            matrix = tl.load(first_order_ptr + rows[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
            pointers = query_ptr + tokens.to(tl.int64)[:, None] * query_stride_s
            pointers += rows.to(tl.int64)[None, :] * query_stride_d
            part = tl.load(pointers, mask=(tokens < end_m)[:, None] & (rows < HEAD_DIM)[None, :], other=0.0)
            if part.dtype == tl.float32:
                # Each slice is summed by itself and added with what rounding dropped: one chain of HEAD_DIM sums onto acc
                # loses more than plain attention. The compiler joins a product with a sum only where it has one use.
                term = tl.dot(part, matrix, input_precision=PRECISION)
                both_terms = acc + term
                acc_low += term - (both_terms - acc)
                acc = both_terms
            else:
                acc = tl.dot(part, matrix, acc, input_precision=PRECISION)
        acc = tl.where(empty[:, None], 0.0, acc + acc_low)
    rows_inside = tokens < end_m
    lse_ptr += wide_batch * lse_stride_b + wide_head * lse_stride_h
    out_ptr += wide_batch * out_stride_b + wide_head * out_stride_h
    pointers = out_ptr + tokens.to(tl.int64)[:, None] * out_stride_s + dims.to(tl.int64)[None, :] * out_stride_d
    inside = rows_inside[:, None] & (dims < HEAD_DIM)[None, :]
    lse_pointers = lse_ptr + tokens.to(tl.int64) * lse_stride_s
    if MERGE:
        other_lse = tl.load(lse_pointers, mask=rows_inside, other=float("-inf"))
        top = tl.maximum(lse, other_lse)
        top = tl.where(top == float("-inf"), 0.0, top)
        own_mass = tl.exp(lse - top)
        other_mass = tl.exp(other_lse - top)
        both = own_mass + other_mass
        none = both == 0.0
        both = tl.where(none, 1.0, both)
        other = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        acc = acc * (own_mass / both)[:, None] + other * (other_mass / both)[:, None]
        lse = tl.where(none, float("-inf"), top + tl.log(both))
        # Several threads may have read the same number: all of them before one writes it.
        tl.debug_barrier()
    tl.store(lse_pointers, lse, mask=rows_inside)
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=inside)


def triton_tail(
    query: Tensor,
    pools: Pools,
    block_mask: BlockMask,
    *,
    scale: float,
    first_order: bool,
    state: tuple[Tensor, Tensor] | None = None,
    config: ForwardConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; inference only.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]` bf16, fp16 or fp32, any strides.
        pools: fp32, rounded to the dtype of `query` for the products.
        block_mask: block sizes and offsets of any kind.
        scale: factor on query . key.
        first_order: whether to add the first-order term.
        state: output (like `query`, any strides) and fp32 LSE `[batch, num_heads, seq_len_q]` to merge into, in place.
        config: tile shape and variant; default: `config_for`.

    Returns:
        Output and fp32 LSE: of the tail alone, or `state` itself after the merge.
    """
    batch, seq_len_q, num_heads, head_dim = query.shape
    if state is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(batch, num_heads, seq_len_q, dtype=torch.float32, device=query.device)
    else:
        out, lse = state
    if out.numel() == 0:
        return out, lse
    keys, values, matrix = rounded(pools, query.dtype, scale if first_order else None)
    num_pools, num_kv_blocks = keys.shape[1:3]
    sizes = block_sizes_log2(pools.counts, block_mask)
    if config is None:
        config = config_for(query, keys, block_mask)
    variable, own_blocks, own_starts, num_q_tiles = q_tiles(block_mask, config.block_m)
    words = listed_words(block_mask)
    block_d = padded_head_dim(head_dim)
    arrays: list[Any] = [keys, values]
    if config.descriptors:
        # As [batch, token, head, dim], which is what `_descriptor` takes.
        arrays = [_descriptor(x.transpose(1, 2), config.block_n, block_d) for x in arrays]
    launch: Any = pooled_tail_kernel[(num_q_tiles * num_heads * batch,)]
    with torch.cuda.device_of(query):
        launch(
            query, *arrays, matrix if matrix is not None else keys, out, lse, words, sizes, own_blocks, own_starts,
            *query.stride(), *out.stride(), *lse.stride(),
            *broadcast_strides(words), words.stride(2), *broadcast_strides(sizes), *broadcast_strides(own_starts),
            num_heads, num_pools, num_kv_blocks, num_q_tiles, seq_len_q, scale * LOG2_E,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            SLICE=min(64 if query.element_size() <= 2 else 16, block_d), Q_BLOCK=block_mask.q_block_size,
            FIRST_ORDER=first_order, MERGE=state is not None, DESCRIPTORS=config.descriptors, VARIABLE=variable,
            PRECISION="ieee", num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


def rounded(pools: Pools, dtype: torch.dtype, scale: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contiguous keys, values and, with a scale, scale times the first-order matrix in the dtype of the products."""
    keys, values = (x.to(dtype).contiguous() for x in (pools.keys, pools.values))
    if scale is None:
        return keys, values, None
    assert pools.first_order is not None
    return keys, values, (pools.first_order * scale).to(dtype).contiguous()


def block_sizes_log2(counts: Tensor, block_mask: BlockMask) -> Tensor:
    """fp32 log2 of `Pools.counts`, -inf where there is no token; kept on the mask where the counts are."""
    if counts is not block_mask._cache.get("kv_counts"):
        return counts.to(torch.float32).log2()
    if "kv_counts_log2" not in block_mask._cache:
        block_mask._cache["kv_counts_log2"] = counts.to(torch.float32).log2()
    return block_mask._cache["kv_counts_log2"]


def q_tiles(block_mask: BlockMask, block_m: int) -> tuple[bool, Tensor, Tensor, int]:
    """Whether tiles of queries are listed (else they follow from the position), their lists, and how many."""
    if block_mask.q_offsets is None and block_mask.q_block_size % block_m == 0:
        unused = block_mask.kv_num_blocks
        return False, unused, unused, triton.cdiv(block_mask.seq_len_q, block_m)
    blocks, tiles = own_tiles(block_mask, block_m)
    return True, blocks, tiles, tiles.shape[-1]


def config_for(query: Tensor, keys: Tensor, block_mask: BlockMask) -> ForwardConfig:
    """What the table of the block-sparse forward says for tiles of queries by 64 virtual tokens."""
    capability = None
    if query.device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(query.device)
    work = 4 * query.numel() * keys.shape[2]
    config = forward_config(
        capability=capability,
        shared_memory=shared_memory_of(query),
        head_dim=query.shape[3],
        itemsize=query.element_size(),
        q_block_size=tile_limit(block_mask.q_block_size),
        kv_block_size=WORD_BITS,
        descriptors_possible=TensorDescriptor is not None
        and work > MIN_DESCRIPTOR_FLOPS
        and _tma_can_read(keys.transpose(1, 2)),
    )
    if query.element_size() <= 2 and capability is not None and capability[0] == 9 and 64 < query.shape[3] <= 128:
        # On an H200 at 75,600 tokens and 12 heads 1.44 ms, with 128 queries a tile 1.58 to 2.5 ms.
        config = replace(config, block_m=min(config.block_m, 64), num_warps=4, num_stages=3)
    if query.element_size() > 2:
        # More would not fit the registers (the compiler's report for 9.0).
        limit = 32 if query.shape[3] <= 128 else 16
        config = replace(config, block_m=min(config.block_m, 32), block_n=min(config.block_n, limit), num_warps=8)
    return config


def shared_memory_of(x: Tensor) -> int:
    """Bytes that one program may use on the device of `x`."""
    if x.device.type != "cuda":
        return 64 * 1024
    return getattr(torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", 64 * 1024)


def tile_limit(q_block_size: int) -> int:
    """Queries of a tile, at most: q-blocks that are no multiple of 64 get one tile that covers them, up to 128."""
    return q_block_size if q_block_size % 64 == 0 else max(16, min(128, triton.next_power_of_2(q_block_size)))


def unsupported(query: Tensor, block_mask: BlockMask) -> str | None:
    """Why Triton cannot do this case, as the end of a sentence that starts with its name; None if it can."""
    if query.dtype not in DTYPES:
        return f"computes in bf16, fp16 and fp32, not {query.dtype}"
    if query.shape[3] > MAX_HEAD_DIM:
        return f"supports head_dim up to {MAX_HEAD_DIM}, got {query.shape[3]}"
    listed_tiles = block_mask.q_offsets is not None or block_mask.q_block_size % 64 != 0
    if listed_tiles and block_mask.seq_len_q > MAX_TOKENS:
        return f"supports up to {MAX_TOKENS} tokens in q-blocks that are no multiple of 64, got {block_mask.seq_len_q}"
    if query.device.type == "cpu":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "needs a GPU"
    if query.device.type != "cuda":
        return f"needs a CUDA or ROCm GPU, got {query.device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "needs compute capability 8.0 or later"
    return None
