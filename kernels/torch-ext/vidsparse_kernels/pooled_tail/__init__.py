"""Pooled tail: the blocks that a mask leaves out, one virtual token each."""

from __future__ import annotations

from .api import (
    block_sparse_attention_with_tail,
    pool_for_tail,
    pooled_tail_attention,
    pooled_tail_merge_,
    select_backend_with_tail,
)
from .pools import Pools

__all__ = [
    "Pools",
    "block_sparse_attention_with_tail",
    "pool_for_tail",
    "pooled_tail_attention",
    "pooled_tail_merge_",
    "select_backend_with_tail",
]
