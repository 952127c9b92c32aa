"""The same maths in plain torch, with the roundings of diffusers; the specification of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_rope_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    eps: float,
    norm: str,
    round_before_weight: bool,
    pairing: str,
    rope_start: int,
) -> Tensor:
    """`x` is `[batch, seq_len, num_heads, head_dim]`; `cos`, `sin` are `[B|1, rope_len, H|1, head_dim / 2]`."""
    out = _norm(x, weight, bias, eps, norm, round_before_weight)
    if cos is None or sin is None:
        return out
    rope_end = rope_start + cos.shape[1]
    rotated = _rotate(out[:, rope_start:rope_end], cos, sin, pairing)
    return torch.cat([out[:, :rope_start], rotated, out[:, rope_end:]], dim=1)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str, early: bool) -> Tensor:
    if norm == "none":
        return x
    wide = x.double() if x.dtype == torch.float64 else x.float()
    rows = wide.flatten(2) if norm == "rms_all" else wide
    if norm == "layer_heads":
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    if early:
        rows = rows.to(x.dtype).to(wide.dtype)
    if weight is not None:
        rows = rows * weight.to(wide.dtype)
    if early:
        rows = rows.to(x.dtype).to(wide.dtype)
    if bias is not None:
        rows = rows + bias.to(wide.dtype)
    return rows.to(x.dtype).view(x.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    interleaved = pairing == "interleaved"
    dim = -1 if interleaved else -2
    first, second = wide.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(dim)
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=dim)
    return rotated.flatten(-2).to(x.dtype)
