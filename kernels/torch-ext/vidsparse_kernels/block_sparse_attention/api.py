"""The public function: checks the arguments once and names the backend that runs."""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec
from typing import Literal, overload

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..block_mask import BlockMask
from ..errors import UnsupportedBackendError

BACKENDS = ("reference", "sdpa", "triton", "hopper", "flex", "flash4")
QUANTIZERS = (None, "int8")
MIN_TRITON_HOPPER = (3, 6)
"""The first version whose Gluon compiles the kernel."""


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    skip_threshold: float | None = None,
    quantize: str | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    skip_threshold: float | None = None,
    quantize: str | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    skip_threshold: float | None = None,
    quantize: str | None = None,
    return_lse: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    skip_threshold: float | None = None,
    quantize: str | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the blocks that `block_mask` lists, exact on those blocks.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]`, any strides.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`, same dtype and device; num_heads is a multiple of
            num_kv_heads (query head h reads kv head h // (num_heads // num_kv_heads)).
        block_mask: lists for these lengths; batch and heads equal to those of `query`, or 1.
        scale: factor on query . key, default 1 / sqrt(head_dim); positive.
        key_bias: fp32 `[B|1, H|1, seq_len_kv]` added to the scaled logits, natural-log units; not differentiated.
        skip_threshold: leave out tiles of small weight while attending (BLASST, arXiv:2512.12087), in [0, 1); None or
            0: exact. A tile of keys is left out for a tile of queries when in each row its largest logit lies more
            than -ln(skip_threshold) below the largest one so far. The tiles are those of the backend, so backends
            differ. Inference only.
        quantize: "int8" multiplies query and key as 8-bit integers, with one scale for each row of query and for each
            128 keys at most, less the mean of the keys (SageAttention, arXiv:2410.02367); None does not. Weights and
            values stay as they are. Inference only, blocks of uniform size, without key_bias, skip_threshold and LSE.
        return_lse: also return the logsumexp of the logits.
        backend: "auto" or one of `available_backends()`. "auto" takes what `select_backend` says.

    Returns:
        Output with the shape and dtype of `query`; with `return_lse` also the natural-log LSE
        `[batch, num_heads, seq_len_q]` in fp32 (fp64 for fp64 inputs). Rows without any block give 0 and -inf.
        With the backends "reference", "triton" and "hopper" both are differentiable, once, in query, key and value.
        Autocast changes nothing: cast the inputs before.

    Raises:
        ValueError: a shape, dtype, device or value does not fit; the message names it.
        UnsupportedBackendError: the backend asked for cannot do this case.

    Example:
        >>> mask = BlockMask.full(100, 100, q_block_size=64, kv_block_size=64)
        >>> q = k = v = torch.randn(1, 100, 2, 32)
        >>> block_sparse_attention(q, k, v, mask).shape
        torch.Size([1, 100, 2, 32])
    """
    if not torch.compiler.is_compiling():
        _check_arguments(query, key, value, block_mask, scale, key_bias, skip_threshold, backend)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    requires_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if skip_threshold and requires_grad:
        raise UnsupportedBackendError(
            f"`skip_threshold` {skip_threshold} has no backward, which would need the same decisions again; "
            "leave it out or use torch.no_grad()."
        )
    case = _Case(
        query, key, value, block_mask, key_bias is not None, bool(skip_threshold), quantize, return_lse, requires_grad
    )
    _check_quantize(case)
    if backend == "auto":
        backend, _ = _select(case)
    else:
        obstacle = _obstacle(backend, case)
        if obstacle:
            raise UnsupportedBackendError(
                f'backend "{backend}" {obstacle}; use backend="{_select(case)[0]}" or "auto" for this case.'
            )
    with without_autocast(query.device.type):
        if backend in ("triton", "hopper"):
            if backend == "hopper" and block_mask.variable:
                from .hopper_packed import packed_forward as forward
            elif backend == "hopper":
                from .hopper import hopper_forward as forward
            else:
                from .forward import triton_forward

                forward = partial(triton_forward, skip_threshold=skip_threshold)
            if quantize is not None:
                forward = partial(forward, quantize=quantize)
            if requires_grad:
                from .autograd import differentiable
                from .backward import triton_backward

                forward = partial(forward, return_lse=True)
                backward = partial(triton_backward, hopper=backend == "hopper")
                out, lse = differentiable(
                    forward, backward, query, key, value, block_mask, scale=scale, key_bias=key_bias
                )
            else:
                out, lse = forward(
                    query, key, value, block_mask, scale=scale, key_bias=key_bias, return_lse=return_lse
                )
        elif backend == "flex":
            from .flex import flex_forward

            out, lse = flex_forward(
                query, key, value, block_mask, scale=scale, key_bias=key_bias, return_lse=return_lse
            )
        elif backend == "flash4":
            from .flash4 import flash4_forward

            out, lse = flash4_forward(
                query, key, value, block_mask, scale=scale, key_bias=key_bias, return_lse=return_lse
            )
        elif backend == "sdpa":
            from .sdpa import grouped_sdpa

            return grouped_sdpa(query, key, value, block_mask, scale=scale, key_bias=key_bias)
        else:
            from .reference import reference

            dtype = query.dtype
            if quantize is not None:
                from .quantize import restored_query_key

                query, key = restored_query_key(query, key, block_mask.kv_block_size)
                value = value.float()
            out, lse = reference(
                query, key, value, block_mask, scale=scale, key_bias=key_bias, skip_threshold=skip_threshold
            )
            out = out.to(dtype)
    if return_lse:
        assert lse is not None
        return out, lse
    return out


def select_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    key_bias: Tensor | None = None,
    skip_threshold: float | None = None,
    quantize: str | None = None,
    return_lse: bool = False,
    requires_grad: bool | None = None,
) -> tuple[str, str]:
    """Which backend "auto" takes for these arguments, and why, in words for a report.

    Args:
        query, key, value, block_mask, key_bias, skip_threshold, quantize, return_lse: as for `block_sparse_attention`.
        requires_grad: whether gradients will be asked for; default: what autograd would record now.

    Returns:
        `(name, reason)`.
    """
    if requires_grad is None:
        requires_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    case = _Case(
        query, key, value, block_mask, key_bias is not None, bool(skip_threshold), quantize, return_lse, requires_grad
    )
    _check_quantize(case)
    return _select(case)


def available_backends() -> tuple[str, ...]:
    """Backends that can be asked for by name on this installation."""
    from .flash4 import installed

    missing = set() if find_spec("triton") is not None else {"triton", "hopper", "flex"}
    if not installed():
        missing.add("flash4")
    return tuple(name for name in BACKENDS if name not in missing)


class _Case:
    """What the choice of a backend depends on."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_mask: BlockMask,
        has_bias: bool,
        skips: bool,
        quantize: str | None,
        return_lse: bool,
        requires_grad: bool,
    ) -> None:
        self.query, self.key, self.value, self.block_mask = query, key, value, block_mask
        self.has_bias, self.skips, self.return_lse, self.requires_grad = has_bias, skips, return_lse, requires_grad
        self.quantize = quantize


