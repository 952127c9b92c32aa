"""Token reordering per head: gather into an order and back, text tokens kept in place."""

from __future__ import annotations

from .api import permute_tokens, unpermute_tokens

__all__ = ["permute_tokens", "unpermute_tokens"]
