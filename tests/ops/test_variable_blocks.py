"""Blocks of variable size: tile lists, densities, and every backend against dense float64 attention."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse_kernels import BlockMask, UnsupportedBackendError, block_sparse_attention, select_backend
from vidsparse_kernels.block_sparse_attention import tiles as tiles_module
from vidsparse_kernels.block_sparse_attention.tiles import MAX_TOKENS, own_tiles, tile_lists, unpacked
from vidsparse_kernels.testing import (
    assert_close_to_oracle,
    make_qkv,
    make_variable_block_mask,
    masked_attention_oracle,
    token_mask,
)

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")


@st.composite
def masks(draw, batch: int = 2, num_heads: int = 3) -> BlockMask:
    """Sizes of all kinds on either side or both; more blocks than tokens give empty ones."""
    lengths, counts = st.sampled_from([1, 15, 63, 64, 111, 130]), st.sampled_from([None, 1, 3, 9, 40])
    return make_variable_block_mask(
        seq_len_q=draw(lengths),
        seq_len_kv=draw(lengths),
        num_q_blocks=draw(counts),
        num_kv_blocks=draw(counts),
        q_block_size=draw(st.sampled_from([16, 32, 48])),
        kv_block_size=draw(st.sampled_from([16, 32, 25])),
        batch=draw(st.sampled_from([1, batch])),
        num_heads=draw(st.sampled_from([1, num_heads])),
        offsets_batch=draw(st.sampled_from([1, batch])),
        offsets_heads=draw(st.sampled_from([1, num_heads])),
        density=draw(st.sampled_from([0.0, 0.3, 0.6, 1.0])),
        empty_rows=draw(st.booleans()),
        full_rows=draw(st.booleans()),
        seed=draw(st.integers(0, 10_000)),
    )


@st.composite
def cases(draw):
    """Query, key, value in float64 and a mask, with shared kv heads."""
    batch, num_kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    num_heads = num_kv_heads * draw(st.integers(1, 3))
    mask = draw(masks(batch, num_heads))
    q, k, v = make_qkv(
        batch=batch,
        seq_len_q=mask.seq_len_q,
        seq_len_kv=mask.seq_len_kv,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([3, 16, 40])),
        dtype=torch.float64,
        contiguous=draw(st.booleans()),
        seed=draw(st.integers(0, 10_000)),
    )
    return q, k, v, mask


def assert_exact(actual: torch.Tensor, truth: torch.Tensor) -> None:
    """Both in float64, where only the order of sums may differ."""
    torch.testing.assert_close(actual, truth, rtol=1e-11, atol=1e-12)


@settings(deadline=None, max_examples=200)
@given(cases(), st.booleans())
def test_reference_and_its_gradients_are_exact(case, with_bias):
    q, k, v, mask = case
    bias = torch.linspace(-2, 2, k.shape[1], dtype=torch.float64).expand(1, 1, -1) if with_bias else None
    weight = torch.linspace(-1, 1, q.numel(), dtype=torch.float64).view_as(q)
    results = []
    for attend in ("reference", "oracle"):
        query, key, value = leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        if attend == "reference":
            out, lse = block_sparse_attention(
                query, key, value, mask, key_bias=bias, return_lse=True, backend="reference"
            )
        else:
            out, lse = masked_attention_oracle(query, key, value, mask, key_bias=bias)
        seen = torch.where(lse == -torch.inf, 0.0, lse)
        grads = torch.autograd.grad((out * weight).sum() + seen.square().sum(), leaves)
        results.append((out.detach(), lse.detach(), *grads))
    for actual, truth in zip(*results, strict=True):
        assert_exact(actual, truth)


@settings(deadline=None, max_examples=150)
@given(cases())
def test_sdpa_is_exact(case):
    q, k, v, mask = case
    truth, _ = masked_attention_oracle(q, k, v, mask)
    assert_exact(block_sparse_attention(q, k, v, mask, backend="sdpa"), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_as_good_as_eager(dtype):
    q, k, v = make_qkv(batch=2, seq_len_q=300, num_heads=4, num_kv_heads=2, dtype=dtype)
    mask = make_variable_block_mask(
        seq_len_q=300, num_q_blocks=7, num_kv_blocks=20, offsets_batch=2, offsets_heads=4, empty_rows=True
    )
    truth, truth_lse = masked_attention_oracle(q, k, v, mask)
    eager, eager_lse = masked_attention_oracle(q, k, v, mask, dtype=dtype)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    assert_close_to_oracle(out, eager, truth)
    assert_close_to_oracle(lse, eager_lse, truth_lse, name="lse")


def test_chunks_do_not_change_the_result(monkeypatch):
    from vidsparse_kernels.block_sparse_attention import reference

    q, k, v = make_qkv(seq_len_q=300, dtype=torch.float64)
    mask = make_variable_block_mask(seq_len_q=300, num_q_blocks=9, num_kv_blocks=30, offsets_heads=2)
    whole = block_sparse_attention(q, k, v, mask, backend="reference")
    monkeypatch.setattr(reference, "CPU_CHUNK_ELEMENTS", 1)
    assert_exact(block_sparse_attention(q, k, v, mask, backend="reference"), whole)


def test_what_is_not_listed_may_be_anything():
    """Padding of a tile lies in the next block: not even what is not finite there may be seen."""
    q, k, v = make_qkv(seq_len_q=40, dtype=torch.float64)
    dense = torch.tensor([[[[True, False, True]]]])
    offsets = torch.tensor([[[0, 10, 15, 40]]])
    mask = BlockMask.from_dense(
        dense, seq_len_q=40, seq_len_kv=40, q_block_size=40, kv_block_size=16, kv_offsets=offsets
    )
    want = block_sparse_attention(q, k, v, mask)
    k[:, 10:15], v[:, 10:15] = torch.nan, torch.inf
    for backend in ("reference", "sdpa"):
        assert_exact(block_sparse_attention(q, k, v, mask, backend=backend), want)


def covered(mask: BlockMask, tile_size: int, transposed: bool) -> torch.Tensor:
    """How often each token pair is computed, `[B, H, own tokens, other tokens]`, from tiles and lists alone."""
    lead = (mask.batch_size, mask.num_heads)
    counts, lists = (x.expand(*lead, *x.shape[2:]) for x in tile_lists(mask, tile_size, transposed=transposed))
    blocks, own = (x.expand(*lead, -1) for x in own_tiles(mask, tile_size, transposed=transposed))
    lengths = (mask.seq_len_kv, mask.seq_len_q) if transposed else (mask.seq_len_q, mask.seq_len_kv)
    listed = torch.arange(lists.shape[-1]) < counts.unsqueeze(-1)
    starts, sizes = unpacked(torch.where(listed, lists, -1))
    columns = torch.arange(lengths[1])
    inside = (columns >= starts.unsqueeze(-1)) & (columns < (starts + sizes).unsqueeze(-1))
    per_block = inside.sum(3)
    starts, sizes = unpacked(own)
    rows = torch.arange(lengths[0]).unsqueeze(-1)
    owns = ((rows >= starts.unsqueeze(2)) & (rows < (starts + sizes).unsqueeze(2))).long()
    assert torch.equal(owns.sum(-1), torch.ones(*lead, lengths[0], dtype=torch.long))
    per_tile = per_block.gather(2, blocks.long().unsqueeze(-1).expand(-1, -1, -1, lengths[1]))
    return owns @ per_tile


@settings(deadline=None, max_examples=200)
@given(masks(), st.sampled_from([1, 7, 16, 64]), st.booleans())
def test_tiles_cover_each_listed_pair_once(mask, tile_size, transposed):
    truth = token_mask(mask).long()
    assert torch.equal(covered(mask, tile_size, transposed), truth.transpose(2, 3) if transposed else truth)
    counts, lists = tile_lists(mask, tile_size, transposed=transposed)
    ascending = lists[..., 1:] > lists[..., :-1]
    valid = torch.arange(1, lists.shape[-1]) < counts.unsqueeze(-1)
    assert bool(ascending[valid].all())
    assert tile_lists(mask, tile_size, transposed=transposed)[0] is counts


@settings(deadline=None, max_examples=100)
@given(masks(), st.sampled_from([1, 16, 64]), st.booleans())
def test_capacity_from_shapes_alone_is_enough(mask, tile_size, transposed):
    """What a GPU allocates, where counts are not read."""
    exact = covered(mask, tile_size, transposed)
    mask._cache.clear()
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(tiles_module, "_capacity", lambda ends, *shape: tiles_module.most_tiles(*shape))
        assert torch.equal(covered(mask, tile_size, transposed), exact)
    _, own = own_tiles(mask, tile_size, transposed=transposed)
    assert bool(((own < 0) | (unpacked(own)[1] > 0)).all())


def test_neighbouring_listed_blocks_share_tiles():
    """Blocks of 10, 0, 20, 5 and 65 tokens: the first three are one run of 30, the last one is another."""
    mask = BlockMask.from_dense(
        torch.tensor([[[[True, True, True, False, True]]]]),
        seq_len_q=8,
        seq_len_kv=100,
        q_block_size=8,
        kv_block_size=16,
        kv_offsets=torch.tensor([[[0, 10, 10, 30, 35, 100]]]),
    )
    counts, lists = tile_lists(mask, 16)
    starts, lengths = unpacked(lists[0, 0, 0, : counts.item()])
    assert starts.tolist() == [0, 16, 35, 51, 67, 83, 99]
    assert lengths.tolist() == [16, 14, 16, 16, 16, 16, 1]
    # 7 of the 7 tiles that 100 tokens take densely, though 5 tokens are left out.
    assert mask.density == 1.0 and mask.token_density == pytest.approx(0.95)


@settings(deadline=None, max_examples=100)
@given(masks())
def test_densities(mask):
    allowed = token_mask(mask)
    assert mask.token_density == pytest.approx(allowed.double().mean().item())
    if not mask.variable:
        return
    # By hand: runs of listed keys of one row of each q-block, cut into tiles, for each tile of that q-block.
    work = 0
    q_offsets = mask.offsets("q").expand(*allowed.shape[:2], -1)
    for b, h in torch.cartesian_prod(torch.arange(allowed.shape[0]), torch.arange(allowed.shape[1])).tolist():
        bounds = q_offsets[b, h].tolist()
        for start, stop in pairwise(bounds):
            if start == stop:
                continue
            row = "".join("x" if seen else " " for seen in allowed[b, h, start].tolist())
            kv_tiles = sum(-(-len(run) // mask.kv_block_size) for run in row.split())
            work += kv_tiles * -(-(stop - start) // mask.q_block_size)
    dense = -(-mask.seq_len_q // mask.q_block_size) * -(-mask.seq_len_kv // mask.kv_block_size)
    assert mask.density == pytest.approx(work / (allowed.shape[0] * allowed.shape[1] * dense))


def test_padding_is_part_of_density():
    """Two q-blocks of 150 tokens in tiles of 64 cost 192 each, where 300 tokens in one cost 320."""
    sizes: dict[str, Any] = dict(seq_len_q=300, seq_len_kv=64, q_block_size=64, kv_block_size=64)
    assert BlockMask.full(**sizes).density == 1.0
    mask = BlockMask.full(**sizes, q_offsets=torch.tensor([[[0, 150, 300]]]))
    assert mask.density == pytest.approx(6 / 5) and mask.token_density == 1.0


@settings(deadline=None, max_examples=100)
@given(masks())
def test_derived_masks_keep_the_offsets(mask):
    rest = mask.complement()
    assert torch.equal(token_mask(rest), ~token_mask(mask))
    assert bool(token_mask(mask.union(rest)).all())
    moved = mask.to("meta")
    for name in ("q_offsets", "kv_offsets"):
        before, after = getattr(mask, name), getattr(moved, name)
        assert (before is None) == (after is None)
        assert after is None or (after.shape == before.shape and after.device.type == "meta")
        assert getattr(rest, name) is before
    assert (moved.num_q_blocks, moved.num_kv_blocks) == (mask.num_q_blocks, mask.num_kv_blocks)
    again = BlockMask.from_indices(
        mask.kv_num_blocks,
        mask.kv_indices,
        seq_len_q=mask.seq_len_q,
        seq_len_kv=mask.seq_len_kv,
        q_block_size=mask.q_block_size,
        kv_block_size=mask.kv_block_size,
        q_offsets=mask.q_offsets,
        kv_offsets=mask.kv_offsets,
    )
    assert torch.equal(token_mask(again), token_mask(mask))


def test_offsets_that_differ_cannot_be_united():
    one = make_variable_block_mask(seq_len_q=50, num_q_blocks=4, seed=1)
    other = make_variable_block_mask(seq_len_q=50, num_q_blocks=4, seed=2)
    uniform = make_variable_block_mask(seq_len_q=50)
    for mask in (other, uniform):
        with pytest.raises(ValueError, match="same `q_offsets`"):
            one.union(mask)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0, 5, 20]), r"`kv_offsets` must be \[B\|1, H\|1, blocks \+ 1\], got shape \(3,\)"),
        (torch.tensor([[[0.0, 20.0]]]), "`kv_offsets` must have an integer dtype, got torch.float32"),
        (torch.tensor([[[1, 20]]]), r"`kv_offsets` must start at 0 and end at 20, got \[1\] and \[20\]"),
        (torch.tensor([[[0, 21]]]), r"`kv_offsets` must start at 0 and end at 20, got \[0\] and \[21\]"),
        (torch.tensor([[[0, 9, 7, 20]]]), "`kv_offsets` must not descend, got a step of -2"),
        (torch.tensor([[[0, 20]]] * 3), r"`kv_offsets` must have a batch and heads that are 1 or go with \(2, 1\)"),
    ],
)
def test_wrong_offsets_are_refused(offsets, message):
    sizes: dict[str, Any] = dict(seq_len_q=20, seq_len_kv=20, q_block_size=10, kv_block_size=10)
    blocks = offsets.shape[-1] - 1
    with pytest.raises(ValueError, match=message):
        BlockMask.from_dense(torch.ones(2, 1, 2, blocks).bool(), **sizes, kv_offsets=offsets)
    counts, indices = torch.zeros(2, 1, 2).int(), torch.zeros(2, 1, 2, 1).int()
    with pytest.raises(ValueError, match=message):
        BlockMask.from_indices(counts, indices, **sizes, kv_offsets=offsets)


def test_lists_that_do_not_fit_the_offsets_are_refused():
    sizes: dict[str, Any] = dict(seq_len_q=20, seq_len_kv=20, q_block_size=10, kv_block_size=10)
    offsets = torch.tensor([[[0, 5, 9, 20]]])
    with pytest.raises(ValueError, match=r"must list 3 q-blocks \(3 blocks by their offsets\), got 2"):
        BlockMask.from_indices(torch.zeros(1, 1, 2).int(), torch.zeros(1, 1, 2, 1).int(), **sizes, q_offsets=offsets)
    with pytest.raises(ValueError, match=r"\[B\|1, H\|1, 2, 3\]"):
        BlockMask.from_dense(torch.ones(1, 1, 2, 2).bool(), **sizes, kv_offsets=offsets)


def test_lengths_that_cannot_be_packed_are_refused():
    offsets = torch.tensor([[[0, 5, MAX_TOKENS + 1]]])
    mask = BlockMask.full(10, MAX_TOKENS + 1, q_block_size=16, kv_block_size=64, kv_offsets=offsets)
    with pytest.raises(ValueError, match=f"`seq_len_kv` must be at most {MAX_TOKENS}"):
        tile_lists(mask, 64)
    with pytest.raises(ValueError, match="`tile_size` must be between 1 and 256, got 512"):
        tile_lists(mask, 512)
    last = BlockMask.full(10, MAX_TOKENS, q_block_size=16, kv_block_size=256, q_offsets=torch.tensor([[[0, 10]]]))
    starts, lengths = unpacked(tile_lists(last, 256)[1])
    assert int(starts[0, 0, 0, -1]) == MAX_TOKENS - 256 and int(lengths[0, 0, 0, -1]) == 256


def test_backends_that_take_only_uniform_blocks_say_so():
    q, k, v = make_qkv(seq_len_q=70)
    mask = make_variable_block_mask(seq_len_q=70, num_kv_blocks=5)
    assert select_backend(q, k, v, mask)[0] == "sdpa"
    assert select_backend(q, k, v, mask, requires_grad=True)[0] == "reference"
    with pytest.raises(UnsupportedBackendError, match='"hopper" needs'):
        block_sparse_attention(q, k, v, mask, backend="hopper")


INTERPRETED = """
import sys
import torch
from vidsparse_kernels import block_sparse_attention
from vidsparse_kernels.block_sparse_attention import tiles
from vidsparse_kernels.block_sparse_attention.configs import ForwardConfig
from vidsparse_kernels.block_sparse_attention.forward import triton_forward
from vidsparse_kernels.block_sparse_attention.tiles import own_tiles
from vidsparse_kernels.testing import (
    assert_close_to_oracle, make_qkv, make_variable_block_mask, masked_attention_oracle)

