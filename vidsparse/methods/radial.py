"""Radial Attention (arXiv 2506.19852): a static mask whose window halves as frames move apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from vidsparse.checks import check_share, is_whole
from vidsparse.errors import ConfigError
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.processors.base import SparseProcessor
from vidsparse.schedule import Schedule

if TYPE_CHECKING:
    from vidsparse.masks.radial import Variant
    from vidsparse_kernels import BlockMask

LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16
DEFAULT_VARIANT: Variant = "release"
SMALLEST_AUTO_BLOCK = 64
"""Below this a kernel's tiles run far below their speed, on a GPU and on a CPU."""


@dataclass(frozen=True)
class RadialConfig:
    """Settings of the method "radial". Defaults are those of the authors' Wan 2.1 scripts.

    Attributes:
        density: target density of the mask (computed blocks / all blocks), in (0, 1]; sets the decay factor by
            bisection for each grid, and the variant where none is given, and overrides `decay_factor`. Default None:
            use `decay_factor`. Where radial cannot go that low or hit it exactly, the nearest is taken and the report
            says so.
        decay_factor: factor on the window of every band from frame distance 2 on, no unit. Default 0.2 (Wan 2.1; the
            authors use 0.95 for HunyuanVideo, 0.8 for Wan 2.2 A14B; 1.0 is Eq. 4 of the paper).
        variant: "release": the block vote of the authors' code, the sparser and faster one. "paper": a block is computed
            if Eq. 4 keeps any token pair in it, which is closer to dense. Default None: "release", or with a `density`
            whichever comes nearer to it. See `vidsparse.masks.radial`.
        sink_frames: first latent frames that every query sees, default 1.
        block_size: tokens per block, a multiple of 16. Default None: 128, or 64 where a frame has fewer than four
            blocks of 128 (a block as large as a frame cannot tell near from far positions). With a `density` it goes
            on down to 16 for small frames, because large blocks would leave nothing to choose.
        schedule: dense steps and layers; default a quarter of the steps and the first layer.

    Raises:
        ConfigError: a value is out of range.
    """

    density: float | None = None
    decay_factor: float = 0.2
    variant: str | None = None
    sink_frames: int = 1
    block_size: int | None = None
    schedule: Schedule = field(default_factory=lambda: Schedule(dense_layers=1))

    def __post_init__(self) -> None:
        from vidsparse.masks.radial import check_radial

        if self.density is not None:
            check_share("density", self.density)
        check_radial(self.decay_factor, self.variant or DEFAULT_VARIANT, self.sink_frames)
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
            smallest = SMALLEST_AUTO_BLOCK if self.config.density is None else SMALLEST_BLOCK
            while size > smallest and grid.tokens_per_frame < 4 * size:
                size //= 2
        return TokenLayout(grid, text_before, text_after, block_size=size)

    def build_mask(self, layout: TokenLayout, device: Any) -> tuple[BlockMask, str | None]:
        from vidsparse.masks.radial import Variant, radial_block_mask, solve_decay_factor

        config, note = self.config, None
        factor, variant = config.decay_factor, config.variant or DEFAULT_VARIANT
        if config.density is not None:
            solved = [
                (*solve_decay_factor(layout, config.density, variant=v, sink_frames=config.sink_frames), v)
                for v in ([config.variant] if config.variant else get_args(Variant))
            ]
            factor, reached, variant = min(solved, key=lambda found: abs(found[1] - config.density))
            if abs(reached - config.density) > 0.01:
                note = f"density {config.density:g} asked for, {reached:.3f} is the nearest on grid {layout.grid}"
        mask = radial_block_mask(
            layout, decay_factor=factor, variant=variant, sink_frames=config.sink_frames, device=device
        )
        return mask, note
