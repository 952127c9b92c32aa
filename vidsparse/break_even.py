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

CLUSTER_OVERHEAD = 3.5
"""Clustering, selecting, permuting and restoring as a share of a dense call, times tokens over clusters (of queries and keys
together). Measured at 75,600 tokens of 40 heads: 0.047 with 1,300 clusters, 0.064 with 2,300, so 2.7 and 2.1
(`2026-11-27-h200-method-parts.json`). At 32,760 tokens of 12 heads two iterations of 0.55 ms (`-clustering.json` of that day)
and 0.3 ms for the rest are 0.13 of 10.5 ms with 1,300 clusters, so 3.3; that call was not timed as a whole."""

CLUSTER_FACTOR = 1.25
"""Of clusters packed into full tiles over uniform blocks of the same density: 1.14 to 1.21 with 1,000 clusters of keys (75
tokens in the mean), 1.34 with 2,000 (same file). Calls with a mask over keys, and other GPUs, run the portable kernel, which
gives each cluster tiles of its own and takes about 3."""

TAIL_FACTOR = 1.2
"""With the pooled tail over without: 1.20 at a density of 0.16, 1.12 at 0.26, with 1,000 clusters (same file)."""

LINEAR_TOKENS = 2100.0
"""The linear branch over all keys and its projection as a share of a dense call, times its tokens: 0.062 and 0.021 at 32,760
tokens of 12 heads and 75,600 of 10, so 2,020 and 1,590 (`2026-11-27-h200-sla.json`)."""

LINEAR_FACTOR = 2.2
"""With the linear branch over the keys that are not selected, which walks the selected blocks again, beside that: 2.0 to 2.2
(same file)."""

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
