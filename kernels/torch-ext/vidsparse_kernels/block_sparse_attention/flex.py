"""torch's FlexAttention as a backend, compiled when it is first asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from ..block_mask import BlockMask
from .configs import largest_divisor
from .convert import to_flex_block_mask

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def flex_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool,
    compiled: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run FlexAttention; inference only.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]`, any strides.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        block_mask: lists of uniform blocks; the converted mask is kept on it.
        scale: factor on query . key.
        key_bias: fp32 `[B|1, H|1, seq_len_kv]`, natural-log units, or None.
        return_lse: whether to return the LSE.
        compiled: False runs the eager form, which holds all seq_len_q * seq_len_kv scores; for tests.

    Returns:
        Output like `query` and the natural-log LSE `[batch, num_heads, seq_len_q]` in fp32 (fp64 for fp64), or None.
    """
    options: dict[str, Any] = dict(
        block_mask=_converted(block_mask),
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
        kernel_options=_kernel_options(block_mask),
    )
    if key_bias is not None:
        options["score_mod"] = _add_bias(key_bias.expand(query.shape[0], query.shape[2], -1))
    # Where torch has `return_aux`, `return_lse` is deprecated.
    named_outputs = hasattr(flex, "AuxRequest")
    if return_lse:
        options.update(dict(return_aux=flex.AuxRequest(lse=True)) if named_outputs else dict(return_lse=True))
    attend = _compiled(block_mask, query, key_bias is not None, return_lse) if compiled else flex.flex_attention
    result: Any = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options)
    out, extra = result if return_lse else (result, None)
    return out.transpose(1, 2), extra.lse if extra is not None and named_outputs else extra


def unsupported(query: Tensor, block_mask: BlockMask) -> str | None:
    """Why FlexAttention cannot do this case, as the end of a sentence that starts with its name; None if it can."""
    for name in ("q_offsets", "kv_offsets"):
        if getattr(block_mask, name, None) is not None:
            return f"does not take blocks of variable size ({name})"
    if query.device.type != "cuda":
        return f"needs a GPU, got {query.device.type}"
    if query.dtype not in DTYPES:
        return f"computes in bf16, fp16 and fp32, not {query.dtype}"
    if query.shape[3] < 16:
        return f"needs a head_dim of at least 16, got {query.shape[3]}"
    for name in ("q_block_size", "kv_block_size"):
        if getattr(block_mask, name) % 16:
            return f"needs a {name} that is a multiple of 16, got {getattr(block_mask, name)}"
    return None


def _converted(block_mask: BlockMask) -> Any:
    if "flex_mask" not in block_mask._cache:
        block_mask._cache["flex_mask"] = to_flex_block_mask(block_mask)
    return block_mask._cache["flex_mask"]


def _compiled(block_mask: BlockMask, query: Tensor, has_bias: bool, return_lse: bool) -> Any:
    """One compiled function per configuration, kept on the mask, so that it goes when the mask does."""
    kept = block_mask._cache.setdefault("flex_compiled", {})
    configuration = (query.dtype, query.device, query.shape[0], query.shape[2:], has_bias, return_lse)
    if configuration not in kept:
        # With fullgraph torch raises where it would otherwise fall back to the quadratic eager form.
        kept[configuration] = torch.compile(flex.flex_attention, fullgraph=True)
    return kept[configuration]


def _kernel_options(block_mask: BlockMask) -> dict[str, Any]:
    # The decoding kernel for few queries has rules of its own about block sizes.
    options: dict[str, Any] = dict(FORCE_USE_FLEX_ATTENTION=True)
    if block_mask.q_block_size % 128 or block_mask.kv_block_size % 128:
        # FlexAttention's own tiles, of up to 128 x 128, have to divide the blocks.
        options["BLOCK_M"] = largest_divisor(block_mask.q_block_size, 128)
        options["BLOCK_N"] = largest_divisor(block_mask.kv_block_size, 64)
    if block_mask.seq_len_q % block_mask.q_block_size or block_mask.seq_len_kv % block_mask.kv_block_size:
        # By default it checks lengths only where they are no multiple of 128, whatever the block size is.
        options["IS_DIVISIBLE"] = False
    return options


def _add_bias(key_bias: Tensor) -> Any:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + key_bias[b, h, kv_idx]

    return score_mod
