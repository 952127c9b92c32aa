"""Radial Attention (arXiv 2506.19852): a static mask whose window halves as frames move apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vidsparse.checks import is_whole
from vidsparse.errors import ConfigError
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.processors.base import SparseProcessor
from vidsparse.schedule import Schedule

if TYPE_CHECKING:
    from vidsparse_kernels import BlockMask

LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16


@dataclass(frozen=True)
class RadialConfig:
    """Settings of the method "radial". Defaults are those of the authors' Wan 2.1 scripts, except the variant.

    Attributes:
        density: target density of the mask (computed blocks / all blocks), in (0, 1]; sets the decay factor by
            bisection for each grid and overrides `decay_factor`. Default None: use `decay_factor`. Where radial cannot
            go that low or hit it exactly, the nearest is taken and the report says so.
        decay_factor: factor on the window of every band from frame distance 2 on, no unit. Default 0.2 (Wan 2.1; the
            authors use 0.95 for HunyuanVideo, 0.8 for Wan 2.2 A14B; 1.0 is Eq. 4 of the paper).
        variant: "paper" (default): a block is computed if Eq. 4 keeps any token pair in it. "release": the block
            vote of the authors' code. See `vidsparse.masks.radial`.
        sink_frames: first latent frames that every query sees, default 1.
        block_size: tokens per block, a multiple of 16. Default None: 128, halved while a frame has fewer than four
            blocks, not below 16 (a block as large as a frame cannot tell near from far positions).
        schedule: dense steps and layers; default a quarter of the steps and the first layer.

    Raises:
        ConfigError: a value is out of range.
    """

    density: float | None = None
    decay_factor: float = 0.2
    variant: str = "paper"
    sink_frames: int = 1
    block_size: int | None = None
    schedule: Schedule = field(default_factory=lambda: Schedule(dense_layers=1))

    def __post_init__(self) -> None:
        from vidsparse.masks.radial import check_density, check_radial

        if self.density is not None:
            check_density(self.density)
        check_radial(self.decay_factor, self.variant, self.sink_frames)
        size = self.block_size
        if size is not None and (not is_whole(size) or size < SMALLEST_BLOCK or size % SMALLEST_BLOCK):
            raise ConfigError(
                f"`block_size` must be a multiple of {SMALLEST_BLOCK} tokens and at least {SMALLEST_BLOCK}, "
                f"got {size!r}."
            )


class RadialProcessor(SparseProcessor):
    """Attention processor for Radial Attention; `pipe.transformer.set_attn_processor(RadialProcessor())` is enough.

    Args:
        options: fields of `RadialConfig` and of `Schedule`, by keyword.

    Raises:
        ConfigError: an option is unknown or out of range.

    Example:
        >>> pipe.transformer.set_attn_processor(RadialProcessor(density=0.3))
    """

    method = "radial"
    config_class = RadialConfig

    def layout(self, grid: LatentGrid, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        size = self.config.block_size
        if size is None:
            size = LARGEST_BLOCK
            while size > SMALLEST_BLOCK and grid.tokens_per_frame < 4 * size:
                size //= 2
        return TokenLayout(grid, text_before, text_after, block_size=size)

    def build_mask(self, layout: TokenLayout, device: Any) -> tuple[BlockMask, str | None]:
        from vidsparse.masks.radial import radial_block_mask, solve_decay_factor

        config, note = self.config, None
        factor = config.decay_factor
        if config.density is not None:
            factor, reached = solve_decay_factor(
                layout, config.density, variant=config.variant, sink_frames=config.sink_frames
            )
            if abs(reached - config.density) > 0.01:
                note = f"density {config.density:g} asked for, {reached:.3f} is the nearest on grid {layout.grid}"
        mask = radial_block_mask(
            layout, decay_factor=factor, variant=config.variant, sink_frames=config.sink_frames, device=device
        )
        return mask, note