def _select(case: _Case) -> tuple[str, str]:
    where = case.query.device.type
    purpose = "gradients are needed" if case.requires_grad else "inference"
    if where == "cuda" and _is_large(case) and _obstacle("hopper", case) is None:
        from .hopper import reads_in_place

        if reads_in_place(case.query, case.key, case.value):
            return "hopper", f"{purpose} on a Hopper GPU"
    obstacle_triton = "needs a GPU" if where == "cpu" else _obstacle("triton", case)
    if obstacle_triton is None:
        return "triton", f"{purpose} on {where}"
    obstacle_sdpa = _obstacle("sdpa", case)
    not_triton = "" if where == "cpu" else f'; "triton" {obstacle_triton}'
    if obstacle_sdpa is None:
        return "sdpa", f"inference on {where}{not_triton}"
    purpose = f"{purpose}; " if case.requires_grad else ""
    return "reference", f'{purpose}"sdpa" {obstacle_sdpa}{not_triton}'


def _is_large(case: _Case) -> bool:
    """Whether the work outweighs making descriptors on the host."""
    from .configs import MIN_DESCRIPTOR_FLOPS

    batch, seq_len_q, num_heads, head_dim = case.query.shape
    return 4 * batch * num_heads * seq_len_q * case.key.shape[1] * head_dim > MIN_DESCRIPTOR_FLOPS


def _obstacle(backend: str, case: _Case) -> str | None:
    """Why a backend cannot do a case, as the end of a sentence that starts with its name; None if it can."""
    if backend == "reference":
        return None
    if case.quantize is not None and backend not in ("triton", "hopper"):
        return f'does not take quantize="{case.quantize}"'
    if backend != "triton" and case.skips:
        return "does not take skip_threshold"
    if backend == "hopper" and case.block_mask.variable and case.has_bias:
        return "does not take key_bias with blocks of variable size"
    if backend == "sdpa":
        if case.requires_grad:
            return "has no backward"
        if case.return_lse:
            return "does not return the LSE"
        return None
    if backend in ("flex", "flash4"):
        if case.requires_grad:
            return "has no backward here"
        if backend == "flash4" and case.has_bias:
            return "does not take key_bias"
        from . import flash4, flex

        return (flex if backend == "flex" else flash4).unsupported(case.query, case.block_mask)
    if find_spec("triton") is None:
        return "needs the package triton (pip install triton)"
    if backend == "hopper":
        obstacle = _obstacle_hopper(case)
        return obstacle if obstacle or not case.requires_grad else _obstacle("triton", case)
    from .forward import unsupported

    obstacle = unsupported(case.query, case.block_mask)
    if obstacle is None and case.requires_grad:
        from .backward import unsupported_backward

        obstacle = unsupported_backward(case.query)
    return obstacle


