"""Uniform blocks chosen by the product of their mean query and mean key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from vidsparse.layout import TokenLayout
from vidsparse.parts import Selection
from vidsparse.selection.spread import spread_scores

if TYPE_CHECKING:
    from vidsparse.processors.context import AttentionContext
    from vidsparse_kernels import BlockMask


def block_sizes(seq_len: int, kv_block_size: int | None = None) -> tuple[int, int]:
    """Query and key block sizes for a length: 128 and 64, smaller where that would leave less than 64 key blocks; 128 and
    what is asked for, where it is."""
    if kv_block_size is not None:
        return 128, kv_block_size
    size = 64
    while size > 16 and seq_len < 64 * size:
        size //= 2
    return 2 * size, size


def forced_blocks(
    layout: TokenLayout, q_block_size: int, kv_block_size: int, sink_frames: int, device: torch.device | str
) -> tuple[torch.Tensor, int]:
    """Blocks that every selection has: text as rows and columns, the first frames, each query block's own position.

    Returns:
        Bool `[1, 1, num_q_blocks, num_kv_blocks]`, and the most that a row without text has.
    """
    starts = torch.arange(0, layout.seq_len, q_block_size, device=device)
    ends = (starts + q_block_size).clamp(max=layout.seq_len)
    kv_starts = torch.arange(0, layout.seq_len, kv_block_size, device=device)
    kv_ends = (kv_starts + kv_block_size).clamp(max=layout.seq_len)
    video = (layout.text_before, layout.text_before + layout.grid.num_tokens)
    sink_end = video[0] + sink_frames * layout.grid.tokens_per_frame
    columns = (kv_starts < (sink_end if sink_frames else video[0])) | (kv_ends > video[1])
    rows = (starts < video[0]) | (ends > video[1])
    own = (starts[:, None] < kv_ends[None]) & (ends[:, None] > kv_starts[None])
    most = int(columns.sum()) + -(-q_block_size // kv_block_size) + 1
    return (rows[:, None] | columns[None] | own)[None, None], most


@dataclass(frozen=True)
class PooledSelector:
    """The best key blocks of each query block by mean query times mean key, text dense.

    Attributes:
        layout: the tokens.
        device: of the calls.
        density: share of the key blocks, forced ones included; or None.
        top_p: least softmax mass of the pooled scores, or None; one of the two is given.
        sink_frames: first latent frames that every query sees.
        random_seed: choose at random with this seed in place of the scores; the same blocks in every step.
        spread: choose by what the mean of a block loses (`selection.spread`), not by its mean alone.
        skip: share of the key blocks of a row, those with the lowest scores, that a correction leaves out as well.
        kv_block_size: tokens of a key block, None: by the length (`block_sizes`).
    """

    layout: TokenLayout
    device: torch.device | str
    density: float | None
    top_p: float | None
    sink_frames: int = 0
    random_seed: int | None = None
    spread: bool = False
    skip: float = 0.0
    kv_block_size: int | None = None

    @cached_property
    def sizes(self) -> tuple[int, int]:
        return block_sizes(self.layout.seq_len, self.kv_block_size)

    @cached_property
    def _blocks(self) -> BlockMask:
        """Blocks of these sizes, none of them listed."""
        from vidsparse_kernels import BlockMask

        q_size, kv_size = self.sizes
        tokens = self.layout.seq_len
        with torch.inference_mode(False):
            counts = torch.zeros(1, 1, -(-tokens // q_size), dtype=torch.int32, device=self.device)
            return BlockMask.from_indices(
                counts,
                counts[..., None],
                seq_len_q=tokens,
                seq_len_kv=tokens,
                q_block_size=q_size,
                kv_block_size=kv_size,
            )

    @cached_property
    def _forced(self) -> tuple[torch.Tensor, int | None]:
        with torch.inference_mode(False):
            forced, most = forced_blocks(self.layout, *self.sizes, self.sink_frames, self.device)
        # Rows of text list every block.
        return forced, None if self.layout.text_len else most

    def select(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> Selection:
        from vidsparse_kernels import BlockMask, pool_blocks, score_blocks, select_blocks

        q_size, kv_size = self.sizes
        pools = None
        if self.random_seed is None:
            q_pooled = pool_blocks(query, q_size)["mean"]
            if self.spread:
                scores = spread_scores(q_pooled, pool_blocks(key, kv_size, kinds=("mean", "max", "min")))
            elif context.pool is not None:
                pools = context.pool(self._blocks)
                scores = score_blocks(q_pooled, pools.keys)
            else:
                scores = score_blocks(q_pooled, pool_blocks(key, kv_size)["mean"])
        else:
            # Drawn on the device of the calls, so that nothing is copied to it.
            generator = torch.Generator(query.device).manual_seed(self.random_seed * 10_007 + context.layer_index)
            blocks = [-(-query.shape[1] // size) for size in self.sizes]
            scores = torch.randn(1, query.shape[2], *blocks, generator=generator, device=query.device)
        forced, most = self._forced
        sizes: dict[str, Any] = dict(
            seq_len_q=query.shape[1], seq_len_kv=key.shape[1], q_block_size=q_size, kv_block_size=kv_size
        )  # fmt: skip
        mask = select_blocks(
            scores, density=self.density, top_p=self.top_p, forced=forced, max_forced=most, **sizes
        )  # fmt: skip
        if not self.skip:
            selection = Selection(mask)
            selection.pools = pools
            return selection
        # Forced blocks come last in line; a row of text, where all are forced, skips none.
        lowest = select_blocks((-scores).masked_fill(forced, -torch.inf), density=self.skip, **sizes)
        counts = lowest.kv_num_blocks.masked_fill(forced.all(-1), 0)
        return Selection(mask, skipped=BlockMask.from_indices(counts, lowest.kv_indices, **sizes))
