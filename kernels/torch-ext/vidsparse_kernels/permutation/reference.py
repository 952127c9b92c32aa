"""The specification of token reordering in plain torch: any device, any dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def full_order(order: Tensor, text_before: int, text_after: int) -> Tensor:
    """`[B|1, H|1, N]` over video tokens -> int64 `[B|1, H|1, text_before + N + text_after]`, text in place."""
    num_video = order.shape[-1]
    lead = order.shape[:2]
    device = order.device
    before = torch.arange(text_before, device=device).expand(*lead, -1)
    after = torch.arange(text_before + num_video, text_before + num_video + text_after, device=device).expand(
        *lead, -1
    )
    return torch.cat([before, order.long() + text_before, after], -1)


def permute_reference(x: Tensor, order: Tensor, *, text_before: int, text_after: int, inverse: bool) -> Tensor:
    """`x[b, order[b, h, s], h]` as `[B, S, H, D]`; with `inverse`, the tensor from which that would give `x`."""
    tokens = full_order(order, text_before, text_after)
    if inverse:
        tokens = tokens.argsort(-1)
    # [B, S, H, D]
    tokens = tokens.expand(x.shape[0], x.shape[2], -1).transpose(1, 2).unsqueeze(-1)
    return x.gather(1, tokens.expand(x.shape))
