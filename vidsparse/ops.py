"""torch.library operator over vidsparse_kernels, so that torch.compile sees one opaque call with known shapes.

It is used only while compiling; eager calls go to vidsparse_kernels directly. The namespace "vidsparse" is registered
here and not in vidsparse_kernels, which may be loaded several times under different names.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from vidsparse_kernels import BlockMask, block_sparse_attention, select_backend

if TYPE_CHECKING:
    from collections.abc import Sequence

KEPT = "_vidsparse_mask"
"""Attribute of a mask's `kv_indices` that holds the mask."""


@overload
def block_sparse_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def block_sparse_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`vidsparse_kernels.block_sparse_attention` as one operator, for code under torch.compile.

    Args:
        query, key, value: `[batch, seq_len, num_heads, head_dim]`.
        block_mask: on the device of `query`; see also `keep_transposed_lists`.
        scale: factor on query . key, default 1 / sqrt(head_dim).
        key_bias: fp32 `[batch | 1, num_heads | 1, seq_len]` added to the logits, not differentiated.
        return_lse: also return the logsumexp of the logits.
        backend: as in `vidsparse_kernels.block_sparse_attention`.

    Returns:
        `[batch, seq_len, num_heads, head_dim]`, contiguous; with `return_lse` also the natural-log LSE
        `[batch, num_heads, seq_len]`. Both are differentiable, once, in query, key and value: by the Triton
        kernels from what the forward kept, by other backends after computing the forward once more.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    out, lse = _attention(
        query,
        key,
        value,
        block_mask.kv_num_blocks,
        block_mask.kv_indices,
        block_mask.q_offsets,
        block_mask.kv_offsets,
        key_bias,
        block_mask.q_block_size,
        block_mask.kv_block_size,
        scale,
        backend,
        return_lse or needs_grad,
    )
    return (out, lse) if return_lse else out


def keep_transposed_lists(block_mask: BlockMask) -> None:
    """Make the lists that the backward walks once, instead of in every compiled backward.

    To be called outside compiled code, where gradients will be needed and the mask will be used again. Mask and lists
    are kept on `block_mask.kv_indices`, an input of the operator; it finds them there as long as the compiled code is
    given this tensor itself and not a copy.

    Args:
        block_mask: on the device of the calls.
    """
    block_mask.transpose()
    setattr(block_mask.kv_indices, KEPT, block_mask)


@torch.library.custom_op("vidsparse::block_sparse_attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_offsets: Tensor | None,
    kv_offsets: Tensor | None,
    key_bias: Tensor | None,
    q_block_size: int,
    kv_block_size: int,
    scale: float,
    backend: str,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output and LSE; without `with_lse` the LSE has no elements, more backends qualify, and there is no backward."""
    mask = _mask(query, key, kv_num_blocks, kv_indices, q_offsets, kv_offsets, q_block_size, kv_block_size)
    if with_lse:
        out, lse = block_sparse_attention(
            query,
            key,
            value,
            mask,
            scale=scale,
            key_bias=key_bias,
            return_lse=True,
            backend=_with_lse(backend, query, key, value, mask, key_bias),
        )
        return out.contiguous(), lse.contiguous()
    out = block_sparse_attention(query, key, value, mask, scale=scale, key_bias=key_bias, backend=backend)
    return out.contiguous(), query.new_empty(0, dtype=torch.float32)


@_attention.register_fake
def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_offsets: Tensor | None,
    kv_offsets: Tensor | None,
    key_bias: Tensor | None,
    q_block_size: int,
    kv_block_size: int,
    scale: float,
    backend: str,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    batch, seq_len, num_heads, _ = query.shape
    dtype = torch.float64 if with_lse and query.dtype == torch.float64 else torch.float32
    shape = (batch, num_heads, seq_len) if with_lse else (0,)
    return query.new_empty(query.shape), query.new_empty(shape, dtype=dtype)


@torch.library.custom_op("vidsparse::block_sparse_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_offsets: Tensor | None,
    kv_offsets: Tensor | None,
    key_bias: Tensor | None,
    q_block_size: int,
    kv_block_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _mask(query, key, kv_num_blocks, kv_indices, q_offsets, kv_offsets, q_block_size, kv_block_size)
    backend = _with_lse(backend, query, key, value, mask, key_bias)
    if backend in ("triton", "hopper"):
        from vidsparse_kernels.block_sparse_attention.backward import triton_backward

        return triton_backward(
            grad_out, grad_lse, query, key, value, out, lse, mask, scale=scale, key_bias=key_bias,
            hopper=backend == "hopper",
        )  # fmt: skip
    # Operators run below autograd; the backend's own backward needs it for this one recomputation.
    exclusion: Any = torch._C._SetExcludeDispatchKeyGuard
    with exclusion(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        outputs = block_sparse_attention(
            q, k, v, mask, scale=scale, key_bias=key_bias, return_lse=True, backend=backend
        )
        grads = torch.autograd.grad(outputs, (q, k, v), (grad_out, grad_lse))
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_attention_backward.register_fake
def _attention_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_offsets: Tensor | None,
    kv_offsets: Tensor | None,
    key_bias: Tensor | None,
    q_block_size: int,
    kv_block_size: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *lists_and_sizes, with_lse = inputs
    assert with_lse or not any(x.requires_grad for x in (query, key, value))
    ctx.save_for_backward(query, key, value, *output, *lists_and_sizes[:5])
    ctx.sizes = lists_and_sizes[5:]


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    grads = _attention_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.sizes)
    return (*grads, *(None,) * 10)


_attention.register_autograd(_backward, setup_context=_setup_context)


def _with_lse(
    backend: str, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, key_bias: Tensor | None
) -> str:
    """The backend that runs forward and backward where the LSE is kept for a backward."""
    if backend == "auto":
        return select_backend(query, key, value, mask, key_bias=key_bias, return_lse=True, requires_grad=True)[0]
    return backend


def _mask(
    query: Tensor,
    key: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_offsets: Tensor | None,
    kv_offsets: Tensor | None,
    q_block_size: int,
    kv_block_size: int,
) -> BlockMask:
    sizes = (query.shape[1], key.shape[1], q_block_size, kv_block_size)
    kept: BlockMask | None = getattr(kv_indices, KEPT, None)
    if kept is not None:
        kept_sizes = (kept.seq_len_q, kept.seq_len_kv, kept.q_block_size, kept.kv_block_size)
        same_lists = kept.kv_num_blocks is kv_num_blocks
        same_offsets = kept.q_offsets is q_offsets and kept.kv_offsets is kv_offsets
        if kept_sizes == sizes and same_lists and same_offsets:
            # What is made on a GPU during a call may lie in the memory of a CUDA graph, and must not outlive the call.
            return kept if kv_indices.device.type == "cpu" else replace(kept, _cache=dict(kept._cache))
    mask = BlockMask(kv_num_blocks, kv_indices, *sizes, q_offsets=q_offsets, kv_offsets=kv_offsets)
    if kv_indices.device.type == "cpu":
        # Plans for CPUs take long to make.
        setattr(kv_indices, KEPT, mask)
    return mask
