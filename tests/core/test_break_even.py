"""Masks that would be slower than dense attention on the CPU run dense, and the report says so."""

from __future__ import annotations

import pytest
import torch

import vidsparse
from vidsparse import LatentGrid
from vidsparse.errors import DenseFallbackError
from vidsparse_kernels import BlockMask
from vidsparse_kernels.block_sparse_attention.sdpa import relative_cost

pytestmark = pytest.mark.break_even


def test_the_estimate_orders_masks():
    dense = BlockMask.full(2016, 2016, q_block_size=64, kv_block_size=64)
    assert relative_cost(dense, torch.float32) == pytest.approx(1.0, abs=0.01)
    near = (torch.arange(32)[:, None] - torch.arange(32)).abs() <= 2
    window = BlockMask.from_dense(near[None, None], seq_len_q=2016, seq_len_kv=2016, q_block_size=64, kv_block_size=64)
    assert relative_cost(window, torch.float32) < 0.6
    scattered = torch.rand(1, 1, 126, 126, generator=torch.Generator().manual_seed(0)) < 0.5
    slow = BlockMask.from_dense(scattered, seq_len_q=2016, seq_len_kv=2016, q_block_size=16, kv_block_size=16)
    assert relative_cost(slow, torch.float32) > 1 and relative_cost(slow, torch.bfloat16) > 1


def test_a_slow_mask_runs_dense_and_is_reported(build_pipeline, generate):
    pipe = build_pipeline()
    handle = vidsparse.apply(pipe, block_size=16)
    generate(pipe)
    report = handle.report()
    assert report.num_sparse_calls == 0
    reasons = [reason for reason in report.dense_calls if reason.startswith("dense is faster than blocks of 16 here")]
    assert len(reasons) == 1 and report.dense_calls[reasons[0]] == 2 * 3 * 2
    assert handle.describe(LatentGrid(5, 8, 8), 4).mean_density == 1.0


def test_strict_says_how_to_insist(build_pipeline, generate):
    pipe = build_pipeline()
    vidsparse.apply(pipe, block_size=16, strict=True)
    with pytest.raises(DenseFallbackError, match=r"dense is faster .* set `min_tokens` to 0 to run its 320 tokens"):
        generate(pipe)
    handle = vidsparse.apply(pipe, block_size=16, strict=True, min_tokens=0)
    generate(pipe)
    assert handle.report().num_sparse_calls > 0


def test_the_default_mask_of_the_bundled_model_pays():
    processor = vidsparse.RadialProcessor()
    for grid in (LatentGrid(21, 8, 12), LatentGrid(21, 12, 20), LatentGrid(76, 8, 12)):
        parts, _ = processor.parts(processor.layout(grid), None)
        assert processor.slow_reason(parts, torch.float32) is None
        assert processor.slow_reason(parts, torch.bfloat16) is None
