"""Autograd around the Triton kernels; registers nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..block_mask import BlockMask
from .backward import triton_tail_backward
from .forward import triton_tail
from .pooling import triton_pool_for_tail
from .pools import Pools, owners


def triton_pools(key: Tensor, value: Tensor, block_mask: BlockMask, *, first_order: bool) -> Pools:
    """Pools as `triton_pool_for_tail` gives them, differentiable once."""
    keys, values, counts, matrix = _Pools.apply(key, value, block_mask, first_order)
    return Pools(keys, values, counts, matrix)


def triton_tail_with_grad(
    query: Tensor, pools: Pools, block_mask: BlockMask, *, scale: float, first_order: bool
) -> tuple[Tensor, Tensor]:
    """Output and LSE as `triton_tail` gives them, differentiable once in query and pools through both."""
    matrix = pools.first_order if first_order else None
    out, lse = _Tail.apply(query, pools.keys, pools.values, matrix, pools.counts, block_mask, scale)
    return out, lse


class _Pools(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, block_mask: BlockMask, first_order: bool) -> Any:
        pools = triton_pool_for_tail(key, value, block_mask, first_order=first_order)
        ctx.save_for_backward(key, value, pools.keys, pools.values, pools.counts)
        ctx.block_mask = block_mask
        ctx.mark_non_differentiable(pools.counts)
        ctx.set_materialize_grads(False)
        return pools.keys, pools.values, pools.counts, pools.first_order

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_keys, grad_values, _, grad_matrix = grad_outputs
        key, value, keys, values, counts = ctx.saved_tensors
        with without_autocast(key.device.type):
            grads = _token_gradients(
                key, value, keys, values, counts, grad_keys, grad_values, grad_matrix, ctx.block_mask
            )
        return (*grads, None, None)


def _token_gradients(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, counts: Tensor, grad_keys: Tensor | None,
    grad_values: Tensor | None, grad_matrix: Tensor | None, block_mask: BlockMask,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of key and value in their dtypes from those of the pools.

    For token n in block j, with N tokens in all: dk_n = dk̄_j / n_j + (v_n - v̄_j) dH^T / N and
    dv_n = dv̄_j / n_j + (k_n - k̄_j) dH / N; the terms of j are one row of a table. One head at a time, so that what is
    held in fp32 stays small.
    """
    seq_len, num_kv_heads = key.shape[1:3]
    pools = keys.shape[1]
    group = pools // num_kv_heads
    owner = owners(block_mask, "kv")
    sizes = counts.clamp(min=1).unsqueeze(-1).expand(keys.shape[0], pools, -1, -1)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    for kv_head in range(num_kv_heads):
        totals: list[Tensor | None] = [None, None]
        for pool in range(kv_head * group, (kv_head + 1) * group):
            rows = owner[:, pool if owner.shape[1] > 1 else 0].unsqueeze(-1)
            rows = rows.expand(key.shape[0], -1, key.shape[3])
            for side, (grad, mean, x) in enumerate(((grad_keys, values, value), (grad_values, keys, key))):
                table = torch.zeros_like(mean[:, pool]) if grad is None else grad[:, pool] / sizes[:, pool]
                update = None
                if grad_matrix is not None:
                    matrix = grad_matrix[:, pool] / seq_len
                    matrix = matrix.transpose(1, 2) if side == 0 else matrix
                    table = table - mean[:, pool] @ matrix
                    update = x[:, :, kv_head].to(torch.float32) @ matrix
                gathered = table.gather(1, rows)
                total = gathered if update is None else gathered.add_(update)
                held = totals[side]
                totals[side] = total if held is None else held.add_(total)
        for target, total in zip((grad_key, grad_value), totals):
            assert total is not None
            target[:, :, kv_head] = total.to(target.dtype)
    return grad_key, grad_value


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        matrix: Any,
        counts: Tensor,
        block_mask: BlockMask,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        pools = Pools(keys, values, counts, matrix)
        out, lse = triton_tail(query, pools, block_mask, scale=scale, first_order=matrix is not None)
        ctx.save_for_backward(query, keys, values, matrix, counts, out, lse)
        ctx.block_mask, ctx.scale = block_mask, scale
        # A gradient that nobody asked for then stays None.
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_out, grad_lse = grad_outputs
        query, keys, values, matrix, counts, out, lse = ctx.saved_tensors
        if grad_out is None:
            # One stored zero, read everywhere.
            grad_out = out.new_zeros(()).expand(out.shape)
        pools = Pools(keys, values, counts, matrix)
        grads = triton_tail_backward(
            grad_out, grad_lse, query, pools, out, lse, ctx.block_mask, scale=ctx.scale,
            first_order=matrix is not None,
        )  # fmt: skip
        return (*grads, None, None, None)
