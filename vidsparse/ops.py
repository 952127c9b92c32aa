"""torch.library operator over vidsparse_kernels, so that torch.compile sees one opaque call with known shapes.

It is used only while compiling; eager calls go to vidsparse_kernels directly. The namespace "vidsparse" is registered
here and not in vidsparse_kernels, which may be loaded several times under different names.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidsparse_kernels import BlockMask, block_sparse_attention

if TYPE_CHECKING:
    from collections.abc import Sequence


def block_sparse_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`vidsparse_kernels.block_sparse_attention` as one operator, for code under torch.compile.

    Args:
        query, key, value: `[batch, seq_len, num_heads, head_dim]`.
        block_mask: on the device of `query`.
        scale: factor on query . key, default 1 / sqrt(head_dim).
        backend: as in `vidsparse_kernels.block_sparse_attention`.

    Returns:
        `[batch, seq_len, num_heads, head_dim]`, contiguous. Differentiable in query, key and value, through the
        reference backend.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    return _attention(
        query,
        key,
        value,
        block_mask.kv_num_blocks,
        block_mask.kv_indices,
        block_mask.q_block_size,
        block_mask.kv_block_size,
        scale,
        backend,
    )


@torch.library.custom_op("vidsparse::block_sparse_attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_block_size: int,
    kv_block_size: int,
    scale: float,
    backend: str,
) -> Tensor:
    mask = _mask(query, key, kv_num_blocks, kv_indices, q_block_size, kv_block_size)
    out = block_sparse_attention(query, key, value, mask, scale=scale, backend=backend)
    assert isinstance(out, Tensor)
    return out.contiguous()


@_attention.register_fake
def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_block_size: int,
    kv_block_size: int,
    scale: float,
    backend: str,
) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("vidsparse::block_sparse_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_block_size: int,
    kv_block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(query, key, kv_num_blocks, kv_indices, q_block_size, kv_block_size)
    # Operators run below autograd; the backend's own backward needs it for this one recomputation.
    exclusion: Any = torch._C._SetExcludeDispatchKeyGuard
    with exclusion(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        out = block_sparse_attention(q, k, v, mask, scale=scale, backend="auto")
        assert isinstance(out, Tensor)
        grads = torch.autograd.grad(out, (q, k, v), grad_out)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_attention_backward.register_fake
def _attention_backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_block_size: int,
    kv_block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    query, key, value, kv_num_blocks, kv_indices, q_block_size, kv_block_size, scale, _ = inputs
    ctx.save_for_backward(query, key, value, kv_num_blocks, kv_indices)
    ctx.sizes = (q_block_size, kv_block_size, scale)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    grads = _attention_backward(grad_out, *ctx.saved_tensors, *ctx.sizes)
    return (*grads, None, None, None, None, None, None)


_attention.register_autograd(_backward, setup_context=_setup_context)


def _mask(
    query: Tensor, key: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, q_block_size: int, kv_block_size: int
) -> BlockMask:
    # What a backend plans for a mask is kept on the mask, and the mask on its own tensor.
    sizes = (query.shape[1], key.shape[1], q_block_size, kv_block_size)
    kept = getattr(kv_indices, "_vidsparse_mask", None)
    if kept is not None and kept[0] == sizes and kept[1].kv_num_blocks is kv_num_blocks:
        return kept[1]
    mask = BlockMask(kv_num_blocks, kv_indices, sizes[0], sizes[1], q_block_size, kv_block_size)
    kv_indices._vidsparse_mask = (sizes, mask)  # pyright: ignore[reportAttributeAccessIssue]
    return mask
