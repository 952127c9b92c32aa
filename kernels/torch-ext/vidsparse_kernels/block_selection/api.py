"""Public functions of block selection: they check the arguments once and choose the implementation."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..block_mask import BlockMask
from ..errors import UnsupportedBackendError
from .reference import pool_uniform, pool_variable, select_reference

BACKENDS = ("reference", "triton")
KINDS = ("mean", "max", "min")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TRITON_KV_BLOCKS = 16384
"""The Triton kernel holds a whole row of scores in registers; beyond this they spill by the kilobyte."""


def pool_blocks(
    x: Tensor,
    block_size: int,
    *,
    kinds: tuple[str, ...] = ("mean",),
    offsets: Tensor | None = None,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Reduce each block of tokens to one vector; all kinds in one pass over `x` on a GPU.

    Args:
        x: `[batch, seq_len, num_heads, head_dim]`, any strides.
        block_size: tokens per block; the last block may be shorter and is pooled over its own tokens. Not used with
            `offsets`.
        kinds: any of "mean", "max", "min". Sums are kept in fp32.
        offsets: blocks of variable size: int32 `[batch|1, num_heads|1, num_blocks + 1]`, ascending; block m holds the
            tokens offsets[m] .. offsets[m + 1]. A block without tokens gives mean 0, max -inf, min +inf.
        backend: "auto", "reference" (differentiable) or "triton".

    Returns:
        For each kind fp32 `[batch, num_heads, num_blocks, head_dim]`.

    Raises:
        ValueError: a shape, dtype or value does not fit. Offsets are read on the CPU only.
        UnsupportedBackendError: the backend asked for cannot do this case.

    Example:
        >>> pool_blocks(torch.randn(1, 100, 2, 32), 64)["mean"].shape
        torch.Size([1, 2, 2, 32])
    """
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(
            f"`x` must be floating point [batch, seq_len, num_heads, head_dim], got {x.dtype} {tuple(x.shape)}."
        )
    _check_whole("block_size", block_size)
    if not kinds or any(kind not in KINDS for kind in kinds):
        raise ValueError(f"`kinds` must name some of {', '.join(KINDS)}, got {kinds!r}.")
    num_blocks = -(-x.shape[1] // block_size)
    if offsets is not None:
        _check_offsets(offsets, x)
        offsets = offsets.expand(x.shape[0], x.shape[2], -1)
        num_blocks = offsets.shape[-1] - 1
    obstacle = _obstacle(x)
    if obstacle is None and x.dtype not in TRITON_DTYPES:
        obstacle = f"pools bf16, fp16 and fp32, not {x.dtype}"
    if obstacle is None and x.requires_grad and torch.is_grad_enabled():
        obstacle = "has no backward for pooling"
    if _use_triton(backend, x, obstacle):
        from .pooling import triton_pool

        return triton_pool(x, block_size, kinds=tuple(kinds), offsets=offsets, num_blocks=num_blocks)
    if offsets is None:
        return {kind: pool_uniform(x, block_size, kind) for kind in kinds}
    return {kind: pool_variable(x, offsets, kind) for kind in kinds}


def score_blocks(q_pooled: Tensor, k_pooled: Tensor, scale: float | None = None) -> Tensor:
    """Scaled products of pooled queries and pooled keys.

    Args:
        q_pooled: fp32 `[batch, num_heads, num_q_blocks, head_dim]`.
        k_pooled: fp32 `[batch, num_kv_heads, num_kv_blocks, head_dim]`; num_heads is a multiple of num_kv_heads.
        scale: factor on the product, default 1 / sqrt(head_dim).

    Returns:
        fp32 `[batch, num_heads, num_q_blocks, num_kv_blocks]`.

    Raises:
        ValueError: shapes do not fit.
    """
    for name, tensor in (("q_pooled", q_pooled), ("k_pooled", k_pooled)):
        if tensor.ndim != 4:
            raise ValueError(f"`{name}` must be [batch, heads, blocks, head_dim], got {tuple(tensor.shape)}.")
    batch, num_heads, num_q_blocks, head_dim = q_pooled.shape
    num_kv_heads = k_pooled.shape[1]
    if k_pooled.shape[0] != batch or k_pooled.shape[3] != head_dim or num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            "`k_pooled` must have the batch and head_dim of `q_pooled` and a number of heads that divides its, got "
            f"{tuple(k_pooled.shape)} and {tuple(q_pooled.shape)}."
        )
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    with without_autocast(q_pooled.device.type):
        # Query heads that share a key head stand one after the other, so one product serves the whole group.
        grouped = (q_pooled * scale).reshape(batch, num_kv_heads, -1, head_dim)
        return (grouped @ k_pooled.transpose(2, 3)).view(batch, num_heads, num_q_blocks, -1)


