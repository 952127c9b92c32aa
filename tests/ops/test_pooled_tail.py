"""The pooled tail: PISA's formula, the reference, and the Triton kernels without a GPU."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from vidsparse_kernels import BlockMask, UnsupportedBackendError, block_sparse_attention, merge_attention_states
from vidsparse_kernels.pooled_tail import (
    Pools,
    block_sparse_attention_with_tail,
    pool_for_tail,
    pooled_tail_attention,
    pooled_tail_merge_,
    select_backend_with_tail,
)
from vidsparse_kernels.testing import make_block_mask, make_qkv, make_variable_block_mask, masked_attention_oracle

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")

ROWS: dict[str, Any] = dict(empty_rows=True, full_rows=True)
MASKS = {
    "uniform": lambda: make_block_mask(
        seq_len_q=60, seq_len_kv=77, q_block_size=16, kv_block_size=16, batch=2, num_heads=4, **ROWS
    ),
    "uniform, one list": lambda: make_block_mask(
        seq_len_q=60, seq_len_kv=77, q_block_size=17, kv_block_size=5, **ROWS
    ),
    "clusters": lambda: make_variable_block_mask(
        seq_len_q=60, seq_len_kv=77, num_q_blocks=3, num_kv_blocks=30, batch=2, num_heads=4, offsets_heads=4, **ROWS
    ),
    "clusters of queries": lambda: make_variable_block_mask(
        seq_len_q=60, seq_len_kv=77, num_q_blocks=7, kv_block_size=8, offsets_batch=2, **ROWS
    ),
    "clusters of keys": lambda: make_variable_block_mask(
        seq_len_q=60, seq_len_kv=77, q_block_size=32, num_kv_blocks=90, num_heads=4, **ROWS
    ),
}


def pisa(query, key, value, mask, scale, first_order):
    """PISA as published: one numerator and one denominator per row, token by token and block by block."""
    batch, seq_len_q, num_heads, _ = query.shape
    seq_len_kv, group_size = key.shape[1], num_heads // key.shape[2]
    out, lse = torch.zeros_like(query), query.new_zeros(batch, num_heads, seq_len_q)

    def at(x, b, h):
        return x[b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]

    for b in range(batch):
        for h in range(num_heads):
            k, v = key[b, :, h // group_size], value[b, :, h // group_size]
            listed = at(mask.to_dense(), b, h)
            blocks = [slice(*ends) for ends in at(mask.offsets("kv"), b, h).unfold(0, 2, 1).tolist()]
            total = sum((k[s] - k[s].mean(0)).T @ v[s] for s in blocks if s.stop > s.start)
            for i, (start, stop) in enumerate(at(mask.offsets("q"), b, h).unfold(0, 2, 1).tolist()):
                for token in range(start, stop):
                    q = query[b, token, h]
                    numerator, denominator, tail = torch.zeros_like(q), q.new_zeros(()), q.new_zeros(())
                    for j, s in enumerate(blocks):
                        if s.stop == s.start:
                            continue
                        if listed[i, j]:
                            weights = torch.exp(scale * (k[s] @ q))
                            numerator, denominator = numerator + weights @ v[s], denominator + weights.sum()
                        else:
                            weight = torch.exp(scale * (k[s].mean(0) @ q))
                            numerator, tail = numerator + weight * v[s].sum(0), tail + weight * (s.stop - s.start)
                    if first_order:
                        numerator = numerator + tail / seq_len_kv * scale * (q @ total)
                    out[b, token, h] = numerator / (denominator + tail)
                    lse[b, h, token] = torch.log(denominator + tail)
    return out, lse


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_merged_with_the_listed_blocks_it_is_pisa(name, first_order):
    q, k, v = make_qkv(
        batch=2, seq_len_q=60, seq_len_kv=77, num_heads=4, num_kv_heads=2, head_dim=12, dtype=torch.float64
    )
    mask = MASKS[name]()
    kept = block_sparse_attention(q, k, v, mask, scale=0.4, return_lse=True)
    tail = pooled_tail_attention(q, k, v, mask, scale=0.4, first_order=first_order)
    out, lse = merge_attention_states(*kept, *tail)
    expected, expected_lse = pisa(q, k, v, mask, 0.4, first_order)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("name", list(MASKS))
def test_both_in_one_call(name, first_order):
    q, k, v = make_qkv(batch=2, seq_len_q=60, seq_len_kv=77, num_heads=4, num_kv_heads=2, head_dim=16)
    mask, scale = MASKS[name](), 0.3
    pools = pool_for_tail(k, v, mask)
    kept = block_sparse_attention(q, k, v, mask, scale=scale, return_lse=True)
    want = merge_attention_states(*kept, *pooled_tail_attention(q, k, v, mask, scale=scale, first_order=first_order))
    name_of_backend, reason = select_backend_with_tail(q, k, v, mask)
    assert name_of_backend == "separate" and reason.startswith('"reference" attends')
    for backend in ("auto", "separate"):
        options: dict[str, Any] = dict(scale=scale, first_order=first_order, pools=pools, backend=backend)
        out, lse = block_sparse_attention_with_tail(q, k, v, mask, return_lse=True, **options)
        torch.testing.assert_close(out, want[0])
        torch.testing.assert_close(lse, want[1])
        assert torch.equal(block_sparse_attention_with_tail(q, k, v, mask, **options), out)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    options = dict(scale=scale, first_order=first_order)
    kept = block_sparse_attention(q, k, v, mask, scale=scale, return_lse=True)
    want, _ = merge_attention_states(*kept, *pooled_tail_attention(q, k, v, mask, **options))
    out = block_sparse_attention_with_tail(q, k, v, mask, **options)
    for got, grad in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, want)), strict=True):
        torch.testing.assert_close(got, grad)


def test_one_kernel_for_both_says_what_it_cannot_do():
    q, k, v = make_qkv(seq_len_q=128)
    mask = make_block_mask(seq_len_q=128, q_block_size=128, kv_block_size=128)
    with pytest.raises(UnsupportedBackendError, match='backend "hopper_with_tail" needs a CUDA GPU; use backend="sep'):
        block_sparse_attention_with_tail(q, k, v, mask, backend="hopper_with_tail")
    pools = pool_for_tail(k, v, mask)
    assert pools.first_order is not None
    pools = dataclasses.replace(pools, first_order=pools.first_order.requires_grad_())
    with pytest.raises(UnsupportedBackendError, match="has no backward"):
        block_sparse_attention_with_tail(q, k, v, mask, pools=pools, backend="hopper_with_tail")
    with pytest.raises(UnsupportedBackendError, match="has no backward"):
        block_sparse_attention_with_tail(q.requires_grad_(), k, v, mask, backend="hopper_with_tail")
    with pytest.raises(
        ValueError, match='`backend` must be "auto" or one of hopper_with_tail, separate, got "hopper"'
    ):
        block_sparse_attention_with_tail(q, k, v, mask, backend="hopper")


def test_blocks_of_one_token_make_it_dense_attention():
    q, k, v = make_qkv(seq_len_q=40, seq_len_kv=50, head_dim=16, dtype=torch.float64)
    mask = make_block_mask(seq_len_q=40, seq_len_kv=50, q_block_size=16, kv_block_size=1, num_heads=2)
    kept = block_sparse_attention(q, k, v, mask, return_lse=True)
    out, lse = merge_attention_states(*kept, *pooled_tail_attention(q, k, v, mask))
    dense, dense_lse = masked_attention_oracle(q, k, v, BlockMask.full(40, 50, q_block_size=40, kv_block_size=50))
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, dense_lse, rtol=0, atol=1e-12)


def test_rows_that_list_every_block_are_empty():
    q, k, v = make_qkv(seq_len_q=50, seq_len_kv=70, head_dim=16)
    mask = BlockMask.full(50, 70, q_block_size=16, kv_block_size=16)
    out, lse = pooled_tail_attention(q, k, v, mask)
    assert not out.any() and bool((lse == -torch.inf).all())
    kept = block_sparse_attention(q, k, v, mask, return_lse=True)
    merged = pooled_tail_merge_(kept[0].clone(), kept[1].clone(), q, k, v, mask)
    torch.testing.assert_close(merged, kept)


def test_empty_clusters_count_for_nothing():
    q, k, v = make_qkv(seq_len_q=50, seq_len_kv=70, head_dim=16, dtype=torch.float64)
    dense = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)[None, None]
    sizes: dict[str, Any] = dict(seq_len_q=50, seq_len_kv=70, q_block_size=32, kv_block_size=16)
    mask = BlockMask.from_dense(dense, kv_offsets=torch.tensor([[[0, 20, 33, 60, 70]]]), **sizes)
    # Blocks 0, 3 and 6 are empty; whether they are listed must not matter either.
    order = torch.tensor([0, 0, 1, 1, 2, 3, 3])
    offsets = torch.tensor([[[0, 0, 20, 33, 33, 60, 70, 70]]])
    padded = dense[..., order].clone()
    padded[..., [0, 3, 6]] = torch.tensor([[True, False, False], [False, False, True]])
    wider = BlockMask.from_dense(padded, kv_offsets=offsets, **sizes)
    for first_order in (True, False):
        expected = pooled_tail_attention(q, k, v, mask, first_order=first_order)
        torch.testing.assert_close(pooled_tail_attention(q, k, v, wider, first_order=first_order), expected)
    # Where only empty clusters are left over, nothing is.
    padded[..., [1, 2, 4, 5]] = True
    out, lse = pooled_tail_attention(q, k, v, BlockMask.from_dense(padded, kv_offsets=offsets, **sizes))
    assert not out.any() and bool((lse == -torch.inf).all())


def test_pools_are_means_and_the_mean_centred_product():
    _, k, v = make_qkv(batch=2, seq_len_q=50, seq_len_kv=77, head_dim=12, dtype=torch.float64)
    uniform = make_block_mask(seq_len_q=50, seq_len_kv=77, q_block_size=16, kv_block_size=20)
    offsets = torch.tensor([[[0, 20, 40, 60, 77]]])
    as_offsets = BlockMask.full(50, 77, q_block_size=16, kv_block_size=64, kv_offsets=offsets)
    blocks = k.split(20, 1), v.split(20, 1)
    keys, values = (torch.stack([x.mean(1) for x in side], 2) for side in blocks)
    product = (
        sum(torch.einsum("bnhd,bnhe->bhde", a - a.mean(1, keepdim=True), b) for a, b in zip(*blocks, strict=True)) / 77
    )
    for mask in (uniform, as_offsets):
        pools = pool_for_tail(k, v, mask)
        torch.testing.assert_close((pools.keys, pools.values, pools.first_order), (keys, values, product))
        assert pools.counts.flatten().tolist() == [20, 20, 20, 17]
        assert pool_for_tail(k, v, mask, first_order=False).first_order is None


@pytest.mark.parametrize("name", MASKS)
def test_pools_can_be_given(name):
    q, k, v = make_qkv(batch=2, seq_len_q=60, seq_len_kv=77, num_heads=4, num_kv_heads=2, head_dim=12)
    mask = MASKS[name]()
    pools = pool_for_tail(k, v, mask)
    expected = pooled_tail_attention(q, k, v, mask)
    nothing = torch.full_like(k, torch.nan)
    torch.testing.assert_close(pooled_tail_attention(q, nothing, nothing, mask, pools=pools), expected)
    kept = block_sparse_attention(q, k, v, mask, return_lse=True)
    merged = merge_attention_states(*kept, *expected)
    out, lse = pooled_tail_merge_(*kept, q, nothing, nothing, mask, pools=pools)
    assert out is kept[0] and lse is kept[1]
    torch.testing.assert_close((out, lse), merged)


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_of_the_reference(name, first_order):
    q, k, v = (
        x.requires_grad_()
        for x in make_qkv(
            batch=2, seq_len_q=60, seq_len_kv=77, num_heads=4, num_kv_heads=2, head_dim=3, dtype=torch.float64
        )
    )
    mask = MASKS[name]()

    def state(q, k, v):
        out, lse = pooled_tail_attention(q, k, v, mask, first_order=first_order)
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    assert torch.autograd.gradcheck(state, (q, k, v), fast_mode=True)


def test_autocast_changes_nothing():
    q, k, v = make_qkv(seq_len_q=50, head_dim=16)
    mask = make_block_mask(seq_len_q=50, q_block_size=16, kv_block_size=16)
    expected = pooled_tail_attention(q, k, v, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(pooled_tail_attention(q, k, v, mask), expected, strict=True))


def test_bad_arguments_are_named():
    q, k, v = make_qkv(seq_len_q=50, head_dim=16)
    mask = make_block_mask(seq_len_q=50, q_block_size=16, kv_block_size=16)
    pools = pool_for_tail(k, v, mask, first_order=False)
    wide = Pools(pools.keys.double(), pools.values, pools.counts, None)
    for words, call in {
        "seq_len_kv": lambda: pooled_tail_attention(q, k[:, :40], v[:, :40], mask),
        "seq_len_q": lambda: pooled_tail_attention(q[:, :40], k, v, mask),
        "`value`": lambda: pool_for_tail(k, v[..., :8], mask),
        "`query`": lambda: pooled_tail_attention(q.double(), k, v, mask),
        "`scale`": lambda: pooled_tail_attention(q, k, v, mask, scale=0.0),
        "`backend`": lambda: pooled_tail_attention(q, k, v, mask, backend="cuda"),
        "`pools` has no `first_order`": lambda: pooled_tail_attention(q, k, v, mask, pools=pools),
        "`pools.keys`": lambda: pooled_tail_attention(q, k, v, mask, pools=wide, first_order=False),
        "`lse`": lambda: pooled_tail_merge_(q.clone(), q[..., 0], q, k, v, mask),
        "`out`": lambda: pooled_tail_merge_(q.double(), q[..., 0].transpose(1, 2), q, k, v, mask),
        "has no backward": lambda: pooled_tail_merge_(
            q.clone(), q[..., 0].transpose(1, 2).clone(), q.clone().requires_grad_(), k, v, mask
        ),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()


@needs_triton
def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = make_qkv(seq_len_q=50, head_dim=16)
    mask = make_block_mask(seq_len_q=50, q_block_size=16, kv_block_size=16)
    with pytest.raises(UnsupportedBackendError, match="needs a GPU"):
        pooled_tail_attention(q, k, v, mask, backend="triton")
    with pytest.raises(UnsupportedBackendError, match="float64"):
        pooled_tail_attention(q.double(), k.double(), v.double(), mask, backend="triton")


INTERPRETED = """
import math, sys
import torch
from vidsparse_kernels import BlockMask, block_sparse_attention, merge_attention_states
from vidsparse_kernels.block_sparse_attention.configs import ForwardConfig
from vidsparse_kernels.pooled_tail import pool_for_tail, pooled_tail_attention, pooled_tail_merge_
from vidsparse_kernels.pooled_tail.forward import triton_tail
from vidsparse_kernels.pooled_tail.words import listed_words
from vidsparse_kernels.testing import (
    assert_close_to_oracle, make_block_mask, make_qkv, make_variable_block_mask, masked_attention_oracle)

