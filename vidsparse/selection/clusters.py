"""Blocks in a token order by content: k-means clusters of queries and of keys, for each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vidsparse.layout import TokenLayout
from vidsparse.parts import Selection
from vidsparse.selection.blocks import block_sizes

if TYPE_CHECKING:
    from vidsparse.processors.context import AttentionContext
    from vidsparse_kernels import Clusters


@dataclass(frozen=True)
class Clustering:
    """How tokens are clustered.

    Attributes:
        q_clusters, k_clusters: clusters of every head, at most one per token.
        first_iterations: k-means iterations where nothing is kept from an earlier step.
        step_iterations: iterations from the centroids of the step before.
    """

    q_clusters: int
    k_clusters: int
    first_iterations: int
    step_iterations: int

    def run(
        self, query: torch.Tensor, key: torch.Tensor, layout: TokenLayout, context: AttentionContext
    ) -> tuple[Clusters, Clusters]:
        """Clusters of the video tokens of query and of key, neighbours alike; centroids stay in the layer's memory."""
        from vidsparse_kernels import arrange_clusters, cluster

        memory = context.memory
        kept = None if memory is None else memory.get("centroids")
        start = layout.text_before
        found = []
        for index, (x, count) in enumerate(((query, self.q_clusters), (key, self.k_clusters))):
            video = x[:, start : start + layout.grid.num_tokens]
            iterations = self.first_iterations if kept is None else self.step_iterations
            centroids = None if kept is None else kept[index]
            clusters = cluster(video, min(count, video.shape[1]), iterations=iterations, centroids=centroids)
            # Later steps keep the numbers with the centroids.
            found.append(arrange_clusters(clusters) if centroids is None else clusters)
        q, k = found
        if memory is not None:
            memory.keep("centroids", (q.centroids, k.centroids), [q.centroids, k.centroids])
        return q, k


@dataclass(frozen=True)
class ClusterSelector:
    """Clusters of keys for each cluster of queries, by the softmax mass of their centroids (Sparse VideoGen 2).

    With centroids q_i and k_j and sizes n_j, cluster j has the share n_j exp(q_i . k_j / sqrt(d)) of row i; clusters
    are taken by falling share up to and including the one that crosses `top_p`. Text is dense.

    With `query_tiles` a row is a full tile of queries in place of a cluster: queries stand in the order of their clusters,
    which is cut every so many queries, wherever clusters end. The share of a tile is the mean over its quarters, each by
    its own mean (`score_tiles`). Tiles that hold text are dense.

    Attributes:
        layout: the tokens.
        clustering: how the clusters are found.
        top_p: share of the mass, in (0, 1]; or None.
        min_share: least share of the key clusters that every row takes, in [0, 1].
        density: in place of `top_p`, the share of the key clusters that every row takes.
        query_tiles: whether rows are full tiles of queries.
    """

    layout: TokenLayout
    clustering: Clustering
    top_p: float | None
    min_share: float
    density: float | None = None
    query_tiles: bool = False

    def select(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> Selection:
        from vidsparse_kernels import BlockMask, score_blocks, score_tiles, select_block_lists

        layout = self.layout
        q, k = self.clustering.run(query, key, layout, context)
        before, after = int(layout.text_before > 0), int(layout.text_after > 0)
        q_size, kv_size = block_sizes(layout.seq_len)
        if self.query_tiles:
            q_size, q_offsets = query_tile(layout.grid.num_tokens, self.clustering.q_clusters), None
            end = layout.text_before + layout.grid.num_tokens
            video = query[:, layout.text_before : end]
            scores = score_tiles(video, q.order, k.centroids, k.counts, q_size, shift=layout.text_before)
            # Tiles that hold text are rows of text.
            first, last, rows = -(-layout.text_before // q_size), end // q_size, -(-layout.seq_len // q_size)
            text_before, text_after = slice(first), slice(last if after else rows, None)
            scores = torch.nn.functional.pad(scores, (before, after, 0, rows - scores.shape[2]), value=-torch.inf)
        else:
            if layout.grid.num_tokens < 128 * self.clustering.q_clusters:
                q_size = min(q_size, 64)
            q_offsets = self._offsets(q.offsets)
            scores = score_blocks(q.centroids, k.centroids)
            text_before, text_after = slice(before), slice(scores.shape[2] + before, None)
            scores = torch.nn.functional.pad(scores, (before, after, before, after), value=-torch.inf)
        # Text is a block of its own on either side: no mass of the softmax, but in every row, and every row's equal.
        forced = None
        if before or after:
            forced = torch.zeros(1, 1, *scores.shape[2:], dtype=torch.bool, device=scores.device)
            for index in (text_before, text_after):
                forced[:, :, index] = True
            for index in [0] * before + [-1] * after:
                forced[:, :, :, index] = True
        kv_offsets = self._offsets(k.offsets)
        clusters = k.offsets.shape[-1] - 1
        least = max(1, int(self.min_share * clusters)) + before + after
        lists = select_block_lists(
            scores,
            top_p=self.top_p,
            top_k=None if self.density is None else max(1, round(self.density * clusters)) + before + after,
            min_blocks=least,
            forced=forced,
            kv_block_sizes=kv_offsets.diff(dim=-1),
        )
        mask = BlockMask(*lists, query.shape[1], key.shape[1], q_size, kv_size, q_offsets, kv_offsets)
        return Selection(mask, q.order, k.order, layout.text_before, layout.text_after)

    def _offsets(self, offsets: torch.Tensor) -> torch.Tensor:
        """Offsets of the clusters among all tokens, text blocks included."""
        layout = self.layout
        offsets = offsets + layout.text_before
        if layout.text_before:
            offsets = torch.nn.functional.pad(offsets, (1, 0), value=0)
        if layout.text_after:
            offsets = torch.nn.functional.pad(offsets, (0, 1), value=layout.seq_len)
        return offsets.contiguous()


def query_tile(tokens: int, q_clusters: int) -> int:
    """Queries of a full tile: 128, or fewer where a cluster has fewer in the mean, but 16 at least."""
    size = 128
    while size > 16 and tokens < size * q_clusters:
        size //= 2
    return size
