"""Pooled tail: the blocks that a mask leaves out, one virtual token each."""

from __future__ import annotations

from .api import pool_for_tail, pooled_tail_attention, pooled_tail_merge_
from .pools import Pools

__all__ = ["Pools", "pool_for_tail", "pooled_tail_attention", "pooled_tail_merge_"]
