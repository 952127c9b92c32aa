"""How far the kernel may be from its reference."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_rounded_alike(got: Tensor, want: Tensor, *, roundings: int, pairing: str = "interleaved") -> None:
    """Assert that two results differ only where a value stood between two neighbours of its dtype.

    Where fp32 sums differ in their last bits, each rounding to 16 bits may come out one spacing apart: eps of the value.
    A rotation hands that on to both members of a pair and keeps its norm, so the error of a pair is at most
    (1 + eps)^roundings - 1 of its norm. Such values are rare: at least 98 % of a 16-bit result must be equal bit for bit.

    Args:
        got, want: `[..., head_dim]`.
        roundings: to the dtype of the result, one after the other: 1 for a rotation or a norm, 1 more for
            `round_before_weight`. In fp32, where sums and products round too, 32 eps are allowed instead.
        pairing: as in `qk_norm_rope`.

    Raises:
        AssertionError: with the largest error relative to the budget, or the share of equal values.
    """
    assert got.shape == want.shape and got.dtype == want.dtype, f"{got.shape} {got.dtype}, {want.shape} {want.dtype}"
    eps = torch.finfo(want.dtype).eps
    share = (1 + eps) ** roundings - 1 if want.dtype != torch.float32 else 32 * eps
    shape, dim = ((-1, 2), -1) if pairing == "interleaved" else ((2, -1), -2)
    error, size = (x.unflatten(-1, shape).norm(dim=dim) for x in (got.float() - want.float(), want.float()))
    # `want` is itself rounded, hence the second factor; a mean that is taken off leaves fp32 noise of about 1e-7.
    worst = float((error / (share * (1 + eps) ** roundings * size + 1e-6)).max())
    assert worst <= 1, f"error is {worst:.2f} of what {roundings} roundings explain"
    if want.dtype != torch.float32:
        equal = float((got == want).float().mean())
        assert equal >= 0.98, f"only {100 * equal:.1f} % are equal"
