"""A linear branch on a radial mask: what the mask drops comes back through SLA's trained projections.

Radial Attention (arXiv 2506.19852) chooses without looking at query and key, SLA's branch (arXiv 2509.24006) needs training;
together they are a student for `vidsparse train` whose selection costs nothing. Like "sla", an untrained one is its mask alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vidsparse.methods.radial import RadialConfig, RadialProcessor
from vidsparse.methods.sparse_linear import check_branch

if TYPE_CHECKING:
    from vidsparse.layout import TokenLayout
    from vidsparse.parts import Parts


@dataclass(frozen=True)
class RadialLinearConfig(RadialConfig):
    """Settings of the method "radial-linear": those of "radial", and

    Attributes:
        feature_map: of the linear branch: "softmax" (default), "elu" (elu + 1) or "relu".
        coverage: which keys the linear branch sees: "all" (default) or "non_selected".

    Raises:
        ConfigError: a value is out of range.
    """

    feature_map: str = "softmax"
    coverage: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_branch(self.feature_map, self.coverage)


class RadialLinearProcessor(RadialProcessor):
    """Attention processor for a linear branch on a radial mask.

    Args:
        options: fields of `RadialLinearConfig` and of `Schedule`, by keyword.

    Raises:
        ConfigError: an option is unknown or out of range.

    Example:
        >>> pipe.transformer.set_attn_processor(RadialLinearProcessor(density=0.3))
    """

    method = "radial-linear"
    corrects = True
    config_class = RadialLinearConfig
    has_projection = True

    def parts(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        from vidsparse.corrections.linear_branch import LinearBranch, branch_cost

        parts, note = super().parts(layout, device)
        overhead, factor = branch_cost(layout.seq_len, self.config.coverage)
        branch = LinearBranch(self.config.feature_map, self.config.coverage)
        return replace(
            parts, correction=branch, overhead=parts.overhead + overhead, factor=parts.factor * factor
        ), note
