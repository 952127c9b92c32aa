"""Triton kernels of vidsparse, each beside its plain torch reference."""

from __future__ import annotations

from .block_mask import BlockMask
from .block_selection import pool_blocks, score_blocks, select_block_lists, select_blocks, select_from_qk
from .block_sparse_attention import (
    available_backends,
    block_sparse_attention,
    merge_attention_states,
    select_backend,
)
from .block_sparse_attention.convert import from_flex_block_mask, to_flash4_block_sparse, to_flex_block_mask
from .clustering import (
    Clusters,
    arrange_clusters,
    assign_clusters,
    cluster,
    order_by_label,
    score_tiles,
    update_centroids,
)
from .errors import UnsupportedBackendError
from .linear_branch import add_linear_branch, linear_branch
from .permutation import permute_tokens, unpermute_tokens
from .pooled_tail import (
    Pools,
    block_sparse_attention_with_tail,
    pool_for_tail,
    pooled_tail_attention,
    pooled_tail_merge_,
    select_backend_with_tail,
)
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_pair
from .sampled_error import sampled_error

__all__ = [
    "BlockMask",
    "Clusters",
    "Pools",
    "UnsupportedBackendError",
    "add_linear_branch",
    "arrange_clusters",
    "assign_clusters",
    "available_backends",
    "block_sparse_attention",
    "block_sparse_attention_with_tail",
    "cluster",
    "from_flex_block_mask",
    "linear_branch",
    "merge_attention_states",
    "order_by_label",
    "permute_tokens",
    "pool_blocks",
    "pool_for_tail",
    "pooled_tail_attention",
    "pooled_tail_merge_",
    "qk_norm_rope",
    "qk_norm_rope_pair",
    "sampled_error",
    "score_blocks",
    "score_tiles",
    "select_backend",
    "select_backend_with_tail",
    "select_block_lists",
    "select_blocks",
    "select_from_qk",
    "to_flash4_block_sparse",
    "to_flex_block_mask",
    "unpermute_tokens",
    "update_centroids",
]