def oracle(q, k, v, mask, scale, first_order, dtype):
    pools = pool_for_tail(k.to(dtype), v.to(dtype), mask, backend="reference")
    rest = BlockMask.from_dense(~mask.to_dense(), seq_len_q=mask.seq_len_q, seq_len_kv=mask.num_kv_blocks,
                                q_block_size=mask.q_block_size, kv_block_size=1, q_offsets=mask.q_offsets)
    heads = pools.counts.shape[1]
    bias = pools.counts.to(torch.float64).log()
    keys, values = (x.transpose(1, 2).to(dtype) for x in (pools.keys, pools.values))
    out, lse = masked_attention_oracle(q, keys, values, rest, scale=scale, key_bias=bias, dtype=dtype)
    if first_order:
        matrix = (pools.first_order * scale).to(dtype).repeat_interleave(q.shape[2] // pools.keys.shape[1], 1)
        term = torch.einsum("bshd,bhde->bshe", q.to(dtype), matrix)
        out = out + term.masked_fill((lse == -torch.inf).transpose(1, 2).unsqueeze(-1), 0)
    return out, lse

def grads(call, q, k, v, grad_out, grad_lse):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = call(q, k, v)
    loss = 0
    if grad_out is not None:
        loss = (out.double() * grad_out).sum()
    if grad_lse is not None:
        # A gradient of -inf is nobody's.
        loss = loss + (torch.where(lse == -torch.inf, 0, lse).double() * grad_lse).sum()
    return torch.autograd.grad(loss, (q, k, v), materialize_grads=True)

variant = sys.argv[1]
shape = dict(seq_len_q=70, seq_len_kv=200, num_heads=4, num_kv_heads=2)
rows = dict(seq_len_q=70, seq_len_kv=200, empty_rows=True, full_rows=True)
masks = dict(
    uniform=lambda: make_block_mask(q_block_size=64, kv_block_size=3, num_heads=4, **rows),
    ragged=lambda: make_block_mask(q_block_size=48, kv_block_size=40, **rows),
    clusters=lambda: make_variable_block_mask(
        num_q_blocks=3, num_kv_blocks=70, q_block_size=32, kv_block_size=16, num_heads=4, offsets_heads=4, **rows),
    keys=lambda: make_variable_block_mask(
        q_block_size=64, num_kv_blocks=30, kv_block_size=16, offsets_batch=2, batch=2, **rows),
)
for number, (name, make) in enumerate(masks.items()):
    mask = make()
    words = listed_words(mask)
    bits = (words.unsqueeze(-1) >> torch.arange(64) & 1).bool().flatten(3)[..., : mask.num_kv_blocks]
    assert torch.equal(bits, mask.to_dense()), name
    dtype, head_dim = ((torch.float32, 24), (torch.float16, 32), (torch.float32, 16), (torch.float16, 72))[number]
    batch = 2 if name == "keys" else 1
    q, k, v = make_qkv(**shape, batch=batch, head_dim=head_dim, dtype=dtype, contiguous=number % 2 == 0)
    first_order = number != 2
    if variant == "backward":
        grad_out, grad_lse = torch.randn(q.shape).double(), torch.randn(batch, 4, 70).double()
        # One of the two may be missing.
        grad_out, grad_lse = (None if number == 1 else grad_out), (None if number == 3 else grad_lse)
        arguments = (q, k, v, grad_out, grad_lse)
        got = grads(lambda q, k, v: pooled_tail_attention(
            q, k, v, mask, scale=0.3, first_order=first_order, backend="triton"), *arguments)
        eager = grads(lambda q, k, v: oracle(q, k, v, mask, 0.3, first_order, dtype), *arguments)
        truth = grads(lambda q, k, v: oracle(q, k, v, mask, 0.3, first_order, torch.float64), q.double(), k.double(),
                      v.double(), grad_out, grad_lse)
        for side, *three in zip("qkv", got, eager, truth):
            assert_close_to_oracle(*three, name=f"{name} {side}")
        continue
    pools = pool_for_tail(k, v, mask, backend="triton")
    wanted, exact = (pool_for_tail(k.to(d), v.to(d), mask, backend="reference") for d in (dtype, torch.float64))
    for field in ("keys", "values"):
        assert_close_to_oracle(*(getattr(x, field) for x in (pools, wanted, exact)), name=f"{name} {field}")
    # The means leave block by block, in fp32.
    for shift in (0, 10):
        sides = k + shift, v - 2 * shift
        got = pool_for_tail(*sides, mask, backend="triton").first_order if shift else pools.first_order
        error = got - pool_for_tail(*(x.double() for x in sides), mask, backend="reference").first_order
        size = math.prod(float(x.double().square().mean().sqrt()) for x in sides)
        assert error.abs().max() < 8 * torch.finfo(torch.float32).eps * size, (name, shift, error.abs().max() / size)
    truth, truth_lse = oracle(q, k, v, mask, 0.3, first_order, torch.float64)
    eager, eager_lse = oracle(q, k, v, mask, 0.3, first_order, dtype)
    for descriptors in (False, True):
        rows_at_once = 32 if number else 64
        config = ForwardConfig(rows_at_once, rows_at_once, 4, 2, descriptors)
        out, lse = triton_tail(q, pools, mask, scale=0.3, first_order=first_order, config=config)
        assert_close_to_oracle(out, eager, truth, name=f"{name} out {config}")
        assert_close_to_oracle(lse, eager_lse, truth_lse, name=f"{name} lse {config}")
    kept = block_sparse_attention(q, k, v, mask, scale=0.3, return_lse=True)
    merged = merge_attention_states(*kept, truth, truth_lse)
    state = [x.clone() for x in kept]
    pooled_tail_merge_(*state, q, k, v, mask, scale=0.3, first_order=first_order, backend="triton")
    rough = merge_attention_states(*kept, eager, eager_lse)
    for field, *three in zip(("out", "lse"), state, rough, merged):
        assert_close_to_oracle(*three, name=f"{name} merged {field}")
print("checked")
"""

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidsparse_kernels.block_sparse_attention.configs import forward_config, padded_head_dim
from vidsparse_kernels.pooled_tail import backward, forward, pooling, words

capability, shared_memory, head_dim, descriptors = (int(x) for x in sys.argv[1:])
config = forward_config(
    capability=(capability // 10, capability % 10), shared_memory=shared_memory, head_dim=head_dim, itemsize=2,
    q_block_size=128, kv_block_size=64, descriptors_possible=bool(descriptors))
block_d = padded_head_dim(head_dim)
FLOATS = {"lse_ptr", "grad_lse_ptr", "shift_ptr", "inverse_ptr", "sizes_ptr", "keys_ptr", "values_ptr", "partial_ptr"}
def compile(kernel, constants, halves=(), num_warps=4, num_stages=2, described=False):
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif described and name in ("keys", "values"):
            signature[name] = f"tensordesc<bf16[1, 1, {config.block_n}, {block_d}]>"
        elif name.endswith("_ptr") or name in ("keys", "values"):
            float32 = name in FLOATS and name not in halves or name.startswith("grad_keys") or name == "grad_values_ptr"
            kind = "fp32" if float32 else "i64" if name == "words_ptr" else "i32" if "own" in name or "offsets" in name \\
                or name in ("counts_ptr", "indices_ptr") else "bf16"
            signature[name] = "*" + kind
        else:
            signature[name] = "fp32" if name.startswith("qk_scale") or name == "scale" else "i32"
        if signature[name].startswith("*") or "stride" in name and signature[name] == "i32":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attributes)
    options = dict(num_warps=num_warps, num_stages=num_stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= shared_memory, (kernel, compiled.metadata.shared)
    return compiled
sizes = dict(HEAD_DIM=head_dim, BLOCK_D=block_d)
last = dict(query_stride_d=1)
tile = dict(**sizes, **last, BLOCK_M=config.block_m, BLOCK_N=config.block_n, SLICE=min(64, block_d), Q_BLOCK=128,
            FIRST_ORDER=True, MERGE=True, DESCRIPTORS=config.descriptors, VARIABLE=False, PRECISION="ieee", out_stride_d=1)
main = compile(forward.pooled_tail_kernel, tile, num_warps=config.num_warps, num_stages=config.num_stages,
               described=config.descriptors)
print("wgmma" in main.asm["ptx"], "cp.async.bulk.tensor" in main.asm["ptx"])
if capability != 90:
    sys.exit()
compile(pooling.tail_pool_kernel, dict(
    **sizes, key_stride_d=1, value_stride_d=1, BLOCK_E=min(block_d, 128 if block_d <= 128 else 64), ROWS=64,
    HAS_OFFSETS=False, TILES=1, FIRST_ORDER=True, PRECISION="ieee"), num_warps=8)
compile(words.listed_words_kernel, dict(WORDS=16))
rows = 64 if block_d <= 128 else 32
tile = dict(**sizes, **last, grad_out_stride_d=1, BLOCK_M=rows, BLOCK_N=rows, Q_BLOCK=128, VARIABLE=False, REFINE=False, PRECISION="ieee")
halves = ("keys_ptr", "values_ptr")
compile(backward.tail_grad_query_kernel,
        dict(**tile, SLICE=min(64, block_d), FIRST_ORDER=True, HAS_GRAD_LSE=True), halves)
compile(backward.tail_grad_pools_kernel, tile, halves)
compile(backward.tail_grad_first_order_kernel, dict(
    **sizes, **last, grad_out_stride_d=1, BLOCK_E=min(block_d, 128 if block_d <= 128 else 64), ROWS=64,
    PRECISION="ieee"), num_warps=8)
"""


COMPILED_FOR_HOPPER = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from vidsparse_kernels.pooled_tail import hopper, hopper_pooling

def compile(kernel, rows, block_d, num_warps, **constants):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in rows:
            layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows[name], block_d], gl.bfloat16)
            signature[name] = f"tensordesc<bf16[1, 1, {rows[name]}, {block_d}],{layout!r}>"
        elif name == "bias":
            layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
            signature[name] = f"tensordesc<fp32[1, {constants['BLOCK_N']}],{layout!r}>"
        elif name in ("counts_ptr", "indices_ptr", "order_ptr", "counter_ptr"):
            signature[name] = "*i32"
        else:
            signature[name] = "*fp32" if name.endswith("_ptr") else "fp32" if name == "qk_scale_log2" else "i32"
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, places, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=num_warps))
    assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
    for word in ("cp.async.bulk.tensor", "setmaxnreg", "mbarrier.try_wait"):
        assert word in compiled.asm["ptx"], word
    return compiled.asm["ptx"]

