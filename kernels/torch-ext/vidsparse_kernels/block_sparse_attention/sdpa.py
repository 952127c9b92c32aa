"""Dense SDPA over groups of q-blocks: the fast inference path where there is no GPU kernel.

Small attention calls run far below the speed of large ones, so q-blocks with equal kv lists share one call, and
neighbours with similar lists share one call over the union of their lists, with an additive mask. Which to join is
decided once per mask by minimising a cost model, and kept on the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """Pick from `[batch, seq_len, heads, head_dim]`, or along another dim; a view where the tokens are one run."""
        if self.index is None:
            return x.narrow(dim, self.start, self.stop - self.start)
        return x.index_select(dim, self.index)

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


def grouped_sdpa(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, *, scale: float, key_bias: Tensor | None = None
) -> Tensor:
    """Attention over the listed blocks through dense `scaled_dot_product_attention` calls; inference only.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]`.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        block_mask: the lists; the first use reads them from the device and plans the calls.
        scale: factor on query . key.
        key_bias: fp32 `[B|1, H|1, seq_len_kv]` added to the scaled logits, natural-log units, or None. A call with a
            mask then has one for each sample and head that the bias has.

    Returns:
        `[batch, seq_len_q, num_heads, head_dim]`, 0 in rows without any block or with all keys at -inf.
    """
    group_size = query.shape[2] // key.shape[2]
    out = query.new_zeros(query.shape)
    for part in _plan(block_mask, query.dtype):
        q, o = query[part.batch], out[part.batch]
        k, v = key[part.batch], value[part.batch]
        heads = part.heads
        bias = None
        if key_bias is not None:
            bias = _of_part(key_bias, part).to(_bias_dtype(query)).unsqueeze(2)
        if heads is not None:
            q = q[:, :, heads]
            k, v = (x[:, :, [h // group_size for h in heads]] for x in (k, v))
            o = torch.zeros_like(q)
        elif group_size > 1:
            k, v = (x.repeat_interleave(group_size, 2) for x in (k, v))
        for number, call in enumerate(part.calls):
            mask = _additive_mask(block_mask, part, number, query.dtype)
            if bias is not None:
                picked = call.keys.take(bias, 3)
                mask = picked if mask is None else mask + picked
            result = F.scaled_dot_product_attention(
                call.queries.take(q).transpose(1, 2),
                call.keys.take(k).transpose(1, 2),
                call.keys.take(v).transpose(1, 2),
                attn_mask=mask,
                scale=scale,
            )
            if bias is not None and mask is not None:
                result = result.masked_fill((mask == -torch.inf).all(-1, keepdim=True), 0.0)
            call.queries.put(o, result.transpose(1, 2))
        if heads is not None:
            out[part.batch, :, heads] = o
    return out


def relative_cost(block_mask: BlockMask, dtype: torch.dtype) -> float:
    """Time of `grouped_sdpa` over that of one dense call, as the cost model sees it; above 1 dense is faster."""
    half = dtype.itemsize == 2
    costs = block_mask._cache.setdefault("sdpa_costs", {})
    if half not in costs:
        total = 0.0
        for part in _plan(block_mask, dtype):
            heads = block_mask.num_heads if part.heads is None else len(part.heads)
            for call in part.calls:
                per_pair = 1.0 if call.allowed is None else MASK_FACTOR[half]
                per_key = START_COST[half] + (0 if call.keys.index is None else GATHER_COST)
                pairs_and_keys = int(call.kv_sizes.sum()) * (int(call.q_sizes.sum()) * per_pair + per_key)
                total += heads * (CALL_COST + pairs_and_keys)
        dense = CALL_COST + block_mask.seq_len_kv * (block_mask.seq_len_q + START_COST[half])
        costs[half] = total / (block_mask.batch_size * block_mask.num_heads * dense)
    return costs[half]


def _of_part(key_bias: Tensor, part: _Part) -> Tensor:
    """The samples and heads of a part, where the bias has them."""
    if key_bias.shape[0] > 1:
        key_bias = key_bias[part.batch]
    return key_bias if part.heads is None or key_bias.shape[1] == 1 else key_bias[:, part.heads]


def _bias_dtype(query: Tensor) -> torch.dtype:
    """SDPA on a CPU adds fp32 to the logits of half precision too; elsewhere it wants the dtype of the query."""
    return torch.float32 if query.device.type == "cpu" and query.dtype.itemsize == 2 else query.dtype


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


@dataclass(frozen=True)
class _Sizes:
    """Where the q-blocks and kv-blocks of one head start: offsets with the length at the end."""

    q_offsets: tuple[int, ...]
    kv_offsets: tuple[int, ...]

    def num_queries(self, q_block: int) -> int:
        return self.q_offsets[q_block + 1] - self.q_offsets[q_block]

    def num_keys(self, bits: int) -> int:
        """Tokens of the kv-blocks in `bits`."""
        total = 0
        while bits:
            block = (bits & -bits).bit_length() - 1
            total += self.kv_offsets[block + 1] - self.kv_offsets[block]
            bits &= bits - 1
        return total


def _make_plan(block_mask: BlockMask, start_cost: float, mask_factor: float) -> list[_Part]:
    bit_rows = _bit_rows(block_mask)
    q_offsets, kv_offsets = (block_mask.offsets(side).tolist() for side in ("q", "kv"))

    def stored(lists: list[list[Any]], b: int, h: int) -> Any:
        return lists[b if len(lists) > 1 else 0][h if len(lists[0]) > 1 else 0]

    parts = []
    for b in range(block_mask.batch_size):
        batch = slice(None) if block_mask.batch_size == 1 else slice(b, b + 1)
        alike: dict[tuple[tuple[int, ...], _Sizes], list[int]] = {}
        for h in range(block_mask.num_heads):
            sizes = _Sizes(*(tuple(stored(offsets, b, h)) for offsets in (q_offsets, kv_offsets)))
            alike.setdefault((stored(bit_rows, b, h), sizes), []).append(h)
        for (rows, sizes), heads in alike.items():
            joined = _join(rows, sizes, start_cost, mask_factor)
            calls = [_make_call(sizes, *members, device=block_mask.device) for members in joined]
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
    rows: tuple[int, ...], sizes: _Sizes, start_cost: float, mask_factor: float
) -> list[tuple[list[int], list[int]]]:
    """Split the q-blocks into calls: lists of (q-blocks, their kv-blocks as bits), cheapest by the cost model."""
    filled = sum(1 << block for block, size in enumerate(_differences(sizes.kv_offsets)) if size)
    by_bits: dict[int, list[int]] = {}
    for q_block, bits in enumerate(rows):
        if bits & filled and sizes.num_queries(q_block):
            by_bits.setdefault(bits & filled, []).append(q_block)
    groups = sorted(by_bits.items(), key=lambda item: item[1][0])
    group_queries = [sum(sizes.num_queries(q_block) for q_block in q_blocks) for _, q_blocks in groups]
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(groups) + 1):
        union, num_keys, num_queries, choices = 0, 0, 0, []
        for start in range(stop - 1, max(-1, stop - 1 - MAX_JOINED), -1):
            num_keys += sizes.num_keys(groups[start][0] & ~union)
            union |= groups[start][0]
            num_queries += group_queries[start]
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


def _differences(offsets: tuple[int, ...]) -> list[int]:
    return [stop - start for start, stop in zip(offsets, offsets[1:])]


def _is_one_run(bits: int) -> bool:
    lowest = bits & -bits
    return (bits + lowest) & bits == 0


def _make_call(sizes: _Sizes, q_blocks: list[int], bits: list[int], *, device: torch.device) -> _Call:
    union = 0
    for row in bits:
        union |= row
    kv_blocks = [block for block in range(len(sizes.kv_offsets) - 1) if union >> block & 1]
    queries, q_sizes = _tokens(q_blocks, sizes.q_offsets, device)
    keys, kv_sizes = _tokens(kv_blocks, sizes.kv_offsets, device)
    allowed = None
    if any(row != union for row in bits):
        allowed = torch.tensor([[bool(row >> block & 1) for block in kv_blocks] for row in bits], device=device)
    return _Call(queries, keys, allowed, q_sizes, kv_sizes)


def _tokens(blocks: list[int], offsets: tuple[int, ...], device: torch.device) -> tuple[_Tokens, Tensor]:
    """The tokens of some blocks (ascending, none empty), and the size of each block."""
    spans = [(offsets[block], offsets[block + 1]) for block in blocks]
    sizes = torch.tensor([stop - start for start, stop in spans], device=device)
    first, last = spans[0][0], spans[-1][1]
    if last - first == int(sizes.sum()):
        return _Tokens(first, last, None), sizes
    return _Tokens(first, last, torch.cat([torch.arange(*span, device=device) for span in spans])), sizes
