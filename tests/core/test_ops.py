from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vidsparse import ops, sparse_attention
from vidsparse.errors import ConfigError
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.parts import Parts
from vidsparse.processors.context import AttentionContext
from vidsparse_kernels import BlockMask, block_sparse_attention
from vidsparse_kernels.testing import make_block_mask, make_qkv, make_variable_block_mask, masked_attention_oracle

MASK = make_block_mask(seq_len_q=111, q_block_size=32, kv_block_size=16, density=0.5, full_rows=True)
CLUSTERS = BlockMask.full(
    111, 111, q_block_size=32, kv_block_size=16, kv_offsets=torch.tensor([[[0, 5, 40, 41, 90, 111]]])
)


def inputs(**changes):
    return make_qkv(seq_len_q=111, head_dim=16, **changes)


def arguments(q, k, v, *, with_lse, mask=MASK, key_bias=None):
    lists = (mask.kv_num_blocks, mask.kv_indices, mask.q_offsets, mask.kv_offsets, key_bias)
    return (q, k, v, *lists, mask.q_block_size, mask.kv_block_size, 0.25, "auto", with_lse)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(contiguous, grad):
    q, k, v = (x.detach().requires_grad_(grad) for x in inputs(contiguous=contiguous))
    torch.library.opcheck(ops._attention, arguments(q, k, v, with_lse=True))
    if not grad:
        torch.library.opcheck(ops._attention, arguments(q, k, v, with_lse=False))
        bias = torch.zeros(1, 1, k.shape[1]).index_fill(2, torch.tensor([1, 40]), -torch.inf)
        torch.library.opcheck(ops._attention, arguments(q, k, v, with_lse=False, key_bias=bias))


@pytest.mark.parametrize("mask", [MASK, CLUSTERS], ids=["uniform", "offsets"])
def test_opcheck_of_the_backward(mask):
    q, k, v = inputs()
    q, k, v, *rest, _ = arguments(q, k, v, with_lse=True, mask=mask)
    out, lse = ops._attention(q, k, v, *rest, True)
    torch.library.opcheck(ops._attention_backward, (q, torch.ones_like(lse), q, k, v, out, lse, *rest))


@pytest.mark.parametrize("biased", [False, True])
def test_compiled_equals_eager_with_gradients(biased):
    bias = torch.zeros(1, 1, 111).index_fill(2, torch.tensor([1, 40]), -torch.inf) if biased else None

    def loss(attention, tensors):
        out = attention(*tensors, MASK, key_bias=bias)
        return out, torch.autograd.grad((out * out.cos()).sum(), tensors)

    tensors = [x.requires_grad_() for x in inputs()]
    out, grads = loss(sparse_attention, tensors)
    compiled = torch.compile(sparse_attention, fullgraph=True, backend="aot_eager")
    compiled_out, compiled_grads = loss(compiled, tensors)
    torch.testing.assert_close(compiled_out, out, atol=1e-6, rtol=1e-5)
    for name, got, want in zip("qkv", compiled_grads, grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5, msg=name)
        assert want.abs().max() > 1e-2


@pytest.mark.parametrize("mask", [MASK, CLUSTERS], ids=["uniform", "offsets"])
def test_compiled_lse_and_its_gradient(mask):
    def loss(attention, tensors):
        out, lse = attention(*tensors, mask, return_lse=True)
        return lse, torch.autograd.grad((out * out.cos()).sum() + lse.sin().sum(), tensors)

    tensors = [x.requires_grad_() for x in inputs()]
    lse, grads = loss(block_sparse_attention, tensors)
    compiled = torch.compile(ops.block_sparse_attention_op, fullgraph=True, backend="aot_eager")
    compiled_lse, compiled_grads = loss(compiled, tensors)
    torch.testing.assert_close(compiled_lse, lse, atol=1e-6, rtol=1e-5)
    for name, got, want in zip("qkv", compiled_grads, grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5, msg=name)
        assert want.abs().max() > 1e-2


def test_gradients_of_offsets_through_the_op():
    query, key, value = tensors = [x.requires_grad_() for x in inputs(dtype=torch.float64)]
    mask = make_variable_block_mask(seq_len_q=111, num_q_blocks=5, num_kv_blocks=9, offsets_heads=2, full_rows=True)
    grads = []
    for attention in (ops.block_sparse_attention_op, masked_attention_oracle):
        options = {} if attention is masked_attention_oracle else {"scale": 0.25, "return_lse": True}
        out, lse = attention(query, key, value, mask, **options)
        loss = (out * out.cos()).sum() + lse.masked_fill(lse == -torch.inf, 0.0).sin().sum()
        grads.append(torch.autograd.grad(loss, tensors))
    for name, got, want in zip("qkv", *grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12, msg=name)
        assert want.abs().max() > 1e-2


