"""Triton kernels on a real GPU against float64."""

from __future__ import annotations

import pytest
import torch

from vidsparse_kernels import BlockMask, block_sparse_attention, select_backend
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

SHAPES = [
    dict(seq_len_q=63),
    dict(seq_len_q=111, seq_len_kv=205, batch=2),
    dict(seq_len_q=2016, num_heads=4, num_kv_heads=2),
    dict(seq_len_q=1000, seq_len_kv=77, num_heads=3),
    dict(seq_len_q=640, seq_len_kv=1280, num_heads=6, num_kv_heads=1, batch=2),
]
BLOCKS = [(128, 128), (128, 64), (64, 64), (64, 32), (32, 128), (16, 16), (48, 80)]


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)


def check(q, k, v, mask, *, key_bias=None, descriptors=None, backend="triton"):
    from vidsparse_kernels.block_sparse_attention.forward import config_for, triton_forward

    truth, truth_lse = masked_attention_oracle(q, k, v, mask, key_bias=key_bias)
    eager, eager_lse = masked_attention_oracle(q, k, v, mask, key_bias=key_bias, dtype=q.dtype)
    if descriptors is None:
        out, lse = block_sparse_attention(q, k, v, mask, key_bias=key_bias, return_lse=True, backend=backend)
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


@on_hopper
@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("blocks", [(128, 128), (128, 64), (256, 192)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_bias(head_dim, blocks, lead):
    """Lengths that are multiples of a tile, of 4 and of nothing."""
    for seq_len_q, seq_len_kv in ((300, 640), (500, 516), (129, 517)):
        q, k, v = make_qkv(
            batch=2, seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, num_heads=4, num_kv_heads=2, head_dim=head_dim,
            dtype=torch.bfloat16, device="cuda",
        )  # fmt: skip
        mask = make_block_mask(
            seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, q_block_size=blocks[0], kv_block_size=blocks[1], num_heads=4,
            density=0.6, empty_rows=seq_len_q > blocks[0], full_rows=True, device="cuda",
        )  # fmt: skip
        bias = 2 * torch.randn(*lead, seq_len_kv, device="cuda")
        check(q, k, v, mask, key_bias=bias, backend="hopper")
        bias[..., ::3] = -torch.inf
        check(q, k, v, mask, key_bias=bias, backend="hopper")


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_bias_that_shuts_whole_tiles(head_dim):
    """A list is walked from its end, so shut tiles are the first ones, the middle ones, the last ones, or all."""
    q, k, v = make_qkv(
        batch=2, seq_len_q=300, seq_len_kv=700, num_heads=3, head_dim=head_dim, dtype=torch.float16, device="cuda"
    )
    mask = BlockMask.full(300, 700, q_block_size=128, kv_block_size=128, device="cuda")
    for shut in (slice(690, 700), slice(400, 700), slice(128, 512), slice(0, 256), slice(0, 700), slice(0, 699)):
        bias = torch.randn(2, 3, 700, device="cuda")
        bias[1, 1:, shut] = -torch.inf
        check(q, k, v, mask, key_bias=bias, backend="hopper")
        every = bias.masked_fill(bias.isfinite(), 0.0)
        check(q, k, v, mask, key_bias=every[1:, 1:2], backend="hopper")


@on_hopper
def test_hopper_bias_with_any_strides():
    q, k, v = make_qkv(batch=2, seq_len_q=200, seq_len_kv=400, num_heads=3, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(
        seq_len_q=200, seq_len_kv=400, q_block_size=128, kv_block_size=128, density=0.7, full_rows=True, device="cuda"
    )
    wide = torch.randn(2, 3, 2 * 400 + 3, device="cuda")
    views = (wide[..., 1:401], wide[..., ::2][..., :400], wide[:1, :, :400], wide[:, :1, 4:404].expand(-1, 3, -1))
    transposed = torch.randn(400, 3, 2, device="cuda").permute(2, 1, 0)
    for bias in (*views, transposed, torch.randn(2, 3, 400, device="cuda", dtype=torch.float64)):
        check(q, k, v, mask, key_bias=bias, backend="hopper")


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_gradients_with_bias(head_dim):
    """Its LSE goes into the portable backward; text comes last, and its padding is shut."""
    q, k, v = (
        x.requires_grad_()
        for x in make_qkv(batch=2, seq_len_q=700, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    )
    mask = make_block_mask(seq_len_q=700, q_block_size=128, kv_block_size=128, full_rows=True, device="cuda")
    bias = torch.zeros(2, 1, 700, device="cuda")
    bias[0, :, 500:], bias[1, :, 650:] = -torch.inf, -torch.inf
    grad = torch.randn(q.shape, device="cuda")
    outputs = [
        block_sparse_attention(q, k, v, mask, key_bias=bias, return_lse=True, backend="hopper"),
        block_sparse_attention(q, k, v, mask, key_bias=bias, return_lse=True, backend="triton"),
        *(masked_attention_oracle(q, k, v, mask, key_bias=bias, dtype=d) for d in (torch.bfloat16, torch.float64)),
    ]
    grads = []
    for out, lse in outputs:
        loss = (out * grad.to(out.dtype)).sum() + lse.masked_fill(lse == -torch.inf, 0.0).sin().sum()
        grads.append(torch.autograd.grad(loss, (q, k, v)))
    for name, hopper, portable, eager, truth in zip(("query", "key", "value"), *grads, strict=True):
        assert_close_to_oracle(hopper, eager, truth, name=f"gradient of {name}")
        assert_close_to_oracle(portable, eager, truth, name=f"portable gradient of {name}")
    assert not grads[0][1][0, 500:].any() and not grads[0][2][1, 650:].any()


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
    # Views into one array, so that the inputs have gaps between heads; the output has none.
    fused = torch.randn(1, seq_len, num_heads, 3 * head_dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.split(head_dim, -1)
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
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert select_backend(q, k, v, mask, return_lse=True)[0] == ("hopper" if hopper else "triton")
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


def check_gradients(q, k, v, mask, *, key_bias=None, descriptors=None, config=None, seed=0):
    """All gradients of a loss that uses the output and the LSE, with a strided grad_out."""
    from vidsparse_kernels.block_sparse_attention.backward import backward_config_for, triton_backward
    from vidsparse_kernels.block_sparse_attention.forward import triton_forward

    generator = torch.Generator("cuda").manual_seed(seed)
    batch, seq_len_q, num_heads, head_dim = q.shape
    grad_out = torch.randn(batch, num_heads, seq_len_q, head_dim, generator=generator, device="cuda").to(q.dtype)
    grad_out = grad_out.transpose(1, 2)
    grad_lse = torch.randn(batch, num_heads, seq_len_q, generator=generator, device="cuda")

    def by_autograd(dtype):
        query, key, value = tensors = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = masked_attention_oracle(query, key, value, mask, key_bias=key_bias, dtype=dtype)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        loss = (out * grad_out.to(dtype)).sum() + (lse * grad_lse.to(dtype)).sum()
        return torch.autograd.grad(loss, tensors)

    scale = head_dim**-0.5
    out, lse = triton_forward(q, k, v, mask, scale=scale, key_bias=key_bias, return_lse=True)
    assert lse is not None
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, torch.nan)
    if config is None and descriptors is not None:
        config = backward_config_for(q, k, v, grad_out, mask, descriptors=descriptors)
    # Freed memory is handed out again: what is not written holds NaN.
    poison = [torch.full_like(x, torch.nan) for x in (q, k, v, q, k, v)]
    del poison
    grads = triton_backward(grad_out, grad_lse, q, k, v, out, lse, mask, scale=scale, key_bias=key_bias, config=config)
    grad_lse = torch.nan_to_num(grad_lse)
    names = ("query", "key", "value")
    for name, got, eager, truth in zip(names, grads, by_autograd(q.dtype), by_autograd(torch.float64), strict=True):
        assert_close_to_oracle(got, eager, truth, name=f"gradient of {name}")
    return grads


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_shapes(shape, dtype, descriptors):
    q, k, v = make_qkv(**shape, dtype=dtype, device="cuda")
    mask = make_block_mask(
        seq_len_q=q.shape[1],
        seq_len_kv=k.shape[1],
        q_block_size=128,
        num_heads=q.shape[2],
        empty_rows=q.shape[1] > 128,
        full_rows=True,
        device="cuda",
    )
    check_gradients(q, k, v, mask, descriptors=descriptors)


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("blocks", [(128, 128), (128, 64)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 40, 64, 72, 80, 96, 100, 128, 192, 256])
def test_gradients_of_head_dims(head_dim, blocks, descriptors):
    q, k, v = make_qkv(seq_len_q=333, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(
        seq_len_q=333, q_block_size=blocks[0], kv_block_size=blocks[1], empty_rows=True, full_rows=True, device="cuda"
    )
    check_gradients(q, k, v, mask, descriptors=descriptors)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_gradients_of_block_sizes_and_broadcast(blocks, lead):
    q, k, v = make_qkv(
        batch=2, seq_len_q=500, seq_len_kv=517, num_heads=4, num_kv_heads=2, dtype=torch.bfloat16, device="cuda"
    )
    mask = make_block_mask(
        seq_len_q=500, seq_len_kv=517, q_block_size=blocks[0], kv_block_size=blocks[1], batch=lead[0],
        num_heads=lead[1], empty_rows=True, full_rows=True, device="cuda",
    )  # fmt: skip
    check_gradients(q, k, v, mask)


def test_gradients_of_strided_inputs_and_bias():
    q, k, v = make_qkv(batch=2, seq_len_q=300, num_heads=3, dtype=torch.bfloat16, device="cuda", contiguous=False)
    mask = make_block_mask(seq_len_q=300, num_heads=3, full_rows=True, device="cuda")
    bias = torch.randn(2, 3, 300, device="cuda")
    bias[:, :, -70:] = -torch.inf
    for descriptors in (True, False):
        check_gradients(q, k, v, mask, key_bias=bias, descriptors=descriptors)
    q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    assert q.stride(3) != 1
    check_gradients(q, k, v, mask, key_bias=bias[:1, :1])


def test_gradients_of_keys_that_nobody_selects():
    q, k, v = make_qkv(seq_len_q=400, head_dim=128, dtype=torch.bfloat16, device="cuda")
    dense = torch.ones(1, 2, 4, 4, dtype=torch.bool, device="cuda")
    dense[:, 0, :, 1], dense[:, 1, 2] = False, False
    mask = BlockMask.from_dense(dense, seq_len_q=400, seq_len_kv=400, q_block_size=128, kv_block_size=128)
    for descriptors in (True, False):
        grads = check_gradients(q, k, v, mask, descriptors=descriptors)
        assert not grads[0][:, 256:384, 1].any()
        assert not grads[1][:, 128:256, 0].any() and not grads[2][:, 128:256, 0].any()


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        (dict(head_dim=128), dict(num_q_blocks=9, num_kv_blocks=30, q_block_size=128, kv_block_size=128)),
        (dict(head_dim=128), dict(num_q_blocks=40, num_kv_blocks=40, offsets_heads=4)),
        (dict(head_dim=64), dict(num_q_blocks=9, q_block_size=128, batch=2, num_heads=4)),
        (dict(head_dim=72, num_kv_heads=2), dict(num_kv_blocks=12, q_block_size=32, offsets_batch=2)),
        # Query heads that share a kv head cut its keys differently.
        (dict(head_dim=64, num_kv_heads=2), dict(num_q_blocks=700, num_kv_blocks=12, offsets_heads=4)),
    ],
    ids=["large tiles", "per head", "q only", "kv only", "shared kv heads"],
)
def test_variable_blocks_and_their_gradients(shape, blocks, descriptors):
    q, k, v = make_qkv(
        batch=2, seq_len_q=500, seq_len_kv=701, dtype=torch.bfloat16, device="cuda", **{"num_heads": 4, **shape}
    )
    for density in (0.3, 1.0):
        mask = make_variable_block_mask(
            seq_len_q=500, seq_len_kv=701, density=density, empty_rows=True, full_rows=True, device="cuda", **blocks
        )
        check(q, k, v, mask, descriptors=descriptors)
        check_gradients(q, k, v, mask, descriptors=descriptors)


def test_gradients_of_variable_blocks_by_autograd():
    """Strides and a bias, through the public function; the same bits again."""
    inputs = make_qkv(batch=2, seq_len_q=333, num_heads=4, dtype=torch.bfloat16, device="cuda", contiguous=False)
    mask = make_variable_block_mask(
        seq_len_q=333, num_q_blocks=9, num_kv_blocks=20, num_heads=4, offsets_heads=4, full_rows=True, device="cuda"
    )
    bias = torch.randn(2, 4, 333, device="cuda")
    bias[:, :, ::5] = -torch.inf
    q, k, v = tensors = [x.requires_grad_() for x in inputs]
    assert select_backend(q, k, v, mask, key_bias=bias) == ("triton", "gradients are needed on cuda")
    grad = make_qkv(batch=2, seq_len_q=333, num_heads=4, dtype=torch.bfloat16, device="cuda", seed=1)[0]
    outputs = [
        block_sparse_attention(q, k, v, mask, key_bias=bias),
        block_sparse_attention(q, k, v, mask, key_bias=bias),
        *(masked_attention_oracle(q, k, v, mask, key_bias=bias, dtype=d)[0] for d in (torch.bfloat16, torch.float64)),
    ]
    grads = [torch.autograd.grad((out * grad.to(out.dtype)).sum(), tensors) for out in outputs]
    for name, got, again, eager, truth in zip(("query", "key", "value"), *grads, strict=True):
        assert torch.equal(got, again), name
        assert_close_to_oracle(got, eager, truth, name=f"gradient of {name}")


def test_one_compilation_serves_every_shape():
    from vidsparse_kernels.block_sparse_attention import backward

    kernels = (
        backward.block_sparse_backward_rows_kernel,
        backward.block_sparse_backward_query_kernel,
        backward.block_sparse_backward_key_value_kernel,
    )

    def compiled():
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    counts = []
    # Lengths and numbers of blocks that are 1, multiples of 16 and neither.
    for seq_len, num_q_blocks in ((48, 3), (111, 16), (256, 17), (77, 1)):
        q, k, v = make_qkv(seq_len_q=seq_len, num_heads=2, dtype=torch.bfloat16, device="cuda")
        mask = make_variable_block_mask(seq_len_q=seq_len, num_q_blocks=num_q_blocks, full_rows=True, device="cuda")
        check_gradients(q, k, v, mask, descriptors=False)
        counts.append(compiled())
    assert counts[1:] == counts[:1] * 3


def test_gradients_by_autograd():
    q, k, v = (x.requires_grad_() for x in make_qkv(seq_len_q=200, device="cuda"))
    mask = make_block_mask(seq_len_q=200, full_rows=True, device="cuda")
    assert select_backend(q, k, v, mask) == ("triton", "gradients are needed on cuda")
    out = block_sparse_attention(q, k, v, mask)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    truth, _ = masked_attention_oracle(q, k, v, mask)
    expected = torch.autograd.grad(truth.square().sum(), (q, k, v))
    eager, _ = masked_attention_oracle(q, k, v, mask, dtype=torch.float32)
    near = torch.autograd.grad(eager.square().sum(), (q, k, v))
    for name, got, e, t in zip(("query", "key", "value"), grads, near, expected, strict=True):
        assert_close_to_oracle(got, e, t, name=f"gradient of {name}")


def test_gradient_offsets_beyond_int32():
    """Only the last q-block has a gradient, and only it reads the last kv-block."""
    from vidsparse_kernels.block_sparse_attention.backward import backward_config_for, triton_backward
    from vidsparse_kernels.block_sparse_attention.forward import triton_forward

    seq_len, num_heads, head_dim = 150_000, 128, 128
    # Views into one array, so that the inputs have gaps between heads; the output has none.
    fused = torch.randn(1, seq_len, num_heads, 3 * head_dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.split(head_dim, -1)
    assert q.numel() > 2**31
    blocks = -(-seq_len // 128)
    mask = BlockMask.from_indices(
        torch.ones(1, 1, blocks, device="cuda", dtype=torch.int32),
        torch.arange(blocks, device="cuda").view(1, 1, -1, 1),
        seq_len_q=seq_len, seq_len_kv=seq_len, q_block_size=128, kv_block_size=128,
    )  # fmt: skip
    scale = head_dim**-0.5
    out, lse = triton_forward(q, k, v, mask, scale=scale, key_bias=None, return_lse=True)
    assert lse is not None
    tail = slice(seq_len - seq_len % 128, None)
    grad_out = torch.zeros_like(q)
    grad_out[:, tail] = torch.randn(grad_out[:, tail].shape, device="cuda", dtype=q.dtype)
    local = BlockMask.full(seq_len % 128, seq_len % 128, q_block_size=128, kv_block_size=128, device="cuda")

    def by_autograd(dtype):
        query, key, value = tensors = [x[:, tail].detach().to(dtype).requires_grad_() for x in (q, k, v)]
        result, _ = masked_attention_oracle(query, key, value, local, dtype=dtype)
        return torch.autograd.grad((result * grad_out[:, tail].to(dtype)).sum(), tensors)

    eager, truth = by_autograd(q.dtype), by_autograd(torch.float64)
    for descriptors in (True, False):
        config = backward_config_for(q, k, v, grad_out, mask, descriptors=descriptors)
        grads = triton_backward(grad_out, None, q, k, v, out, lse, mask, scale=scale, key_bias=None, config=config)
        for name, got, e, t in zip(("query", "key", "value"), grads, eager, truth, strict=True):
            assert_close_to_oracle(got[:, tail], e, t, name=f"gradient of {name}")
            assert not got[:, : tail.start].any()


def test_gradients_repeat_bit_for_bit():
    q, k, v = make_qkv(seq_len_q=2016, num_heads=4, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(seq_len_q=2016, num_heads=4, device="cuda")
    tensors = [x.requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    runs = [torch.autograd.grad(block_sparse_attention(q, k, v, mask), tensors, grad) for _ in range(5)]
    for name, first, *others in zip(("query", "key", "value"), *runs, strict=True):
        assert all(torch.equal(first, other) for other in others), name


def test_results_repeat_bit_for_bit():
    q, k, v = make_qkv(seq_len_q=2016, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(seq_len_q=2016, device="cuda")
    first, second = (block_sparse_attention(q, k, v, mask, backend="triton") for _ in range(2))
    assert torch.equal(first, second)
