"""Pooled block selection: for each query block the key blocks with the largest mean q times mean k.

The plainest selection that looks at the content, under many names: the router of Sparse-Linear Attention (arXiv
2509.24006, section 3.1) and of PISA (arXiv 2602.01077). It knows no frames, so it serves images as well as videos.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vidsparse.checks import check_share, is_whole
from vidsparse.errors import ConfigError
from vidsparse.processors.base import SparseProcessor
from vidsparse.schedule import Schedule

if TYPE_CHECKING:
    from vidsparse.layout import LatentGrid, TokenLayout
    from vidsparse.parts import Parts


@dataclass(frozen=True)
class PooledConfig:
    """Settings of the method "pooled".

    Attributes:
        density: share of the key blocks of a row, in (0, 1]; default 0.25, or None with `top_p`.
        top_p: in (0, 1]: in place of a density, the fewest blocks whose softmax mass of pooled scores reaches it.
        sink_frames: first latent frames that every query sees, default 0.
        spread: choose blocks by weight and spread of their logits, not by their means alone; default False.
        kv_block_size: tokens of a key block, 64 or 128; default None: 64, less below 4,096 tokens. In blocks of 128 the
            Hopper kernel runs faster and a tail of means has half the work.
        schedule: dense steps and layers; default a quarter of the steps and the first layer.

    Raises:
        ConfigError: a value is out of range, or both or none of `density` and `top_p` are given.
    """

    density: float | None = None
    top_p: float | None = None
    sink_frames: int = 0
    spread: bool = False
    kv_block_size: int | None = None
    schedule: Schedule = field(default_factory=lambda: Schedule(dense_layers=1))

    def __post_init__(self) -> None:
        if self.density is not None and self.top_p is not None:
            raise ConfigError(f"Give `density` or `top_p`, not both; got {self.density!r} and {self.top_p!r}.")
        for name in ("density", "top_p"):
            if getattr(self, name) is not None:
                check_share(name, getattr(self, name))
        if not is_whole(self.sink_frames) or self.sink_frames < 0:
            raise ConfigError(f"`sink_frames` must be a whole number of at least 0, got {self.sink_frames!r}.")
        if not isinstance(self.spread, bool):
            raise ConfigError(f"`spread` must be True or False, got {self.spread!r}.")
        if self.kv_block_size is not None and (
            not is_whole(self.kv_block_size) or self.kv_block_size not in (64, 128)
        ):
            raise ConfigError(f"`kv_block_size` must be 64, 128 or None, got {self.kv_block_size!r}.")

    @property
    def share(self) -> float | None:
        """The density in force."""
        return DEFAULT_DENSITY if self.density is None and self.top_p is None else self.density


DEFAULT_DENSITY = 0.25


class PooledProcessor(SparseProcessor):
    """Attention processor for pooled block selection, for videos and images.

    Args:
        options: fields of `PooledConfig` and of `Schedule`, by keyword.

    Raises:
        ConfigError: an option is unknown or out of range.

    Example:
        >>> pipe.transformer.set_attn_processor(PooledProcessor(density=0.2))
    """

    method = "pooled"
    config_class = PooledConfig

    def layout(self, grid: LatentGrid, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        from vidsparse.layout import TokenLayout
        from vidsparse.selection.blocks import block_sizes

        # svg1 and random have this layout, but not that setting.
        kv_block_size = getattr(self.config, "kv_block_size", None)
        q_block_size, _ = block_sizes(grid.num_tokens + text_before + text_after, kv_block_size)
        return TokenLayout(grid, text_before, text_after, block_size=q_block_size)

    def parts(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        from vidsparse.break_even import POOL_OVERHEAD
        from vidsparse.parts import Parts
        from vidsparse.selection.blocks import PooledSelector

        config = self.config
        selector = PooledSelector(
            layout, device, config.share, config.top_p, config.sink_frames, spread=config.spread,
            kv_block_size=config.kv_block_size,
        )  # fmt: skip
        return Parts(selector=selector, density=config.share, overhead=POOL_OVERHEAD), None
