"""Corrections that keep, from one step to the next, what attention to the dropped blocks gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vidsparse_kernels import block_sparse_attention, merge_attention_states

if TYPE_CHECKING:
    from vidsparse.parts import Selection
    from vidsparse.processors.context import AttentionContext


@dataclass(frozen=True)
class KeptState:
    """Attention over the dropped blocks, computed when blocks are selected and kept until they are selected anew.

    The step of a selection is therefore exact and costs a dense step; the others cost the sparse one. Where nothing can
    be kept (training, no room, `refresh_every` 1) nothing is corrected.

    Attributes:
        residual: False: the dropped part's output and LSE are kept and merged with the fresh part (FlashBlock, arXiv
            2602.05305). True: its share of the mass stays as it was too (Re-ttention, arXiv 2505.22918): the fresh part
            is scaled by exp(lse_selected - lse_all) and the kept rest added.
    """

    residual: bool = False
    needs_lse: bool = True

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
        assert lse is not None
        selection.exact = False
        memory = context.memory
        if memory is None or context.refresh_every == 1 or memory.get("selection") is not selection:
            return out
        kept = memory.get("state")
        if kept is not None and kept[0] is selection:
            _, first, second = kept
            if self.residual:
                return out * second + first
            return merge_attention_states(out, lse, first, second)[0]
        if not memory.has_room(out.numel() * out.element_size() + lse.numel() * lse.element_size()):
            memory.budget.refused += 1
            return out
        rest, rest_lse = block_sparse_attention(
            query, key, value, selection.block_mask.complement(), scale=scale, key_bias=key_bias, return_lse=True
        )
        selection.exact = True
        exact, exact_lse = merge_attention_states(out, lse, rest, rest_lse)
        if self.residual:
            share = torch.exp(lse - exact_lse).nan_to_num(0.0).transpose(1, 2)[..., None].to(out.dtype)
            first, second = exact - out * share, share
        else:
            first, second = rest, rest_lse
        memory.keep("state", (selection, first, second), [first, second])
        return exact
