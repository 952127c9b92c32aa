"""Block scores that ask what is lost by a block's mean: how large its weights are, and how unlike each other."""

from __future__ import annotations

import torch


def spread_scores(q_mean: torch.Tensor, key_pools: dict[str, torch.Tensor]) -> torch.Tensor:
    """Pooled scores plus the logarithm of how far the logits of a block spread.

    With the mean query q of a block of queries, and mean k and range r (largest minus smallest, by channel) of a block of keys,

        score = q . k / sqrt(d) + log sqrt(sum_c q_c^2 r_c^2 / d)

    exp(score) estimates the first order of what replacing every key of the block by their mean changes: the weight of the
    mean times the deviation of the logits. PISA (arXiv 2602.01077) adds, for images, the logarithm of the norm of its
    covariance with value, which needs a matrix for each block; ranges come with the means in one pass over the keys.

    Args:
        q_mean: fp32 `[batch, num_heads, num_q_blocks, head_dim]`.
        key_pools: "mean", "max" and "min" of the keys, fp32 `[batch, num_kv_heads, num_kv_blocks, head_dim]`.

    Returns:
        fp32 `[batch, num_heads, num_q_blocks, num_kv_blocks]`.
    """
    from vidsparse_kernels import score_blocks

    ranges = key_pools["max"] - key_pools["min"]
    spread = score_blocks(q_mean.square(), ranges.square(), 1.0 / q_mean.shape[-1])
    return score_blocks(q_mean, key_pools["mean"]) + 0.5 * spread.clamp(min=1e-12).log()
