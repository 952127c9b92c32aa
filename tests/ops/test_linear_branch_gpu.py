"""The linear branch on a real GPU against float64."""

from __future__ import annotations

import pytest
import torch

from vidsparse_kernels import BlockMask
from vidsparse_kernels.linear_branch import add_linear_branch, linear_branch
from vidsparse_kernels.linear_branch.oracle import linear_branch_oracle
from vidsparse_kernels.testing import (
    assert_close_to_oracle,
    make_block_mask,
    make_qkv,
    make_variable_block_mask,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(inputs, mask, feature_map="softmax", eps=1e-5, descriptors=None):
    """Output and gradients; `descriptors` as for `config_for`."""
    from vidsparse_kernels.linear_branch.backward import backward_config_for, triton_backward
    from vidsparse_kernels.linear_branch.forward import config_for, triton_forward

    q, k, v = inputs
    grad_out = torch.randn(q.transpose(1, 2).shape, device="cuda").to(q.dtype).transpose(1, 2)
    if descriptors is None:
        tensors = [x.detach().requires_grad_() for x in inputs]
        coverage = "all" if mask is None else "non_selected"
        out = linear_branch(
            *tensors, block_mask=mask, feature_map=feature_map, coverage=coverage, eps=eps, backend="triton"
        )
        got = (out.detach(), *torch.autograd.grad(out, tensors, grad_out))
    else:
        forward = config_for(q, k, v, mask, descriptors=descriptors)
        backward = backward_config_for(q, k, v, mask, descriptors=descriptors)
        saved = triton_forward(q, k, v, mask, feature_map=feature_map, eps=eps, config=forward)
        got = (
            saved[0],
            *triton_backward(
                grad_out, q, k, v, *saved, mask, feature_map=feature_map, eps=eps, config=backward
            ),
        )  # fmt: skip
    results = []
    for dtype in (q.dtype, torch.float64):
        tensors = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = linear_branch_oracle(*tensors, excluded=mask, feature_map=feature_map, eps=eps, dtype=dtype)
        results.append((out.detach(), *torch.autograd.grad(out, tensors, grad_out.to(dtype))))
    names = ("output", "grad query", "grad key", "grad value")
    for name, g, e, t in zip(names, got, *results, strict=True):
        assert_close_to_oracle(g, e, t, name=name)


def mask_for(q, k, **options):
    options = {"num_heads": q.shape[2], "empty_rows": True, "full_rows": True, "density": 0.2, **options}
    return make_block_mask(seq_len_q=q.shape[1], seq_len_kv=k.shape[1], device="cuda", **options)


# Every test compiles kernels of its own (six a row, and seconds each), so these are lists in which every value of a
# feature meets every value of the others that the kernels treat together, not products of all of them.
@pytest.mark.parametrize(
    ("feature_map", "dtype", "descriptors"),
    [("softmax", BF16, True), ("softmax", FP16, False), ("softmax", FP32, False), ("elu", BF16, False),
     ("elu", FP16, True), ("elu", FP32, True), ("relu", BF16, True), ("relu", FP32, False)],
    ids=str,
)  # fmt: skip
def test_feature_maps(feature_map, dtype, descriptors):
    inputs = make_qkv(
        batch=2, seq_len_q=333, seq_len_kv=205, num_heads=4, num_kv_heads=2, dtype=dtype, device="cuda"
    )  # fmt: skip
    check(inputs, mask_for(*inputs[:2], q_block_size=128), feature_map, descriptors=descriptors)


@pytest.mark.parametrize(
    ("feature_map", "dtype", "head_dim"),
    [("softmax", BF16, 128), ("elu", FP16, 72), ("relu", FP32, 64), ("softmax", BF16, 256)],
    ids=str,
)
def test_coverage_of_all_keys(feature_map, dtype, head_dim):
    inputs = make_qkv(
        batch=2, seq_len_q=333, seq_len_kv=205, num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype,
        device="cuda",
    )  # fmt: skip
    check(inputs, None, feature_map)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "descriptors"),
    [(32, FP16, True), (72, BF16, False), (72, FP32, True), (80, FP16, True), (100, BF16, False), (128, BF16, True),
     (128, FP16, False), (128, FP32, False), (192, BF16, True), (256, FP16, True), (256, FP32, False)],
    ids=str,
)  # fmt: skip
def test_head_dims(head_dim, dtype, descriptors):
    inputs = make_qkv(seq_len_q=333, head_dim=head_dim, dtype=dtype, device="cuda")
    check(inputs, mask_for(*inputs[:2], q_block_size=128), descriptors=descriptors)


