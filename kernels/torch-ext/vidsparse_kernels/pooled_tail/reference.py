"""The specification of the pooled tail in plain torch: any device, differentiable by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask
from .pools import Pools, num_pools, owners

CHUNK_ELEMENTS = 1 << 26
"""Logits held at a time."""


def pool_reference(key: Tensor, value: Tensor, block_mask: BlockMask, *, first_order: bool) -> Pools:
    """Pools by their definition; arguments as for `pool_for_tail`."""
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    pools = num_pools(key.shape[2], block_mask)
    # [batch, num_pools, seq_len_kv, head_dim]
    k, v = (x.transpose(1, 2).to(dtype).repeat_interleave(pools // x.shape[2], 1) for x in (key, value))
    counts = block_mask.offsets("kv").diff()
    owner = owners(block_mask, "kv").unsqueeze(-1).expand(k.shape)
    sizes = counts.clamp(min=1).unsqueeze(-1)
    if block_mask.kv_offsets is None:
        # Sums by shape, not by scattering: the same bits every time.
        size = block_mask.kv_block_size
        sums = [F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).sum(3) for x in (k, v)]
    else:
        shape = (*k.shape[:2], block_mask.num_kv_blocks, k.shape[3])
        sums = [x.new_zeros(shape).scatter_add(2, owner, x) for x in (k, v)]
    keys, values = (x / sizes for x in sums)
    product = None
    if first_order:
        product = (k - keys.gather(2, owner)).transpose(2, 3) @ v / key.shape[1]
    return Pools(keys, values, counts, product)


def tail_reference(
    query: Tensor, pools: Pools, block_mask: BlockMask, *, scale: float, first_order: bool
) -> tuple[Tensor, Tensor]:
    """The attention state over the blocks that are not listed.

    With s = scale, a row q and its unlisted blocks U: the logits are s q.k̄_j + log n_j, j in U, and

        lse = log sum_j n_j exp(s q.k̄_j),    out = sum_j exp(logit_j - lse) v̄_j + s q H,

    with H = `pools.first_order`, the second summand only with `first_order` and only where lse is finite. PISA
    (arXiv 2602.01077) adds (tail mass / N) s q H_sum to the numerator of one joint softmax; the tail mass is exp(lse)
    and H = H_sum / N, so after a merge by LSE both are the same.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]`.
        pools: for the keys and values of `block_mask`.
        block_mask: the blocks listed are those left out here.
        scale: factor on query . key.
        first_order: whether to add the first-order term.

    Returns:
        Output in the dtype of `query` and the LSE `[batch, num_heads, seq_len_q]` in fp32 (fp64).
    """
    dtype = pools.keys.dtype
    batch, seq_len_q, num_heads, head_dim = query.shape
    group = num_heads // pools.keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (pools.keys, pools.values))
    counts = pools.counts
    if counts.shape[1] > 1:
        counts = counts.repeat_interleave(num_heads // counts.shape[1], 1)
    bias = torch.where(counts > 0, counts.clamp(min=1).to(dtype).log(), -torch.inf).unsqueeze(2)
    listed = block_mask.to_dense()
    owner = owners(block_mask, "q")
    lead = torch.broadcast_shapes(listed.shape[:2], owner.shape[:2])
    listed, owner = listed.expand(*lead, -1, -1), owner.expand(*lead, -1)
    outs, lses = [], []
    step = max(1, CHUNK_ELEMENTS // max(1, batch * num_heads * keys.shape[2]))
    for start in range(0, seq_len_q, step):
        q = query[:, start : start + step].transpose(1, 2).to(dtype)
        rows = owner[..., start : start + step].unsqueeze(-1).expand(*lead, -1, listed.shape[-1])
        logits = (q @ keys.transpose(2, 3) * scale + bias).masked_fill(listed.gather(2, rows), -torch.inf)
        empty = (logits == -torch.inf).all(-1, keepdim=True)
        # No NaN may arise in rows without blocks, nor in their gradients.
        logits = logits.masked_fill(empty, 0.0)
        out = torch.softmax(logits, -1) @ values
        if first_order:
            assert pools.first_order is not None
            out = out + q @ pools.first_order.repeat_interleave(group, 1) * scale
        outs.append(out.masked_fill(empty, 0.0).transpose(1, 2))
        lses.append(torch.logsumexp(logits, -1).masked_fill(empty.squeeze(-1), -torch.inf))
    return torch.cat(outs, 1).to(query.dtype), torch.cat(lses, 2)
