"""Autograd around the Triton kernels; registers nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from .backward import triton_backward
from .forward import triton_forward


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    key_bias: Tensor | None,
    hopper: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and LSE as `triton_forward` (or `hopper_forward`) gives them, differentiable once in query, key and value
    through both."""
    out, lse = _TritonAttention.apply(query, key, value, block_mask, scale, key_bias, hopper)
    return out, lse


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_mask: BlockMask,
        scale: float,
        key_bias: Any,
        hopper: bool,
    ) -> tuple[Tensor, Tensor]:
        if hopper:
            from .hopper import hopper_forward

            out, lse = hopper_forward(query, key, value, block_mask, scale=scale, return_lse=True)
        else:
            out, lse = triton_forward(query, key, value, block_mask, scale=scale, key_bias=key_bias, return_lse=True)
        assert lse is not None
        ctx.save_for_backward(query, key, value, key_bias, out, lse)
        ctx.block_mask, ctx.scale = block_mask, scale
        # A gradient that nobody asked for then stays None, and the kernels do not read zeros for it.
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_out, grad_lse = grad_outputs
        query, key, value, key_bias, out, lse = ctx.saved_tensors
        if grad_out is None:
            # One stored zero, read everywhere.
            grad_out = out.new_zeros(()).expand(out.shape)
        grads = triton_backward(
            grad_out, grad_lse, query, key, value, out, lse, ctx.block_mask, scale=ctx.scale, key_bias=key_bias
        )
        return (*grads, None, None, None, None)
