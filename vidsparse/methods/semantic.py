"""Sparse VideoGen 2 (arXiv 2505.18875): attention between clusters of alike tokens, chosen by the mass of their centroids.

Queries and keys of each head are clustered by k-means after norm and rotary embedding (section 4.1), each side in its own
order; clusters of keys are taken by estimated softmax mass up to `top_p` (section 4.2); centroids are kept from step to
step. Text keeps its place and stays dense.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from vidsparse.checks import check_share, is_number, is_whole
from vidsparse.errors import ConfigError
from vidsparse.processors.base import SparseProcessor
from vidsparse.schedule import Schedule

if TYPE_CHECKING:
    from vidsparse.layout import LatentGrid, TokenLayout
    from vidsparse.parts import Parts


@dataclass(frozen=True)
class SemanticConfig:
    """Settings of the method "semantic"; defaults are those of the authors' Wan 2.1 text-to-video script at 720p.

    Attributes:
        q_clusters: clusters of the queries of a head, at most one per token. Default None: the authors' number for so many
            tokens, 200 up to 60,000 (480p), 300 up to 100,000 (Wan at 720p), 400 beyond (HunyuanVideo at 720p).
        k_clusters: clusters of the keys, at most one per token; default None: the authors' 1000. Either default is lowered
            to at most a 32nd of the tokens.
        top_p: softmax mass that the chosen clusters of a row reach, in (0, 1]; default 0.9.
        density: in place of `top_p`, the share of the key clusters (blocks) that every row takes, in (0, 1].
        min_share: least share of the key clusters of a row, in [0, 1]; default 0.1.
        first_iterations: k-means iterations in the first sparse step, default 20 (the authors use 50).
        step_iterations: iterations in later steps, from the centroids kept, default 2.
        query_tiles: choose key clusters for full tiles of queries, cut from their order by cluster wherever clusters end,
            not for clusters of queries, whose last tiles are part empty. Tiles have 128 queries, fewer where a cluster has
            fewer in the mean. Default None: no, as published.
        schedule: dense steps and layers; default a quarter of the steps and the first layer.

    Raises:
        ConfigError: a value is out of range.
    """

    q_clusters: int | None = None
    k_clusters: int | None = None
    top_p: float | None = None
    density: float | None = None
    min_share: float = 0.1
    first_iterations: int = 20
    step_iterations: int = 2
    query_tiles: bool | None = None
    schedule: Schedule = field(default_factory=lambda: Schedule(dense_layers=1))

    LEAST_TOKENS: ClassVar[dict[str, int]] = {"q_clusters": 32, "k_clusters": 32}
    """Mean tokens of a cluster below which a default does not go."""

    def __post_init__(self) -> None:
        for name in ("q_clusters", "k_clusters", "first_iterations", "step_iterations"):
            value = vars(self)[name]
            if name in ("q_clusters", "k_clusters") and value is None:
                continue
            if not is_whole(value) or value < 1:
                raise ConfigError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if self.density is not None and self.top_p is not None:
            raise ConfigError(f"Give `density` or `top_p`, not both; got {self.density!r} and {self.top_p!r}.")
        for name in ("density", "top_p"):
            if getattr(self, name) is not None:
                check_share(name, getattr(self, name))
        if self.query_tiles is not None and not isinstance(self.query_tiles, bool):
            raise ConfigError(f"`query_tiles` must be True, False or None, got {self.query_tiles!r}.")
        if not is_number(self.min_share) or not 0 <= self.min_share <= 1:
            raise ConfigError(f"`min_share` must be in [0, 1], got {self.min_share!r}.")

    def clusters(self, tokens: int) -> tuple[int, int]:
        """Clusters of queries and of keys for so many video tokens.

        Raises:
            ConfigError: more of them were asked for than there are tokens.
        """
        found = []
        for name, published in (("q_clusters", published_q_clusters(tokens)), ("k_clusters", PUBLISHED_K_CLUSTERS)):
            count = getattr(self, name)
            if count is not None and count > tokens:
                raise ConfigError(f"`{name}` must be at most the {tokens} video tokens there are, got {count}.")
            least = self.LEAST_TOKENS[name]
            found.append(min(published, max(1, tokens // least)) if count is None else count)
        return found[0], found[1]

    def tiles_queries(self, tokens: int) -> bool:
        """Whether rows of the mask are full tiles of queries, for so many video tokens."""
        return bool(self.query_tiles)

    @property
    def share(self) -> float | None:
        """The density in force, None with `top_p`."""
        return self.density

    @property
    def mass(self) -> float | None:
        """The `top_p` in force."""
        return DEFAULT_TOP_P if self.density is None and self.top_p is None else self.top_p


DEFAULT_TOP_P = 0.9
PUBLISHED_K_CLUSTERS = 1000


def published_q_clusters(tokens: int) -> int:
    """Clusters of queries in the authors' scripts for models of so many tokens (Cosmos, 56,320 with 400, left out)."""
    return 200 if tokens <= 60_000 else 300 if tokens <= 100_000 else 400


class SemanticProcessor(SparseProcessor):
    """Attention processor for Sparse VideoGen 2 (alias `SVG2Processor`).

    Args:
        options: fields of `SemanticConfig` and of `Schedule`, by keyword.

    Raises:
        ConfigError: an option is unknown or out of range.

    Example:
        >>> pipe.transformer.set_attn_processor(SemanticProcessor(top_p=0.9))
    """

    method = "semantic"
    config_class = SemanticConfig

    def layout(self, grid: LatentGrid, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        from vidsparse.layout import TokenLayout
        from vidsparse.selection.blocks import block_sizes

        q_block_size, _ = block_sizes(grid.num_tokens + text_before + text_after)
        return TokenLayout(grid, text_before, text_after, block_size=q_block_size)

    def check(self, grid: LatentGrid) -> None:
        self.config.clusters(grid.num_tokens)

    def parts(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        from vidsparse.break_even import (
            CLUSTER_CALL_SECONDS,
            CLUSTER_OVERHEAD,
            PADDING_TOKENS,
            TILED_PADDING_TOKENS,
        )
        from vidsparse.parts import Parts
        from vidsparse.selection.clusters import Clustering, ClusterSelector, query_tile

        config = self.config
        q_clusters, k_clusters = config.clusters(layout.grid.num_tokens)
        clustering = Clustering(q_clusters, k_clusters, config.first_iterations, config.step_iterations)
        tiles = config.tiles_queries(layout.grid.num_tokens)
        selector = ClusterSelector(layout, clustering, config.mass, config.min_share, config.share, tiles)
        note = f"{q_clusters} clusters of queries and {k_clusters} of keys in each head, for grid {layout.grid}"
        if tiles:
            note += f"; full tiles of {query_tile(layout.grid.num_tokens, q_clusters)} queries"
        density = config.share
        overhead = CLUSTER_OVERHEAD * (q_clusters + k_clusters) / layout.grid.num_tokens
        padding = TILED_PADDING_TOKENS if tiles else PADDING_TOKENS
        factor = 1 + padding * k_clusters / layout.grid.num_tokens
        return Parts(
            selector=selector, density=density, overhead=overhead, factor=factor, call_seconds=CLUSTER_CALL_SECONDS
        ), note


SVG2Processor = SemanticProcessor
