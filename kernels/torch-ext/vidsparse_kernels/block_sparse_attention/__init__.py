"""Attention over the kv-blocks that a BlockMask lists."""

from __future__ import annotations

from .api import available_backends, block_sparse_attention, select_backend
from .merge import merge_attention_states

__all__ = ["available_backends", "block_sparse_attention", "merge_attention_states", "select_backend"]
