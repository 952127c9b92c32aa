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

SELECT_CALL_SECONDS = 0.35e-3
"""Likewise with pooling, scoring and selecting before it."""

SELECT_SHARE = 0.02
"""Of the dense time, for pooling, scoring and selecting."""

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


def relative_cost(shape: CallShape, density: float, selects: bool = False) -> float:
    """Estimated time of a sparse call over that of a dense one; above 1 dense is faster.

    Args:
        shape: of the call.
        density: computed share of the blocks.
        selects: whether the call selects its blocks from query and key.
    """
    dense = shape.flops / (DENSE_FLOPS * min(1.0, shape.head_dim / FULL_HEAD_DIM))
    wide = shape.head_dim >= FULL_HEAD_DIM
    if shape.flops > LARGE_WORK:
        share = 0.03 + (0.95 if wide else 1.1) * density
    else:
        share = 0.05 + (1.85 if wide else 1.25) * density
    if selects:
        return max(SELECT_CALL_SECONDS / dense, share + SELECT_SHARE)
    return max(CALL_SECONDS / dense, share)
