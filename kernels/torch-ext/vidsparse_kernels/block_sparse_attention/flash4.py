"""FlashAttention-4 (package flash-attn-4) as a backend, where it is installed."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from .convert import to_flash4_block_sparse

MAX_HEAD_DIM = 128


def flash4_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    key_bias: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run FlashAttention-4 over the lists; inference only.

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]` bf16 or fp16.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`.
        block_mask: lists for which `unsupported` has no objection; the converted mask is kept on it.
        scale: factor on query . key.
        key_bias: must be None.
        return_lse: whether to return the LSE.

    Returns:
        Output like `query` and the fp32 natural-log LSE `[batch, num_heads, seq_len_q]`, or None.

    Raises:
        ValueError: `key_bias` is given.
    """
    if key_bias is not None:
        raise ValueError('`key_bias` must be None: backend "flash4" does not take it.')
    from flash_attn.cute.interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    if "flash4" not in block_mask._cache:
        block_mask._cache["flash4"] = to_flash4_block_sparse(block_mask)
    result: Any = flash_attn_func(
        query, key, value, softmax_scale=scale, block_sparse_tensors=block_mask._cache["flash4"], return_lse=return_lse
    )
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    return out, lse if return_lse else None


def unsupported(query: Tensor, block_mask: BlockMask) -> str | None:
    """Why FlashAttention-4 cannot do this case, as the end of a sentence that starts with its name; None if it can.

    Its tiles have to match the blocks: 128 x 128 on Hopper up to head_dim 128; on data-centre Blackwell two tiles of
    128 queries and any multiple of 128 keys (flash_attn/cute/interface.py: `_tile_size_fwd_sm90`, `_get_fwd_config`).
    """
    for name in ("q_offsets", "kv_offsets"):
        if getattr(block_mask, name, None) is not None:
            return f"does not take blocks of variable size ({name})"
    if not installed():
        return "needs the package flash-attn-4"
    if query.device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    return _unsupported_shape(torch.cuda.get_device_capability(query.device)[0], query, block_mask)


def _unsupported_shape(major: int, query: Tensor, block_mask: BlockMask) -> str | None:
    """The part of `unsupported` that follows from compute capability `major`.x."""
    if major not in (9, 10, 11):
        return f"is block-sparse on compute capability 9 to 11, got {major}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 and fp16, not {query.dtype}"
    head_dim = query.shape[3]
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return f"needs a head_dim that is a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}"
    q_block_size, kv_block_size = block_mask.q_block_size, block_mask.kv_block_size
    if major == 9:
        # Between 65 and 96 it takes tiles of 192 x 144 where the q-blocks allow them.
        if q_block_size % 128 or (64 < head_dim <= 96 and q_block_size % 192 == 0) or kv_block_size != 128:
            return f"needs blocks of 128 x 128 here, got {q_block_size} x {kv_block_size}"
    elif q_block_size % 256 or kv_block_size % 128:
        return f"needs blocks of 256 x 128 or multiples here, got {q_block_size} x {kv_block_size}"
    return None


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether the package is there; looked up once, because the search goes through the file system."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:
        # find_spec imports the parent package, which an older flash-attn may refuse.
        return False
