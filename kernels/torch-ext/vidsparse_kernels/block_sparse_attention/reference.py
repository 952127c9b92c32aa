"""The specification of block_sparse_attention in plain torch: any device, any case, differentiable.

Work goes over chunks of q-blocks, forward and backward, so that memory grows with the chunk and never with
seq_len_q * seq_len_kv. The backward recomputes the probabilities from the saved LSE.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from ..block_mask import BlockMask

CHUNK_ELEMENTS = 1 << 23
"""Scores plus gathered keys held at a time; 32 MiB in fp32."""


def reference(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, *, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each q-block over its listed kv-blocks.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]`.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`, num_heads a multiple of num_kv_heads.
        block_mask: the lists.
        scale: factor on query . key.
        key_bias: fp32 `[B|1, H|1, seq_len_kv]` added to the scaled logits (natural log), or None.

    Returns:
        Output `[batch, seq_len_q, num_heads, head_dim]` in the dtype of `query`, and the natural-log LSE
        `[batch, num_heads, seq_len_q]`, fp64 when `query` is fp64, else fp32. Sums are kept in the dtype of the LSE.
        Rows without any block give 0 and -inf. Both are differentiable once in query, key and value.
    """
    out, lse = _ReferenceAttention.apply(query, key, value, block_mask, scale, key_bias)
    return out, lse


