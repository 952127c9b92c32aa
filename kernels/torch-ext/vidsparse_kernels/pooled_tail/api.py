"""The public functions: they check the arguments once and choose the implementation."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Literal, overload

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..block_mask import BlockMask
from ..block_sparse_attention.api import MIN_TRITON_HOPPER, block_sparse_attention, select_backend
from ..block_sparse_attention.merge import merge_attention_states
from ..errors import UnsupportedBackendError
from .pools import Pools, num_pools
from .reference import pool_reference, tail_reference

BACKENDS = ("reference", "triton")
BACKENDS_WITH_TAIL = ("hopper_with_tail", "separate")


def pool_for_tail(
    key: Tensor, value: Tensor, block_mask: BlockMask, *, first_order: bool = True, backend: str = "auto"
) -> Pools:
    """Mean key and mean value of every kv-block and the matrix of the first-order term, in one pass over both.

    Args:
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`, any strides.
        block_mask: says where the kv-blocks are; its lists are not read.
        first_order: whether to compute `Pools.first_order`, which costs a product of key and value.
        backend: "auto", "reference" or "triton".

    Returns:
        `Pools`, differentiable in key and value. The same input gives the same bits.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        UnsupportedBackendError: the backend asked for cannot do this case.

    Source: PISA (arXiv 2602.01077). Only the sum of its matrices H_j is used, so no H_j is stored.
    """
    if not torch.compiler.is_compiling():
        _check_key_value(key, value, block_mask)
    requires_grad = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    with without_autocast(key.device.type):
        if _use_triton(backend, key, block_mask):
            if requires_grad:
                from .autograd import triton_pools

                return triton_pools(key, value, block_mask, first_order=first_order)
            from .pooling import triton_pool_for_tail

            return triton_pool_for_tail(key, value, block_mask, first_order=first_order)
        return pool_reference(key, value, block_mask, first_order=first_order)


def pooled_tail_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    first_order: bool = True,
    pools: Pools | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The attention state over the kv-blocks that `block_mask` does NOT list, each as one virtual token.

    A block of n tokens with mean key k̄ and mean value v̄ enters with the logit scale * q . k̄ + log n and the value v̄.
    The first-order term adds scale * q H to the output, H being the mean of (k - k̄)^T v over all tokens. Merged with
    the output of `block_sparse_attention` by `merge_attention_states` this is PISA, exactly.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]`, any strides.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`; num_heads is a multiple of num_kv_heads.
        block_mask: lists for these lengths, blocks uniform or with offsets; blocks without tokens count for nothing.
        scale: factor on query . key, default 1 / sqrt(head_dim); positive.
        first_order: whether to add the first-order term.
        pools: what `pool_for_tail` gives for key, value and mask, where it is known; key and value are then not read.
        backend: "auto", "reference" or "triton".

    Returns:
        Output like `query` and natural-log LSE `[batch, num_heads, seq_len_q]`, fp32 (fp64 for fp64 inputs). Rows whose
        q-block lists every block give 0 and -inf. Both are differentiable, once, in query, key and value. Autocast
        changes nothing.

    Raises:
        ValueError: a shape, dtype, device or value does not fit; the message names it.
        UnsupportedBackendError: the backend asked for cannot do this case.

    Source: PISA (arXiv 2602.01077).

    Example:
        >>> mask = BlockMask.from_dense(torch.eye(2, dtype=torch.bool)[None, None], seq_len_q=100, seq_len_kv=100,
        ...                             q_block_size=64, kv_block_size=64)
        >>> q = k = v = torch.randn(1, 100, 2, 32)
        >>> kept = block_sparse_attention(q, k, v, mask, return_lse=True)
        >>> merge_attention_states(*kept, *pooled_tail_attention(q, k, v, mask))[0].shape
        torch.Size([1, 100, 2, 32])
    """
    scale = _checked_scale(query, key, value, block_mask, scale, first_order, pools)
    if pools is None:
        pools = pool_for_tail(key, value, block_mask, first_order=first_order, backend=backend)
    with without_autocast(query.device.type):
        if not _use_triton(backend, query, block_mask):
            return tail_reference(query, pools, block_mask, scale=scale, first_order=first_order)
        if _requires_grad(query, pools):
            from .autograd import triton_tail_with_grad

            return triton_tail_with_grad(query, pools, block_mask, scale=scale, first_order=first_order)
        from .forward import triton_tail

        return triton_tail(query, pools, block_mask, scale=scale, first_order=first_order)


def pooled_tail_merge_(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    first_order: bool = True,
    pools: Pools | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add the pooled tail to an attention state in place: `pooled_tail_attention` and the merge in one pass.

    Args:
        out, lse: what `block_sparse_attention(..., return_lse=True)` gave for these arguments; overwritten.
        query, key, value, block_mask, scale, first_order, pools, backend: as for `pooled_tail_attention`.

    Returns:
        `out` and `lse` themselves, now over all blocks. Inference only: for gradients use `pooled_tail_attention` and
        `merge_attention_states`.

    Raises:
        ValueError: a shape, dtype, device or value does not fit, or gradients are needed.
        UnsupportedBackendError: the backend asked for cannot do this case.
    """
    scale = _checked_scale(query, key, value, block_mask, scale, first_order, pools)
    if out.shape != query.shape or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(
            f"`out` must be like `query` {tuple(query.shape)} {query.dtype} on {query.device}, got {tuple(out.shape)} "
            f"{out.dtype} on {out.device}."
        )
    batch, seq_len_q, num_heads, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if lse.shape != (batch, num_heads, seq_len_q) or lse.dtype != wide or lse.device != query.device:
        raise ValueError(
            f"`lse` must be [{batch}, {num_heads}, {seq_len_q}] {wide} on {query.device}, got {tuple(lse.shape)} "
            f"{lse.dtype} on {lse.device}."
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, lse, query, key, value)):
        raise ValueError(
            "`pooled_tail_merge_` works in place and has no backward; use pooled_tail_attention and "
            "merge_attention_states, or torch.no_grad()."
        )
    with torch.no_grad(), without_autocast(query.device.type):
        if pools is None:
            pools = pool_for_tail(key, value, block_mask, first_order=first_order, backend=backend)
        if _use_triton(backend, query, block_mask):
            from .forward import triton_tail

            return triton_tail(query, pools, block_mask, scale=scale, first_order=first_order, state=(out, lse))
        tail = tail_reference(query, pools, block_mask, scale=scale, first_order=first_order)
        merged = merge_attention_states(out, lse, *tail)
        return out.copy_(merged[0]), lse.copy_(merged[1])


@overload
def block_sparse_attention_with_tail(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    first_order: bool = True,
    pools: Pools | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def block_sparse_attention_with_tail(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    first_order: bool = True,
    pools: Pools | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention_with_tail(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    first_order: bool = True,
    pools: Pools | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the listed kv-blocks and, by their means, over all others: PISA in one call.

    `block_sparse_attention` merged with `pooled_tail_attention`, in one kernel where there is one for the case.

    Args:
        query, key, value, block_mask, scale, first_order, pools: as for `pooled_tail_attention`.
        return_lse: also return the logsumexp over both.
        backend: "hopper_with_tail" is one kernel, "separate" attends and merges one after the other, each with the
            backend that suits the case; "auto" takes what `select_backend_with_tail` says.

    Returns:
        Output with the shape and dtype of `query`; with `return_lse` also the natural-log LSE
        `[batch, num_heads, seq_len_q]` in fp32 (fp64 for fp64 inputs). "separate" is differentiable, once, in query, key
        and value. Autocast changes nothing.

    Raises:
        ValueError: a shape, dtype, device or value does not fit; the message names it.
        UnsupportedBackendError: the backend asked for cannot do this case.

    Source: PISA (arXiv 2602.01077).

    Example:
        >>> mask = BlockMask.from_dense(torch.eye(2, dtype=torch.bool)[None, None], seq_len_q=100, seq_len_kv=100,
        ...                             q_block_size=64, kv_block_size=64)
        >>> q = k = v = torch.randn(1, 100, 2, 32)
        >>> block_sparse_attention_with_tail(q, k, v, mask).shape
        torch.Size([1, 100, 2, 32])
    """
    scale = _checked_scale(query, key, value, block_mask, scale, first_order, pools)
    if backend not in ("auto", *BACKENDS_WITH_TAIL):
        raise ValueError(f'`backend` must be "auto" or one of {", ".join(BACKENDS_WITH_TAIL)}, got "{backend}".')
    requires_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    requires_grad = requires_grad or pools is not None and _requires_grad(query, pools)
    if backend == "auto":
        backend, _ = select_backend_with_tail(query, key, value, block_mask, requires_grad=requires_grad)
    elif backend == "hopper_with_tail":
        obstacle = _obstacle_with_tail(query, key, block_mask, requires_grad)
        if obstacle:
            raise UnsupportedBackendError(
                f'backend "hopper_with_tail" {obstacle}; use backend="separate" or "auto" for this case.'
            )
    if backend == "hopper_with_tail":
        with without_autocast(query.device.type):
            from .hopper import hopper_forward_with_tail

            means = _rounded_pools(key, value, block_mask, pools, scale if first_order else None)
            out, lse = hopper_forward_with_tail(
                query, key, value, *means, block_mask, scale=scale, return_lse=return_lse
            )
    else:
        out, lse = block_sparse_attention(query, key, value, block_mask, scale=scale, return_lse=True)
        arguments = (query, key, value, block_mask)
        if requires_grad:
            tail = pooled_tail_attention(*arguments, scale=scale, first_order=first_order, pools=pools)
            out, lse = merge_attention_states(out, lse, *tail)
        else:
            pooled_tail_merge_(out, lse, *arguments, scale=scale, first_order=first_order, pools=pools)
    if return_lse:
        assert lse is not None
        return out, lse
    return out


def select_backend_with_tail(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, *, requires_grad: bool | None = None
) -> tuple[str, str]:
    """Which backend "auto" of `block_sparse_attention_with_tail` takes, and why, in words for a report.

    Args:
        query, key, value, block_mask: as for `block_sparse_attention_with_tail`.
        requires_grad: whether gradients will be asked for; default: what autograd would record now.

    Returns:
        `(name, reason)`.
    """
    if requires_grad is None:
        requires_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    # Where it is worth the descriptors, it is so for the listed blocks alone.
    name, reason = select_backend(query, key, value, block_mask, return_lse=True, requires_grad=requires_grad)
    if name != "hopper":
        return "separate", f'"{name}" attends: {reason}'
    obstacle = _obstacle_with_tail(query, key, block_mask, requires_grad)
    if obstacle is None:
        return "hopper_with_tail", reason
    return "separate", f'"hopper_with_tail" {obstacle}'


def _obstacle_with_tail(query: Tensor, key: Tensor, block_mask: BlockMask, requires_grad: bool) -> str | None:
    """Why one kernel cannot do a case, as the end of a sentence that starts with its name; None if it can."""
    if requires_grad:
        return "has no backward"
    if query.device.type != "cuda":
        return "needs a CUDA GPU"
    if find_spec("triton") is None:
        return "needs the package triton (pip install triton)"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON_HOPPER:
        return f"needs Triton {'.'.join(map(str, MIN_TRITON_HOPPER))} or later, got {triton.__version__}"
    from .hopper import unsupported

    return unsupported(query, key, block_mask)


def _rounded_pools(
    key: Tensor, value: Tensor, block_mask: BlockMask, pools: Pools | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pools in the dtype of key, the matrix times scale. Where the kernel for Hopper GPUs pools, it writes them rounded."""
    from .forward import rounded
    from .pooling import hopper_pools

    first_order = scale is not None
    if pools is None and hopper_pools(key, value, block_mask):
        from .hopper_pooling import hopper_pool

        size, factor = block_mask.kv_block_size, scale or 1.0
        return hopper_pool(key, value, size, first_order=first_order, dtype=key.dtype, factor=factor)
    if pools is None:
        pools = pool_for_tail(key, value, block_mask, first_order=first_order)
    return rounded(pools, key.dtype, scale)


def _requires_grad(query: Tensor, pools: Pools) -> bool:
    tensors = (query, pools.keys, pools.values, pools.first_order)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _use_triton(backend: str, x: Tensor, block_mask: BlockMask) -> bool:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f'`backend` must be "auto" or one of {", ".join(BACKENDS)}, got "{backend}".')
    if backend == "reference":
        return False
    obstacle = "needs the package triton (pip install triton)"
    if find_spec("triton") is not None:
        from .forward import unsupported

        obstacle = unsupported(x, block_mask)
    if backend == "triton" and obstacle:
        raise UnsupportedBackendError(f'backend "triton" {obstacle}; use backend="reference" or "auto" for this case.')
    # The interpreter is for tests: it runs only when asked for by name.
    return backend == "triton" or obstacle is None and x.device.type != "cpu"


def _checked_scale(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    scale: float | None,
    first_order: bool,
    pools: Pools | None,
) -> float:
    """Check the arguments; return the scale to use."""
    if not torch.compiler.is_compiling():
        _check_key_value(key, value, block_mask)
        _check_query(query, key, block_mask)
        if pools is not None:
            _check_pools(pools, query, key, block_mask, first_order)
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"`scale` must be positive and finite, got {scale}.")
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale


def _check_key_value(key: Tensor, value: Tensor, block_mask: BlockMask) -> None:
    for name, x in (("key", key), ("value", value)):
        if x.ndim != 4 or not x.dtype.is_floating_point:
            raise ValueError(
                f"`{name}` must be floating point [batch, seq_len, num_heads, head_dim], got {x.dtype} "
                f"{tuple(x.shape)}."
            )
    if value.shape != key.shape or value.dtype != key.dtype or value.device != key.device:
        raise ValueError(
            f"`value` must be like `key` {tuple(key.shape)} {key.dtype} on {key.device}, got {tuple(value.shape)} "
            f"{value.dtype} on {value.device}."
        )
    if block_mask.seq_len_kv != key.shape[1]:
        raise ValueError(f"`block_mask` was built for seq_len_kv {block_mask.seq_len_kv}, got {key.shape[1]} tokens.")
    if block_mask.device != key.device:
        raise ValueError(
            f"`block_mask` must be on the device of `key` ({key.device}), got {block_mask.device}; use .to()."
        )
    offsets = block_mask.kv_offsets
    if key.shape[2] == 0 or num_pools(key.shape[2], block_mask) % key.shape[2]:
        heads = key.shape[2] if offsets is None else offsets.shape[1]
        raise ValueError(
            f"`kv_offsets` must have 1 head or a multiple of those of `key` ({key.shape[2]}), got {heads}."
        )
    if offsets is not None and offsets.shape[0] not in (1, key.shape[0]):
        raise ValueError(f"`kv_offsets` must have batch 1 or {key.shape[0]}, got {offsets.shape[0]}.")


def _check_query(query: Tensor, key: Tensor, block_mask: BlockMask) -> None:
    if query.ndim != 4 or query.dtype != key.dtype or query.device != key.device:
        raise ValueError(
            f"`query` must be [batch, seq_len, num_heads, head_dim] with the dtype and device of `key` ({key.dtype}, "
            f"{key.device}), got {tuple(query.shape)}, {query.dtype}, {query.device}."
        )
    batch, seq_len_q, num_heads, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"`key` must have the batch and head_dim of `query` ({batch}, {head_dim}), got {tuple(key.shape)}."
        )
    if num_heads % key.shape[2]:
        raise ValueError(
            f"num_heads of `query` must be a multiple of that of `key`, got {num_heads} and {key.shape[2]}."
        )
    if block_mask.seq_len_q != seq_len_q:
        raise ValueError(f"`block_mask` was built for seq_len_q {block_mask.seq_len_q}, got {seq_len_q} tokens.")
    if block_mask.batch_size not in (1, batch) or block_mask.num_heads not in (1, num_heads):
        raise ValueError(
            f"`block_mask` must have batch 1 or {batch} and heads 1 or {num_heads}, got {block_mask.batch_size} "
            f"and {block_mask.num_heads}."
        )


def _check_pools(pools: Pools, query: Tensor, key: Tensor, block_mask: BlockMask, first_order: bool) -> None:
    batch, _, num_kv_heads, head_dim = key.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lead = (batch, num_pools(num_kv_heads, block_mask))
    shapes = {"keys": (*lead, block_mask.num_kv_blocks, head_dim), "first_order": (*lead, head_dim, head_dim)}
    shapes["values"] = shapes["keys"]
    for name, shape in shapes.items():
        x = getattr(pools, name)
        if x is None and not first_order:
            continue
        if x is None:
            raise ValueError("`pools` has no `first_order`; pool with first_order=True or leave the term out.")
        if tuple(x.shape) != shape or x.dtype != wide or x.device != query.device:
            raise ValueError(
                f"`pools.{name}` must be {shape} {wide} on {query.device}, got {tuple(x.shape)} {x.dtype} on {x.device}."
            )
    if pools.counts.ndim != 3 or pools.counts.shape[2] != block_mask.num_kv_blocks:
        raise ValueError(
            f"`pools.counts` must be [B|1, H|1, {block_mask.num_kv_blocks}], got {tuple(pools.counts.shape)}."
        )
