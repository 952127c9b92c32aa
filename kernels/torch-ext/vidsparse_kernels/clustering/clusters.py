"""The result of clustering."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Clusters:
    """Clusters of the tokens of every head.

    Attributes:
        labels: int32 `[batch, num_heads, seq_len]`: the cluster of each token.
        centroids: fp32 (fp64 for fp64 tokens) `[batch, num_heads, num_clusters, head_dim]`: the mean of each cluster.
        counts: int32 `[batch, num_heads, num_clusters]`: tokens of each cluster, 0 for an empty one.
        order: int32 `[batch, num_heads, seq_len]`: the tokens by rising label, within a cluster by rising position.
        ranks: int32 `[batch, num_heads, seq_len]`: the inverse of `order`: where each token stands in it.
        offsets: int32 `[batch, num_heads, num_clusters + 1]`: where each cluster starts in `order`; as `q_offsets`
            and `kv_offsets` of a `BlockMask`.
    """

    labels: Tensor
    centroids: Tensor
    counts: Tensor
    order: Tensor
    ranks: Tensor
    offsets: Tensor
