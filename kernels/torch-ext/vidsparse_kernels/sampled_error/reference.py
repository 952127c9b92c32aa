"""The specification: exact attention of the sampled rows in float32 (float64 for float64), any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sampled_rows(first: int, among: int, count: int, offset: int, device: torch.device) -> Tensor:
    """`count` rows spread evenly over `among` rows from `first` on; row i is `first + (i * among + offset) // count`."""
    return first + (torch.arange(count, device=device) * among + offset).div(count, rounding_mode="floor")


def sampled_error_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    key_bias: Tensor | None,
    *,
    first: int,
    among: int,
    count: int,
    offset: int,
    heads: tuple[int, int],
    scale: float | None,
) -> Tensor:
    """Squared error and squared norm of the sampled rows, head after head, `[batch, heads * count, 2]`."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows = sampled_rows(first, among, count, offset, query.device)
    begin, end = heads
    groups = query.shape[2] // key.shape[2]
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    q = query[:, rows, begin:end].transpose(1, 2).to(dtype)
    # Of key and value the heads that the sampled query heads read, each as often as it is read.
    k, v = (
        x[:, :, begin // groups : -(-end // groups)].transpose(1, 2).to(dtype).repeat_interleave(groups, 1)[
            :, begin % groups : begin % groups + end - begin
        ]
        for x in (key, value)
    )  # fmt: skip
    logits = q @ k.transpose(2, 3) * scale
    if key_bias is not None:
        bias = key_bias if key_bias.shape[1] == 1 else key_bias[:, begin:end]
        logits = logits + bias.to(dtype)[:, :, None]
    # A row without any key gives 0.
    exact = torch.nan_to_num(logits.softmax(-1)) @ v
    error = out[:, rows, begin:end].transpose(1, 2).to(dtype) - exact
    return torch.stack([error.square().sum(3), exact.square().sum(3)], 3).flatten(1, 2).float()
