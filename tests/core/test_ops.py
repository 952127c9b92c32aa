from __future__ import annotations

import pytest
import torch

from vidsparse import ops, sparse_attention
from vidsparse.errors import ConfigError
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.processors.context import AttentionContext
from vidsparse_kernels.testing import make_block_mask, make_qkv

MASK = make_block_mask(seq_len_q=111, q_block_size=32, kv_block_size=16, density=0.5, full_rows=True)


def inputs(**changes):
    return make_qkv(seq_len_q=111, head_dim=16, **changes)


def arguments(q, k, v):
    return (q, k, v, MASK.kv_num_blocks, MASK.kv_indices, 32, 16, 0.25, "auto")


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(contiguous, grad):
    q, k, v = (x.detach().requires_grad_(grad) for x in inputs(contiguous=contiguous))
    torch.library.opcheck(ops._attention, arguments(q, k, v))


def test_opcheck_of_the_backward():
    q, k, v = inputs()
    torch.library.opcheck(ops._attention_backward, (q, *arguments(q, k, v)[:-1]))


def test_compiled_equals_eager_with_gradients():
    def loss(attention, tensors):
        out = attention(*tensors, MASK)
        return out, torch.autograd.grad((out * out.cos()).sum(), tensors)

    tensors = [x.requires_grad_() for x in inputs()]
    out, grads = loss(sparse_attention, tensors)
    compiled = torch.compile(sparse_attention, fullgraph=True, backend="aot_eager")
    compiled_out, compiled_grads = loss(compiled, tensors)
    torch.testing.assert_close(compiled_out, out, atol=1e-6, rtol=1e-5)
    for name, got, want in zip("qkv", compiled_grads, grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5, msg=name)
        assert want.abs().max() > 1e-2


def test_compiled_calls_share_one_mask_object():
    q, k, v = inputs()
    ops.block_sparse_attention_op(q, k, v, MASK)
    first = ops._mask(q, k, MASK.kv_num_blocks, MASK.kv_indices, 32, 16)
    assert ops._mask(q, k, MASK.kv_num_blocks, MASK.kv_indices, 32, 16) is first
    other = ops._mask(q, k, MASK.kv_num_blocks.clone(), MASK.kv_indices, 32, 16)
    assert other is not first


def test_context_or_mask():
    q, k, v = inputs()
    layout = TokenLayout(LatentGrid(1, 3, 37), block_size=16)
    context = AttentionContext(0, 1, 0, 4, "cond", layout, MASK, "reference")
    torch.testing.assert_close(sparse_attention(q, k, v, context), sparse_attention(q, k, v, MASK))
    with pytest.raises(ConfigError, match="dense call selects no blocks"):
        sparse_attention(q, k, v, AttentionContext(0, 1, 0, 4, "cond", layout))
