"""The linear branch: linear attention beside the sparse one, added through a trained projection (SLA, arXiv 2509.24006)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vidsparse.errors import ConfigError

if TYPE_CHECKING:
    from vidsparse.parts import Selection
    from vidsparse.processors.context import AttentionContext


@dataclass(frozen=True)
class LinearBranch:
    """out + projection(linear attention), the projection being the layer's own (`AttentionContext.projection`).

    Attributes:
        feature_map: "softmax", "elu" or "relu".
        coverage: "all" keys, or the "non_selected" ones.
        backend: of `vidsparse_kernels.add_linear_branch`.
    """

    feature_map: str
    coverage: str
    backend: str = "auto"
    needs_lse: bool = False

    def correct(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        selection: Selection,
        context: AttentionContext,
        scale: float,
        key_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        from vidsparse_kernels import add_linear_branch

        if context.projection is None:
            raise ConfigError("The linear branch needs a projection for each layer; bind the method to a model.")
        if key_bias is not None:
            # A key that nobody may see has no value and, being 0 in every sum, hardly any feature.
            seen = (key_bias > -torch.inf).transpose(1, 2)[..., None]
            key, value = key.masked_fill(~seen, 0), value.masked_fill(~seen, 0)
        mask = selection.block_mask if self.coverage == "non_selected" else None
        projection = context.projection
        return add_linear_branch(
            out, query, key, value, projection.weight, projection.bias, mask, feature_map=self.feature_map,
            coverage=self.coverage, skipped=selection.skipped, backend=self.backend,
        )  # fmt: skip


def branch_cost(seq_len: int, coverage: str) -> tuple[float, float]:
    """What the branch adds to a call, as a share of dense attention, and the factor on the sparse attention's own time."""
    from vidsparse.break_even import LINEAR_FACTOR, LINEAR_TOKENS

    return LINEAR_TOKENS / seq_len, LINEAR_FACTOR if coverage == "non_selected" else 1.0