block_n, first_order = (int(x) for x in sys.argv[1:])
rows = dict(
    query=64, key=block_n, value=block_n, mean_key=block_n, mean_value=block_n, out=64, matrix=128 if first_order else 64)
ptx = compile(
    hopper.block_sparse_forward_with_tail_kernel, rows, 128, 4, BLOCK_D=128, BLOCK_N=block_n, Q_BLOCK=128, KV_BLOCK=block_n,
    STAGES=hopper.num_stages(block_n, 128), RAGGED_KV=True, FIRST_ORDER=bool(first_order), STORE_LSE=bool(first_order),
    LARGEST_MASS=hopper.LARGEST_MASS, CONSUMER_REGISTERS=hopper.CONSUMER_REGISTERS,
    PRODUCER_REGISTERS=hopper.PRODUCER_REGISTERS)
assert "wgmma.mma_async" in ptx
block_d, tokens = 128 if first_order else 64, hopper_pooling.TILE
ptx = compile(
    hopper_pooling.tail_pool_hopper_kernel, dict(key=tokens, value=tokens), block_d, block_d // 16, HEAD_DIM=block_d - 8,
    BLOCK_D=block_d, TILE=tokens, STAGES=hopper_pooling.STAGE_BYTES // (4 * tokens * block_d),
    FIRST_ORDER=bool(first_order), NUM_WARPS=block_d // 16, PRODUCER_REGISTERS=hopper_pooling.PRODUCER_REGISTERS)
assert "wgmma.mma_async" in ptx
print("compiled")
"""


INTERPRETED_BIAS = """
import torch
from vidsparse_kernels.pooled_tail.hopper import tail_bias
from vidsparse_kernels.testing import make_block_mask

for heads, width in ((3, 128), (1, 1280)):
    mask = make_block_mask(
        seq_len_q=500, seq_len_kv=width * 64 - 700, q_block_size=128, kv_block_size=64, batch=2, num_heads=heads,
        empty_rows=True, full_rows=True)
    want = mask.offsets("kv").diff().float().log2()[:, :, None].expand(mask.to_dense().shape)
    want = (want / 2).masked_fill(mask.to_dense(), -torch.inf)
    got = tail_bias(mask, 2.0)
    assert got.shape == (2, heads, 4, width + 128), got.shape
    assert torch.equal(got[..., : mask.num_kv_blocks], want)
    assert bool((got[..., mask.num_kv_blocks :] == -torch.inf).all())
print("checked")
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT), **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@needs_triton
@pytest.mark.parametrize("variant", ["forward", "backward"])
def test_interpreted_kernels_are_exact(variant):
    """bf16 is left to the GPU tests: the interpreter computes with numpy, which has no bf16."""
    assert run(INTERPRETED, variant, TRITON_INTERPRET="1") == "checked"


