"""Dense SDPA over groups of q-blocks: the fast inference path where there is no GPU kernel.

Small attention calls run far below the speed of large ones, so q-blocks with equal kv lists share one call, and
neighbours with similar lists share one call over the union of their lists, with an additive mask. Which to join is
decided once per mask by minimising a cost model, and kept on the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask

MAX_JOINED = 32
"""Longest run of groups considered for one call."""
MASK_ELEMENTS = 1 << 25
"""Masks up to this many elements in total are kept from call to call; larger ones are rebuilt."""

# The cost model, fitted on a Xeon with AMX (torch 2.13, head_dim 64). The unit is one query-key pair of one head in a
# large call without a mask.
CALL_COST = 4_000
"""Of making a call."""
GATHER_COST = 20
"""Of copying one key and value out of a list that is not one run of tokens."""
START_COST = (20, 80)
"""Of each key of a call (packing it for the matrix unit), which is why calls with few queries are slow: fp32 and wider,
bf16 and fp16."""
MASK_FACTOR = (1.2, 1.3)
"""Of a pair with an additive mask, likewise."""


@dataclass(frozen=True)
class _Tokens:
    """A set of token positions: a slice where it is one run, else an index tensor."""

    start: int
    stop: int
    index: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """Pick from `[batch, seq_len, heads, head_dim]`; a view where the tokens are one run."""
        return x[:, self.start : self.stop] if self.index is None else x.index_select(1, self.index)

    def put(self, x: Tensor, update: Tensor) -> None:
        if self.index is None:
            x[:, self.start : self.stop] = update
        else:
            x.index_copy_(1, self.index, update)


@dataclass(frozen=True)
class _Call:
    """One SDPA call: these queries over these keys; `allowed` bool `[q tokens, kv tokens]` by blocks or None."""

    queries: _Tokens
    keys: _Tokens
    allowed: Tensor | None
    q_sizes: Tensor
    kv_sizes: Tensor

    def additive_mask(self, dtype: torch.dtype) -> Tensor | None:
        if self.allowed is None:
            return None
        bias = torch.zeros(self.allowed.shape, dtype=dtype, device=self.allowed.device)
        bias.masked_fill_(self.allowed.logical_not(), -torch.inf)
        return bias.repeat_interleave(self.q_sizes, 0).repeat_interleave(self.kv_sizes, 1)


@dataclass(frozen=True)
class _Part:
    """Calls for one sample (or all) and some heads (None: all) that share their lists."""

    batch: slice
    heads: list[int] | None
    calls: list[_Call]


def grouped_sdpa(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, *, scale: float) -> Tensor:
    """Attention over the listed blocks through dense `scaled_dot_product_attention` calls; inference only.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]`.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        block_mask: the lists; the first use reads them from the device and plans the calls.
        scale: factor on query . key.

    Returns:
        `[batch, seq_len_q, num_heads, head_dim]`, 0 in rows without any block.
    """
    group_size = query.shape[2] // key.shape[2]
    out = query.new_zeros(query.shape)
    for part in _plan(block_mask, query.dtype):
        q, o = query[part.batch], out[part.batch]
        k, v = key[part.batch], value[part.batch]
        heads = part.heads
        if heads is not None:
            q = q[:, :, heads]
            k, v = (x[:, :, [h // group_size for h in heads]] for x in (k, v))
            o = torch.zeros_like(q)
        elif group_size > 1:
            k, v = (x.repeat_interleave(group_size, 2) for x in (k, v))
        for number, call in enumerate(part.calls):
            result = F.scaled_dot_product_attention(
                call.queries.take(q).transpose(1, 2),
                call.keys.take(k).transpose(1, 2),
                call.keys.take(v).transpose(1, 2),
                attn_mask=_additive_mask(block_mask, part, number, query.dtype),
                scale=scale,
            )
            call.queries.put(o, result.transpose(1, 2))
        if heads is not None:
            out[part.batch, :, heads] = o
    return out


def _additive_mask(block_mask: BlockMask, part: _Part, number: int, dtype: torch.dtype) -> Tensor | None:
    call = part.calls[number]
    if call.allowed is None:
        return None
    kept = block_mask._cache.setdefault("sdpa_masks", {})
    name = (id(part), number, dtype)
    if name in kept:
        return kept[name]
    mask = call.additive_mask(dtype)
    assert mask is not None
    if sum(m.numel() for m in kept.values()) + mask.numel() <= MASK_ELEMENTS:
        kept[name] = mask
    return mask


def _plan(block_mask: BlockMask, dtype: torch.dtype) -> list[_Part]:
    plans = block_mask._cache.setdefault("sdpa_plans", {})
    half = dtype.itemsize == 2
    if half not in plans:
        plans[half] = _make_plan(block_mask, START_COST[half], MASK_FACTOR[half])
    return plans[half]


def _make_plan(block_mask: BlockMask, start_cost: float, mask_factor: float) -> list[_Part]:
    parts = []
    for b, batch_rows in enumerate(_bit_rows(block_mask)):
        batch = slice(None) if block_mask.batch_size == 1 else slice(b, b + 1)
        heads_by_rows: dict[tuple[int, ...], list[int]] = {}
        for h, rows in enumerate(batch_rows):
            heads_by_rows.setdefault(rows, []).append(h)
        for rows, heads in heads_by_rows.items():
            calls = [_make_call(block_mask, *joined) for joined in _join(block_mask, rows, start_cost, mask_factor)]
            parts.append(_Part(batch, None if len(heads) == block_mask.num_heads else heads, calls))
    return parts


def _bit_rows(block_mask: BlockMask) -> list[list[tuple[int, ...]]]:
    """Per stored batch and head, the kv-blocks of each q-block as the bits of an integer."""
    if "bit_rows" not in block_mask._cache:
        counts, lists = block_mask.kv_num_blocks.tolist(), block_mask.kv_indices.tolist()
        block_mask._cache["bit_rows"] = [
            [
                tuple(sum(1 << block for block in blocks[:count]) for count, blocks in zip(*head))
                for head in zip(*sample)
            ]
            for sample in zip(counts, lists)
        ]
    return block_mask._cache["bit_rows"]


def _join(
    block_mask: BlockMask, rows: tuple[int, ...], start_cost: float, mask_factor: float
) -> list[tuple[list[int], list[int]]]:
    """Split the q-blocks into calls: lists of (q-blocks, their kv-blocks as bits), cheapest by the cost model."""
    by_bits: dict[int, list[int]] = {}
    for q_block, bits in enumerate(rows):
        if bits:
            by_bits.setdefault(bits, []).append(q_block)
    groups = sorted(by_bits.items(), key=lambda item: item[1][0])
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(groups) + 1):
        union, num_queries, choices = 0, 0, []
        for start in range(stop - 1, max(-1, stop - 1 - MAX_JOINED), -1):
            union |= groups[start][0]
            num_queries += len(groups[start][1]) * block_mask.q_block_size
            num_keys = bin(union).count("1") * block_mask.kv_block_size
            per_pair = mask_factor if start < stop - 1 else 1.0
            per_key = start_cost if _is_one_run(union) else start_cost + GATHER_COST
            cost = CALL_COST + num_keys * (num_queries * per_pair + per_key)
            choices.append((best[start][0] + cost, start))
        best.append(min(choices))
    joined, stop = [], len(groups)
    while stop:
        start = best[stop][1]
        members = sorted((q_block, bits) for bits, q_blocks in groups[start:stop] for q_block in q_blocks)
        joined.append(([m[0] for m in members], [m[1] for m in members]))
        stop = start
    return joined


def _is_one_run(bits: int) -> bool:
    lowest = bits & -bits
    return (bits + lowest) & bits == 0


def _make_call(block_mask: BlockMask, q_blocks: list[int], bits: list[int]) -> _Call:
    union = 0
    for row in bits:
        union |= row
    kv_blocks = [block for block in range(block_mask.num_kv_blocks) if union >> block & 1]
    device = block_mask.device
    queries, q_sizes = _tokens(q_blocks, block_mask.q_block_size, block_mask.seq_len_q, device)
    keys, kv_sizes = _tokens(kv_blocks, block_mask.kv_block_size, block_mask.seq_len_kv, device)
    allowed = None
    if any(row != union for row in bits):
        allowed = torch.tensor([[bool(row >> block & 1) for block in kv_blocks] for row in bits], device=device)
    return _Call(queries, keys, allowed, q_sizes, kv_sizes)


def _tokens(blocks: list[int], block_size: int, seq_len: int, device: torch.device) -> tuple[_Tokens, Tensor]:
    """The tokens of some blocks (ascending), and the size of each block."""
    spans = [(block * block_size, min((block + 1) * block_size, seq_len)) for block in blocks]
    sizes = torch.tensor([stop - start for start, stop in spans], device=device)
    first, last = spans[0][0], spans[-1][1]
    if last - first == int(sizes.sum()):
        return _Tokens(first, last, None), sizes
    return _Tokens(first, last, torch.cat([torch.arange(*span, device=device) for span in spans])), sizes
