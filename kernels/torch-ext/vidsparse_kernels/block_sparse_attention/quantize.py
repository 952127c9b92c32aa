"""Query and key as int8 numbers with scales: the specification, in plain torch.

Softmax does not change when one vector is taken from all keys, so their mean goes first: what is left is smaller, and
all of int8 is there for what tells keys apart (SageAttention, Zhang et al. 2024, arXiv 2410.02367, section 4.2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .configs import largest_divisor

MAX_SAMPLE = 1024
"""Tokens at most whose mean is taken from the keys; any vector is allowed, so a sample is as good as all of them."""
SMALLEST = 1e-10
"""What stands for the largest number of a row of zeros."""


class QuantizedQueryKey(NamedTuple):
    """Query and key in int8.

    Attributes:
        query: int8 `[batch, seq_len_q, num_heads, head_dim]`.
        query_scale: fp32 `[batch, num_heads, seq_len_q]`; query is about query * query_scale.
        key: int8 `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        key_scale: fp32 `[batch, num_kv_heads, ceil(seq_len_kv / block)]`; key less its mean is about key * key_scale.
    """

    query: Tensor
    query_scale: Tensor
    key: Tensor
    key_scale: Tensor


def scale_block(kv_block_size: int) -> int:
    """Keys that share a scale: at most 128, and never of two kv-blocks."""
    return largest_divisor(kv_block_size, 128)


def restored_query_key(query: Tensor, key: Tensor, kv_block_size: int) -> tuple[Tensor, Tensor]:
    """fp32 query and key after rounding, key without its mean: what attention with `quantize` attends over."""
    block = scale_block(kv_block_size)
    return restored(quantize_reference(query, key, key_mean(key), block), block)


def key_mean(key: Tensor) -> Tensor:
    """fp32 `[batch, num_kv_heads, head_dim]`, the mean of at most `MAX_SAMPLE` evenly spaced tokens."""
    return key[:, :: -(-key.shape[1] // MAX_SAMPLE)].mean(1, dtype=torch.float32)


def quantize_reference(query: Tensor, key: Tensor, mean: Tensor, block: int) -> QuantizedQueryKey:
    """Round to 255 steps between plus and minus the largest number of a row of query, of a block of key.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]`.
        key: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        mean: fp32 `[batch, num_kv_heads, head_dim]`, taken from every key.
        block: keys that share a scale.

    Returns:
        A scale is NaN where its row or block holds NaN or an infinity, so that attention gives NaN there too.
    """
    # [batch, heads, tokens, dim]
    rows = query.float().transpose(1, 2)
    numbers, query_scale = _rounded(rows[..., None, :])
    blocks = (key.float() - mean[:, None]).transpose(1, 2)
    seq_len = blocks.shape[2]
    blocks = torch.nn.functional.pad(blocks, (0, 0, 0, -seq_len % block))
    key_numbers, key_scale = _rounded(blocks.unflatten(2, (-1, block)))
    return QuantizedQueryKey(
        numbers.squeeze(3).transpose(1, 2).contiguous(),
        query_scale,
        key_numbers.flatten(2, 3)[:, :, :seq_len].transpose(1, 2).contiguous(),
        key_scale,
    )


def restored(quantized: QuantizedQueryKey, block: int) -> tuple[Tensor, Tensor]:
    """Query and key that the numbers stand for, in fp32; key without its mean."""
    key_scale = quantized.key_scale.repeat_interleave(block, 2)[:, :, : quantized.key.shape[1]]
    return (
        quantized.query * quantized.query_scale.transpose(1, 2)[..., None],
        quantized.key * key_scale.transpose(1, 2)[..., None],
    )


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[..., rows, dim]` and the fp32 scale `[...]` of each group of rows."""
    # 0 or, where a number is not finite, NaN.
    spoilt = (x * 0.0).sum((-2, -1))
    largest = x.abs().nan_to_num(0.0, 0.0).amax((-2, -1)).clamp_min(SMALLEST)
    # A plain number over a tensor would be a product with a rounded reciprocal.
    numbers = (x * (torch.full_like(largest, 127.0) / largest)[..., None, None]).nan_to_num(0.0, 0.0, 0.0).round()
    return numbers.to(torch.int8), largest * (1.0 / 127.0) + spoilt
