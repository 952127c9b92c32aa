"""The pooled tail on a real GPU against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidsparse_kernels import BlockMask, block_sparse_attention, merge_attention_states
from vidsparse_kernels.pooled_tail import pool_for_tail, pooled_tail_attention, pooled_tail_merge_
from vidsparse_kernels.testing import (
    assert_close_to_oracle,
    make_block_mask,
    make_qkv,
    make_variable_block_mask,
    masked_attention_oracle,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS: dict[str, Any] = dict(seq_len_q=700, seq_len_kv=1111, empty_rows=True, full_rows=True, device="cuda")
MASKS = {
    "128x64": lambda: make_block_mask(q_block_size=128, kv_block_size=64, num_heads=4, batch=2, **ROWS),
    "64x8": lambda: make_block_mask(q_block_size=64, kv_block_size=8, num_heads=4, **ROWS),
    "100x70, one list": lambda: make_block_mask(q_block_size=100, kv_block_size=70, **ROWS),
    "clusters": lambda: make_variable_block_mask(
        num_q_blocks=9, num_kv_blocks=150, num_heads=4, offsets_heads=4, q_block_size=128, **ROWS
    ),
    "clusters of keys": lambda: make_variable_block_mask(
        q_block_size=128, num_kv_blocks=30, offsets_batch=2, batch=2, **ROWS
    ),
    "clusters of queries": lambda: make_variable_block_mask(
        num_q_blocks=9, q_block_size=64, kv_block_size=16, num_heads=4, **ROWS
    ),
}


def poison() -> None:
    """Leave memory full of NaN where the next arrays will be."""
    junk = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(8, 24)]
    del junk


def oracle(query, key, value, mask, dtype, first_order=True):
    """Dense attention over the virtual tokens, and the first-order term, in `dtype`; differentiable."""
    # Pools are kept wide, whatever the dtype of the products.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pools = pool_for_tail(key.to(wide), value.to(wide), mask, first_order=first_order, backend="reference")
    rest = BlockMask.from_dense(
        mask.to_dense().logical_not(),
        seq_len_q=mask.seq_len_q,
        seq_len_kv=mask.num_kv_blocks,
        q_block_size=mask.q_block_size,
        kv_block_size=1,
        q_offsets=mask.q_offsets,
    )
    keys, values = (x.transpose(1, 2).to(dtype) for x in (pools.keys, pools.values))
    bias = pools.counts.to(torch.float64).log()
    out, lse = masked_attention_oracle(query, keys, values, rest, key_bias=bias, dtype=dtype)
    if first_order:
        assert pools.first_order is not None
        matrix = pools.first_order.repeat_interleave(query.shape[2] // pools.keys.shape[1], 1)
        matrix = (matrix * query.shape[-1] ** -0.5).to(dtype)
        term = torch.einsum("bshd,bhde->bshe", query.to(dtype), matrix)
        out = out + term.masked_fill((lse == -torch.inf).transpose(1, 2).unsqueeze(-1), 0)
    return out, lse


def size(key, value):
    """A typical product of an element of key and one of value."""
    return key.double().square().mean().sqrt() * value.double().square().mean().sqrt()


def inputs(dtype, head_dim, contiguous=True):
    return make_qkv(
        batch=2, seq_len_q=700, seq_len_kv=1111, num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype,
        device="cuda", contiguous=contiguous,
    )  # fmt: skip


# Every test compiles kernels of its own, so these are lists in which every value of a feature meets the others that the
# kernels treat together, not products of all of them: mask, head_dim, dtype, first_order, contiguous.
FORWARD = [
    *((name, 128, BF16, True, number % 2 == 0) for number, name in enumerate(MASKS)),
    ("128x64", 128, BF16, False, False), ("clusters", 128, BF16, False, True),
    ("128x64", 64, FP16, True, False), ("clusters", 64, FP32, True, True), ("64x8", 64, BF16, False, True),
    ("64x8", 72, BF16, True, False), ("clusters of keys", 72, FP16, True, True),
    ("100x70, one list", 72, FP32, False, False), ("clusters of queries", 72, BF16, False, True),
    ("128x64", 256, FP32, True, True), ("clusters", 256, FP16, False, False), ("64x8", 256, BF16, True, True),
    ("clusters of queries", 256, BF16, True, False), ("clusters of keys", 32, BF16, False, True),
    ("64x8", 80, FP16, True, True), ("100x70, one list", 96, BF16, True, False), ("128x64", 128, FP32, False, False),
    ("clusters of keys", 128, FP16, True, False), ("clusters of queries", 128, FP32, True, True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "head_dim", "dtype", "first_order", "contiguous"), FORWARD, ids=str)
def test_forward_and_merge(name, head_dim, dtype, first_order, contiguous):
    mask = MASKS[name]()
    q, k, v = inputs(dtype, head_dim, contiguous=contiguous)
    poison()
    pools = pool_for_tail(k, v, mask, first_order=first_order)
    rough, exact = (
        pool_for_tail(k.to(wide), v.to(wide), mask, backend="reference") for wide in (dtype, torch.float64)
    )
    for field in ("keys", "values"):
        assert_close_to_oracle(*(getattr(x, field) for x in (pools, rough, exact)), name=field)
    if first_order:
        assert pools.first_order is not None and exact.first_order is not None
        assert (pools.first_order - exact.first_order).abs().max() < 8 * torch.finfo(torch.float32).eps * size(k, v)
    out, lse = pooled_tail_attention(q, k, v, mask, first_order=first_order, pools=pools, backend="triton")
    truth = oracle(q, k, v, mask, torch.float64, first_order)
    eager = oracle(q, k, v, mask, dtype, first_order)
    assert_close_to_oracle(out, eager[0], truth[0])
    assert_close_to_oracle(lse, eager[1], truth[1], name="lse")
    kept = block_sparse_attention(q, k, v, mask, return_lse=True, backend="reference")
    exact_merge = merge_attention_states(kept[0].double(), kept[1].double(), *truth)
    rough_merge = merge_attention_states(*kept, *eager)
    merged = pooled_tail_merge_(*kept, q, k, v, mask, first_order=first_order, pools=pools, backend="triton")
    assert_close_to_oracle(merged[0], rough_merge[0], exact_merge[0], name="merged")
    assert_close_to_oracle(merged[1], rough_merge[1], exact_merge[1], name="merged lse")


@pytest.mark.parametrize("name", ["128x64", "100x70, one list", "clusters"])
def test_large_means_cancel_in_fp32(name):
    """The means leave the first-order matrix block by block; what they leave behind is a few units of fp32."""
    mask = MASKS[name]()
    _, k, v = inputs(BF16, 128)
    k, v = k + 10, v - 20
    got = pool_for_tail(k, v, mask).first_order
    exact = pool_for_tail(k.double(), v.double(), mask, backend="reference").first_order
    assert got is not None and exact is not None
    assert (got - exact).abs().max() < 16 * torch.finfo(torch.float32).eps * size(k, v)


GRADIENTS = [
    ("128x64", 128, BF16, True), ("clusters", 128, BF16, True), ("64x8", 128, FP16, False),
    ("clusters of keys", 64, FP16, True), ("clusters of queries", 64, BF16, True), ("128x64", 64, FP32, True),
    ("64x8", 72, FP16, True), ("100x70, one list", 72, BF16, True), ("clusters of keys", 72, FP32, True),
    ("clusters", 256, BF16, True), ("128x64", 256, FP16, True), ("100x70, one list", 256, FP32, False),
    ("clusters of queries", 128, FP32, True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "head_dim", "dtype", "first_order"), GRADIENTS, ids=str)
def test_gradients(name, head_dim, dtype, first_order):
    mask = MASKS[name]()
    q, k, v = inputs(dtype, head_dim)
    generator = torch.Generator("cuda").manual_seed(1)
    grad_out = torch.randn(q.shape, generator=generator, device="cuda").to(dtype)
    grad_lse = torch.randn(2, 4, 700, generator=generator, device="cuda")

    def grads(call, *tensors):
        tensors = [x.detach().clone().requires_grad_() for x in tensors]
        out, lse = call(*tensors)
        lse = torch.where(lse == -torch.inf, 0, lse)
        return torch.autograd.grad((out, lse), tensors, (grad_out.to(out.dtype), grad_lse.to(lse.dtype)))

    def kernels(q, k, v):
        return pooled_tail_attention(q, k, v, mask, first_order=first_order, backend="triton")

    poison()
    got = grads(kernels, q, k, v)
    again = grads(kernels, q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    eager = grads(lambda q, k, v: oracle(q, k, v, mask, dtype, first_order), q, k, v)
    truth = grads(
        lambda q, k, v: oracle(q, k, v, mask, torch.float64, first_order), q.double(), k.double(), v.double()
    )
    for side, *three in zip(("query", "key", "value"), got, eager, truth, strict=True):
        assert_close_to_oracle(*three, name=side)


def test_nothing_waits_for_the_device_and_runs_agree():
    q, k, v = inputs(BF16, 128)
    for make in MASKS.values():
        mask = make()
        expected = pooled_tail_attention(q, k, v, mask)
        mask = make()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = pooled_tail_attention(q, k, v, mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_captured_in_a_graph():
    q, k, v = inputs(BF16, 128)
    mask = MASKS["128x64"]()
    expected = pooled_tail_attention(q, k, v, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = pooled_tail_attention(q, k, v, mask)
    for x in got:
        x.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kv_block_size", [64, 128])
def test_descriptors_at_the_shape_of_a_video(kv_block_size):
    """Large enough for tensor descriptors and many splits; the last rows against float64."""
    q, k, v = make_qkv(seq_len_q=32_760, num_heads=12, head_dim=128, dtype=torch.bfloat16, device="cuda")
    sizes: dict[str, Any] = dict(q_block_size=128, kv_block_size=kv_block_size)
    mask = make_block_mask(seq_len_q=32_760, num_heads=12, density=0.15, device="cuda", **sizes)
    out, lse = pooled_tail_attention(q, k, v, mask)
    rows = slice(32_760 - 32_760 % 128, None)
    last = BlockMask.from_dense(
        mask.to_dense()[:, :, -1:], seq_len_q=32_760 % 128, seq_len_kv=32_760, **sizes
    )  # fmt: skip
    truth = oracle(q[:, rows], k, v, last, torch.float64)
    eager = oracle(q[:, rows], k, v, last, torch.bfloat16)
    assert_close_to_oracle(out[:, rows], eager[0], truth[0])
    assert_close_to_oracle(lse[..., rows], eager[1], truth[1])


def test_beyond_int32():
    q, k, v = (torch.randn(1, 150_000, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (128, 128, 128))
    assert q.numel() > 2**31
    counts, indices = torch.zeros(1, 1, 1172, dtype=torch.int32), torch.zeros(1, 1, 1172, 1, dtype=torch.int32)
    sizes: dict[str, Any] = dict(seq_len_kv=150_000, q_block_size=128, kv_block_size=64)
    mask = BlockMask.from_indices(counts, indices, seq_len_q=150_000, **sizes).to("cuda")
    out, lse = pooled_tail_attention(q, k, v, mask)
    last = BlockMask.from_indices(counts[..., :1], indices[:, :, :1], seq_len_q=64, **sizes).to("cuda")
    part_q, part_k, part_v = (x[..., -1:, :] for x in (q[:, -64:], k, v))
    truth = oracle(part_q, part_k, part_v, last, torch.float64)
    eager = oracle(part_q, part_k, part_v, last, torch.bfloat16)
    assert_close_to_oracle(out[:, -64:, -1:], eager[0], truth[0])
    assert_close_to_oracle(lse[:, -1:, -64:], eager[1], truth[1])
