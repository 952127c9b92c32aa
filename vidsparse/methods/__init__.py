"""Published methods, one file each, and the one list of their names."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from vidsparse.errors import ConfigError
from vidsparse.methods.dense import DenseConfig, DenseProcessor
from vidsparse.methods.pisa import PisaConfig, PisaProcessor
from vidsparse.methods.pooled import PooledConfig, PooledProcessor
from vidsparse.methods.radial import RadialConfig, RadialProcessor
from vidsparse.methods.radial_linear import RadialLinearConfig, RadialLinearProcessor
from vidsparse.methods.random import RandomConfig, RandomProcessor
from vidsparse.methods.semantic import SemanticConfig, SemanticProcessor
from vidsparse.methods.sparse_linear import SparseLinearConfig, SparseLinearProcessor
from vidsparse.methods.svg1 import SVG1Config, SVG1Processor
from vidsparse.methods.tuned import TunedConfig, TunedProcessor
from vidsparse.methods.vidsparse import VidsparseConfig, VidsparseProcessor
from vidsparse.schedule import Schedule

if TYPE_CHECKING:
    from vidsparse.processors.base import SparseProcessor

PROCESSORS: dict[str, type[SparseProcessor]] = {
    "radial": RadialProcessor,
    "vidsparse": VidsparseProcessor,
    "semantic": SemanticProcessor,
    "svg1": SVG1Processor,
    "pisa": PisaProcessor,
    "sla": SparseLinearProcessor,
    "radial-linear": RadialLinearProcessor,
    "pooled": PooledProcessor,
    "random": RandomProcessor,
    "dense": DenseProcessor,
    "tuned": TunedProcessor,
}


def processor_class(method: str) -> type[SparseProcessor]:
    """The processor of a method.

    Raises:
        ConfigError: no method has this name.
    """
    if not isinstance(method, str) or method not in PROCESSORS:
        raise ConfigError(f"`method` must be one of {', '.join(PROCESSORS)}, got {method!r}.")
    return PROCESSORS[method]


def method_options(method: str) -> dict[str, object]:
    """Names and defaults of the options that a method takes, its own first, then those of its schedule.

    Raises:
        ConfigError: no method has this name.
    """
    config = processor_class(method).config_class()
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "schedule"}
    return own | {f.name: getattr(config.schedule, f.name) for f in dataclasses.fields(Schedule)}


__all__ = [
    "PROCESSORS",
    "DenseConfig",
    "DenseProcessor",
    "PisaConfig",
    "PisaProcessor",
    "PooledConfig",
    "PooledProcessor",
    "RadialConfig",
    "RadialLinearConfig",
    "RadialLinearProcessor",
    "RadialProcessor",
    "RandomConfig",
    "RandomProcessor",
    "SVG1Config",
    "SVG1Processor",
    "SemanticConfig",
    "SemanticProcessor",
    "SparseLinearConfig",
    "SparseLinearProcessor",
    "TunedConfig",
    "TunedProcessor",
    "VidsparseConfig",
    "VidsparseProcessor",
    "method_options",
    "processor_class",
]
