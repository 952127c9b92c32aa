"""Triton kernels of vidsparse, each beside its plain torch reference."""

from __future__ import annotations

from .block_mask import BlockMask
from .block_sparse_attention import (
    available_backends,
    block_sparse_attention,
    merge_attention_states,
    select_backend,
)
from .errors import UnsupportedBackendError

__all__ = [
    "BlockMask",
    "UnsupportedBackendError",
    "available_backends",
    "block_sparse_attention",
    "merge_attention_states",
    "select_backend",
]
