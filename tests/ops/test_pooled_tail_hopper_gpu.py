"""The pooled tail's kernel for Hopper GPUs against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidsparse_kernels import BlockMask, block_sparse_attention, merge_attention_states
from vidsparse_kernels.pooled_tail import pool_for_tail
from vidsparse_kernels.testing import (
    assert_close_to_oracle,
    make_block_mask,
    make_qkv,
    make_variable_block_mask,
    masked_attention_oracle,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

BF16, FP16 = torch.bfloat16, torch.float16
ROWS: dict[str, Any] = dict(seq_len_q=700, seq_len_kv=1111, empty_rows=True, full_rows=True, device="cuda")
MASKS = {
    "128x64": lambda: make_block_mask(q_block_size=128, kv_block_size=64, num_heads=4, batch=2, **ROWS),
    "256x5": lambda: make_block_mask(q_block_size=256, kv_block_size=5, **ROWS),
    "clusters": lambda: make_variable_block_mask(
        q_block_size=128, num_kv_blocks=150, num_heads=4, offsets_heads=4, **ROWS
    ),
    "clusters of samples": lambda: make_variable_block_mask(
        q_block_size=128, num_kv_blocks=70, offsets_batch=2, batch=2, **ROWS
    ),
}


def oracle(query, pools, mask, dtype):
    """Dense attention over the virtual tokens of float64 pools, and the first-order term, in `dtype`."""
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


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype", "first_order", "block_n"),
    [("128x64", 128, BF16, True, 64), ("128x64", 128, FP16, False, 128), ("256x5", 128, BF16, True, 128),
     ("clusters", 64, BF16, True, 64), ("clusters of samples", 72, FP16, True, 64),
     ("clusters of samples", 64, FP16, False, 128)],
    ids=str,
)  # fmt: skip
def test_tail_and_merge(name, head_dim, dtype, first_order, block_n):
    from vidsparse_kernels.block_sparse_attention.configs import ForwardConfig
    from vidsparse_kernels.pooled_tail.forward import triton_tail

    mask = MASKS[name]()
    q, k, v = make_qkv(
        batch=2, seq_len_q=700, seq_len_kv=1111, num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype,
        device="cuda",
    )  # fmt: skip
    pools = pool_for_tail(k, v, mask, first_order=first_order)
    exact = pool_for_tail(k.double(), v.double(), mask, first_order=first_order, backend="reference")
    truth, eager = oracle(q, exact, mask, torch.float64), oracle(q, pools, mask, dtype)
    options: dict[str, Any] = dict(
        scale=head_dim**-0.5, first_order=first_order, config=ForwardConfig(128, block_n, 4, 2, True), hopper=True
    )
    out, lse = triton_tail(q, pools, mask, **options)
    assert_close_to_oracle(out, eager[0], truth[0])
    assert_close_to_oracle(lse, eager[1], truth[1], name="lse")
    again = triton_tail(q, pools, mask, **options)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    kept = block_sparse_attention(q, k, v, mask, return_lse=True, backend="reference")
    exact_merge = merge_attention_states(kept[0].double(), kept[1].double(), *truth)
    rough_merge = merge_attention_states(*kept, *eager)
    merged = triton_tail(q, pools, mask, state=kept, **options)
    assert merged[0] is kept[0] and merged[1] is kept[1]
    assert_close_to_oracle(merged[0], rough_merge[0], exact_merge[0], name="merged")
    assert_close_to_oracle(merged[1], rough_merge[1], exact_merge[1], name="merged lse")


def test_many_tiles_for_each_program():
    """More tiles of queries than programs, each with the stages of the pipeline at other places."""
    from vidsparse_kernels.pooled_tail.forward import triton_tail

    q, k, v = make_qkv(seq_len_q=10_000, num_heads=6, head_dim=128, dtype=BF16, device="cuda")
    mask = make_block_mask(seq_len_q=10_000, q_block_size=128, kv_block_size=64, num_heads=6, device="cuda")
    pools = pool_for_tail(k, v, mask)
    for state in (None, block_sparse_attention(q, k, v, mask, return_lse=True)):
        states = [None if state is None else (state[0].clone(), state[1].clone()) for _ in range(2)]
        got, want = (
            triton_tail(q, pools, mask, scale=128**-0.5, first_order=True, state=x, hopper=hopper)
            for x, hopper in zip(states, (True, False), strict=True)
        )
        torch.testing.assert_close(got[0].float(), want[0].float(), rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