@pytest.mark.parametrize(
    ("lengths", "blocks"),
    [((1, 5), (128, 64)), ((63, 111), (64, 64)), ((1000, 77), (16, 16)), ((640, 1280), (128, 64)),
     ((2016, 2016), (48, 80)), ((2016, 2016), (128, 64))],
    ids=str,
)  # fmt: skip
def test_lengths_and_blocks(lengths, blocks):
    inputs = make_qkv(seq_len_q=lengths[0], seq_len_kv=lengths[1], num_heads=3, dtype=BF16, device="cuda")
    options = {"empty_rows": lengths[0] > 64, "full_rows": lengths[0] > 1}
    for density in (0.1, 0.7):
        mask = mask_for(*inputs[:2], q_block_size=blocks[0], kv_block_size=blocks[1], density=density, **options)
        check(inputs, mask)


@pytest.mark.parametrize(
    ("offsets_heads", "heads", "dtype", "descriptors"),
    [(1, (4, 2), BF16, True), (4, (4, 4), BF16, False), (4, (4, 2), FP16, True), (4, (4, 2), FP32, False)],
    ids=str,
)
def test_variable_blocks(offsets_heads, heads, dtype, descriptors):
    inputs = make_qkv(
        seq_len_q=700, seq_len_kv=611, num_heads=heads[0], num_kv_heads=heads[1], dtype=dtype, device="cuda"
    )
    mask = make_variable_block_mask(
        seq_len_q=700, seq_len_kv=611, num_q_blocks=9, num_kv_blocks=20, num_heads=4, offsets_heads=offsets_heads,
        density=0.25, empty_rows=True, full_rows=True, device="cuda",
    )  # fmt: skip
    check(inputs, mask, descriptors=descriptors)


def test_strides():
    inputs = make_qkv(batch=2, seq_len_q=300, num_heads=3, dtype=torch.bfloat16, device="cuda", contiguous=False)
    mask = mask_for(*inputs[:2], num_heads=1)
    check(inputs, mask)
    inputs = tuple(x.transpose(1, 3).contiguous().transpose(1, 3) for x in inputs)
    assert inputs[0].stride(3) != 1
    check(inputs, mask)
    wide = torch.randn(1, 200, 2, 67, device="cuda").to(torch.bfloat16)[..., 1:65]
    check((wide, wide.flip(1), wide.flip(2)), mask_for(wide, wide))


def test_rows_that_keep_little_weight():
    q, k, v = make_qkv(seq_len_q=256, seq_len_kv=320, dtype=torch.float32, device="cuda")
    k = (k + 3) * torch.where(torch.arange(320, device="cuda") < 64, 1e4, 1.0).view(1, 320, 1, 1)
    dense = torch.zeros(1, 1, 4, 5, dtype=torch.bool, device="cuda")
    dense[..., 0] = True
    mask = BlockMask.from_dense(dense, seq_len_q=256, seq_len_kv=320, q_block_size=64, kv_block_size=64)
    check((q + 3, k, v), mask, "relu", eps=0.0)


def test_skipped_blocks():
    inputs = make_qkv(seq_len_q=500, dtype=torch.bfloat16, device="cuda")
    mask, skipped = (mask_for(*inputs[:2], seed=seed) for seed in (1, 2))
    both = mask.union(skipped)
    got = linear_branch(*inputs, block_mask=mask, coverage="non_selected", skipped=skipped)
    assert torch.equal(got, linear_branch(*inputs, block_mask=both, coverage="non_selected"))
    truth, eager = (
        linear_branch_oracle(*inputs, excluded=both, feature_map="softmax", eps=0.0, dtype=d)
        for d in (torch.float64, torch.bfloat16)
    )
    assert_close_to_oracle(got, eager, truth)


