"""Sparse VideoGen (arXiv 2502.01776): each head attends either near in space or at its place through all frames.

Which of the two a head is, is asked in every step, from query rows sampled over the whole sequence. Both masks are block
lists over the tokens as they stand, so nothing is moved in memory, and what is judged is what runs.
"""

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
class SVG1Config:
    """Settings of the method "svg1".

    Attributes:
        density: of either mask, in (0, 1]; default 0.3 (the authors' Wan 2.1 at 720p; they use 0.25 for HunyuanVideo).
            Where a band cannot go that low its narrowest form is taken.
        rows: query rows sampled to judge a head, at least 1; default 64.
        sink_frames: first latent frames that every query sees, default 1.
        kind: "spatial" or "temporal" for every head; default None: asked for each head in every step.
        schedule: dense steps and layers; default a quarter of the steps and the first layer.

    Raises:
        ConfigError: a value is out of range.
    """

    density: float = 0.3
    rows: int = 64
    sink_frames: int = 1
    kind: str | None = None
    schedule: Schedule = field(default_factory=lambda: Schedule(dense_layers=1))

    def __post_init__(self) -> None:
        check_share("density", self.density)
        for name, least in (("rows", 1), ("sink_frames", 0)):
            value = getattr(self, name)
            if not is_whole(value) or value < least:
                raise ConfigError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
        if self.kind is None:
            return
        from vidsparse.masks.bands import KINDS

        if self.kind not in KINDS:
            raise ConfigError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}.")


class SVG1Processor(PooledProcessor):
    """Attention processor for Sparse VideoGen.

    Args:
        options: fields of `SVG1Config` and of `Schedule`, by keyword.

    Raises:
        ConfigError: an option is unknown or out of range.
    """

    method = "svg1"
    config_class = SVG1Config

    def parts(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        from vidsparse.break_even import BAND_TOKENS
        from vidsparse.masks.bands import KINDS
        from vidsparse.parts import Parts
        from vidsparse.selection.bands import BandSelector

        config = self.config
        selector = BandSelector(layout, device, config.density, config.rows, config.sink_frames)
        reached = [mask.density for mask in selector.masks]
        note = None
        if max(reached) - config.density > 0.05:
            note = (
                f"density {config.density:g} asked for, {reached[0]:.2f} and {reached[1]:.2f} are the bands' nearest"
            )
        if config.kind is not None:
            return Parts(selector.masks[KINDS.index(config.kind)]), note
        return Parts(selector=selector, density=sum(reached) / 2, overhead=BAND_TOKENS / layout.seq_len), note
