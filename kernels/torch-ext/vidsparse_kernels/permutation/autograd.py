"""Autograd around the Triton kernel: the gradient of a permutation is the permutation back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gather import triton_move


def move_with_grad(
    tensors: tuple[Tensor, ...], order: Tensor, *, text_before: int, inverse: bool, heads_first: bool
) -> tuple[Tensor, ...]:
    """`triton_move`, differentiable any number of times in the tensors."""
    return _Move.apply(order, text_before, inverse, heads_first, *tensors)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, order: Tensor, text_before: int, inverse: bool, heads_first: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(order)
        ctx.options = text_before, inverse
        return triton_move(tensors, order, text_before=text_before, inverse=inverse, heads_first=heads_first)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (order,) = ctx.saved_tensors
        text_before, inverse = ctx.options
        return None, None, None, None, *_Move.apply(order, text_before, not inverse, False, *grads)
