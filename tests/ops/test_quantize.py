"""Attention with query and key as 8-bit integers: the specification's error, and the kernels against it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from vidsparse_kernels import BlockMask, UnsupportedBackendError, block_sparse_attention, select_backend
from vidsparse_kernels.block_sparse_attention.quantize import key_mean, quantize_reference, restored, scale_block
from vidsparse_kernels.testing import assert_close_to_oracle, make_block_mask, make_qkv, masked_attention_oracle

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("offset", [0.0, 4.0], ids=["centred", "common-offset"])
def test_error_is_below_the_goal(head_dim: int, offset: float) -> None:
    query, key, value = make_qkv(seq_len_q=500, num_heads=2, head_dim=head_dim, dtype=torch.bfloat16)
    key = key + offset * torch.linspace(-1, 1, head_dim).bfloat16()
    mask = make_block_mask(seq_len_q=500, num_heads=2, density=0.5, full_rows=True)
    out = block_sparse_attention(query, key, value, mask, quantize="int8", backend="reference")
    truth = masked_attention_oracle(query, key, value, mask)[0]
    assert out.dtype == torch.bfloat16
    assert relative_error(out, truth) < 0.02
    # Without taking the mean away an offset costs digits of every key.
    if offset:
        block = scale_block(mask.kv_block_size)
        plain = restored(quantize_reference(query, key, torch.zeros_like(key_mean(key)), block), block)
        worse = block_sparse_attention(*plain, value.float(), mask, backend="reference")
        assert relative_error(worse, truth) > 1.5 * relative_error(out, truth)


def test_numbers_use_all_steps_and_zeros_stay_zeros() -> None:
    query, key, _ = make_qkv(seq_len_q=100, num_heads=1, head_dim=32)
    query[0, 3] = 0.0
    got = quantize_reference(query, key, key_mean(key), 64)
    assert got.query.abs().amax(-1).flatten().tolist().count(127) == 99
    assert not got.query[0, 3].any() and got.query_scale.isfinite().all()
    assert got.key.abs().amax() == 127 and got.key_scale.shape == (1, 1, 2)
    again_query, again_key = restored(got, 64)
    assert (again_query - query).abs().max() <= got.query_scale.max() * 0.501
    assert (again_key - (key - key_mean(key)[:, None])).abs().max() <= got.key_scale.max() * 0.501


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(number: float) -> None:
    query, key, value = make_qkv(seq_len_q=128, num_heads=1, head_dim=32)
    query[0, 5, 0, 2] = number
    mask = BlockMask.full(128, 128, q_block_size=64, kv_block_size=64)
    out = block_sparse_attention(query, key, value, mask, quantize="int8", backend="reference")
    assert out[0, 5].isnan().all() and out[0, 6:].isfinite().all()


def test_what_cannot_be_asked_for_together() -> None:
    query, key, value = make_qkv(seq_len_q=128, num_heads=1, head_dim=32)
    mask = BlockMask.full(128, 128, q_block_size=64, kv_block_size=64)
    with pytest.raises(ValueError, match='`quantize` must be None or "int8", got "fp8"'):
        block_sparse_attention(query, key, value, mask, quantize="fp8")
    with pytest.raises(UnsupportedBackendError, match="does not go with `return_lse`"):
        block_sparse_attention(query, key, value, mask, quantize="int8", return_lse=True)
    with pytest.raises(UnsupportedBackendError, match="does not go with `key_bias`"):
        block_sparse_attention(query, key, value, mask, quantize="int8", key_bias=torch.zeros(1, 1, 128))
    with pytest.raises(UnsupportedBackendError, match="does not go with gradients"):
        block_sparse_attention(query.requires_grad_(), key, value, mask, quantize="int8")
    with torch.no_grad():
        with pytest.raises(UnsupportedBackendError, match='"sdpa" does not take quantize="int8"'):
            block_sparse_attention(query, key, value, mask, quantize="int8", backend="sdpa")
        assert select_backend(query, key, value, mask, quantize="int8")[0] == "reference"


INTERPRETED = """
import torch
from vidsparse_kernels import block_sparse_attention
from vidsparse_kernels.block_sparse_attention.quantize import (
    key_mean, quantize_reference, restored_query_key)
