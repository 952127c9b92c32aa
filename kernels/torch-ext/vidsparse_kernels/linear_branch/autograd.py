"""Autograd around the Triton kernels; registers nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from .backward import triton_backward
from .forward import triton_forward


def triton_linear_branch(
    query: Tensor, key: Tensor, value: Tensor, excluded: BlockMask | None, *, feature_map: str, eps: float
) -> Tensor:
    """Output as `triton_forward` gives it, differentiable once in query, key and value."""
    return _TritonLinearBranch.apply(query, key, value, excluded, feature_map, eps)  # pyright: ignore[reportReturnType]


class _TritonLinearBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, excluded: BlockMask | None, feature_map: str, eps: float
    ) -> Tensor:
        out, denominator, state, key_sum, rest = triton_forward(
            query, key, value, excluded, feature_map=feature_map, eps=eps
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, denominator, state, key_sum, rest)
        ctx.excluded, ctx.feature_map, ctx.eps = excluded, feature_map, eps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, denominator, state, key_sum, rest = ctx.saved_tensors
        grads = triton_backward(
            grad_outputs[0], query, key, value, out, denominator, state, key_sum, rest, ctx.excluded,
            feature_map=ctx.feature_map, eps=ctx.eps,
        )  # fmt: skip
        return (*grads, None, None, None)
