"""Triton kernels of vidsparse, each beside its plain torch reference."""

from __future__ import annotations

from .block_mask import BlockMask
from .block_selection import pool_blocks, score_blocks, select_block_lists, select_blocks, select_from_qk
from .block_sparse_attention import (
    available_backends,
    block_sparse_attention,
    merge_attention_states,
    select_backend,
)
from .block_sparse_attention.convert import from_flex_block_mask, to_flash4_block_sparse, to_flex_block_mask
from .errors import UnsupportedBackendError

__all__ = [
    "BlockMask",
    "UnsupportedBackendError",
    "available_backends",
    "block_sparse_attention",
    "from_flex_block_mask",
    "merge_attention_states",
    "pool_blocks",
    "score_blocks",
    "select_backend",
    "select_block_lists",
    "select_blocks",
    "select_from_qk",
    "to_flash4_block_sparse",
    "to_flex_block_mask",
]
