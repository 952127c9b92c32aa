"""Random blocks: the baseline that any selection has to beat. The same blocks in every step, others in each layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vidsparse.checks import check_share, is_whole
from vidsparse.errors import ConfigError
from vidsparse.methods.pooled import PooledProcessor
from vidsparse.schedule import Schedule

if TYPE_CHECKING:
    from vidsparse.layout import TokenLayout
    from vidsparse.parts import Parts


@dataclass(frozen=True)
class RandomConfig:
    """Settings of the method "random".

    Attributes:
        density: share of the key blocks of a row, its own position included, in (0, 1]; default 0.25.
        seed: of the choice, a whole number of at least 0.
        schedule: dense steps and layers; default a quarter of the steps and the first layer.

    Raises:
        ConfigError: a value is out of range.
    """

    density: float = 0.25
    seed: int = 0
    schedule: Schedule = field(default_factory=lambda: Schedule(dense_layers=1))

    def __post_init__(self) -> None:
        check_share("density", self.density)
        if not is_whole(self.seed) or self.seed < 0:
            raise ConfigError(f"`seed` must be a whole number of at least 0, got {self.seed!r}.")


class RandomProcessor(PooledProcessor):
    """Attention processor for random blocks.

    Args:
        options: fields of `RandomConfig` and of `Schedule`, by keyword.
    """

    method = "random"
    config_class = RandomConfig

    def parts(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        from vidsparse.parts import Parts
        from vidsparse.selection.blocks import PooledSelector

        selector = PooledSelector(layout, device, self.config.density, None, 0, self.config.seed)
        return Parts(selector=selector, density=self.config.density), None