@needs_triton
@pytest.mark.parametrize(
    ("capability", "shared_memory", "head_dim", "expected"),
    [(80, 163 * 1024, 128, "False False"), (90, 227 * 1024, 128, "True True"), (120, 99 * 1024, 64, "False True")],
)
def test_kernels_compile(capability, shared_memory, head_dim, expected):
    assert run(COMPILED, str(capability), str(shared_memory), str(head_dim), "1") == expected


@needs_triton
@pytest.mark.parametrize(("block_n", "first_order"), [(128, 1), (64, 0)])
def test_hopper_kernels_compile(block_n, first_order, tmp_path):
    options = dict(TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert run(COMPILED_FOR_HOPPER, str(block_n), str(first_order), **options) == "compiled"


@needs_triton
def test_interpreted_bias_is_log_of_sizes_but_where_listed():
    assert run(INTERPRETED_BIAS, TRITON_INTERPRET="1") == "checked"


def test_reference_takes_more_tokens_than_fit_one_chunk(monkeypatch):
    from vidsparse_kernels.pooled_tail import reference

    q, k, v = make_qkv(batch=2, seq_len_q=60, seq_len_kv=77, num_heads=4, num_kv_heads=2, head_dim=12)
    mask = MASKS["clusters"]()
    whole = pooled_tail_attention(q, k, v, mask)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 2 * 4 * mask.num_kv_blocks * 7)
    torch.testing.assert_close(pooled_tail_attention(q, k, v, mask), whole)


def test_large_logits_stay_finite():
    """A listed block far above all others must not take the tail's precision away: it is left out, not subtracted."""
    q, k, v = make_qkv(seq_len_q=32, seq_len_kv=64, num_heads=1, head_dim=16)
    q[..., 0], k[..., 0] = 30.0, 0.0
    k[:, 16:32, :, 0] = 100.0
    listed = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
    listed[..., 1] = True
    mask = BlockMask.from_dense(listed, seq_len_q=32, seq_len_kv=64, q_block_size=16, kv_block_size=16)
    out, lse = pooled_tail_attention(q, k, v, mask)
    exact, exact_lse = pooled_tail_attention(q.double(), k.double(), v.double(), mask)
    assert bool((exact_lse < 100 * 30 / math.sqrt(16) - 500).all())
    torch.testing.assert_close((out.double(), lse.double()), (exact, exact_lse), rtol=1e-5, atol=1e-5)