def select_block_lists(
    scores: Tensor,
    *,
    top_k: int | None = None,
    density: float | None = None,
    top_p: float | None = None,
    min_blocks: int = 1,
    forced: Tensor | None = None,
    max_forced: int | None = None,
    kv_block_sizes: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose kv-blocks for every q-block by score, on the device and without waiting for it.

    Exactly one of `top_k`, `density` and `top_p` says how many. Blocks are taken by falling score (by score plus log of
    the size where sizes are given), equal ones by rising index, NaN as -inf; the result depends on nothing else.

    Args:
        scores: `[batch, num_heads, num_q_blocks, num_kv_blocks]`, computed with in fp32; in natural-log units for
            `top_p`.
        top_k: number of blocks; more than there are means all.
        density: share of the kv-blocks in (0, 1]; top_k = ceil(density * num_kv_blocks).
        top_p: in (0, 1]: the smallest set whose softmax mass reaches it, the block that crosses it included; 1 takes
            every block.
        min_blocks: least number of blocks of a row, at least 1.
        forced: bool, broadcastable to `scores`: blocks that are always in. They count towards the number and the mass,
            and all are taken even where that is more than the number.
        max_forced: no row has more forced blocks than this. Without it lists have room for every block, because
            counting would wait for the device. Checked on the CPU only; elsewhere forced blocks beyond the room are
            dropped, highest index first.
        kv_block_sizes: tokens per kv-block, integer, broadcastable to `[batch, num_heads, num_kv_blocks]`; default:
            all alike.
        backend: "auto", "reference" or "triton".

    Returns:
        `kv_num_blocks` int32 `[batch, num_heads, num_q_blocks]` and `kv_indices` int32 `[..., max_blocks]`, ascending,
        0 past the count. Not differentiable.

    Raises:
        ValueError: an argument does not fit; the message names it.
        UnsupportedBackendError: the backend asked for cannot do this case.
    """
    if scores.ndim != 4 or not scores.dtype.is_floating_point or scores.shape[3] == 0:
        raise ValueError(
            "`scores` must be floating point [batch, num_heads, num_q_blocks, num_kv_blocks] with at least one "
            f"kv-block, got {scores.dtype} {tuple(scores.shape)}."
        )
    num_kv_blocks = scores.shape[3]
    budget = _budget(num_kv_blocks, top_k, density, top_p, min_blocks)
    if top_p == 1:
        budget, top_p = num_kv_blocks, None
    capacity = budget if top_p is None else num_kv_blocks
    if forced is not None:
        if forced.dtype != torch.bool:
            raise ValueError(f"`forced` must be boolean, got {forced.dtype}.")
        if forced.device != scores.device:
            raise ValueError(f"`forced` must be on the device of `scores` ({scores.device}), got {forced.device}.")
        forced = _expand("forced", forced, tuple(scores.shape))
        if max_forced is not None:
            _check_forced(forced, max_forced)
        capacity = max(capacity, num_kv_blocks if max_forced is None else min(max_forced, num_kv_blocks))
    if kv_block_sizes is not None:
        if kv_block_sizes.dtype.is_floating_point or kv_block_sizes.device != scores.device:
            raise ValueError(
                f"`kv_block_sizes` must be integer on {scores.device}, got {kv_block_sizes.dtype} on "
                f"{kv_block_sizes.device}."
            )
        kv_block_sizes = _expand("kv_block_sizes", kv_block_sizes, (*scores.shape[:2], num_kv_blocks))
    scores = scores.detach().to(torch.float32)
    obstacle = _obstacle(scores)
    if obstacle is None and num_kv_blocks > MAX_TRITON_KV_BLOCKS:
        obstacle = f"selects among up to {MAX_TRITON_KV_BLOCKS} kv-blocks, got {num_kv_blocks}"
    options: dict[str, Any] = dict(
        budget=budget, top_p=top_p, forced=forced, kv_block_sizes=kv_block_sizes, capacity=capacity
    )
    if _use_triton(backend, scores, obstacle):
        from .select import triton_select

        return triton_select(scores, **options)
    counts, indices = select_reference(scores, **options)
    if counts.device.type == "cpu" and counts.numel():
        indices = indices[..., : int(counts.max())].contiguous()
    return counts, indices


def select_blocks(
    scores: Tensor,
    *,
    seq_len_q: int,
    seq_len_kv: int,
    q_block_size: int,
    kv_block_size: int,
    top_k: int | None = None,
    density: float | None = None,
    top_p: float | None = None,
    min_blocks: int = 1,
    forced: Tensor | None = None,
    max_forced: int | None = None,
    kv_block_sizes: Tensor | None = None,
    backend: str = "auto",
) -> BlockMask:
    """`select_block_lists` as a BlockMask over blocks of uniform size.

    Args:
        scores: `[batch, num_heads, num_q_blocks, num_kv_blocks]`.
        seq_len_q, seq_len_kv: tokens.
        q_block_size, kv_block_size: tokens per block.
        top_k, density, top_p, min_blocks, forced, max_forced, kv_block_sizes, backend: as for `select_block_lists`.

    Raises:
        ValueError: an argument does not fit; the message names it.
        UnsupportedBackendError: the backend asked for cannot do this case.

    Example:
        >>> scores = torch.randn(1, 2, 4, 8)
        >>> sizes = dict(seq_len_q=256, seq_len_kv=512, q_block_size=64, kv_block_size=64)
        >>> select_blocks(scores, density=0.25, **sizes).density
        0.25
    """
    for name, size in (
        ("seq_len_q", seq_len_q), ("seq_len_kv", seq_len_kv), ("q_block_size", q_block_size),
        ("kv_block_size", kv_block_size),
    ):  # fmt: skip
        _check_whole(name, size)
    blocks = (-(-seq_len_q // q_block_size), -(-seq_len_kv // kv_block_size))
    if scores.ndim != 4 or tuple(scores.shape[2:]) != blocks or 0 in scores.shape[:2]:
        raise ValueError(
            f"`scores` must be [batch, num_heads, {blocks[0]}, {blocks[1]}] for {seq_len_q} x {seq_len_kv} tokens in "
            f"blocks of {q_block_size} x {kv_block_size}, got {tuple(scores.shape)}."
        )
    counts, indices = select_block_lists(
        scores, top_k=top_k, density=density, top_p=top_p, min_blocks=min_blocks, forced=forced,
        max_forced=max_forced, kv_block_sizes=kv_block_sizes, backend=backend,
    )  # fmt: skip
    # The lists are right by construction, so the checks of `from_indices` and their launches are left out.
    return BlockMask(
        kv_num_blocks=counts,
        kv_indices=indices,
        seq_len_q=seq_len_q,
        seq_len_kv=seq_len_kv,
        q_block_size=q_block_size,
        kv_block_size=kv_block_size,
    )


def select_from_qk(
    query: Tensor,
    key: Tensor,
    *,
    q_block_size: int,
    kv_block_size: int,
    scale: float | None = None,
    top_k: int | None = None,
    density: float | None = None,
    top_p: float | None = None,
    min_blocks: int = 1,
    forced: Tensor | None = None,
    max_forced: int | None = None,
    backend: str = "auto",
) -> BlockMask:
    """Select by the product of mean query and mean key of each pair of blocks.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]`, any strides.
        key: `[batch, seq_len_kv, num_kv_heads, head_dim]`, num_heads a multiple of num_kv_heads.
        q_block_size, kv_block_size: tokens per block.
        scale: factor on query . key, default 1 / sqrt(head_dim).
        top_k, density, top_p, min_blocks, forced, max_forced, backend: as for `select_block_lists`.

    Returns:
        A mask for `block_sparse_attention`, on the device of `query`; the selection is not differentiated.

    Example:
        >>> q, k = torch.randn(1, 300, 2, 32), torch.randn(1, 300, 2, 32)
        >>> select_from_qk(q, k, q_block_size=64, kv_block_size=64, top_k=2).kv_num_blocks.shape
        torch.Size([1, 2, 5])
    """
    with torch.no_grad():
        q_pooled = pool_blocks(query, q_block_size, backend=backend)["mean"]
        k_pooled = pool_blocks(key, kv_block_size, backend=backend)["mean"]
        return select_blocks(
            score_blocks(q_pooled, k_pooled, scale), seq_len_q=query.shape[1], seq_len_kv=key.shape[1],
            q_block_size=q_block_size, kv_block_size=kv_block_size, top_k=top_k, density=density, top_p=top_p,
            min_blocks=min_blocks, forced=forced, max_forced=max_forced, backend=backend,
        )  # fmt: skip


def _budget(num_kv_blocks: int, top_k: int | None, density: float | None, top_p: float | None, min_blocks: int) -> int:
    """The number of blocks, or with top_p the least number."""
    given = [name for name, x in (("top_k", top_k), ("density", density), ("top_p", top_p)) if x is not None]
    if len(given) != 1:
        raise ValueError(f"Exactly one of `top_k`, `density` and `top_p` must be given, got {given or 'none'}.")
    _check_whole("min_blocks", min_blocks)
    for name, share in (("density", density), ("top_p", top_p)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"`{name}` must be in (0, 1], got {share}.")
    count = 1
    if top_k is not None:
        _check_whole("top_k", top_k)
        count = top_k
    elif density is not None:
        # A share such as 0.07 of 100 must not become 8 by rounding.
        count = math.ceil(density * num_kv_blocks - 1e-9)
    return min(max(count, min_blocks), num_kv_blocks)


def _check_whole(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")


def _check_offsets(offsets: Tensor, x: Tensor) -> None:
    batch, seq_len, num_heads, _ = x.shape
    fits = offsets.ndim == 3 and offsets.shape[0] in (1, batch) and offsets.shape[1] in (1, num_heads)
    if not fits or offsets.shape[2] < 2 or offsets.dtype != torch.int32 or offsets.device != x.device:
        raise ValueError(
            f"`offsets` must be int32 [1 or {batch}, 1 or {num_heads}, num_blocks + 1] on {x.device}, got "
            f"{offsets.dtype} {tuple(offsets.shape)} on {offsets.device}."
        )
    if offsets.device.type == "cpu" and offsets.numel():
        low, high = int(offsets.min()), int(offsets.max())
        if low < 0 or high > seq_len or bool((offsets.diff(dim=-1) < 0).any()):
            raise ValueError(f"`offsets` must ascend from 0 or more to at most {seq_len}, got {low} to {high}.")


def _check_forced(forced: Tensor, max_forced: int) -> None:
    if not isinstance(max_forced, Integral) or max_forced < 0:
        raise ValueError(f"`max_forced` must be a whole number of at least 0, got {max_forced!r}.")
    if forced.device.type == "cpu" and forced.numel():
        most = int(forced.sum(-1).max())
        if most > max_forced:
            raise ValueError(f"`max_forced` must bound the forced blocks of every row ({most}), got {max_forced}.")


def _expand(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return x.expand(shape)
    except RuntimeError:
        raise ValueError(f"`{name}` must be broadcastable to {shape}, got {tuple(x.shape)}.") from None


def _obstacle(x: Tensor) -> str | None:
    """Why Triton cannot work on this tensor, as the end of a sentence that starts with its name; None if it can."""
    if find_spec("triton") is None:
        return "needs the package triton"
    if x.device.type == "cpu":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "needs a GPU"
    return None if x.device.type == "cuda" else f"needs a CUDA or ROCm GPU, got {x.device.type}"


def _use_triton(backend: str, x: Tensor, obstacle: str | None) -> bool:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f'`backend` must be "auto" or one of {", ".join(BACKENDS)}, got "{backend}".')
    if backend == "triton" and obstacle:
        raise UnsupportedBackendError(f'backend "triton" {obstacle}; use backend="reference" or "auto" for this case.')
    # The interpreter is for tests: it runs only when asked for by name.
    return backend == "triton" or backend == "auto" and obstacle is None and x.device.type != "cpu"
