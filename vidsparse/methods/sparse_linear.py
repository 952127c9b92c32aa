"""Sparse-Linear Attention (SLA, arXiv 2509.24006; TurboDiffusion, arXiv 2512.16093): pooled selection and a linear branch.

The linear branch enters through a projection per layer, `[head_dim, head_dim]`, that starts at zero: an untrained model
attends over its selected blocks alone. The projections live in the attention modules as `proj_l`, so they train, save and
load with the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vidsparse.errors import ConfigError
from vidsparse.methods.pooled import PooledConfig, PooledProcessor

if TYPE_CHECKING:
    from vidsparse.layout import TokenLayout
    from vidsparse.parts import Parts

FEATURE_MAPS = ("softmax", "elu", "relu")
COVERAGES = ("all", "non_selected")


def check_branch(feature_map: str, coverage: str) -> None:
    """Raises ConfigError for a linear branch that there is not."""
    for name, value, allowed in (("feature_map", feature_map, FEATURE_MAPS), ("coverage", coverage, COVERAGES)):
        if value not in allowed:
            raise ConfigError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")


@dataclass(frozen=True)
class SparseLinearConfig(PooledConfig):
    """Settings of the method "sla": those of "pooled", and

    Attributes:
        feature_map: of the linear branch: "softmax" (default), "elu" (elu + 1) or "relu".
        coverage: which keys the linear branch sees: "all" (default; the released SLA and TurboDiffusion checkpoints) or
            "non_selected" (the paper).
        skip: share of the key blocks of a row, those with the lowest scores, that the linear branch leaves out as well;
            default 0, the paper's 0.1; with `density` at most 1 - density.

    Raises:
        ConfigError: a value is out of range.
    """

    feature_map: str = "softmax"
    coverage: str = "all"
    skip: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_branch(self.feature_map, self.coverage)
        most = 1.0 if self.share is None else 1.0 - self.share
        if isinstance(self.skip, bool) or not isinstance(self.skip, int | float) or not 0 <= self.skip <= most:
            raise ConfigError(
                f"`skip` must be from 0 to {most:g}, what the density leaves of the blocks, got {self.skip!r}."
            )

    @property
    def share(self) -> float | None:
        """The density in force; TurboDiffusion runs 10 %, and 15 % for quality."""
        return 0.15 if self.density is None and self.top_p is None else self.density


class SparseLinearProcessor(PooledProcessor):
    """Attention processor for SLA (alias `SLAProcessor`).

    Args:
        options: fields of `SparseLinearConfig` and of `Schedule`, by keyword.

    Raises:
        ConfigError: an option is unknown or out of range.

    Example:
        >>> pipe.transformer.set_attn_processor(SparseLinearProcessor(density=0.15))
    """

    method = "sla"
    corrects = True
    config_class = SparseLinearConfig
    has_projection = True

    def parts(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        from vidsparse.corrections.linear_branch import LinearBranch, branch_cost
        from vidsparse.selection.blocks import PooledSelector

        parts, note = super().parts(layout, device)
        assert isinstance(parts.selector, PooledSelector)
        selector = replace(parts.selector, skip=self.config.skip)
        branch = LinearBranch(self.config.feature_map, self.config.coverage)
        overhead, factor = branch_cost(layout.seq_len, self.config.coverage)
        return replace(
            parts,
            selector=selector,
            correction=branch,
            overhead=parts.overhead + overhead,
            factor=parts.factor * factor,
        ), note


SLAProcessor = SparseLinearProcessor
