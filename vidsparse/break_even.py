"""Whether sparse attention pays on a GPU: a model of one call's time, fitted to measurements.

Fitted to `scripts/bench_break_even.py` on an H200 (`benchmarks/results/2026-11-30-h200-break-even.json`): 1,024 to 118,800
tokens, 12 to 48 heads, head dims 64 and 128, densities 0.1 to 1, against the faster of cuDNN and FlashAttention-2. Other
GPUs were not measured; the same numbers are used there.
"""

from __future__ import annotations

from dataclasses import dataclass

DENSE_FLOPS = 680e12
"""Rate of short dense calls from a head dim of `FULL_HEAD_DIM` on, where what counts is the host's time for a sparse one;
below in proportion to the head dim. Long calls, in which the GPU gets hot, run at 540 to 570."""

FULL_HEAD_DIM = 90

CALL_SECONDS, HOPPER_CALL_SECONDS = 0.28e-3, 0.5e-3
"""What a sparse call takes at least, on the host: of the portable kernel 0.15 to 0.28 ms, of the Hopper kernel 0.3 to 0.53."""

SELECT_CALL_SECONDS = 1.9e-3
"""Likewise with pooling, scoring and selecting before it: in a compiled block of Flux at 1,024 x 1,024, where the rest of the
block hides nothing of it (`2026-11-27-h200-models-compiled.json`: 3.42 ms, stock 1.99 with 0.43 of attention)."""

POOL_OVERHEAD = 0.012
"""Pooling, scoring and selecting, as a share of a dense call (`2026-11-23-h200-block-selection.json`)."""

BAND_TOKENS = 2600.0
"""Scores of sampled rows, as a share of a dense call times its tokens: 0.079 at 32,760 tokens, 0.029 at 75,600
(`2026-11-27-h200-method-parts-in-turns.json`, as all that follow)."""

CLUSTER_OVERHEAD = 4.18
"""Clustering, selecting, permuting and restoring as a share of a dense call, times tokens over clusters (of queries and keys
together). At 75,600 tokens of 40 heads 2.7 with 1,300 clusters and 2.1 with 2,300, at 32,760 of 12 heads 3.6 with 1,200; with
the two that follow fitted to whole calls, so that none is estimated too low and none 1.35 times too high."""

CLUSTER_CALL_SECONDS, CLUSTER_TAIL_CALL_SECONDS = 3.5e-3, 4.8e-3
"""What a call with clusters, and with their tail, takes at least, on the host: 2.4 to 3.1 ms and 3.2 to 4.3 ms at lengths
where the GPU waits for it (`2026-11-27-h200-method-calls.json`), and a share more, as that host differs from run to run."""

PADDING_TOKENS, TILED_PADDING_TOKENS = 18.0, 4.0
"""Attention over clusters takes 1 + this over the keys of a cluster times as long as over uniform blocks; the second with full
tiles of queries. Measured 1.20 to 1.24 and 0.99 to 1.05 times with 76 keys, 1.39 to 1.42 and 1.09 to 1.12 with 33
(`2026-11-30-h200-packed-full-tiles.json`). Calls with a mask over keys, and other GPUs, run the portable kernel, which gives
each cluster tiles of its own and takes about 3 times as long."""

TAIL_OVERHEAD = 2.7
"""The tail over clusters as a share of a dense call, times tokens over clusters of keys: measured 2.7 at 75,600 tokens with
1,000 clusters, 2.2 with 2,000, and 3.5 at 32,760 with 1,000 (`2026-11-27-h200-method-parts.json` and `-in-turns.json`; 2.4 to
2.7 and 3.1 in `2026-12-01-h200-method-parts.json`)."""

TAIL_FACTOR = 1.3
"""The tail over uniform blocks, with it over without, at a density of 0.15 and in key blocks of 64: whole
calls in one kernel 1.14 to 1.15, attention in two steps 1.29 to 1.38 (`2026-12-01-h200-pooled-tail-calls.json`). The tail costs the
same at any density, so this is too much where more is computed."""

LINEAR_TOKENS = 1250.0
"""Selecting and the linear branch over all keys with its projection as a share of a dense call, times its tokens: at most
1,190 at 32,760 tokens of 12 heads, less at 75,600 of 10 (`2026-11-27-h200-sla-again.json`)."""

LINEAR_FACTOR = 2.75
"""With the linear branch over the keys that are not selected, which walks the selected blocks again, beside that: 2.0 to 2.7
(same file)."""

LARGE_WORK = 2e11
"""FLOPs of the dense call from which on the Hopper kernel runs; the portable one below."""

LONG_WORK = 5e12
"""FLOPs of the dense call from which on small head dims gain as much as large ones."""


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


def every_block_cost(shape: CallShape) -> float:
    """Estimated time of a dense call through our kernel over all blocks, over that of torch's dense kernels."""
    return relative_cost(shape, 1.0)


def relative_cost(
    shape: CallShape,
    density: float,
    *,
    selects: bool = False,
    overhead: float = 0.0,
    factor: float = 1.0,
    call_seconds: float = 0.0,
) -> float:
    """Estimated time of a sparse call over that of a dense one; above 1 dense is faster.

    Args:
        shape: of the call.
        density: computed share of the blocks.
        selects: whether the call selects its blocks from query and key.
        overhead: of selecting and ordering, as a share of the dense call.
        factor: on the time of the sparse call, for padding and corrections.
        call_seconds: what the call takes at least, if more than others that select or do not.
    """
    dense = shape.flops / (DENSE_FLOPS * min(1.0, shape.head_dim / FULL_HEAD_DIM))
    wide = shape.head_dim >= FULL_HEAD_DIM
    if shape.flops > LARGE_WORK:
        share = 0.015 + (0.815 if wide or shape.flops > LONG_WORK else 0.9) * density
        host = HOPPER_CALL_SECONDS
    else:
        share = 0.05 + (2.0 if wide else 1.3) * density
        host = CALL_SECONDS
    at_least = max(call_seconds, SELECT_CALL_SECONDS if selects else host)
    return max(at_least / dense, share * factor + overhead)
