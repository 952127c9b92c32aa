"""The specification of block_sparse_attention in plain torch: any device, any case, differentiable.

Blocks of variable size are computed in tiles of q_block_size x kv_block_size, those of uniform size as they are.

Work goes over chunks of q-blocks, forward and backward, so that memory grows with the chunk and never with
seq_len_q * seq_len_kv. The backward recomputes the probabilities from the saved LSE.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask
from .autograd import differentiable
from .tiles import own_tiles, tile_lists, unpacked

CHUNK_ELEMENTS, CPU_CHUNK_ELEMENTS = 1 << 23, 1 << 21
"""Scores plus gathered keys held at a time: 32 MiB in fp32, half as many where their products are summed in fp64. On a CPU 8
MiB, which stay in its caches: 1.2 to 1.7 times as fast."""


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    key_bias: Tensor | None,
    skip_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each q-block over its listed kv-blocks.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]`.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`, num_heads a multiple of num_kv_heads.
        block_mask: the lists.
        scale: factor on query . key.
        key_bias: fp32 `[B|1, H|1, seq_len_kv]` added to the scaled logits (natural log), or None.
        skip_threshold: leave out tiles of small weight (arXiv:2512.12087); None or 0: exact. Each q-block (or tile of
            it) walks its kv-blocks (or tiles of runs) in ascending order and leaves one out when in each of its rows
            the largest logit lies more than -ln(skip_threshold) below the largest one of the row so far, over the
            tiles kept. So the result depends on the block sizes. Not differentiable.

    Returns:
        Output `[batch, seq_len_q, num_heads, head_dim]` in the dtype of `query`, and the natural-log LSE
        `[batch, num_heads, seq_len_q]`, fp64 when `query` is fp64, else fp32. Sums are kept in the dtype of the LSE,
        those of matrix products of fp32 inputs in fp64 where the device has it.
        Rows without any block give 0 and -inf. Both are differentiable once in query, key and value.
    """
    forward = partial(_forward, skip_threshold=skip_threshold)
    return differentiable(forward, _gradients, query, key, value, block_mask, scale=scale, key_bias=key_bias)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    key_bias: Tensor | None,
    skip_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    blocks = _blocks(query, key, value, block_mask, scale, key_bias)
    out = torch.zeros_like(blocks.query)
    lse = out.new_full(out.shape[:-1], -torch.inf)
    for start, stop, width in blocks.chunks():
        scores, values = blocks.scores(start, stop, width)[0], blocks.gathered(blocks.value, start, stop, width)
        if skip_threshold:
            scores = _without_skipped(scores, blocks.q_rows(start, stop), width, math.log(skip_threshold))
        peak = scores.amax(-1, keepdim=True)
        peak = torch.where(peak == -torch.inf, 0.0, peak)
        weights = torch.exp(scores - peak)
        mass = weights.sum(-1, keepdim=True)
        lse[:, :, start:stop] = (peak + torch.log(mass)).squeeze(-1)
        out[:, :, start:stop] = blocks.product(weights, values) / torch.where(mass == 0, 1.0, mass)
    out = blocks.by_token(out).transpose(1, 2).to(query.dtype)
    return out, blocks.by_token(lse.unsqueeze(-1)).squeeze(-1).contiguous()


