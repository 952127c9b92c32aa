"""vidsparse: sparse attention for video and image diffusion transformers."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vidsparse.attention import make_context, sparse_attention
    from vidsparse.layout import LatentGrid, TokenLayout
    from vidsparse.methods.dense import DenseProcessor
    from vidsparse.methods.pisa import PisaProcessor
    from vidsparse.methods.pooled import PooledProcessor
    from vidsparse.methods.radial import RadialConfig, RadialProcessor
    from vidsparse.methods.radial_linear import RadialLinearProcessor
    from vidsparse.methods.semantic import SemanticProcessor, SVG2Processor
    from vidsparse.methods.sparse_linear import SLAProcessor, SparseLinearProcessor
    from vidsparse.methods.svg1 import SVG1Processor
    from vidsparse.methods.vidsparse import VidsparseProcessor
    from vidsparse.processors.apply import Handle, apply
    from vidsparse.recipe import Recipe
    from vidsparse.report import Report
    from vidsparse.schedule import Schedule

_HOMES = {
    "DenseProcessor": "vidsparse.methods.dense",
    "Handle": "vidsparse.processors.apply",
    "LatentGrid": "vidsparse.layout",
    "PisaProcessor": "vidsparse.methods.pisa",
    "PooledProcessor": "vidsparse.methods.pooled",
    "RadialConfig": "vidsparse.methods.radial",
    "RadialLinearProcessor": "vidsparse.methods.radial_linear",
    "RadialProcessor": "vidsparse.methods.radial",
    "Recipe": "vidsparse.recipe",
    "Report": "vidsparse.report",
    "SLAProcessor": "vidsparse.methods.sparse_linear",
    "SVG1Processor": "vidsparse.methods.svg1",
    "SVG2Processor": "vidsparse.methods.semantic",
    "Schedule": "vidsparse.schedule",
    "SemanticProcessor": "vidsparse.methods.semantic",
    "SparseLinearProcessor": "vidsparse.methods.sparse_linear",
    "TokenLayout": "vidsparse.layout",
    "VidsparseProcessor": "vidsparse.methods.vidsparse",
    "apply": "vidsparse.processors.apply",
    "make_context": "vidsparse.attention",
    "sparse_attention": "vidsparse.attention",
}

__all__ = [
    "DenseProcessor",
    "Handle",
    "LatentGrid",
    "PisaProcessor",
    "PooledProcessor",
    "RadialConfig",
    "RadialLinearProcessor",
    "RadialProcessor",
    "Recipe",
    "Report",
    "SLAProcessor",
    "SVG1Processor",
    "SVG2Processor",
    "Schedule",
    "SemanticProcessor",
    "SparseLinearProcessor",
    "TokenLayout",
    "VidsparseProcessor",
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
    if name.endswith("Processor") and find_spec("diffusers") is not None:
        # Before `model.set_attn_processor` is looked up, which transformers such as Mochi's do not have by themselves.
        import_module("vidsparse.processors.binding").install()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
