"""The specification of linear_branch in plain torch: any device, any case, differentiable by autograd.

Sums the states of the blocks that count, tile by tile, and never subtracts. It holds one head_dim x head_dim state per
block, so it is meant for small inputs: 0.1 GB a head at 75,600 tokens and head_dim 128.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask
from ..block_sparse_attention.tiles import own_tiles, unpacked

FEATURE_MAPS = {
    "softmax": lambda x: torch.softmax(x, -1),
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
}
"""Applied over the head dimension, to query and key alike."""


def reference(
    query: Tensor, key: Tensor, value: Tensor, excluded: BlockMask | None, *, feature_map: str, eps: float
) -> Tensor:
    """Linear attention of each q-block over the kv-blocks that `excluded` does not list.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]`.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`, num_heads a multiple of num_kv_heads.
        excluded: blocks that do not count; None: all count.
        feature_map: a name in FEATURE_MAPS.
        eps: added to each denominator.

    Returns:
        `[batch, seq_len_q, num_heads, head_dim]` in the dtype of `query`, computed in fp64 where that is fp64, else in
        fp32. 0 in rows without weight.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group_size = query.shape[2] // key.shape[2]
    features = FEATURE_MAPS[feature_map]
    # [batch, num_heads, seq_len, head_dim], values with a column of ones: the last column then is the denominator.
    q, k = features(query.to(dtype)).transpose(1, 2), features(key.to(dtype)).transpose(1, 2)
    v = F.pad(value.to(dtype).transpose(1, 2), (0, 1), value=1.0)
    if excluded is None:
        state = k.transpose(-1, -2) @ v
        sums = q @ state.repeat_interleave(group_size, 1)
    else:
        k, v = (x.repeat_interleave(group_size, 1) for x in (k, v))
        sums = _over_blocks(q, k, v, excluded)
    mass = sums[..., -1:]
    empty = mass == 0
    out = (sums[..., :-1] / (mass + eps).masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
    return out.transpose(1, 2).to(query.dtype)


def _over_blocks(q: Tensor, k: Tensor, v: Tensor, excluded: BlockMask) -> Tensor:
    """Unnormalised sums `[batch, heads, seq_len_q, columns of v]`."""
    lead = q.shape[:2]
    rows, row_valid, row_blocks = _tiles(excluded, "q", lead)
    columns, column_valid, column_blocks = _tiles(excluded, "kv", lead)
    keys, values = _gathered(k, columns) * column_valid.unsqueeze(-1), _gathered(v, columns)
    # [batch, heads, kv tiles, head_dim, head_dim + 1]
    states = keys.transpose(-1, -2) @ values
    counts = excluded.to_dense().logical_not().expand(*lead, -1, -1)
    counts = counts.gather(2, row_blocks.unsqueeze(-1).expand(*row_blocks.shape, counts.shape[-1]))
    counts = counts.gather(3, column_blocks.unsqueeze(2).expand(*counts.shape[:3], column_blocks.shape[-1]))
    summed = (counts.to(q.dtype) @ states.flatten(3)).unflatten(-1, states.shape[3:])
    sums = (_gathered(q, rows) @ summed).flatten(2, 3)
    # Rows that only pad a tile go to a token that does not exist.
    target = torch.where(row_valid, rows, q.shape[2]).flatten(2).unsqueeze(-1).expand_as(sums)
    return sums.new_zeros(*lead, q.shape[2] + 1, sums.shape[-1]).scatter(2, target, sums)[:, :, :-1]


def _tiles(mask: BlockMask, side: str, lead: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of each tile and which of them are real, `[*lead, tiles, size]`, and the block of each tile."""
    transposed = side == "kv"
    size, length = (
        (mask.kv_block_size, mask.seq_len_kv) if transposed else (mask.q_block_size, mask.seq_len_q)
    )  # fmt: skip
    within = torch.arange(size, device=mask.device)
    if mask.variable:
        blocks, packed = own_tiles(mask, size, transposed=transposed)
        start, number = unpacked(packed)
    else:
        number_of_blocks = mask.num_kv_blocks if transposed else mask.num_q_blocks
        blocks = torch.arange(number_of_blocks, device=mask.device).view(1, 1, -1)
        start = blocks * size
        number = (length - start).clamp(max=size)
    tokens = (start.to(torch.int64).unsqueeze(-1) + within).clamp(max=length - 1)
    valid = within < number.unsqueeze(-1)
    return (
        tokens.expand(*lead, -1, -1),
        valid.expand(*lead, -1, -1),
        blocks.to(torch.int64).expand(*lead, -1),
    )


def _gathered(x: Tensor, tokens: Tensor) -> Tensor:
    """`[batch, heads, tiles, size, columns]`."""
    index = tokens.flatten(2).unsqueeze(-1).expand(*tokens.shape[:2], -1, x.shape[-1])
    return x.gather(2, index).unflatten(2, tokens.shape[2:])
