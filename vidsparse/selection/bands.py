"""For each head one of two static masks: the one that keeps more of the mass of sampled rows (Sparse VideoGen)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from vidsparse.layout import TokenLayout
from vidsparse.masks.bands import KINDS, band_dense_blocks, solve_band_width
from vidsparse.parts import Selection
from vidsparse.selection.blocks import block_sizes

if TYPE_CHECKING:
    from vidsparse.processors.context import AttentionContext
    from vidsparse_kernels import BlockMask

HEADS_AT_ONCE = 8
"""All at once the logits of 40 heads over 75,600 keys take gigabytes; one by one a call waits for the host."""


@dataclass(frozen=True)
class BandSelector:
    """Spatial or temporal band per head, by the mass kept of rows sampled over the whole sequence.

    Attributes:
        layout: the tokens.
        device: of the calls.
        density: of both masks.
        rows: sampled query rows.
        sink_frames: first latent frames that every query sees.
    """

    layout: TokenLayout
    device: torch.device | str
    density: float
    rows: int
    sink_frames: int

    @cached_property
    def masks(self) -> list[BlockMask]:
        from vidsparse_kernels import BlockMask

        q_size, kv_size = self._block_sizes()
        sizes = {"q_block_size": q_size, "kv_block_size": kv_size, "sink_frames": self.sink_frames}
        masks = []
        for kind in KINDS:
            width = solve_band_width(self.layout, kind, self.density, **sizes)
            dense = torch.from_numpy(band_dense_blocks(self.layout, kind, width, **sizes))
            seq_len = self.layout.seq_len
            with torch.inference_mode(False):
                mask = BlockMask.from_dense(
                    dense[None, None],
                    seq_len_q=seq_len,
                    seq_len_kv=seq_len,
                    q_block_size=q_size,
                    kv_block_size=kv_size,
                )
            masks.append(mask.to(self.device))
        return masks

    def _block_sizes(self) -> tuple[int, int]:
        """Small enough to tell places in a frame apart."""
        q_size, kv_size = block_sizes(self.layout.seq_len)
        while q_size > 16 and self.layout.grid.tokens_per_frame < 8 * q_size:
            q_size, kv_size = q_size // 2, max(16, kv_size // 2)
        return q_size, kv_size

    def select(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> Selection:
        from vidsparse_kernels import BlockMask

        spatial, temporal = self.masks
        better = self._temporal_is_better(query, key, context)
        room = max(spatial.kv_indices.shape[-1], temporal.kv_indices.shape[-1])
        indices = [torch.nn.functional.pad(m.kv_indices, (0, room - m.kv_indices.shape[-1])) for m in self.masks]
        choice = better[:, :, None]
        mask = BlockMask(
            torch.where(choice, temporal.kv_num_blocks, spatial.kv_num_blocks),
            torch.where(choice[..., None], indices[1], indices[0]),
            query.shape[1],
            key.shape[1],
            spatial.q_block_size,
            spatial.kv_block_size,
        )
        return Selection(mask)

    @cached_property
    def _sampled(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Sampled rows, and for each mask the keys that they see, `[rows, seq_len]`."""
        seq_len = self.layout.seq_len
        with torch.inference_mode(False):
            rows = torch.linspace(0, seq_len - 1, min(self.rows, seq_len), device=self.device).long()
            seen = [mask.to_dense()[0, 0, rows // mask.q_block_size] for mask in self.masks]
            sizes = [mask.kv_block_size for mask in self.masks]
            pairs = zip(seen, sizes, strict=True)
            return rows, [blocks.repeat_interleave(size, 1)[:, :seq_len] for blocks, size in pairs]

    def _temporal_is_better(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Bool `[batch, heads]`: by the probability mass that each mask keeps of the sampled rows.

        Sparse VideoGen compares outputs; the mass that a mask keeps of a row orders masks without reading the values.
        """
        rows, seen = self._sampled
        kept, heads = [], HEADS_AT_ONCE
        for first in range(0, query.shape[2], heads):
            sampled = query[:, rows, first : first + heads].float().transpose(1, 2) * query.shape[-1] ** -0.5
            keys = key[:, :, first : first + heads].float().permute(0, 2, 3, 1)
            weights = (sampled @ keys).softmax(-1)
            # [masks, batch, heads]
            kept.append(torch.stack([(weights * tokens).sum((2, 3)) for tokens in seen]))
        spatial, temporal = torch.cat(kept, -1)
        return temporal > spatial
