"""CUDA graphs, torch.compile and waiting for the device, on a real GPU."""

from __future__ import annotations

import pytest
import torch

from vidsparse import ops
from vidsparse_kernels import block_sparse_attention
from vidsparse_kernels.testing import make_block_mask, make_qkv, make_variable_block_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SEQ_LEN = 700
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)
BACKENDS = ["triton", pytest.param("hopper", marks=on_hopper)]
KINDS = ["uniform", "variable"]


def inputs(seed=0):
    return make_qkv(
        batch=2, seq_len_q=SEQ_LEN, num_heads=4, num_kv_heads=2, dtype=torch.bfloat16, device="cuda", seed=seed
    )


def make_mask(kind="uniform"):
    if kind == "variable":
        return make_variable_block_mask(
            seq_len_q=SEQ_LEN, num_q_blocks=9, num_kv_blocks=12, num_heads=4, full_rows=True, device="cuda"
        )
    return make_block_mask(
        seq_len_q=SEQ_LEN, q_block_size=128, kv_block_size=128, num_heads=4, empty_rows=True, full_rows=True,
        device="cuda",
    )  # fmt: skip


def forward_and_backward(attention, tensors, mask, grad, **options):
    """Output, LSE and the three gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = attention(*leaves, mask, return_lse=True, **options)
    # An LSE of -inf has no gradient.
    grad_lse = torch.where(lse.detach() == -torch.inf, 0.0, 0.5)
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (grad, grad_lse))


def forward(tensors, mask, backend):
    query, key, value = tensors
    return block_sparse_attention(query, key, value, mask, return_lse=True, backend=backend)


def captured(function):
    """A CUDA graph of `function`, after runs that compile its kernels, and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def assert_same_bits(actual, expected):
    for number, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(got, want), f"result {number}"
        assert bool(want.any()), f"result {number} is 0"


def assert_replays_follow_the_inputs(function, tensors):
    """Replays after the tensors were overwritten, against plain runs on the same contents."""
    graph, results = captured(function)
    first = None
    for seed in (1, 2):
        for tensor, new in zip(tensors, inputs(seed), strict=True):
            tensor.copy_(new)
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        replayed = [x.clone() for x in results]
        assert_same_bits(replayed, function())
        if first is not None:
            assert not any(torch.equal(old, new) for old, new in zip(first, replayed, strict=True))
        first = replayed


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_of_the_forward(backend):
    tensors, mask = inputs(), make_mask()
    assert_replays_follow_the_inputs(lambda: forward(tensors, mask, backend), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_of_forward_and_backward(backend):
    tensors, mask = inputs(), make_mask()
    grad = torch.randn_like(tensors[0])
    assert_replays_follow_the_inputs(
        lambda: forward_and_backward(block_sparse_attention, tensors, mask, grad, backend=backend), tensors
    )


def test_graph_with_blocks_of_variable_size():
    tensors, mask = inputs(), make_mask("variable")
    grad = torch.randn_like(tensors[0])
    assert_replays_follow_the_inputs(
        lambda: forward_and_backward(block_sparse_attention, tensors, mask, grad, backend="triton"), tensors
    )


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [False, True])
def test_compiled_equals_eager(kept, kind, mode):
    mask, grad = make_mask(kind), torch.randn_like(inputs()[0])
    if kept:
        ops.keep_transposed_lists(mask)
    torch.compiler.reset()

    def attention(query, key, value, mask, return_lse):
        return ops.block_sparse_attention_op(query, key, value, mask, return_lse=return_lse, backend="triton")

    compiled = torch.compile(attention, fullgraph=True, mode=mode)
    # reduce-overhead runs, records and then replays.
    for seed in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        tensors = inputs(seed)
        got = [x.clone() for x in forward_and_backward(compiled, tensors, mask, grad)]
        assert_same_bits(got, forward_and_backward(block_sparse_attention, tensors, mask, grad, backend="triton"))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_inference_equals_eager(backend, mode):
    mask = make_mask()
    torch.compiler.reset()

    def attention(query, key, value):
        return ops.block_sparse_attention_op(query, key, value, mask, backend=backend)

    compiled = torch.compile(attention, fullgraph=True, mode=mode)
    with torch.no_grad():
        for seed in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            q, k, v = inputs(seed)
            assert_same_bits([compiled(q, k, v).clone()], [block_sparse_attention(q, k, v, mask, backend=backend)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_device(backend, kind):
    if backend == "hopper" and kind == "variable":
        pytest.skip("hopper takes blocks of one size")
    tensors = inputs()
    grad = torch.randn_like(tensors[0])
    forward_and_backward(block_sparse_attention, tensors, make_mask(kind), grad, backend=backend)
    # A mask that no one has used: making its transposed lists or tiles must not wait either.
    mask = make_mask(kind)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(block_sparse_attention, tensors, mask, grad, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
