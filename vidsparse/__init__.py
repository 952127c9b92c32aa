"""vidsparse: sparse attention for video and image diffusion transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vidsparse.attention import make_context, sparse_attention
    from vidsparse.layout import LatentGrid, TokenLayout
    from vidsparse.methods.dense import DenseProcessor
    from vidsparse.methods.pooled import PooledProcessor
    from vidsparse.methods.radial import RadialConfig, RadialProcessor
    from vidsparse.processors.apply import Handle, apply
    from vidsparse.recipe import Recipe
    from vidsparse.report import Report
    from vidsparse.schedule import Schedule

_HOMES = {
    "DenseProcessor": "vidsparse.methods.dense",
    "Handle": "vidsparse.processors.apply",
    "LatentGrid": "vidsparse.layout",
    "PooledProcessor": "vidsparse.methods.pooled",
    "RadialConfig": "vidsparse.methods.radial",
    "RadialProcessor": "vidsparse.methods.radial",
    "Recipe": "vidsparse.recipe",
    "Report": "vidsparse.report",
    "Schedule": "vidsparse.schedule",
    "TokenLayout": "vidsparse.layout",
    "apply": "vidsparse.processors.apply",
    "make_context": "vidsparse.attention",
    "sparse_attention": "vidsparse.attention",
}

__all__ = [
    "DenseProcessor",
    "Handle",
    "LatentGrid",
    "PooledProcessor",
    "RadialConfig",
    "RadialProcessor",
    "Recipe",
    "Report",
    "Schedule",
    "TokenLayout",
    "__version__",
    "apply",
    "make_context",
    "sparse_attention",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import vidsparse` needs neither torch nor diffusers.
    if name not in _HOMES:
        raise AttributeError(f"module 'vidsparse' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
