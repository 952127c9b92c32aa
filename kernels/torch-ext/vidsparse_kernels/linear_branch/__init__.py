"""Linear attention beside block-sparse attention (SLA, arXiv:2509.24006)."""

from __future__ import annotations

from .api import add_linear_branch, linear_branch

__all__ = ["add_linear_branch", "linear_branch"]
