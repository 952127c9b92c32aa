"""The project's own recipe: attention between clusters, and every dropped cluster by its mean (clustering and pooled tail).

Clusters (Sparse VideoGen 2) are tokens that are alike, so their means say nearly all about them, and a tail of means
(PISA) that adds little to blocks of neighbours brings most of the dropped attention back. `docs/methods.md` has the
measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vidsparse.errors import ConfigError
from vidsparse.methods.semantic import SemanticConfig, SemanticProcessor

if TYPE_CHECKING:
    from vidsparse.layout import TokenLayout
    from vidsparse.parts import Parts


@dataclass(frozen=True)
class VidsparseConfig(SemanticConfig):
    """Settings of the method "vidsparse": those of "semantic", with these changed or added

    Attributes:
        k_clusters: clusters of the keys, at most one per token; default None: 1000, lowered to at most a 16th of the tokens.
        density: the share of the key clusters that every row takes, in (0, 1]; default 0.15 unless `top_p` is given.
        query_tiles: default None: where a cluster has at least 160 queries in the mean.
        first_order: add the tail's first-order term, default True.

    Raises:
        ConfigError: a value is out of range.
    """

    first_order: bool = True

    # A tail of smaller clusters says more, and each is one key: `docs/methods.md`.
    LEAST_TOKENS: ClassVar[dict[str, int]] = {"q_clusters": 32, "k_clusters": 16}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.first_order, bool):
            raise ConfigError(f"`first_order` must be True or False, got {self.first_order!r}.")

    def tiles_queries(self, tokens: int) -> bool:
        """Whether rows of the mask are full tiles of queries, for so many video tokens."""
        if self.query_tiles is None:
            return tokens >= TILED_CLUSTER * self.clusters(tokens)[0]
        return self.query_tiles

    @property
    def share(self) -> float | None:
        """The density in force: 0.15, less than clusters without a tail need."""
        return 0.15 if self.density is None and self.top_p is None else self.density

    @property
    def mass(self) -> float | None:
        """The `top_p` in force."""
        return self.top_p


TILED_CLUSTER = 160
"""Mean queries of a cluster from which full tiles of 128 pay. Error at equal density: with 252 queries 16 to 22 % less than with
clusters, with 168 up to 9 % more (`docs/methods.md`), where a call takes 9 to 11 % less time; spent on density, that time is
a quarter less error."""


class VidsparseProcessor(SemanticProcessor):
    """Attention processor for the project's own recipe.

    Args:
        options: fields of `VidsparseConfig` and of `Schedule`, by keyword.

    Raises:
        ConfigError: an option is unknown or out of range.

    Example:
        >>> pipe.transformer.set_attn_processor(VidsparseProcessor(density=0.15))
    """

    method = "vidsparse"
    corrects = True
    config_class = VidsparseConfig

    def parts(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        from vidsparse.break_even import CLUSTER_TAIL_CALL_SECONDS, TAIL_OVERHEAD
        from vidsparse.corrections.pooled_tail import PooledTail

        parts, note = super().parts(layout, device)
        tail = PooledTail(self.config.first_order)
        _, k_clusters = self.config.clusters(layout.grid.num_tokens)
        overhead = parts.overhead + TAIL_OVERHEAD * k_clusters / layout.grid.num_tokens
        return replace(parts, correction=tail, overhead=overhead, call_seconds=CLUSTER_TAIL_CALL_SECONDS), note
