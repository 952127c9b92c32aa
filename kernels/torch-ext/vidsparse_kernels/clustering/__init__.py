"""Batched k-means of tokens per head, and the token order that puts each cluster together."""

from __future__ import annotations

from .api import arrange_clusters, assign_clusters, cluster, order_by_label, score_tiles, update_centroids
from .clusters import Clusters

__all__ = [
    "Clusters",
    "arrange_clusters",
    "assign_clusters",
    "cluster",
    "order_by_label",
    "score_tiles",
    "update_centroids",
]