class _ReferenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float, key_bias: Any
    ) -> tuple[Tensor, Tensor]:
        batch, seq_len_q, num_heads, head_dim = query.shape
        blocks = _Blocks(query, key, value, block_mask, scale, key_bias)
        out = torch.zeros_like(blocks.query)
        lse = out.new_full(out.shape[:-1], -torch.inf)
        for start, stop, width in blocks.chunks():
            scores, values = blocks.scores(start, stop, width)[0], blocks.gathered(blocks.value, start, stop, width)
            peak = scores.amax(-1, keepdim=True)
            peak = torch.where(peak == -torch.inf, 0.0, peak)
            weights = torch.exp(scores - peak)
            mass = weights.sum(-1, keepdim=True)
            lse[:, :, start:stop] = (peak + torch.log(mass)).squeeze(-1)
            out[:, :, start:stop] = weights @ values / torch.where(mass == 0, 1.0, mass)
        out = out.view(batch, num_heads, -1, head_dim)[:, :, :seq_len_q].transpose(1, 2).to(query.dtype)
        lse = lse.view(batch, num_heads, -1)[:, :, :seq_len_q].contiguous()
        ctx.save_for_backward(query, key, value, key_bias, out, lse)
        ctx.block_mask, ctx.scale = block_mask, scale
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_out, grad_lse = grad_outputs
        with without_autocast(grad_out.device.type):
            return (*_gradients(ctx, grad_out, grad_lse), None, None, None)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their dtypes and shapes."""
    query, key, value, key_bias, out, lse = ctx.saved_tensors
    scale = ctx.scale
    blocks = _Blocks(query, key, value, ctx.block_mask, scale, key_bias)
    dtype = blocks.query.dtype
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1).transpose(1, 2)
    # Rows without keys have lse -inf: no weight, and whatever arrives through them is dropped.
    empty = lse == -torch.inf
    shift = torch.where(empty, 0.0, grad_lse.to(dtype) - delta)
    grad_out_blocks, lse_blocks, shift_blocks = (
        blocks.by_q_block(grad_out.to(dtype).transpose(1, 2)),
        blocks.by_q_block(torch.where(empty, torch.inf, lse).unsqueeze(-1), padding=torch.inf),
        blocks.by_q_block(shift.unsqueeze(-1)),
    )
    grad_query = torch.zeros_like(blocks.query)
    grad_key, grad_value = torch.zeros_like(blocks.key), torch.zeros_like(blocks.value)
    for start, stop, width in blocks.chunks():
        scores, keys, rows = blocks.scores(start, stop, width)
        values = blocks.gathered(blocks.value, start, stop, width)
        grad_o = grad_out_blocks[:, :, start:stop]
        weights = torch.exp(scores - lse_blocks[:, :, start:stop])
        grad_scores = weights * (grad_o @ values.transpose(-1, -2) + shift_blocks[:, :, start:stop]) * scale
        grad_query[:, :, start:stop] = grad_scores @ keys
        q = blocks.query[:, :, start:stop]
        blocks.scatter_add(grad_key, rows, grad_scores.transpose(-1, -2) @ q)
        blocks.scatter_add(grad_value, rows, weights.transpose(-1, -2) @ grad_o)
    grad_query = grad_query.flatten(2, 3)[:, :, : query.shape[1]].transpose(1, 2).to(query.dtype)
    grad_key, grad_value = (
        g.flatten(2, 3)[:, :, : key.shape[1]].transpose(1, 2).to(key.dtype) for g in (grad_key, grad_value)
    )
    return grad_query, grad_key, grad_value


class _Blocks:
    """Query, key and value cut into blocks (padded with zeros) in the dtype of the sums.

    query `[batch, num_heads, num_q_blocks, q_block_size, head_dim]`;
    key, value `[batch, num_kv_heads, num_kv_blocks, kv_block_size, head_dim]`;
    bias `[B|1, H|1, num_kv_blocks, kv_block_size]`, -inf on padding.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_mask: BlockMask,
        scale: float,
        key_bias: Tensor | None,
    ) -> None:
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.mask, self.scale = block_mask, scale
        self.query = self.by_q_block(query.transpose(1, 2).to(dtype))
        self.key = self.by_kv_block(key.transpose(1, 2).to(dtype))
        self.value = self.by_kv_block(value.transpose(1, 2).to(dtype))
        if key_bias is None:
            key_bias = torch.zeros(1, 1, block_mask.seq_len_kv, device=key.device)
        padding = -block_mask.seq_len_kv % block_mask.kv_block_size
        bias = F.pad(key_bias.to(dtype), (0, padding), value=-torch.inf)
        self.bias = bias.unflatten(2, (block_mask.num_kv_blocks, block_mask.kv_block_size))

    def by_q_block(self, x: Tensor, padding: float = 0.0) -> Tensor:
        """`[batch, heads, seq_len_q, dim]` -> `[batch, heads, num_q_blocks, q_block_size, dim]`."""
        size = self.mask.q_block_size
        return F.pad(x, (0, 0, 0, -x.shape[2] % size), value=padding).unflatten(2, (-1, size)).contiguous()

    def by_kv_block(self, x: Tensor) -> Tensor:
        size = self.mask.kv_block_size
        return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).contiguous()

    def chunks(self) -> list[tuple[int, int, int]]:
        """(first q-block, last q-block + 1, longest list among them), none where all lists are empty."""
        batch, num_heads, num_q_blocks, q_block_size, head_dim = self.query.shape
        result = []
        start, widths = 0, longest_lists(self.mask)
        while start < num_q_blocks:
            width, stop = widths[start], start + 1
            while stop < num_q_blocks:
                wider = max(width, widths[stop])
                rows = batch * num_heads * (stop + 1 - start)
                if rows * wider * self.mask.kv_block_size * (q_block_size + 2 * head_dim) > CHUNK_ELEMENTS:
                    break
                width, stop = wider, stop + 1
            if width:
                result.append((start, stop, width))
            start = stop
        return result

    def rows(self, num_batches: int, num_heads: int, start: int, stop: int, width: int) -> Tensor:
        """Positions of the listed blocks in a `[num_batches, num_heads, num_kv_blocks]` array, flattened:
        int64 `[batch, num_heads of query, stop - start, width]`, or with size 1 where everything broadcasts."""
        listed = self.mask.kv_indices[:, :, start:stop, :width].to(torch.int64)
        device = listed.device
        batches = torch.arange(num_batches, device=device)[:, None, None, None]
        heads = torch.arange(num_heads, device=device)
        if num_heads > 1:
            heads = heads.repeat_interleave(self.query.shape[1] // num_heads)
        return (batches * num_heads + heads[None, :, None, None]) * self.mask.num_kv_blocks + listed

    def gathered(self, blocks: Tensor, start: int, stop: int, width: int) -> Tensor:
        """Listed blocks of key or value: `[batch, num_heads, stop - start, width * kv_block_size, head_dim]`."""
        rows = self.rows(blocks.shape[0], blocks.shape[1], start, stop, width)
        rows = rows.expand(-1, self.query.shape[1], -1, -1)
        picked = blocks.flatten(0, 2).index_select(0, rows.reshape(-1))
        return picked.view(*rows.shape[:3], width * self.mask.kv_block_size, blocks.shape[-1])

    def scores(self, start: int, stop: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled and biased logits `[batch, num_heads, stop - start, q_block_size, width * kv_block_size]`, -inf where
        a list has ended; the gathered keys; and the rows they came from."""
        keys = self.gathered(self.key, start, stop, width)
        rows = self.rows(self.key.shape[0], self.key.shape[1], start, stop, width)
        bias_rows = self.rows(self.bias.shape[0], self.bias.shape[1], start, stop, width)
        bias = self.bias.flatten(0, 2)[bias_rows]
        listed = torch.arange(width, device=keys.device) < self.mask.kv_num_blocks[:, :, start:stop, None]
        bias = torch.where(listed.unsqueeze(-1), bias, -torch.inf).flatten(3)
        scores = self.query[:, :, start:stop] @ keys.transpose(-1, -2) * self.scale + bias.unsqueeze(3)
        return scores, keys, rows

    def scatter_add(self, target: Tensor, rows: Tensor, update: Tensor) -> None:
        """Add `[batch, num_heads, n, width * kv_block_size, head_dim]` onto the blocks of `target` at `rows`."""
        rows = rows.expand(-1, self.query.shape[1], -1, -1)
        size = self.mask.kv_block_size * target.shape[-1]
        target.view(-1, size).index_add_(0, rows.reshape(-1), update.reshape(-1, size))


def longest_lists(block_mask: BlockMask) -> list[int]:
    """Length of the longest list over batch and heads for each q-block; read from the device once per mask."""
    if "longest_lists" not in block_mask._cache:
        block_mask._cache["longest_lists"] = block_mask.kv_num_blocks.amax((0, 1)).tolist()
    return block_mask._cache["longest_lists"]
