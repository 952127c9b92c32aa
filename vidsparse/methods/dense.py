"""Dense attention as a method, with the report of the sparse ones: the model's own attention, or our kernel if asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vidsparse.processors.base import SparseProcessor
from vidsparse.schedule import Schedule

if TYPE_CHECKING:
    from vidsparse.layout import LatentGrid, TokenLayout
    from vidsparse_kernels import BlockMask


@dataclass(frozen=True)
class DenseConfig:
    """Settings of the method "dense": none but the schedule.

    Attributes:
        schedule: kept so that a recipe can be switched to "dense" and back without losing it. All but `dense_backend` is
            without effect, and that is "stock" unless told otherwise: the baseline is what the model does by itself.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(dense_backend="stock"))


class DenseProcessor(SparseProcessor):
    """Runs the model's own attention in every layer and step and reports it.

    Args:
        options: fields of `Schedule`, accepted and without effect but for `dense_backend`.
    """

    method = "dense"
    config_class = DenseConfig
    always_dense = True

    def layout(self, grid: LatentGrid, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        from vidsparse.layout import TokenLayout

        return TokenLayout(grid, text_before, text_after)

    def build_mask(self, layout: TokenLayout, device: Any) -> tuple[BlockMask, str | None]:
        from vidsparse_kernels import BlockMask

        size = layout.block_size
        mask = BlockMask.full(layout.seq_len, layout.seq_len, q_block_size=size, kv_block_size=size, device=device)
        return mask, None