descriptors, generator = sys.argv[1] == "descriptors", torch.Generator().manual_seed(int(sys.argv[2]))
# What a GPU allocates, with programs that have nothing to do.
tiles._capacity = lambda ends, *shape: tiles.most_tiles(*shape)

def pick(*options):
    return options[int(torch.randint(len(options), (), generator=generator))]

for number in range(int(sys.argv[3])):
    batch, group, kv_heads = pick(1, 2), pick(1, 2), pick(1, 2)
    heads = group * kv_heads
    dtype = pick(torch.float32, torch.float16)
    mask = make_variable_block_mask(
        seq_len_q=pick(1, 33, 63, 90), seq_len_kv=pick(1, 16, 40, 111), num_q_blocks=pick(None, 1, 3, 12),
        num_kv_blocks=pick(None, 1, 4, 12), q_block_size=32, kv_block_size=pick(16, 32), batch=pick(1, batch),
        num_heads=pick(1, heads), offsets_batch=pick(1, batch), offsets_heads=pick(1, heads),
        density=pick(0.0, 0.3, 0.6, 1.0), empty_rows=pick(True, False), full_rows=pick(True, False), seed=number)
    q, k, v = make_qkv(
        batch=batch, seq_len_q=mask.seq_len_q, seq_len_kv=mask.seq_len_kv, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=pick(16, 40), dtype=dtype, contiguous=pick(True, False), seed=number)
    bias = pick(None, torch.linspace(-2, 2, k.shape[1]).expand(1, 1, -1).clone())
    if bias is not None:
        bias[..., ::3] = -torch.inf
    truth, truth_lse = masked_attention_oracle(q, k, v, mask, key_bias=bias)
    eager, eager_lse = masked_attention_oracle(q, k, v, mask, key_bias=bias, dtype=dtype)
    if mask.variable:
        # Programs run in order here: what a tile wrote past its end would be covered up by the next one.
        own_tiles(mask, 32)
        mask._cache["own_tiles 32 False"] = tuple(x.flip(-1) for x in mask._cache["own_tiles 32 False"])
    config = ForwardConfig(32, 16, 4, 2, descriptors)
    out, lse = triton_forward(
        q, k, v, mask, scale=q.shape[-1] ** -0.5, key_bias=bias, return_lse=True, config=config)
    case = f"{number} {mask} {dtype}"
    assert_close_to_oracle(out, eager, truth, name=case)
    assert_close_to_oracle(lse, eager_lse, truth_lse, name="lse " + case)
out = block_sparse_attention(q, k, v, mask, backend="triton")
assert_close_to_oracle(out, *[masked_attention_oracle(q, k, v, mask, dtype=d)[0] for d in (dtype, torch.float64)])
print("checked")
"""


@needs_triton
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", ["descriptors", "pointers"])
def test_interpreted_kernel_is_exact(variant, seed):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED, variant, str(seed), "25"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "checked"