def test_same_bits_every_time():
    inputs = [x.requires_grad_() for x in make_qkv(seq_len_q=1500, dtype=torch.bfloat16, device="cuda")]
    mask = mask_for(*inputs[:2])
    runs = []
    for _ in range(3):
        out = linear_branch(*inputs, block_mask=mask, coverage="non_selected")
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_long_sums_stay_in_the_range_of_fp16():
    inputs = make_qkv(seq_len_q=8000, num_heads=1, head_dim=128, dtype=torch.float16, device="cuda")
    inputs = (inputs[0] + 2, inputs[1] + 2, inputs[2] + 1)
    tensors = [x.detach().requires_grad_() for x in inputs]
    mask = mask_for(*inputs[:2], q_block_size=128, density=0.1, empty_rows=False, full_rows=False)
    grad_out = torch.randn_like(inputs[0])
    out = linear_branch(*tensors, block_mask=mask, feature_map="elu", coverage="non_selected")
    got = (out, *torch.autograd.grad(out, tensors, grad_out))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = linear_branch_oracle(*exact, excluded=mask, feature_map="elu", eps=0.0)
    for g, t in zip(got, (out, *torch.autograd.grad(out, exact, grad_out.double())), strict=True):
        assert torch.isfinite(g).all()
        assert (g - t).norm() < 0.02 * t.norm()


def projected(inputs, weight_dtype=torch.float32, bias=True, feature_map="softmax"):
    """Results and gradients of add_linear_branch, of the oracle at the same precision, and in float64."""
    q, head_dim = inputs[0], inputs[0].shape[3]
    tensors = [torch.randn_like(q), *inputs]
    parameters = [torch.randn(head_dim, head_dim, device="cuda") / 8]
    parameters += [torch.randn(head_dim, device="cuda")] * bias
    grad_out = torch.randn(q.transpose(1, 2).shape, device="cuda").to(q.dtype).transpose(1, 2)

    def run(function, dtype, parameter_dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        leaves += [x.detach().to(parameter_dtype).requires_grad_() for x in parameters]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))

    def written_out(out, query, key, value, weight, *bias):
        mean = linear_branch_oracle(query, key, value, None, feature_map=feature_map, eps=1e-5, dtype=query.dtype)
        return out + torch.nn.functional.linear(mean, weight, *bias)

    return (
        run(lambda *x: add_linear_branch(*x, feature_map=feature_map, backend="triton"), q.dtype, weight_dtype),
        run(written_out, q.dtype, q.dtype),
        run(written_out, torch.float64, torch.float64),
    )


@pytest.mark.parametrize(
    ("feature_map", "dtype", "head_dim", "bias"),
    [("softmax", BF16, 128, True), ("softmax", FP16, 64, False), ("elu", BF16, 72, True), ("elu", FP16, 128, True),
     ("relu", BF16, 32, False), ("softmax", FP32, 64, True), ("softmax", BF16, 256, True)],
    ids=str,
)  # fmt: skip
def test_projected(feature_map, dtype, head_dim, bias):
    inputs = make_qkv(
        batch=2, seq_len_q=1333, seq_len_kv=705, num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype,
        device="cuda",
    )  # fmt: skip
    names = ("output", "grad out", "grad query", "grad key", "grad value", "grad weight", "grad bias")
    for name, g, e, t in zip(names, *projected(inputs, bias=bias, feature_map=feature_map), strict=False):
        assert_close_to_oracle(g, e.to(g.dtype), t, name=name)


def test_projected_strides_and_any_parameters():
    q, k, v = make_qkv(batch=2, seq_len_q=300, num_heads=3, dtype=BF16, device="cuda", contiguous=False)
    got, eager, truth = projected((q, k, v), weight_dtype=torch.bfloat16)
    for g, e, t in zip(got, eager, truth, strict=True):
        assert_close_to_oracle(g, e, t)


def test_projected_long_sums_stay_in_the_range_of_fp16():
    q, k, v = make_qkv(seq_len_q=8000, num_heads=1, head_dim=128, dtype=FP16, device="cuda")
    got, _, truth = projected((q + 2, k + 2, v + 1), feature_map="elu")
    for g, t in zip(got, truth, strict=True):
        assert torch.isfinite(g).all()
        assert (g - t).norm() < 0.02 * t.norm()


def test_projected_gives_the_same_bits_every_time():
    inputs = make_qkv(seq_len_q=5000, dtype=BF16, device="cuda", head_dim=128)
    runs = []
    for _ in range(3):
        torch.manual_seed(0)
        runs.append(projected(inputs)[0])
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
