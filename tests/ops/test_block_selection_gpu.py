"""Pooling and selection on a real GPU, and the backends of other libraries over selected lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidsparse_kernels import BlockMask, pool_blocks, score_blocks, select_block_lists, select_from_qk
from vidsparse_kernels.block_sparse_attention import flash4, flex
from vidsparse_kernels.testing import assert_close_to_oracle, make_block_mask, make_qkv, masked_attention_oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

KINDS = ("mean", "max", "min")


def poison() -> None:
    """Leave memory full of large values where the next small arrays will be."""
    junk = [torch.full((1 << size,), 2**31 - 1, dtype=torch.int32, device="cuda") for size in range(8, 24)]
    del junk


def mean_in_float64(x: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Means of the tokens bounds[b, h, m] .. bounds[b, h, m + 1], 0 where there are none."""
    rows = [
        x[b, start:stop, h].double().sum(0) / max(1, stop - start)
        for b in range(x.shape[0])
        for h in range(x.shape[2])
        for start, stop in bounds[b, h].unfold(0, 2, 1).tolist()
    ]
    return torch.stack(rows).view(x.shape[0], x.shape[2], -1, x.shape[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 72, 128, 256])
@pytest.mark.parametrize("block_size", [16, 64, 100, 128])
def test_pooling(dtype, head_dim, block_size):
    for contiguous in (True, False):
        x, _, _ = make_qkv(
            batch=2, seq_len_q=777, num_heads=3, head_dim=head_dim, dtype=dtype, device="cuda", contiguous=contiguous
        )
        poison()
        got = pool_blocks(x, block_size, kinds=KINDS, backend="triton")
        want = pool_blocks(x, block_size, kinds=KINDS, backend="reference")
        bounds = [*range(0, 777, block_size), 777]
        truth = mean_in_float64(x, torch.tensor(bounds).expand(2, 3, -1))
        assert_close_to_oracle(got["mean"], want["mean"], truth)
        assert all(torch.equal(got[kind], want[kind]) for kind in ("max", "min"))


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (2, 3)], ids=str)
def test_pooling_of_variable_blocks(lead):
    x, _, _ = make_qkv(batch=2, seq_len_q=3000, num_heads=3, head_dim=128, dtype=torch.bfloat16, device="cuda")
    offsets = torch.randint(0, 3001, (*lead, 41), generator=torch.Generator().manual_seed(0)).sort(-1).values
    offsets[..., 7] = offsets[..., 8]
    offsets = offsets.to(torch.int32).cuda()
    got = pool_blocks(x, 1, kinds=KINDS, offsets=offsets, backend="triton")
    want = pool_blocks(x, 1, kinds=KINDS, offsets=offsets, backend="reference")
    truth = mean_in_float64(x, offsets.cpu().expand(2, 3, -1))
    assert_close_to_oracle(got["mean"], want["mean"], truth)
    assert all(torch.equal(got[kind], want[kind]) for kind in ("max", "min"))
    assert not got["mean"][:, :, 7].any() and bool((got["max"][:, :, 7] == -torch.inf).all())


