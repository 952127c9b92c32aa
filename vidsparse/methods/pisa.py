"""PISA (arXiv 2602.01077): pooled block selection, and every dropped block by its means (pooled tail)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vidsparse.errors import ConfigError
from vidsparse.methods.pooled import PooledConfig, PooledProcessor

if TYPE_CHECKING:
    from vidsparse.layout import TokenLayout
    from vidsparse.parts import Parts


@dataclass(frozen=True)
class PisaConfig(PooledConfig):
    """Settings of the method "pisa": those of "pooled", and

    Attributes:
        first_order: add the first-order term of the expansion (section 3.2), default True; False: means alone.

    Raises:
        ConfigError: a value is out of range.
    """

    first_order: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.first_order, bool):
            raise ConfigError(f"`first_order` must be True or False, got {self.first_order!r}.")

    @property
    def share(self) -> float | None:
        """The density in force; the authors' is 12.5 % for video, 15 % for images."""
        return 0.125 if self.density is None and self.top_p is None else self.density


class PisaProcessor(PooledProcessor):
    """Attention processor for PISA.

    Args:
        options: fields of `PisaConfig` and of `Schedule`, by keyword.

    Raises:
        ConfigError: an option is unknown or out of range.

    Example:
        >>> pipe.transformer.set_attn_processor(PisaProcessor(density=0.15))
    """

    method = "pisa"
    corrects = True
    config_class = PisaConfig

    def parts(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        from vidsparse.break_even import TAIL_FACTOR
        from vidsparse.corrections.pooled_tail import PooledTail

        parts, note = super().parts(layout, device)
        tail = PooledTail(self.config.first_order)
        return replace(parts, correction=tail, factor=parts.factor * TAIL_FACTOR), note
