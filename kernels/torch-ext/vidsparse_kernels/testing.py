"""Inputs, a float64 oracle and an error budget for tests of attention ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .block_mask import BlockMask


def make_qkv(
    *,
    batch: int = 1,
    seq_len_q: int,
    seq_len_kv: int | None = None,
    num_heads: int = 2,
    num_kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    contiguous: bool = True,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random normal query `[batch, seq_len_q, num_heads, head_dim]` and key, value to match.

    `contiguous=False` gives views into a larger array, with gaps between tokens, heads and samples (last stride 1).
    """
    generator = torch.Generator(device).manual_seed(seed)
    seq_len_kv = seq_len_q if seq_len_kv is None else seq_len_kv
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    result = []
    for seq_len, heads in ((seq_len_q, num_heads), (seq_len_kv, num_kv_heads), (seq_len_kv, num_kv_heads)):
        if contiguous:
            x = torch.randn(batch, seq_len, heads, head_dim, generator=generator, device=device)
            result.append(x.to(dtype))
        else:
            x = torch.randn(batch, heads, seq_len, head_dim + 8, generator=generator, device=device)
            result.append(x.to(dtype).transpose(1, 2)[..., :head_dim])
    return result[0], result[1], result[2]


def make_block_mask(
    *,
    seq_len_q: int,
    seq_len_kv: int | None = None,
    q_block_size: int = 64,
    kv_block_size: int = 64,
    batch: int = 1,
    num_heads: int = 1,
    density: float = 0.4,
    empty_rows: bool = False,
    full_rows: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> BlockMask:
    """Random mask with about `density` of the blocks; on request the first q-block is empty, the last one full."""
    seq_len_kv = seq_len_q if seq_len_kv is None else seq_len_kv
    num_q_blocks, num_kv_blocks = -(-seq_len_q // q_block_size), -(-seq_len_kv // kv_block_size)
    generator = torch.Generator("cpu").manual_seed(seed)
    dense = torch.rand(batch, num_heads, num_q_blocks, num_kv_blocks, generator=generator) < density
    if full_rows:
        dense[:, :, -1] = True
    if empty_rows:
        dense[:, :, 0] = False
    return BlockMask.from_dense(
        dense,
        seq_len_q=seq_len_q,
        seq_len_kv=seq_len_kv,
        q_block_size=q_block_size,
        kv_block_size=kv_block_size,
    ).to(device)


def make_variable_block_mask(
    *,
    seq_len_q: int,
    seq_len_kv: int | None = None,
    num_q_blocks: int | None = None,
    num_kv_blocks: int | None = None,
    q_block_size: int = 64,
    kv_block_size: int = 64,
    batch: int = 1,
    num_heads: int = 1,
    offsets_batch: int = 1,
    offsets_heads: int = 1,
    density: float = 0.4,
    empty_rows: bool = False,
    full_rows: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> BlockMask:
    """Random mask with blocks of random sizes, some of them empty or of one token where there are many.

    A side without a number of blocks is uniform. `q_block_size`, `kv_block_size` are then tiles. `batch`, `num_heads`
    are those of the lists, `offsets_batch`, `offsets_heads` those of the offsets; density and rows as for
    `make_block_mask`.
    """
    seq_len_kv = seq_len_q if seq_len_kv is None else seq_len_kv
    generator = torch.Generator("cpu").manual_seed(seed)
    offsets, blocks = [], []
    for seq_len, count, size in (
        (seq_len_q, num_q_blocks, q_block_size),
        (seq_len_kv, num_kv_blocks, kv_block_size),
    ):
        if count is None:
            offsets.append(None)
            blocks.append(-(-seq_len // size))
            continue
        cuts = torch.randint(0, seq_len + 1, (offsets_batch, offsets_heads, count + 1), generator=generator)
        cuts[..., 0], cuts[..., -1] = 0, seq_len
        offsets.append(cuts.sort(-1).values.to(torch.int32))
        blocks.append(count)
    dense = torch.rand(batch, num_heads, *blocks, generator=generator) < density
    if full_rows:
        dense[:, :, -1] = True
    if empty_rows:
        dense[:, :, 0] = False
    return BlockMask.from_dense(
        dense,
        seq_len_q=seq_len_q,
        seq_len_kv=seq_len_kv,
        q_block_size=q_block_size,
        kv_block_size=kv_block_size,
        q_offsets=offsets[0],
        kv_offsets=offsets[1],
    ).to(device)


def token_mask(block_mask: BlockMask) -> Tensor:
    """Bool `[B|1, H|1, seq_len_q, seq_len_kv]`: quadratic in the length, for tests only."""
    if not block_mask.variable:
        tokens = block_mask.to_dense().repeat_interleave(block_mask.q_block_size, 2)
        tokens = tokens.repeat_interleave(block_mask.kv_block_size, 3)
        return tokens[:, :, : block_mask.seq_len_q, : block_mask.seq_len_kv]
    dense = block_mask.to_dense().expand(block_mask.batch_size, block_mask.num_heads, -1, -1)
    for dim, side, seq_len in ((2, "q", block_mask.seq_len_q), (3, "kv", block_mask.seq_len_kv)):
        tokens = torch.arange(seq_len, dtype=torch.int32, device=dense.device)
        offsets = block_mask.offsets(side)
        tokens = tokens.expand(*offsets.shape[:2], -1).contiguous()
        # [B|1, H|1, seq_len]: the last block that starts at or before the token is the one that holds it.
        blocks = torch.searchsorted(offsets.contiguous(), tokens, right=True) - 1
        shape = [*dense.shape]
        shape[dim] = seq_len
        dense = dense.gather(dim, blocks.unsqueeze(5 - dim).expand(shape))
    return dense


def masked_attention_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Dense attention with a token-level mask, every step in `dtype`; quadratic in the length, for tests only.

    Args:
        query, key, value: `[batch, seq_len, num_heads, head_dim]` as for `block_sparse_attention`.
        block_mask, scale, key_bias: likewise.
        dtype: fp64 for the truth; the dtype of the inputs for eager attention at that precision.

    Returns:
        Output `[batch, seq_len_q, num_heads, head_dim]` and LSE `[batch, num_heads, seq_len_q]` in `dtype`;
        0 and -inf in rows without any block. Differentiable by autograd.
    """
    group_size = query.shape[2] // key.shape[2]
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    q = query.to(dtype).transpose(1, 2)
    k, v = (x.to(dtype).transpose(1, 2).repeat_interleave(group_size, 1) for x in (key, value))
    logits = q @ k.transpose(-1, -2) * scale
    if key_bias is not None:
        logits = logits + key_bias.to(dtype).unsqueeze(2)
    logits = logits.masked_fill(token_mask(block_mask).logical_not(), -torch.inf)
    empty = (logits == -torch.inf).all(-1)
    safe = logits.masked_fill(empty.unsqueeze(-1), 0.0)
    weights = torch.softmax(safe, -1).masked_fill(empty.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(safe, -1).masked_fill(empty, -torch.inf)
    return (weights @ v).transpose(1, 2), lse


def assert_close_to_oracle(actual: Tensor, eager: Tensor, oracle: Tensor, *, name: str = "output") -> None:
    """Assert that `actual` is about as near to the float64 truth as eager attention at the same precision.

    Both the largest and the root-mean-square error may be at most those of `eager` plus a rounding band: four units
    in the last place of the result's dtype, relative to the largest (or rms) value of `oracle`. Where `oracle` is
    -inf, `actual` must be too.

    Args:
        actual: the result under test.
        eager: the same quantity by `masked_attention_oracle(..., dtype=<dtype of the inputs>)`.
        oracle: the same quantity in float64.

    Raises:
        AssertionError: with both errors and the budget.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    infinite = oracle == -torch.inf
    assert torch.equal(actual == -torch.inf, infinite), f"{name}: -inf in the wrong rows"
    assert bool(torch.isfinite(actual[~infinite]).all()), f"{name}: not finite"
    if bool(infinite.all()):
        return
    truth = oracle[~infinite].double()
    error, allowed = (x[~infinite].double() - truth for x in (actual, eager))
    band = 4 * torch.finfo(actual.dtype).eps
    for kind, size in (("largest", lambda x: x.abs().max()), ("rms", lambda x: x.square().mean().sqrt())):
        got, budget = float(size(error)), float(size(allowed) + band * size(truth))
        assert got <= budget, f"{name}: {kind} error {got:.3e} exceeds {budget:.3e} (eager {float(size(allowed)):.3e})"