def _obstacle_hopper(case: _Case) -> str | None:
    if case.query.device.type != "cuda":
        return "needs a CUDA GPU"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON_HOPPER:
        return f"needs Triton {'.'.join(map(str, MIN_TRITON_HOPPER))} or later, got {triton.__version__}"
    from .hopper import unsupported

    if case.quantize is not None and case.query.shape[3] % 16:
        return f"needs a head_dim that is a multiple of 16 for 8-bit numbers, got {case.query.shape[3]}"
    return unsupported(case.query, case.key, case.block_mask)


def _check_quantize(case: _Case) -> None:
    if case.quantize is None:
        return
    if case.quantize not in QUANTIZERS:
        raise ValueError(f'`quantize` must be None or "int8", got "{case.quantize}".')
    obstacles = {
        "gradients": case.requires_grad,
        "`key_bias`": case.has_bias,
        "`skip_threshold`": case.skips,
        "`return_lse`": case.return_lse,
        "blocks of variable size": case.block_mask.variable,
    }
    for name, there in obstacles.items():
        if there:
            raise UnsupportedBackendError(
                f'`quantize` "{case.quantize}" does not go with {name}; leave one of them out.'
            )


def _check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    scale: float | None,
    key_bias: Tensor | None,
    skip_threshold: float | None,
    backend: str,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(
                f"`{name}` must be [batch, seq_len, num_heads, head_dim], got shape {tuple(tensor.shape)}."
            )
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"`{name}` must have a floating point dtype, got {tensor.dtype}.")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"`{name}` must have the dtype and device of `query` ({query.dtype}, {query.device}), "
                f"got {tensor.dtype}, {tensor.device}."
            )
    batch, seq_len_q, num_heads, head_dim = query.shape
    _, seq_len_kv, num_kv_heads, _ = key.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"`key` must have the batch and head_dim of `query` ({batch}, {head_dim}), got {tuple(key.shape)}."
        )
    if value.shape != key.shape:
        raise ValueError(f"`value` must have the shape of `key` {tuple(key.shape)}, got {tuple(value.shape)}.")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads of `query` must be a multiple of that of `key`, got {num_heads} and {num_kv_heads}."
        )
    for name, length in (("seq_len_q", seq_len_q), ("seq_len_kv", seq_len_kv)):
        if getattr(block_mask, name) != length:
            raise ValueError(f"`block_mask` was built for {name} {getattr(block_mask, name)}, got {length} tokens.")
    if block_mask.batch_size not in (1, batch) or block_mask.num_heads not in (1, num_heads):
        raise ValueError(
            f"`block_mask` must have batch 1 or {batch} and heads 1 or {num_heads}, got {block_mask.batch_size} "
            f"and {block_mask.num_heads}."
        )
    if block_mask.device != query.device:
        raise ValueError(
            f"`block_mask` must be on the device of `query` ({query.device}), got {block_mask.device}; use .to()."
        )
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"`scale` must be positive and finite, got {scale}.")
    if skip_threshold is not None and not 0 <= skip_threshold < 1:
        raise ValueError(f"`skip_threshold` must be in [0, 1), got {skip_threshold}.")
    if key_bias is not None:
        if key_bias.ndim != 3 or key_bias.shape[2] != seq_len_kv:
            raise ValueError(f"`key_bias` must be [B|1, H|1, {seq_len_kv}], got {tuple(key_bias.shape)}.")
        if key_bias.shape[0] not in (1, batch) or key_bias.shape[1] not in (1, num_heads):
            raise ValueError(
                f"`key_bias` must have batch 1 or {batch} and heads 1 or {num_heads}, got {tuple(key_bias.shape)}."
            )
        if key_bias.dtype not in (torch.float32, torch.float64) or key_bias.device != query.device:
            raise ValueError(f"`key_bias` must be fp32 on {query.device}, got {key_bias.dtype} on {key_bias.device}.")
        if key_bias.requires_grad and torch.is_grad_enabled():
            raise ValueError("`key_bias` must not require grad: no backend differentiates it; pass .detach().")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f'`backend` must be "auto" or one of {", ".join(BACKENDS)}, got "{backend}".')
