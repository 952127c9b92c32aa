"""How far an attention output is from exact attention, on sampled query rows."""

from __future__ import annotations

from .api import sampled_error

__all__ = ["sampled_error"]
