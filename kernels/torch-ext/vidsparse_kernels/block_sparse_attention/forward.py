"""Triton forward kernel."""

from __future__ import annotations

from torch import Tensor

from ..block_mask import BlockMask


def unsupported(query: Tensor, block_mask: BlockMask) -> str | None:
    """Why Triton cannot do this case, as the end of a sentence; None if it can."""
    return "needs a CUDA or ROCm GPU"


def triton_forward(query, key, value, block_mask, *, scale, key_bias, return_lse):
    raise NotImplementedError
