"""The project's own recipe: tokens sorted by content, uniform blocks chosen by their means, the rest by a pooled tail.

Clusters (Sparse VideoGen 2) gather tokens that are alike; cut into blocks of one size they run on the fastest kernel and
their means say more about them, which helps the choice and the tail (PISA) alike; a selection may serve several steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vidsparse.errors import ConfigError
from vidsparse.methods.semantic import SemanticConfig, SemanticProcessor
from vidsparse.schedule import Schedule

if TYPE_CHECKING:
    from vidsparse.layout import TokenLayout
    from vidsparse.parts import Parts


@dataclass(frozen=True)
class VidsparseConfig(SemanticConfig):
    """Settings of the method "vidsparse": those of "semantic", and

    Attributes:
        blocks: default "uniform".
        tail: put the dropped blocks back by their means, default True.
        first_order: add the tail's first-order term, default True.
        schedule: dense steps and layers; default a quarter of the steps and the first layer; a selection serves one
            step.

    Raises:
        ConfigError: a value is out of range.
    """

    blocks: str = "uniform"
    tail: bool = True
    first_order: bool = True
    schedule: Schedule = field(default_factory=lambda: Schedule(dense_layers=1))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tail", "first_order"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")


class VidsparseProcessor(SemanticProcessor):
    """Attention processor for the project's own recipe.

    Args:
        options: fields of `VidsparseConfig` and of `Schedule`, by keyword.

    Raises:
        ConfigError: an option is unknown or out of range.

    Example:
        >>> pipe.transformer.set_attn_processor(VidsparseProcessor(density=0.15))
    """

    method = "vidsparse"
    config_class = VidsparseConfig

    def parts(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        from vidsparse.corrections.pooled_tail import PooledTail

        parts, note = super().parts(layout, device)
        if self.config.tail:
            parts = replace(parts, correction=PooledTail(self.config.first_order))
        return parts, note
