"""A forward and a backward as one differentiable function; registers nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..block_mask import BlockMask


def differentiable(
    forward: Callable[..., tuple[Tensor, Any]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE, differentiable once in query, key and value through both.

    Args:
        forward: (query, key, value, block_mask, scale=, key_bias=) -> output, LSE.
        backward: (grad_out, grad_lse or None, query, key, value, out, lse, block_mask, scale=, key_bias=) -> gradients
            of query, key and value.
        query, key, value, block_mask, scale, key_bias: as for `block_sparse_attention`.
    """
    out, lse = _Attention.apply(forward, backward, query, key, value, block_mask, scale, key_bias)
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        forward: Callable[..., tuple[Tensor, Any]],
        backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_mask: BlockMask,
        scale: float,
        key_bias: Any,
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward(query, key, value, block_mask, scale=scale, key_bias=key_bias)
        ctx.save_for_backward(query, key, value, key_bias, out, lse)
        ctx.gradients, ctx.block_mask, ctx.scale = backward, block_mask, scale
        # A gradient that nobody asked for then stays None, and nothing reads zeros for it.
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
        with without_autocast(out.device.type):
            grads = ctx.gradients(
                grad_out, grad_lse, query, key, value, out, lse, ctx.block_mask, scale=ctx.scale, key_bias=key_bias
            )
        return (None, None, *grads, None, None, None)
