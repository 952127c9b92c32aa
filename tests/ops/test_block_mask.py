"""BlockMask: constructors, derived forms and their checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse_kernels import BlockMask
from vidsparse_kernels.testing import make_block_mask, token_mask


@st.composite
def masks(draw) -> BlockMask:
    return make_block_mask(
        seq_len_q=draw(st.integers(1, 300)),
        seq_len_kv=draw(st.integers(1, 300)),
        q_block_size=draw(st.sampled_from([16, 48, 64])),
        kv_block_size=draw(st.sampled_from([16, 32, 100])),
        batch=draw(st.integers(1, 2)),
        num_heads=draw(st.integers(1, 3)),
        density=draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])),
        seed=draw(st.integers(0, 1000)),
    )


def sizes_of(mask: BlockMask) -> dict[str, Any]:
    return dict(
        seq_len_q=mask.seq_len_q,
        seq_len_kv=mask.seq_len_kv,
        q_block_size=mask.q_block_size,
        kv_block_size=mask.kv_block_size,
    )


@settings(deadline=None, max_examples=100)
@given(masks())
def test_lists_and_dense_form_agree(mask):
    dense = mask.to_dense()
    again = BlockMask.from_dense(dense, **sizes_of(mask))
    assert torch.equal(again.kv_num_blocks, mask.kv_num_blocks)
    assert torch.equal(again.kv_indices, mask.kv_indices)
    rebuilt = BlockMask.from_indices(mask.kv_num_blocks, mask.kv_indices, **sizes_of(mask))
    assert torch.equal(rebuilt.to_dense(), dense)
    for b, h, q in torch.cartesian_prod(*[torch.arange(n) for n in dense.shape[:3]]).tolist():
        count = int(mask.kv_num_blocks[b, h, q])
        assert mask.kv_indices[b, h, q, :count].tolist() == dense[b, h, q].nonzero().flatten().tolist()
        assert not mask.kv_indices[b, h, q, count:].any()


@settings(deadline=None, max_examples=100)
@given(masks())
def test_transpose_lists_the_other_way_round(mask):
    counts, indices = mask.transpose()
    dense = mask.to_dense().transpose(2, 3)
    assert counts.dtype == indices.dtype == torch.int32
    assert torch.equal(counts, dense.sum(-1, dtype=torch.int32))
    for b, h, kv in torch.cartesian_prod(*[torch.arange(n) for n in dense.shape[:3]]).tolist():
        count = int(counts[b, h, kv])
        assert indices[b, h, kv, :count].tolist() == dense[b, h, kv].nonzero().flatten().tolist()
        assert not indices[b, h, kv, count:].any()
    assert mask.transpose()[0] is counts


@settings(deadline=None, max_examples=100)
@given(masks(), st.integers(0, 1000))
def test_union_and_complement(mask, seed):
    other = make_block_mask(**sizes_of(mask), density=0.3, seed=seed)
    union = mask.union(other)
    assert torch.equal(union.to_dense(), mask.to_dense() | other.to_dense())
    rest = mask.complement()
    assert torch.equal(rest.to_dense(), ~mask.to_dense())
    assert mask.union(rest).density == 1.0
    assert mask.density + rest.density == pytest.approx(1.0)


@settings(deadline=None, max_examples=100)
@given(masks())
def test_densities(mask):
    assert mask.density == pytest.approx(mask.to_dense().float().mean().item())
    assert mask.token_density == pytest.approx(token_mask(mask).float().mean().item())


def test_full_is_one_stored_row():
    mask = BlockMask.full(130, 70, q_block_size=64, kv_block_size=32)
    assert mask.to_dense().all() and mask.to_dense().shape == (1, 1, 3, 3)
    assert mask.density == mask.token_density == 1.0
    assert mask.kv_indices.untyped_storage().nbytes() == 3 * 4


def test_broadcast_dimensions_stay_broadcast():
    mask = make_block_mask(seq_len_q=128)
    assert mask.kv_num_blocks.shape == (1, 1, 2)
    assert (mask.num_q_blocks, mask.num_kv_blocks, mask.batch_size, mask.num_heads) == (2, 2, 1, 1)


def test_to_the_same_device_is_the_same_mask():
    mask = make_block_mask(seq_len_q=128)
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert moved.device.type == "meta" and moved.seq_len_q == 128


def test_entries_past_the_count_are_zeroed():
    mask = BlockMask.from_indices(
        torch.tensor([[[1, 2]]]),
        torch.tensor([[[[1, 9], [0, 1]]]]),
        seq_len_q=20,
        seq_len_kv=20,
        q_block_size=10,
        kv_block_size=10,
    )
    assert mask.kv_indices.tolist() == [[[[1, 0], [0, 1]]]]
    assert mask.kv_indices.dtype == mask.kv_num_blocks.dtype == torch.int32


SIZES: dict[str, Any] = dict(seq_len_q=20, seq_len_kv=30, q_block_size=10, kv_block_size=10)


@pytest.mark.parametrize(
    ("counts", "indices", "message"),
    [
        (torch.ones(1, 2), torch.zeros(1, 1, 2, 1), "kv_num_blocks` must have 3 dimensions"),
        (torch.ones(1, 1, 2), torch.zeros(1, 1, 2, 1).long(), "integer dtype, got torch.float32"),
        (torch.ones(1, 1, 2).int(), torch.zeros(1, 2, 2, 1).int(), "must start with the shape"),
        (torch.ones(1, 1, 3).int(), torch.zeros(1, 1, 3, 1).int(), "must list 2 q-blocks"),
        (torch.tensor([[[1, 2]]]), torch.zeros(1, 1, 2, 1).int(), "between 0 and 1, got values from 1 to 2"),
        (torch.tensor([[[1, 1]]]), torch.tensor([[[[0], [3]]]]), "between 0 and 2, got values from 0 to 3"),
        (torch.tensor([[[2, 1]]]), torch.tensor([[[[1, 1], [0, 0]]]]), "strictly ascending"),
    ],
)
def test_wrong_lists_are_refused(counts, indices, message):
    with pytest.raises(ValueError, match=message):
        BlockMask.from_indices(counts, indices, **SIZES)


def test_wrong_dense_masks_and_sizes_are_refused():
    with pytest.raises(ValueError, match="must be boolean"):
        BlockMask.from_dense(torch.ones(1, 1, 2, 3), **SIZES)
    with pytest.raises(ValueError, match=r"\[B\|1, H\|1, 2, 3\]"):
        BlockMask.from_dense(torch.ones(1, 1, 3, 2).bool(), **SIZES)
    with pytest.raises(ValueError, match="`seq_len_q` must be a whole number of at least 1, got 0"):
        BlockMask.full(0, 5, q_block_size=1, kv_block_size=1)
    mask = BlockMask.full(20, 30, q_block_size=10, kv_block_size=10)
    with pytest.raises(ValueError, match="same `kv_block_size`, got 10 and 15"):
        mask.union(BlockMask.full(20, 30, q_block_size=10, kv_block_size=15))


@pytest.mark.parametrize("size", [0, -1, 10.5, "8"])
def test_sizes_are_whole_numbers(size):
    with pytest.raises(ValueError, match="`seq_len_q` must be a whole number of at least 1, got"):
        BlockMask.full(size, 10, q_block_size=2, kv_block_size=2)


@pytest.mark.parametrize("lead", [(0, 1), (1, 0)], ids=str)
def test_masks_of_no_sample_or_no_head_are_refused(lead):
    sizes: dict[str, Any] = dict(seq_len_q=64, seq_len_kv=64, q_block_size=32, kv_block_size=32)
    with pytest.raises(ValueError, match="`dense` must have at least one sample and one head"):
        BlockMask.from_dense(torch.ones(*lead, 2, 2, dtype=torch.bool), **sizes)
    lists = torch.zeros(*lead, 2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="`kv_num_blocks` must have at least one sample and one head"):
        BlockMask.from_indices(lists[..., 0], lists, **sizes)
