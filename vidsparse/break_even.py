"""Whether sparse attention pays on a GPU: a model of one call's time, fitted to measurements.

Fitted to `scripts/bench_break_even.py` on an H200 (`benchmarks/results/2026-11-25-h200-break-even.json`): 1,024 to 32,760
tokens, 12 to 48 heads, head dims 64 and 128, densities 0.1 to 1, against the faster of cuDNN and FlashAttention-2. Other
GPUs were not measured; the same numbers are used there.
"""

from __future__ import annotations

from dataclasses import dataclass

DENSE_FLOPS = 600e12
"""Rate of dense attention from a head dim of `FULL_HEAD_DIM` on; below in proportion to the head dim."""

FULL_HEAD_DIM = 90

CALL_SECONDS = 0.15e-3
"""What a sparse call takes at least, on the host."""

SELECT_CALL_SECONDS = 1.9e-3
"""Likewise with pooling, scoring and selecting before it: in a compiled block of Flux at 1,024 x 1,024, where the rest of the
block hides nothing of it (`2026-11-27-h200-models-compiled.json`: 3.42 ms, stock 1.99 with 0.43 of attention)."""

POOL_OVERHEAD = 0.012
"""Pooling, scoring and selecting, as a share of a dense call (`2026-11-23-h200-block-selection.json`)."""

BAND_OVERHEAD = 0.04
"""Scores of 64 sampled rows: bytes of keys and weights in fp32 at 32,760 tokens and 12 heads; an estimate, not measured."""

CLUSTER_OVERHEAD = 0.14
"""Two warm k-means iterations of 0.62 ms and the permutations of 0.22 ms, of 10.5 ms dense: 32,760 tokens, 12 heads
(`2026-11-25-h200-clustering.json`). Longer sequences pay a smaller share."""

CLUSTER_FACTOR = 3.2
"""6.26 ms for clusters of 64 tokens (`2026-11-25-h200-variable-blocks.json`) where uniform blocks of the same density take
1.95: twice the tiles, because clusters do not fill theirs, and the portable kernel instead of Hopper's."""

TAIL_FACTOR = 1.25
"""With the pooled tail over without (`2026-11-25-h200-pooled-tail.json`)."""

LARGE_WORK = 2e11
"""FLOPs of the dense call from which on the Hopper kernel runs; the portable one below."""


@dataclass(frozen=True)
class CallShape:
    """One attention call.

    Attributes:
        batch: samples.
        num_heads: query heads.
        seq_len: tokens.
        head_dim: channels of a head.
    """

    batch: int
    num_heads: int
    seq_len: int
    head_dim: int

    @property
    def flops(self) -> float:
        """Of the dense call: two products of 2 * seq_len^2 * head_dim each."""
        return 4.0 * self.batch * self.num_heads * self.seq_len**2 * self.head_dim


def relative_cost(
    shape: CallShape, density: float, *, selects: bool = False, overhead: float = 0.0, factor: float = 1.0
) -> float:
    """Estimated time of a sparse call over that of a dense one; above 1 dense is faster.

    Args:
        shape: of the call.
        density: computed share of the blocks.
        selects: whether the call selects its blocks from query and key.
        overhead: of selecting and ordering, as a share of the dense call.
        factor: on the time of the sparse call, for padding and corrections.
    """
    dense = shape.flops / (DENSE_FLOPS * min(1.0, shape.head_dim / FULL_HEAD_DIM))
    wide = shape.head_dim >= FULL_HEAD_DIM
    if shape.flops > LARGE_WORK:
        share = 0.03 + (0.95 if wide else 1.1) * density
    else:
        share = 0.05 + (1.85 if wide else 1.25) * density
    return max((SELECT_CALL_SECONDS if selects else CALL_SECONDS) / dense, share * factor + overhead)