def _gradients(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their dtypes and shapes."""
    blocks = _blocks(query, key, value, block_mask, scale, key_bias)
    dtype = blocks.query.dtype
    # Rows without keys have lse -inf: no weight, and whatever arrives through them is dropped.
    empty = (lse == -torch.inf).unsqueeze(-1)
    grad_out_blocks = blocks.by_q_block(grad_out.to(dtype).transpose(1, 2))
    lse_blocks = blocks.by_q_block(torch.where(empty, torch.inf, lse.unsqueeze(-1)), padding=torch.inf)
    grad_lse_blocks = None
    if grad_lse is not None:
        grad_lse_blocks = blocks.by_q_block(torch.where(empty, 0.0, grad_lse.to(dtype).unsqueeze(-1)))
    grad_query = torch.zeros_like(blocks.query)
    grad_key, grad_value = torch.zeros_like(blocks.key), torch.zeros_like(blocks.value)
    for start, stop, width in blocks.chunks():
        scores, keys, rows = blocks.scores(start, stop, width)
        values = blocks.gathered(blocks.value, start, stop, width)
        grad_o = grad_out_blocks[:, :, start:stop]
        weights = torch.exp(scores - lse_blocks[:, :, start:stop])
        # The LSE was rounded, which tilts a whole row: it has to add up to 1.
        mass = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(mass == 0, 1.0, mass)
        grad_weights = blocks.product(grad_o, values.transpose(-1, -2))
        # What goes through the sum of a row, from the same numbers that it is taken from: dO . O would not cancel to the bit.
        grad_mass = (weights * grad_weights).sum(-1, keepdim=True)
        if grad_lse_blocks is not None:
            grad_mass = grad_mass - grad_lse_blocks[:, :, start:stop]
        grad_scores = weights * (grad_weights - grad_mass) * scale
        grad_query[:, :, start:stop] = blocks.product(grad_scores, keys)
        blocks.scatter_add(
            grad_key, rows, blocks.product(grad_scores.transpose(-1, -2), blocks.query[:, :, start:stop])
        )
        blocks.scatter_add(grad_value, rows, blocks.product(weights.transpose(-1, -2), grad_o))
    grad_query = blocks.by_token(grad_query).transpose(1, 2).to(query.dtype)
    grad_key, grad_value = (
        g.flatten(2, 3)[:, :, : key.shape[1]].transpose(1, 2).to(key.dtype) for g in (grad_key, grad_value)
    )
    return grad_query, grad_key, grad_value


def _has_fp64(device: torch.device) -> bool:
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).has_fp64
    return device.type != "mps"


def _without_skipped(scores: Tensor, q_rows: Tensor, width: int, log_threshold: float) -> Tensor:
    """-inf in the scores `[..., q rows, width * columns]` of the tiles that are left out.

    `q_rows`: bool, broadcastable to the scores without their columns; rows of padding do not vote.
    """
    tiles = scores.unflatten(-1, (width, -1))
    tile_peaks = tiles.amax(-1)
    peak = torch.full_like(tile_peaks[..., 0], -torch.inf)
    kept = []
    for tile_peak in tile_peaks.unbind(-1):
        # The comparison fails where both are -inf: nothing is lost.
        votes = (tile_peak - peak >= log_threshold) & q_rows
        keep = votes.any(-1, keepdim=True)
        peak = torch.where(keep, torch.maximum(peak, tile_peak), peak)
        kept.append(keep)
    return torch.where(torch.stack(kept, -1).unsqueeze(-1), tiles, -torch.inf).flatten(-2)


def _blocks(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float, key_bias: Any) -> _Blocks:
    kind = _Tiles if block_mask.variable else _Blocks
    return kind(query, key, value, block_mask, scale, key_bias)


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
        # The error budget is the error of eager attention, which over few rows can by chance be several times smaller
        # than that of the same fp32 sums in another order. So for fp32 the products are summed in fp64 and rounded once.
        # Eager attention in fp16 and bf16 is so much less exact that fp32 sums do.
        in_fp64 = query.dtype.itemsize > 2 and _has_fp64(query.device)
        self.product_dtype = torch.float64 if in_fp64 else dtype
        self.mask, self.scale = block_mask, scale
        self.cut()
        self.query = self.by_q_block(query.transpose(1, 2).to(dtype))
        self.key = self.by_kv_block(key.transpose(1, 2).to(dtype))
        self.value = self.by_kv_block(value.transpose(1, 2).to(dtype))
        if key_bias is None:
            key_bias = torch.zeros(1, 1, block_mask.seq_len_kv, device=key.device)
        self.bias = self.by_kv_block(key_bias.to(dtype).unsqueeze(-1), padding=-torch.inf).squeeze(-1)

    def cut(self) -> None:
        """Lists per q-block: how many kv-blocks, which, and the longest one over batch and heads."""
        self.counts, self.lists = self.mask.kv_num_blocks, self.mask.kv_indices
        self.widths = longest_lists(self.mask)

    def by_q_block(self, x: Tensor, padding: float = 0.0) -> Tensor:
        """`[batch, heads, seq_len_q, dim]` -> `[batch, heads, num_q_blocks, q_block_size, dim]`."""
        size = self.mask.q_block_size
        return F.pad(x, (0, 0, 0, -x.shape[2] % size), value=padding).unflatten(2, (-1, size)).contiguous()

    def by_token(self, x: Tensor) -> Tensor:
        """The other way round."""
        return x.flatten(2, 3)[:, :, : self.mask.seq_len_q]

    def q_rows(self, start: int, stop: int) -> Tensor:
        """Bool `[B|1, H|1, stop - start, q_block_size]`: which rows of the q-blocks are tokens."""
        rows = torch.arange(start * self.mask.q_block_size, stop * self.mask.q_block_size, device=self.query.device)
        return (rows < self.mask.seq_len_q).view(1, 1, stop - start, -1)

    def by_kv_block(self, x: Tensor, padding: float = 0.0) -> Tensor:
        """`[batch, heads, seq_len_kv, dim]` -> `[batch, heads, num_kv_blocks, kv_block_size, dim]`."""
        size = self.mask.kv_block_size
        return F.pad(x, (0, 0, 0, -x.shape[2] % size), value=padding).unflatten(2, (-1, size)).contiguous()

    def chunks(self) -> list[tuple[int, int, int]]:
        """(first q-block, last q-block + 1, longest list among them), none where all lists are empty."""
        batch, num_heads, num_q_blocks, q_block_size, head_dim = self.query.shape
        most = CPU_CHUNK_ELEMENTS if self.query.device.type == "cpu" else CHUNK_ELEMENTS
        result = []
        start, widths = 0, self.widths
        while start < num_q_blocks:
            width, stop = widths[start], start + 1
            while stop < num_q_blocks:
                wider = max(width, widths[stop])
                rows = batch * num_heads * (stop + 1 - start)
                elements = rows * wider * self.mask.kv_block_size * (q_block_size + 2 * head_dim)
                if elements * self.product_dtype.itemsize > most * torch.float32.itemsize:
                    break
                width, stop = wider, stop + 1
            if width:
                result.append((start, stop, width))
            start = stop
        return result

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Matrix product summed in `product_dtype`, rounded to the dtype of `a`."""
        return (a.to(self.product_dtype) @ b.to(self.product_dtype)).to(a.dtype)

    def rows(self, num_batches: int, num_heads: int, start: int, stop: int, width: int) -> Tensor:
        """Positions of the listed blocks in a `[num_batches, num_heads, num_kv_blocks]` array, flattened:
        int64 `[batch, num_heads of query, stop - start, width]`, or with size 1 where everything broadcasts."""
        listed = self.lists[:, :, start:stop, :width].to(torch.int64)
        return self.map_rows(num_batches, num_heads)[..., None, None] * self.mask.num_kv_blocks + listed

    def map_rows(self, num_batches: int, num_heads: int) -> Tensor:
        """int64 `[num_batches, num_heads of query or 1]`: positions in a `[num_batches, num_heads]` array, flattened;
        heads of query that share a kv head repeat."""
        batches = torch.arange(num_batches, device=self.query.device)
        heads = torch.arange(num_heads, device=self.query.device)
        if num_heads > 1:
            heads = heads.repeat_interleave(self.query.shape[1] // num_heads)
        return batches[:, None] * num_heads + heads

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
        listed = torch.arange(width, device=keys.device) < self.counts[:, :, start:stop, None]
        bias = torch.where(listed.unsqueeze(-1), bias, -torch.inf).flatten(3)
        scores = self.product(self.query[:, :, start:stop], keys.transpose(-1, -2)) * self.scale + bias.unsqueeze(3)
        return scores, keys, rows

    def scatter_add(self, target: Tensor, rows: Tensor, update: Tensor) -> None:
        """Add `[batch, num_heads, n, width * kv_block_size, head_dim]` onto the blocks of `target` at `rows`."""
        rows = rows.expand(-1, self.query.shape[1], -1, -1)
        size = self.mask.kv_block_size * target.shape[-1]
        target.view(-1, size).index_add_(0, rows.reshape(-1), update.reshape(-1, size))


class _Tiles(_Blocks):
    """The same for blocks of variable size, each q-block and each run of listed kv-blocks cut into tiles.

    query `[batch, num_heads, q tiles, q_block_size, head_dim]`, where the number of tiles is the most of any head;
    key, value `[batch, num_kv_heads, seq_len_kv, 1, head_dim]`; bias `[B|1, H|1, seq_len_kv, 1]`.
    """

    def cut(self) -> None:
        mask = self.mask
        if "reference_tiles" not in mask._cache:
            blocks, q_tiles = own_tiles(mask, mask.q_block_size)
            counts, kv_tiles = tile_lists(mask, mask.kv_block_size)
            starts, lengths = unpacked(q_tiles)
            lead = torch.broadcast_shapes(blocks.shape[:2], counts.shape[:2])
            owner = blocks.to(torch.int64).expand(*lead, -1)
            counts = counts.expand(*lead, -1).gather(-1, owner) * (lengths > 0)
            rows = owner.unsqueeze(-1).expand(*owner.shape, kv_tiles.shape[-1])
            lists = kv_tiles.expand(*lead, *kv_tiles.shape[2:]).gather(2, rows)
            columns = torch.arange(mask.q_block_size, device=mask.device)
            # Rows past the end of a tile read its first token; their results are dropped.
            inside = columns < lengths.unsqueeze(-1)
            q_tokens = torch.where(inside, starts.unsqueeze(-1) + columns, starts.unsqueeze(-1))
            place = torch.arange(inside[0, 0].numel(), device=mask.device).expand_as(inside.flatten(2))
            slot = torch.where(inside, q_tokens, mask.seq_len_q).flatten(2)
            places = torch.zeros(*lengths.shape[:2], mask.seq_len_q + 1, dtype=torch.int64, device=mask.device)
            places = places.scatter(2, slot, place)[..., :-1]
            widths = counts.amax((0, 1)).tolist()
            mask._cache["reference_tiles"] = (counts, lists, widths, inside, q_tokens, places)
        self.counts, self.lists, self.widths, self.inside, self.q_tokens, self.places = mask._cache["reference_tiles"]

    def by_q_block(self, x: Tensor, padding: float = 0.0) -> Tensor:
        index = self.q_tokens.flatten(2).unsqueeze(-1).expand(*x.shape[:2], -1, x.shape[-1])
        picked = x.gather(2, index).unflatten(2, self.q_tokens.shape[2:])
        return torch.where(self.inside.unsqueeze(-1), picked, padding)

    def by_token(self, x: Tensor) -> Tensor:
        x = x.flatten(2, 3)
        return x.gather(2, self.places.unsqueeze(-1).expand(*x.shape[:2], -1, x.shape[-1]))

    def q_rows(self, start: int, stop: int) -> Tensor:
        return self.inside[:, :, start:stop]

    def by_kv_block(self, x: Tensor, padding: float = 0.0) -> Tensor:
        return x.unsqueeze(3).contiguous()

    def columns(self, start: int, stop: int, width: int) -> tuple[Tensor, Tensor]:
        """kv tokens of the listed tiles, int64 `[B|1, H|1, stop - start, width * kv_block_size]`, and which of them are
        meant; the others are token 0."""
        starts, lengths = unpacked(self.lists[:, :, start:stop, :width])
        columns = torch.arange(self.mask.kv_block_size, device=starts.device)
        listed = torch.arange(width, device=starts.device) < self.counts[:, :, start:stop, None]
        inside = (columns < lengths.unsqueeze(-1)) & listed.unsqueeze(-1)
        tokens = torch.where(inside, starts.unsqueeze(-1) + columns, 0)
        return tokens.flatten(3), inside.flatten(3)

    def rows(self, num_batches: int, num_heads: int, start: int, stop: int, width: int) -> Tensor:
        tokens, _ = self.columns(start, stop, width)
        return self.map_rows(num_batches, num_heads)[..., None, None] * self.mask.seq_len_kv + tokens

    def gathered(self, blocks: Tensor, start: int, stop: int, width: int) -> Tensor:
        rows = self.rows(blocks.shape[0], blocks.shape[1], start, stop, width)
        rows = rows.expand(-1, self.query.shape[1], -1, -1)
        picked = blocks.flatten(0, 3).index_select(0, rows.reshape(-1)).view(*rows.shape, blocks.shape[-1])
        _, inside = self.columns(start, stop, width)
        # A weight of 0 would not hide what is not finite in tokens of other blocks.
        return torch.where(inside.unsqueeze(-1), picked, 0.0)

    def scores(self, start: int, stop: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        keys = self.gathered(self.key, start, stop, width)
        rows = self.rows(self.key.shape[0], self.key.shape[1], start, stop, width)
        _, inside = self.columns(start, stop, width)
        bias = self.bias.flatten()[self.rows(self.bias.shape[0], self.bias.shape[1], start, stop, width)]
        bias = torch.where(inside, bias, -torch.inf)
        scores = self.product(self.query[:, :, start:stop], keys.transpose(-1, -2)) * self.scale + bias.unsqueeze(3)
        return scores, keys, rows

    def scatter_add(self, target: Tensor, rows: Tensor, update: Tensor) -> None:
        rows = rows.expand(-1, self.query.shape[1], -1, -1)
        target.view(-1, target.shape[-1]).index_add_(0, rows.reshape(-1), update.reshape(-1, target.shape[-1]))


def longest_lists(block_mask: BlockMask) -> list[int]:
    """Length of the longest list over batch and heads for each q-block; read from the device once per mask."""
    if "longest_lists" not in block_mask._cache:
        block_mask._cache["longest_lists"] = block_mask.kv_num_blocks.amax((0, 1)).tolist()
    return block_mask._cache["longest_lists"]