def test_pooling_beyond_int32():
    x = torch.randn(1, 150_000, 128, 128, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    got = pool_blocks(x, 128)["mean"][:, :, -1]
    expected = x[:, 150_000 // 128 * 128 :].float().mean(1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def random_case(seed: int, num_kv_blocks: int):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 65, num_kv_blocks, generator=generator) * 2
    if seed % 3 == 0:
        scores = scores.round()
    if seed % 4 == 0:
        scores[0, 0, 0] = -torch.inf
        scores[0, 1, 1, 0] = torch.nan
    forced = torch.rand(1, 3, 1, num_kv_blocks, generator=generator) < 0.1 if seed % 2 else None
    sizes = torch.randint(0, 100, (2, 1, num_kv_blocks), generator=generator) if seed % 5 > 2 else None
    return scores, forced, sizes


@pytest.mark.parametrize("num_kv_blocks", [1, 5, 64, 511, 512, 1182, 4557, 16384])
@pytest.mark.parametrize("seed", range(6))
def test_top_k_equals_the_reference(num_kv_blocks, seed):
    scores, forced, _ = random_case(seed, num_kv_blocks)
    options: dict[str, Any] = dict(density=0.2) if seed % 2 else dict(top_k=3)
    counts, indices = select_block_lists(scores, forced=forced, backend="reference", **options)
    poison()
    on_gpu = None if forced is None else forced.cuda()
    got_counts, got = select_block_lists(scores.cuda(), forced=on_gpu, backend="triton", **options)
    longest = indices.shape[-1]
    assert torch.equal(got_counts.cpu(), counts)
    assert torch.equal(got[..., :longest].cpu(), indices) and not got[..., longest:].any()


@pytest.mark.parametrize("num_kv_blocks", [1, 5, 64, 512, 1182, 16384])
@pytest.mark.parametrize("seed", range(6))
def test_top_p_is_the_smallest_set_that_reaches_the_mass(num_kv_blocks, seed):
    scores, forced, sizes = random_case(seed, num_kv_blocks)
    scores = scores.nan_to_num(0.0, neginf=0.0)
    top_p = (0.3, 0.7, 0.9, 0.99)[seed % 4]
    poison()
    counts, indices = select_block_lists(
        scores.cuda(), top_p=top_p, forced=None if forced is None else forced.cuda(),
        kv_block_sizes=None if sizes is None else sizes.cuda(), backend="triton",
    )  # fmt: skip
    counts, indices = counts.cpu().long(), indices.cpu().long()
    assert int(counts.min()) >= 1
    valid = torch.arange(num_kv_blocks) < counts.unsqueeze(-1)
    assert not indices[~valid].any()
    assert bool((~valid[..., 1:] | (indices[..., 1:] > indices[..., :-1])).all())
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(
        -1, torch.where(valid, indices, indices[..., :1]), True
    )
    must = torch.zeros_like(chosen) if forced is None else forced.expand_as(chosen)
    assert bool(chosen[must].all())
    weight = scores.double() if sizes is None else scores.double() + sizes.double().log().unsqueeze(2)
    if bool((weight.amax(-1) == -torch.inf).any()):
        return
    mass = torch.softmax(weight, -1)
    reached = (mass * chosen).sum(-1)
    assert bool((reached >= top_p - 1e-5).all())
    spare = chosen & ~must
    smallest = torch.where(spare, mass, torch.inf).amin(-1)
    minimal = (reached - smallest < top_p + 1e-5) | ~spare.any(-1)
    assert bool(minimal.all())
    largest_left = torch.where(chosen, -torch.inf, weight).amax(-1)
    smallest_taken = torch.where(spare, weight, torch.inf).amin(-1)
    assert bool((largest_left <= smallest_taken + 1e-5).all())


def test_no_wait_for_the_device_and_graph_capture():
    q, k, _ = make_qkv(seq_len_q=2016, num_heads=4, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    forced = torch.zeros(32, dtype=torch.bool, device="cuda")
    forced[0] = True

    def select(**options) -> BlockMask:
        return select_from_qk(q, k, q_block_size=128, kv_block_size=64, forced=forced, **options)

    for options in (dict(density=0.2), dict(top_p=0.8)):
        select(**options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        by_count, by_mass = select(density=0.2), select(top_p=0.8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select(density=0.2), select(top_p=0.8)
    graph.replay()
    for got, want in zip(captured, (by_count, by_mass), strict=True):
        assert torch.equal(got.kv_num_blocks, want.kv_num_blocks) and torch.equal(got.kv_indices, want.kv_indices)
    scores = score_blocks(pool_blocks(q, 128)["mean"], pool_blocks(k, 64)["mean"])
    counts, indices = select_block_lists(scores.cpu(), density=0.2, forced=forced.cpu())
    assert torch.equal(by_count.kv_indices[..., : indices.shape[-1]].cpu(), indices)
    assert torch.equal(by_count.kv_num_blocks.cpu(), counts)


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        (dict(seq_len_q=512), (128, 128)),
        (dict(seq_len_q=500, seq_len_kv=517, num_heads=4, num_kv_heads=2), (128, 64)),
        (dict(seq_len_q=384, seq_len_kv=384), (64, 256)),
        (dict(seq_len_q=63, seq_len_kv=300, head_dim=72), (32, 32)),
    ],
    ids=str,
)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_flex(shape, blocks, biased):
    q, k, v = make_qkv(batch=2, dtype=torch.bfloat16, device="cuda", **shape)
    mask = make_block_mask(
        seq_len_q=q.shape[1], seq_len_kv=k.shape[1], q_block_size=blocks[0], kv_block_size=blocks[1],
        num_heads=q.shape[2], empty_rows=True, full_rows=True, device="cuda",
    )  # fmt: skip
    assert flex.unsupported(q, mask) is None
    bias = torch.randn(1, 1, k.shape[1], device="cuda") if biased else None
    truth, truth_lse = masked_attention_oracle(q, k, v, mask, key_bias=bias)
    eager, eager_lse = masked_attention_oracle(q, k, v, mask, key_bias=bias, dtype=q.dtype)
    with torch.no_grad():
        out, lse = flex.flex_forward(q, k, v, mask, scale=q.shape[-1] ** -0.5, key_bias=bias, return_lse=True)
    assert lse is not None
    assert_close_to_oracle(out, eager, truth)
    assert_close_to_oracle(lse, eager_lse, truth_lse, name="lse")


@pytest.mark.skipif(not flash4.installed(), reason="needs the package flash-attn-4")
@pytest.mark.parametrize("shape", [dict(seq_len_q=1024), dict(seq_len_q=1000, seq_len_kv=517, head_dim=128)], ids=str)
def test_flash4(shape):
    q, k, v = make_qkv(batch=2, num_heads=4, dtype=torch.bfloat16, device="cuda", **shape)
    q_block_size = 128 if torch.cuda.get_device_capability()[0] == 9 else 256
    mask = make_block_mask(
        seq_len_q=q.shape[1], seq_len_kv=k.shape[1], q_block_size=q_block_size, kv_block_size=128, num_heads=4,
        empty_rows=True, full_rows=True, device="cuda",
    )  # fmt: skip
    if (obstacle := flash4.unsupported(q, mask)) is not None:
        pytest.skip(f"flash4 {obstacle}")
    truth, truth_lse = masked_attention_oracle(q, k, v, mask)
    eager, eager_lse = masked_attention_oracle(q, k, v, mask, dtype=q.dtype)
    with torch.no_grad():
        out, lse = flash4.flash4_forward(q, k, v, mask, scale=q.shape[-1] ** -0.5, key_bias=None, return_lse=True)
    assert lse is not None
    assert_close_to_oracle(out, eager, truth)
    assert_close_to_oracle(lse, eager_lse, truth_lse, name="lse")
