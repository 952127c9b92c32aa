"""Norm of query and key and rotary position embedding, in one pass over each."""

from __future__ import annotations

from .api import qk_norm_rope, qk_norm_rope_pair

__all__ = ["qk_norm_rope", "qk_norm_rope_pair"]
