"""The pooled tail as a method's correction: in one call with the attention where a kernel does both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vidsparse
import vidsparse_kernels
from vidsparse.attention import attend, make_context
from vidsparse.errors import DenseFallbackError
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.parts import LayerMemory, MemoryBudget
from vidsparse.processors.binding import BINDING
from vidsparse.recipe import Recipe
from vidsparse_kernels.pooled_tail import Pools
from vidsparse_kernels.testing import make_qkv

LAYOUT = TokenLayout(LatentGrid(5, 16, 16), text_after=7)


@pytest.mark.parametrize("first_order", [True, False])
def test_both_in_one_call_is_named_and_gives_the_same(monkeypatch, first_order):
    context = make_context(LAYOUT, Recipe.from_options("pisa", density=0.2, first_order=first_order), "cpu")
    q, k, v = make_qkv(seq_len_q=LAYOUT.seq_len, num_heads=2, head_dim=16)
    want, selection = attend(q, k, v, context)
    assert selection is not None and selection.backend is not None and selection.backend[0] == "reference"
    both = vidsparse_kernels.block_sparse_attention_with_tail
    calls = []

    def one_kernel(*tensors, backend, **options):
        calls.append(options)
        assert backend == "hopper_with_tail"
        return both(*tensors, backend="separate", **options)

    monkeypatch.setattr(vidsparse_kernels, "select_backend_with_tail", lambda *_: ("hopper_with_tail", "as if"))
    monkeypatch.setattr(vidsparse_kernels, "block_sparse_attention_with_tail", one_kernel)
    got, selection = attend(q, k, v, context)
    torch.testing.assert_close(got, want)
    assert selection is not None and selection.backend == ("hopper_with_tail", "as if")
    assert len(calls) == 1 and isinstance(calls[0].pop("pools"), Pools)
    assert calls == [dict(scale=0.25, first_order=first_order)]
    # With a bias over keys, and with a backend asked for, they stay two steps.
    bias = torch.zeros(1, 1, LAYOUT.seq_len)
    for options in (dict(key_bias=bias), dict(backend="reference")):
        torch.testing.assert_close(attend(q, k, v, context, **options)[0], want)  # pyright: ignore[reportArgumentType]
    assert len(calls) == 1


def test_selection_and_tail_share_means_of_one_call_alone(monkeypatch):
    """Keys are pooled once a call; a selection kept for later steps keeps no means, whose keys are others by then."""
    made = []

    def counted(key, value, mask, **options):
        made.append(key)
        return pool_for_tail(key, value, mask, **options)

    pool_for_tail = vidsparse_kernels.pool_for_tail
    monkeypatch.setattr(vidsparse_kernels, "pool_for_tail", counted)
    monkeypatch.setattr("vidsparse_kernels.pooled_tail.api.pool_for_tail", counted)
    context = make_context(LAYOUT, Recipe.from_options("pisa", density=0.2), "cpu")
    context = replace(context, memory=LayerMemory(MemoryBudget()), refresh_every=2, step_count=10)
    outputs = []
    for step in (4, 5):
        q, k, v = make_qkv(seq_len_q=LAYOUT.seq_len, num_heads=2, head_dim=16, seed=step)
        out, selection = attend(q, k, v, replace(context, step_index=step))
        assert selection is not None and selection.pools is None
        mask = selection.block_mask
        kept = vidsparse_kernels.block_sparse_attention(q, k, v, mask, return_lse=True)
        tail = vidsparse_kernels.pooled_tail_attention(q, k, v, mask, pools=pool_for_tail(k, v, mask))
        torch.testing.assert_close(out, vidsparse_kernels.merge_attention_states(*kept, *tail)[0])
        outputs.append(selection)
    assert outputs[0] is outputs[1] and len(made) == 2


def test_selects_the_same_with_gradients():
    context = make_context(LAYOUT, Recipe.from_options("pisa", density=0.2), "cpu")
    tensors = make_qkv(seq_len_q=LAYOUT.seq_len, num_heads=2, head_dim=16)
    selections = [attend(*tensors, context)[1]]
    out, selection = attend(*(x.requires_grad_() for x in tensors), context)  # pyright: ignore[reportCallIssue]
    selections.append(selection)
    masks = [selection.block_mask for selection in selections if selection is not None]
    assert len(masks) == 2 and torch.equal(masks[0].kv_indices, masks[1].kv_indices)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in tensors)


def test_both_in_one_call_is_no_slow_backend(build_transformer):
    """A generation that must not be slow takes it, and the report says nothing of it."""
    model = build_transformer()
    handle = vidsparse.apply(model, "pisa", strict=True)
    binding = vars(model)[BINDING]
    for name in ("hopper_with_tail", "hopper", "triton"):
        binding._check_fast(name, "as if", "cuda")
    assert handle.report().notes == []
    with pytest.raises(DenseFallbackError, match='slow backend "reference"'):
        binding._check_fast("reference", "as if", "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kv_block_size", [64, 128])
def test_one_kernel_and_shared_means_on_a_gpu(kv_block_size):
    layout = TokenLayout(LatentGrid(21, 20, 20), text_after=9)
    recipe = Recipe.from_options("pisa", density=0.2, kv_block_size=kv_block_size)
    context = make_context(layout, recipe, "cuda")
    q, k, v = make_qkv(
        seq_len_q=layout.seq_len, num_heads=16, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda"
    )
    attend(q, k, v, context)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, selection = attend(q, k, v, context)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert selection is not None and selection.backend is not None
    if torch.cuda.get_device_capability() == (9, 0):
        assert selection.backend[0] == "hopper_with_tail"
    mask = selection.block_mask
    want, plain = (
        vidsparse_kernels.block_sparse_attention_with_tail(
            q.to(kind), k.to(kind), v.to(kind), mask, backend="separate"
        )
        for kind in (torch.float32, q.dtype)
    )
    error, allowed = ((x.float() - want).norm() / want.norm() for x in (out, plain))
    assert error < 1.5 * allowed + 1e-4
