"""From query and key to block lists: pool blocks, score them, select some."""

from __future__ import annotations

from .api import pool_blocks, score_blocks, select_block_lists, select_blocks, select_from_qk

__all__ = ["pool_blocks", "score_blocks", "select_block_lists", "select_blocks", "select_from_qk"]
