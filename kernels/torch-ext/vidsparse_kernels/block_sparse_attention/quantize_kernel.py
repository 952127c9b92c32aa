"""Triton kernel that rounds query or key to int8, one pass over it."""

# In kernels every value is the compiler's, which its annotations for the host do not describe.
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import padded_head_dim
from .quantize import SMALLEST, QuantizedQueryKey, key_mean

QUERY_ROWS = 64
"""Rows of query per program."""


@triton.jit
def quantize_kernel(
    x_ptr, mean_ptr, out_ptr, scale_ptr,
    stride_b, stride_s, stride_h, stride_d, num_heads, seq_len, num_blocks, smallest,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, IS_KEY: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head; heads run fastest, so that neighbouring programs read neighbouring memory."""
    program = tl.program_id(0)
    head = program % num_heads
    block = (program // num_heads) % num_blocks
    batch = program // num_heads // num_blocks
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    # [ROWS], [BLOCK_D]
    tokens = block * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    inside = (tokens < seq_len)[:, None] & (dims < HEAD_DIM)[None, :]
    row = (wide_batch * seq_len + tokens.to(tl.int64)) * num_heads + wide_head
    x_ptr += wide_batch * stride_b + wide_head * stride_h
    pointers = x_ptr + tokens.to(tl.int64)[:, None] * stride_s + dims.to(tl.int64)[None, :] * stride_d
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if IS_KEY:
        mean = tl.load(
            mean_ptr + (wide_batch * num_heads + wide_head) * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0
        )
        x = tl.where(inside, x - mean[None, :], 0.0)
    # 0, or NaN where a number is not finite, which must not turn into a number.
    spoilt = x * 0.0
    x = tl.where(spoilt == 0.0, x, 0.0)
    if IS_KEY:
        largest = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), smallest)
        scale = largest * (1.0 / 127.0) + tl.sum(tl.sum(spoilt, 1), 0)
        tl.store(scale_ptr + (wide_batch * num_heads + wide_head) * num_blocks + block, scale)
        x = x * tl.div_rn(127.0, largest)
    else:
        largest = tl.maximum(tl.max(tl.abs(x), 1), smallest)
        scale = largest * (1.0 / 127.0) + tl.sum(spoilt, 1)
        tl.store(scale_ptr + (wide_batch * num_heads + wide_head) * seq_len + tokens, scale, mask=tokens < seq_len)
        x = x * tl.div_rn(127.0, largest)[:, None]
    # Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    x = (x + 12582912.0) - 12582912.0
    tl.store(out_ptr + row[:, None] * HEAD_DIM + dims[None, :], x.to(tl.int8), mask=inside)


def quantize_query_key(query: Tensor, key: Tensor, block: int) -> QuantizedQueryKey:
    """What `quantize_reference` gives for the mean of the keys, in two launches.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]` bf16, fp16 or fp32, any strides.
        key: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        block: keys that share a scale, a power of two.
    """
    return QuantizedQueryKey(*_quantize(query, None, QUERY_ROWS), *_quantize(key, key_mean(key), block))


def _quantize(x: Tensor, mean: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    batch, seq_len, num_heads, head_dim = x.shape
    num_blocks = triton.cdiv(seq_len, rows)
    numbers = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = seq_len if mean is None else num_blocks
    scale = torch.empty(batch, num_heads, scales, dtype=torch.float32, device=x.device)
    launch: Any = quantize_kernel[(batch * num_heads * num_blocks,)]
    with torch.cuda.device_of(x):
        launch(
            x, scale if mean is None else mean, numbers, scale, *x.stride(), num_heads, seq_len, num_blocks, SMALLEST,
            HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), ROWS=rows, IS_KEY=mean is not None, num_warps=4,
            # A product and a sum rounded once would round some halves the other way than the specification.
            enable_fp_fusion=False,
        )  # fmt: skip
    return numbers, scale
