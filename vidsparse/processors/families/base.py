"""Family: how a model's forward and modules are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vidsparse.layout import LatentGrid


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: for messages and documents.
        model_classes: names of the diffusers transformer classes; names, so that nothing is imported for them.
        is_target: (module path, attention module) -> whether it is video self-attention.
        grid: (arguments of forward by name, model config) -> latent grid.
        hidden_states: name of the forward's latent argument.
        timestep: name of the forward's timestep argument.
    """

    name: str
    model_classes: tuple[str, ...]
    is_target: Callable[[str, Any], bool]
    grid: Callable[[Mapping[str, Any], Any], LatentGrid]
    hidden_states: str = "hidden_states"
    timestep: str = "timestep"
