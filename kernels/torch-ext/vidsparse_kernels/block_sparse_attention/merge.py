"""Exact merge of two attention results over disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys into attention over their union.

    With w = softmax([lse_a, lse_b]) the result is w_a * out_a + w_b * out_b. A side with lse -inf (no keys) counts for
    nothing; where both are -inf the result is 0 and -inf. Differentiable in all four arguments.

    Args:
        out_a, out_b: `[batch, seq_len, num_heads, head_dim]`.
        lse_a, lse_b: natural-log logsumexp `[batch, num_heads, seq_len]`, fp32 (or fp64).

    Returns:
        The merged output in the dtype of `out_a` and the merged LSE in the dtype of `lse_a`.

    Raises:
        ValueError: shapes do not fit.

    Source: online softmax, Milakov and Gimelshein 2018 (arXiv 1805.02867), section 3.
    """
    batch, seq_len, num_heads, _ = out_a.shape
    if out_b.shape != out_a.shape:
        raise ValueError(f"`out_b` must have the shape of `out_a` {tuple(out_a.shape)}, got {tuple(out_b.shape)}.")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if tuple(lse.shape) != (batch, num_heads, seq_len):
            raise ValueError(f"`{name}` must be [{batch}, {num_heads}, {seq_len}], got {tuple(lse.shape)}.")
    empty_a, empty_b = lse_a == -torch.inf, lse_b == -torch.inf
    peak = torch.maximum(lse_a, lse_b).detach()
    peak = torch.where(empty_a & empty_b, 0.0, peak)
    # The inner `where` keeps -inf out of exp, whose gradient there would be 0 * inf.
    mass_a = torch.where(empty_a, 0.0, torch.exp(torch.where(empty_a, peak, lse_a) - peak))
    mass_b = torch.where(empty_b, 0.0, torch.exp(torch.where(empty_b, peak, lse_b) - peak))
    mass = mass_a + mass_b
    none = mass == 0
    mass = torch.where(none, 1.0, mass)
    lse = torch.where(none, -torch.inf, peak + torch.log(mass))
    weight_a = (mass_a / mass).transpose(1, 2).unsqueeze(-1)
    weight_b = (mass_b / mass).transpose(1, 2).unsqueeze(-1)
    out = weight_a * out_a.to(weight_a.dtype) + weight_b * out_b.to(weight_b.dtype)
    return out.to(out_a.dtype), lse
