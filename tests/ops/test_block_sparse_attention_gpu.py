"""Triton kernels on a real GPU against float64."""

from __future__ import annotations

import pytest
import torch

from vidsparse_kernels import BlockMask, block_sparse_attention, select_backend
from vidsparse_kernels.testing import assert_close_to_oracle, make_block_mask, make_qkv, masked_attention_oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SHAPES = [
    dict(seq_len_q=63),
    dict(seq_len_q=111, seq_len_kv=205, batch=2),
    dict(seq_len_q=2016, num_heads=4, num_kv_heads=2),
    dict(seq_len_q=1000, seq_len_kv=77, num_heads=3),
    dict(seq_len_q=640, seq_len_kv=1280, num_heads=6, num_kv_heads=1, batch=2),
]
BLOCKS = [(128, 128), (128, 64), (64, 64), (64, 32), (32, 128), (16, 16), (48, 80)]


def check(q, k, v, mask, *, key_bias=None, descriptors=None):
    from vidsparse_kernels.block_sparse_attention.forward import config_for, triton_forward

    truth, truth_lse = masked_attention_oracle(q, k, v, mask, key_bias=key_bias)
    eager, eager_lse = masked_attention_oracle(q, k, v, mask, key_bias=key_bias, dtype=q.dtype)
    if descriptors is None:
        out, lse = block_sparse_attention(q, k, v, mask, key_bias=key_bias, return_lse=True, backend="triton")
    else:
        config = config_for(q, k, v, torch.empty_like(q), mask, descriptors=descriptors)
        out, lse = triton_forward(
            q, k, v, mask, scale=q.shape[-1] ** -0.5, key_bias=key_bias, return_lse=True, config=config
        )
    assert lse is not None
    assert_close_to_oracle(out, eager, truth)
    assert_close_to_oracle(lse, eager_lse, truth_lse, name="lse")


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, descriptors):
    q, k, v = make_qkv(**shape, dtype=dtype, device="cuda")
    mask = make_block_mask(
        seq_len_q=q.shape[1],
        seq_len_kv=k.shape[1],
        num_heads=q.shape[2],
        empty_rows=True,
        full_rows=True,
        device="cuda",
    )
    check(q, k, v, mask, descriptors=descriptors)


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 72, 80, 96, 100, 128, 192, 256])
def test_head_dims(head_dim, descriptors):
    q, k, v = make_qkv(seq_len_q=333, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(seq_len_q=333, q_block_size=128, empty_rows=True, full_rows=True, device="cuda")
    check(q, k, v, mask, descriptors=descriptors)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_block_sizes_and_broadcast(blocks, lead):
    q, k, v = make_qkv(batch=2, seq_len_q=500, seq_len_kv=517, num_heads=4, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(
        seq_len_q=500, seq_len_kv=517, q_block_size=blocks[0], kv_block_size=blocks[1], batch=lead[0],
        num_heads=lead[1], empty_rows=True, full_rows=True, device="cuda",
    )  # fmt: skip
    check(q, k, v, mask)


def test_strided_inputs_and_bias():
    q, k, v = make_qkv(batch=2, seq_len_q=300, num_heads=3, dtype=torch.bfloat16, device="cuda", contiguous=False)
    mask = make_block_mask(seq_len_q=300, num_heads=3, full_rows=True, device="cuda")
    bias = torch.randn(2, 3, 300, device="cuda")
    bias[:, :, -70:] = -torch.inf
    check(q, k, v, mask, key_bias=bias)
    q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    assert q.stride(3) != 1
    check(q, k, v, mask, key_bias=bias[:1, :1])


def test_expanded_batch_and_rows_not_aligned():
    q, k, v = make_qkv(seq_len_q=200, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(seq_len_q=200, device="cuda")
    check(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), mask)
    wide = torch.randn(1, 200, 2, 67, device="cuda").to(torch.bfloat16)[..., 1:65]
    check(wide, wide, wide, mask)


def test_no_block_at_all():
    q, k, v = make_qkv(seq_len_q=130, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(seq_len_q=130, density=0.0, device="cuda")
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="triton")
    assert torch.equal(out, torch.zeros_like(out))
    assert bool((lse == -torch.inf).all())


def test_offsets_beyond_int32():
    seq_len, num_heads, head_dim = 150_000, 128, 128
    q, k, v = (torch.randn(1, seq_len, num_heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert q.numel() > 2**31
    blocks = -(-seq_len // 128)
    lists = torch.arange(blocks, device="cuda").view(1, 1, -1, 1)
    mask = BlockMask.from_indices(
        torch.ones(1, 1, blocks, device="cuda", dtype=torch.int32), lists,
        seq_len_q=seq_len, seq_len_kv=seq_len, q_block_size=128, kv_block_size=128,
    )  # fmt: skip
    from vidsparse_kernels.block_sparse_attention.forward import config_for, triton_forward

    tail = slice(seq_len - seq_len % 128, None)
    local = BlockMask.full(seq_len % 128, seq_len % 128, q_block_size=128, kv_block_size=128, device="cuda")
    truth, _ = masked_attention_oracle(q[:, tail], k[:, tail], v[:, tail], local)
    eager, _ = masked_attention_oracle(q[:, tail], k[:, tail], v[:, tail], local, dtype=q.dtype)
    for descriptors in (True, False):
        config = config_for(q, k, v, q, mask, descriptors=descriptors)
        out, _ = triton_forward(q, k, v, mask, scale=head_dim**-0.5, key_bias=None, return_lse=False, config=config)
        assert_close_to_oracle(out[:, tail], eager, truth)


def test_wan_length():
    """Wan 480p, 81 frames: the oracle is computed for the q-blocks at both ends."""
    seq_len = 32_760
    q, k, v = make_qkv(seq_len_q=seq_len, num_heads=12, head_dim=128, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(seq_len_q=seq_len, q_block_size=128, num_heads=12, density=0.2, device="cuda")
    assert select_backend(q, k, v, mask, return_lse=True)[0] == "triton"
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    for rows in (slice(0, 256), slice(seq_len - seq_len % 128 - 128, seq_len)):
        blocks = slice(rows.start // 128, -(-rows.stop // 128))
        part = BlockMask.from_dense(
            mask.to_dense()[:, :, blocks], seq_len_q=rows.stop - rows.start, seq_len_kv=seq_len,
            q_block_size=128, kv_block_size=64,
        )  # fmt: skip
        truth, truth_lse = masked_attention_oracle(q[:, rows], k, v, part)
        eager, eager_lse = masked_attention_oracle(q[:, rows], k, v, part, dtype=torch.bfloat16)
        assert_close_to_oracle(out[:, rows], eager, truth)
        assert_close_to_oracle(lse[:, :, rows], eager_lse, truth_lse, name="lse")


def test_gradients_fall_to_the_reference():
    q, k, v = (x.requires_grad_() for x in make_qkv(seq_len_q=200, device="cuda"))
    mask = make_block_mask(seq_len_q=200, device="cuda")
    assert select_backend(q, k, v, mask)[0] == "reference"
    out = block_sparse_attention(q, k, v, mask)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    truth, _ = masked_attention_oracle(q, k, v, mask)
    expected = torch.autograd.grad(truth.square().sum(), (q, k, v))
    eager, _ = masked_attention_oracle(q, k, v, mask, dtype=torch.float32)
    near = torch.autograd.grad(eager.square().sum(), (q, k, v))
    for name, got, e, t in zip(("query", "key", "value"), grads, near, expected, strict=True):
        assert_close_to_oracle(got, e, t, name=f"gradient of {name}")


def test_results_repeat_bit_for_bit():
    q, k, v = make_qkv(seq_len_q=2016, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(seq_len_q=2016, device="cuda")
    first, second = (block_sparse_attention(q, k, v, mask, backend="triton") for _ in range(2))
    assert torch.equal(first, second)
