"""The pooled tail's kernels for Hopper GPUs against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidsparse_kernels import BlockMask, block_sparse_attention, merge_attention_states
from vidsparse_kernels.pooled_tail import (
    block_sparse_attention_with_tail,
    pool_for_tail,
    pooled_tail_attention,
    pooled_tail_merge_,
    select_backend_with_tail,
)
from vidsparse_kernels.testing import assert_close_to_oracle, make_block_mask, make_qkv, masked_attention_oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

BF16, FP16 = torch.bfloat16, torch.float16
ROWS: dict[str, Any] = dict(seq_len_q=700, seq_len_kv=1111, empty_rows=True, full_rows=True, device="cuda")


def lists(dense: bool, kv_block_size: int) -> BlockMask:
    """Every row lists all blocks, or none."""
    listed = torch.full((1, 1, 6, -(-1111 // kv_block_size)), dense)
    sizes: dict[str, Any] = dict(seq_len_q=700, seq_len_kv=1111, q_block_size=128, kv_block_size=kv_block_size)
    return BlockMask.from_dense(listed, **sizes).to("cuda")


MASKS = {
    "128x128": lambda: make_block_mask(q_block_size=128, kv_block_size=128, num_heads=4, batch=2, **ROWS),
    "128x64": lambda: make_block_mask(q_block_size=128, kv_block_size=64, num_heads=4, density=0.15, **ROWS),
    "256x192, one list": lambda: make_block_mask(q_block_size=256, kv_block_size=192, **ROWS),
    "every block": lambda: lists(True, 128),
    "no block": lambda: lists(False, 64),
}


def tail_oracle(query, key, value, mask, dtype, first_order):
    """Dense attention over the virtual tokens of wide pools, and the first-order term, in `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pools = pool_for_tail(key.to(wide), value.to(wide), mask, first_order=first_order, backend="reference")
    rest = BlockMask.from_dense(
        mask.to_dense().logical_not(), seq_len_q=mask.seq_len_q, seq_len_kv=mask.num_kv_blocks,
        q_block_size=mask.q_block_size, kv_block_size=1,
    )  # fmt: skip
    keys, values = (x.transpose(1, 2).to(dtype) for x in (pools.keys, pools.values))
    out, lse = masked_attention_oracle(query, keys, values, rest, key_bias=pools.counts.double().log(), dtype=dtype)
    if pools.first_order is not None:
        matrix = pools.first_order.repeat_interleave(query.shape[2] // pools.keys.shape[1], 1)
        term = torch.einsum("bshd,bhde->bshe", query.to(dtype), (matrix * query.shape[-1] ** -0.5).to(dtype))
        out = out + term.masked_fill((lse == -torch.inf).transpose(1, 2).unsqueeze(-1), 0)
    return out, lse


def oracle(query, key, value, mask, dtype, first_order):
    kept = masked_attention_oracle(query, key, value, mask, dtype=dtype)
    return merge_attention_states(*kept, *tail_oracle(query, key, value, mask, dtype, first_order))


def inputs(dtype, head_dim, contiguous=True):
    return make_qkv(
        batch=2, seq_len_q=700, seq_len_kv=1111, num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype,
        device="cuda", contiguous=contiguous,
    )  # fmt: skip


# Large logits go beyond the peak of the first tile, so that q tiles are done again.
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype", "first_order", "factor"),
    [("128x128", 128, BF16, True, 1), ("128x64", 128, BF16, True, 1), ("128x128", 72, FP16, False, 1),
     ("256x192, one list", 128, FP16, True, 1), ("128x64", 96, BF16, False, 1), ("every block", 128, BF16, True, 1),
     ("no block", 128, BF16, True, 1), ("no block", 128, FP16, False, 20), ("128x128", 128, BF16, True, 30),
     ("128x64", 72, FP16, True, 30)],
    ids=str,
)  # fmt: skip
def test_with_tail(name, head_dim, dtype, first_order, factor):
    q, k, v = inputs(dtype, head_dim, contiguous=head_dim != 96)
    q, mask = q * factor, MASKS[name]()
    truth = oracle(q, k, v, mask, torch.float64, first_order)
    eager = oracle(q, k, v, mask, dtype, first_order)
    options: dict[str, Any] = dict(first_order=first_order, backend="hopper_with_tail")
    out, lse = block_sparse_attention_with_tail(q, k, v, mask, return_lse=True, **options)
    assert_close_to_oracle(out, eager[0], truth[0])
    assert_close_to_oracle(lse, eager[1], truth[1], name="lse")
    # The second call takes the longest lists first.
    assert torch.equal(block_sparse_attention_with_tail(q, k, v, mask, **options), out)


def test_without_a_tail_it_is_block_sparse_attention():
    q, k, v = inputs(BF16, 128)
    mask = MASKS["every block"]()
    want = block_sparse_attention(q, k, v, mask, return_lse=True, backend="hopper")
    got = block_sparse_attention_with_tail(q, k, v, mask, return_lse=True, backend="hopper_with_tail")
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_block_size", [64, 128])
def test_at_the_shape_of_a_video(kv_block_size):
    """Many q tiles for each program, and what "auto" takes."""
    q, k, v = make_qkv(seq_len_q=32_760, num_heads=6, head_dim=128, dtype=BF16, device="cuda")
    mask = make_block_mask(
        seq_len_q=32_760, num_heads=6, density=0.15, q_block_size=128, kv_block_size=kv_block_size, device="cuda"
    )
    assert select_backend_with_tail(q, k, v, mask) == ("hopper_with_tail", "inference on a Hopper GPU")
    got = block_sparse_attention_with_tail(q, k, v, mask, return_lse=True)
    want = pooled_tail_merge_(*block_sparse_attention(q, k, v, mask, return_lse=True), q, k, v, mask)
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(block_sparse_attention_with_tail(q, k, v, mask), got[0])


def test_nothing_waits_for_the_device():
    q, k, v = inputs(BF16, 128)
    mask = MASKS["128x128"]()
    expected = block_sparse_attention_with_tail(q, k, v, mask, backend="hopper_with_tail")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = block_sparse_attention_with_tail(q, k, v, mask, backend="hopper_with_tail")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected)


def test_head_dim_64_is_refused():
    q, k, v = inputs(BF16, 64)
    name, reason = select_backend_with_tail(q, k, v, MASKS["128x128"]())
    assert name == "separate" and reason


@pytest.mark.parametrize(
    ("head_dim", "dtype", "kv_block_size", "first_order", "shift"),
    [(128, BF16, 128, True, 0), (128, FP16, 64, False, 0), (64, FP16, 64, True, 0), (72, BF16, 384, True, 0),
     (128, BF16, 128, True, 10)],
    ids=str,
)  # fmt: skip
def test_pools(head_dim, dtype, kv_block_size, first_order, shift):
    from vidsparse_kernels.pooled_tail.hopper_pooling import hopper_pool

    _, k, v = inputs(dtype, head_dim, contiguous=kv_block_size != 384)
    k, v = k + shift, v - 2 * shift
    mask = make_block_mask(**ROWS, q_block_size=128, kv_block_size=kv_block_size)
    got = hopper_pool(k, v, kv_block_size, first_order=first_order)
    rough, exact = (
        pool_for_tail(k.to(wide), v.to(wide), mask, backend="reference") for wide in (dtype, torch.float64)
    )
    for name, mean in zip(("keys", "values"), got[:2], strict=True):
        assert_close_to_oracle(mean, getattr(rough, name), getattr(exact, name), name=name)
    if first_order:
        typical = k.double().square().mean().sqrt() * v.double().square().mean().sqrt()
        limit = (16 if shift else 8) * torch.finfo(torch.float32).eps * typical
        assert got[2] is not None and exact.first_order is not None
        assert (got[2] - exact.first_order).abs().max() < limit
    again = hopper_pool(k, v, kv_block_size, first_order=first_order)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True) if a is not None and b is not None)


def test_large_inputs_are_pooled_by_it():
    q, k, v = make_qkv(seq_len_q=32_760, num_heads=12, head_dim=128, dtype=BF16, device="cuda")
    mask = make_block_mask(
        seq_len_q=32_760, num_heads=12, density=0.15, q_block_size=128, kv_block_size=128, device="cuda"
    )
    pools, exact = pool_for_tail(k, v, mask), pool_for_tail(k.double(), v.double(), mask, backend="reference")
    assert pools.first_order is not None and exact.first_order is not None
    torch.testing.assert_close(pools.keys.double(), exact.keys, rtol=0, atol=1e-6)
    torch.testing.assert_close(pools.first_order.double(), exact.first_order, rtol=0, atol=1e-6)
    with torch.no_grad():
        tail = pooled_tail_attention(q, k, v, mask, pools=pools)
        torch.testing.assert_close(pooled_tail_attention(q, k, v, mask), tail)
