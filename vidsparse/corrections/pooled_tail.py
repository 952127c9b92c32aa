"""The pooled tail: what a selection drops enters by its means (PISA, arXiv 2602.01077, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vidsparse.parts import Selection
    from vidsparse.processors.context import AttentionContext
    from vidsparse_kernels import BlockMask
    from vidsparse_kernels.pooled_tail import Pools


@dataclass(frozen=True)
class PooledTail:
    """Every dropped block counts as its mean key, as often as it has tokens, with its mean value; exact merge by LSE.

    Attributes:
        first_order: add the first-order term of the expansion, one for all blocks of a head.
    """

    first_order: bool = True
    needs_lse: bool = True

    def pool(self, key: torch.Tensor, value: torch.Tensor, block_mask: BlockMask) -> Pools:
        from vidsparse_kernels import pool_for_tail

        with torch.no_grad():
            return pool_for_tail(key, value, block_mask, first_order=self.first_order)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        selection: Selection,
        context: AttentionContext,
        scale: float,
        key_bias: torch.Tensor | None,
    ) -> torch.Tensor | None:
        from vidsparse_kernels import block_sparse_attention_with_tail, select_backend_with_tail

        if key_bias is not None:
            return None
        name, reason = select_backend_with_tail(query, key, value, selection.block_mask)
        if name == "separate":
            return None
        selection.backend = name, reason
        return block_sparse_attention_with_tail(
            query, key, value, selection.block_mask, scale=scale, first_order=self.first_order,
            pools=selection.take_pools(), backend=name,
        )  # fmt: skip

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
        # Padding of a prompt stands in text blocks, which every row lists: the tail never sees it.
        from vidsparse_kernels import merge_attention_states, pooled_tail_attention, pooled_tail_merge_

        assert lse is not None
        options = {"scale": scale, "first_order": self.first_order}
        pools = selection.take_pools()
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            tail = pooled_tail_attention(query, key, value, selection.block_mask, **options)
            return merge_attention_states(out, lse, *tail)[0]
        return pooled_tail_merge_(out, lse, query, key, value, selection.block_mask, pools=pools, **options)[0]
