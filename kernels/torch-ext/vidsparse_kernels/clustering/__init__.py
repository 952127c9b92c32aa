"""Batched k-means of tokens per head, and the token order that puts each cluster together."""

from __future__ import annotations

from .api import assign_clusters, cluster, order_by_label, update_centroids
from .clusters import Clusters

__all__ = ["Clusters", "assign_clusters", "cluster", "order_by_label", "update_centroids"]