def test_only_gradients_make_the_op_keep_the_lse():
    """Without them, backends that return no LSE stay possible."""
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.vidsparse.block_sparse_attention.default:
                seen.append(args[-1])
            return func(*args, **(kwargs or {}))

    q, k, v = inputs()
    with Record():
        ops.block_sparse_attention_op(q, k, v, MASK)
        ops.block_sparse_attention_op(q, k, v, MASK, return_lse=True)
        ops.block_sparse_attention_op(q, k.requires_grad_(), v, MASK)
        with torch.no_grad():
            ops.block_sparse_attention_op(q, k, v, MASK)
    assert seen == [False, True, True, False]


INTERPRETED = """
import torch
from vidsparse import ops
from vidsparse_kernels import block_sparse_attention
from vidsparse_kernels.block_sparse_attention import forward
from vidsparse_kernels.testing import make_block_mask, make_qkv, make_variable_block_mask

torch.set_num_threads(1)
launches = []
launch = forward.triton_forward
forward.triton_forward = lambda *args, **kwargs: launches.append(0) or launch(*args, **kwargs)
q, k, v = tensors = [x.requires_grad_() for x in make_qkv(seq_len_q=63, head_dim=16)]
for mask in (
    make_block_mask(seq_len_q=63, q_block_size=32, kv_block_size=16, full_rows=True),
    make_variable_block_mask(
        seq_len_q=63, num_q_blocks=4, num_kv_blocks=6, q_block_size=32, kv_block_size=16, offsets_heads=2, full_rows=True),
):
    results = []
    for backend in ("triton", "reference"):
        out, lse = ops.block_sparse_attention_op(q, k, v, mask, return_lse=True, backend=backend)
        grads = torch.autograd.grad((out * out.cos()).sum() + lse.clamp(min=-9).sin().sum(), tensors)
        results.append((out.detach(), *grads))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
print("forward launches", len(launches))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_the_triton_backward_takes_what_the_forward_kept():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "forward launches 2", result.stderr[-3000:]


def test_calls_on_a_cpu_share_one_mask_object():
    q, k, v = inputs()
    ops.block_sparse_attention_op(q, k, v, MASK)
    first = ops._mask(q, k, MASK.kv_num_blocks, MASK.kv_indices, None, None, 32, 16)
    assert ops._mask(q, k, MASK.kv_num_blocks, MASK.kv_indices, None, None, 32, 16) is first
    other = ops._mask(q, k, MASK.kv_num_blocks.clone(), MASK.kv_indices, None, None, 32, 16)
    assert other is not first


def test_on_other_devices_nothing_made_in_a_call_outlives_it():
    mask, (q, k, _) = MASK.to("meta"), (x.to("meta") for x in inputs())
    lists = (mask.kv_num_blocks, mask.kv_indices, None, None, 32, 16)
    fresh = ops._mask(q, k, *lists)
    assert fresh._cache == {} and not hasattr(mask.kv_indices, ops.KEPT)
    kept = (torch.zeros(1), torch.zeros(1))
    mask._cache["transpose"] = kept
    ops.keep_transposed_lists(mask)
    found = ops._mask(q, k, *lists)
    assert found.transpose() is kept
    found._cache["plan"] = torch.zeros(1)
    assert "plan" not in mask._cache and "plan" not in ops._mask(q, k, *lists)._cache
    for changed in ((mask.kv_num_blocks.clone(), *lists[1:]), (*lists[:4], 64, 16), (*lists[:4], 32, 32)):
        assert ops._mask(q, k, *changed)._cache == {}


@pytest.mark.parametrize("mask", [MASK, CLUSTERS], ids=["uniform", "offsets"])
def test_the_compiled_backward_finds_the_kept_lists(mask, monkeypatch):
    mask = replace(mask, kv_indices=mask.kv_indices.clone(), _cache={})
    ops.keep_transposed_lists(mask)
    found = []
    original = ops._mask
    monkeypatch.setattr(ops, "_mask", lambda *args: found.append(original(*args)) or found[-1])
    q, k, v = (x.requires_grad_() for x in inputs())
    compiled = torch.compile(ops.block_sparse_attention_op, fullgraph=True, backend="aot_eager")
    torch.autograd.grad(compiled(q, k, v, mask).sum(), (q, k, v))
    assert [x is mask for x in found] == [True, True]


def test_context_or_mask():
    q, k, v = inputs()
    layout = TokenLayout(LatentGrid(1, 3, 37), block_size=16)
    context = AttentionContext(0, 1, 0, 4, "cond", layout, Parts(MASK), backend="reference")
    torch.testing.assert_close(sparse_attention(q, k, v, context), sparse_attention(q, k, v, MASK))
    with pytest.raises(ConfigError, match="dense call selects no blocks"):
        sparse_attention(q, k, v, AttentionContext(0, 1, 0, 4, "cond", layout))