from vidsparse_kernels.block_sparse_attention.quantize_kernel import quantize_query_key
from vidsparse_kernels.testing import (
    assert_close_to_oracle, make_block_mask, make_qkv, masked_attention_oracle)

for head_dim, kv_block, dtype in ((128, 128, torch.float16), (72, 64, torch.float16), (32, 32, torch.float32)):
    q, k, v = make_qkv(
        batch=2, seq_len_q=100, seq_len_kv=200, num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype,
        contiguous=False)
    k[0, 7, 1, 3], q[0, 6, 2, 1], q[0, 5, 2] = float("nan"), float("inf"), 0.0
    for ours, theirs in zip(quantize_query_key(q, k, kv_block), quantize_reference(q, k, key_mean(k), kv_block)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    k[0, 7, 1, 3], q[0, 6, 2, 1] = 0.0, 0.0
    mask = make_block_mask(
        seq_len_q=100, seq_len_kv=200, num_heads=4, kv_block_size=kv_block, empty_rows=True, full_rows=True)
    ours = block_sparse_attention(q, k, v, mask, quantize="int8", backend="triton")
    restored = (*restored_query_key(q, k, kv_block), v)
    truth = masked_attention_oracle(*(x.double() for x in restored), mask)[0]
    eager = masked_attention_oracle(*restored, mask, dtype=dtype)[0]
    assert_close_to_oracle(ours, eager, truth)
    assert not ours[:, :64].any()
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(params=[pytest.param("triton", marks=on_gpu), pytest.param("hopper", marks=on_gpu)])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    if request.param == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return request.param


@pytest.mark.parametrize("kv_block_size", [64, 128])
@pytest.mark.parametrize("head_dim", [48, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_on_a_gpu(gpu_backend: str, dtype: torch.dtype, head_dim: int, kv_block_size: int) -> None:
    from vidsparse_kernels.block_sparse_attention.quantize_kernel import quantize_query_key

    lengths: dict[str, Any] = {"seq_len_q": 1000, "seq_len_kv": 777, "batch": 2}
    query, key, value = make_qkv(
        **lengths, num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype, device="cuda", contiguous=False
    )
    mask = make_block_mask(
        **lengths, num_heads=4, q_block_size=128, kv_block_size=kv_block_size, empty_rows=True, full_rows=True
    ).to("cuda")
    got = quantize_query_key(query, key, kv_block_size)
    expected = quantize_reference(query, key, key_mean(key), kv_block_size)
    for ours, theirs in zip(got, expected, strict=True):
        if ours.dtype == torch.int8:
            # A product that is halfway between two steps may be rounded once or twice.
            assert (ours.int() - theirs.int()).abs().max() <= 1 and (ours != theirs).float().mean() < 1e-3
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    out = block_sparse_attention(query, key, value, mask, quantize="int8", backend=gpu_backend)
    query, key = restored(got, kv_block_size)
    truth = masked_attention_oracle(query, key, value.float(), mask)[0]
    eager = masked_attention_oracle(query, key, value, mask, dtype=dtype)[0]
    assert_close_to_oracle(out, eager, truth)


def test_what_is_not_finite_stays_visible_on_a_gpu(gpu_backend: str) -> None:
    query, key, value = make_qkv(seq_len_q=512, num_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda")
    query[0, 300, 1, 5] = float("nan")
    mask = BlockMask.full(512, 512, q_block_size=128, kv_block_size=128).to("cuda")
    out = block_sparse_attention(query, key, value, mask, quantize="int8", backend=gpu_backend)
    assert out[0, 300, 1].isnan().all() and int(out.isnan().sum()) == 64
