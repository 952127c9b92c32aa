"""The linear branch written out over all pairs of tokens, for tests and benchmarks only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..testing import token_mask
from .reference import FEATURE_MAPS


def linear_branch_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    excluded: BlockMask | None,
    *,
    feature_map: str,
    eps: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Weights of all pairs, those of excluded blocks set to 0, in `dtype`; quadratic in the length.

    Args:
        query, key, value: as for `linear_branch`.
        excluded: blocks that do not count, or None.
        feature_map, eps: as for `linear_branch`.
        dtype: fp64 for the truth; the dtype of the inputs for eager computation at that precision.

    Returns:
        `[batch, seq_len_q, num_heads, head_dim]` in `dtype`, 0 in rows without weight. Differentiable by autograd.
    """
    group_size = query.shape[2] // key.shape[2]
    features = FEATURE_MAPS[feature_map]
    q = features(query.to(dtype)).transpose(1, 2)
    k, v = (x.transpose(1, 2).repeat_interleave(group_size, 1) for x in (features(key.to(dtype)), value.to(dtype)))
    weights = q @ k.transpose(-1, -2)
    if excluded is not None:
        weights = weights.masked_fill(token_mask(excluded), 0.0)
    mass = weights.sum(-1, keepdim=True)
    empty = mass == 0
    return (weights @ v / (mass + eps).masked_fill(empty, 1.0)).masked_fill(empty, 0.0).transpose(1, 2)
