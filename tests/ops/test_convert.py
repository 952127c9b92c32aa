"""Masks of other libraries, and FlexAttention as a backend in its eager form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from vidsparse_kernels import BlockMask, from_flex_block_mask, to_flash4_block_sparse, to_flex_block_mask
from vidsparse_kernels.block_sparse_attention import flash4, flex
from vidsparse_kernels.block_sparse_attention.convert import flash4_fields
from vidsparse_kernels.testing import (
    assert_close_to_oracle,
    make_block_mask,
    make_qkv,
    masked_attention_oracle,
    token_mask,
)

# The eager form of FlexAttention warns that it is slow; here it is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@st.composite
def masks(draw) -> BlockMask:
    return make_block_mask(
        seq_len_q=draw(st.integers(1, 200)),
        seq_len_kv=draw(st.integers(1, 200)),
        q_block_size=draw(st.sampled_from([16, 48, 64])),
        kv_block_size=draw(st.sampled_from([16, 32, 100])),
        batch=draw(st.integers(1, 2)),
        num_heads=draw(st.integers(1, 3)),
        density=draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])),
        seed=draw(st.integers(0, 1000)),
    )


def assert_same_mask(got: BlockMask, want: BlockMask) -> None:
    for name in ("seq_len_q", "seq_len_kv", "q_block_size", "kv_block_size"):
        assert getattr(got, name) == getattr(want, name)
    assert torch.equal(got.to_dense(), want.to_dense())


@settings(deadline=None, max_examples=60)
@given(masks())
def test_there_and_back(mask):
    assert_same_mask(from_flex_block_mask(to_flex_block_mask(mask)), mask)


@settings(deadline=None, max_examples=25)
@given(masks())
def test_flex_builds_the_same_mask_from_our_mask_mod(mask):
    """`create_block_mask` evaluates the mask_mod on every token and sorts blocks into partial and full by itself."""
    ours = to_flex_block_mask(mask)
    theirs = create_block_mask(
        ours.mask_mod, mask.batch_size, mask.num_heads, mask.seq_len_q, mask.seq_len_kv, device="cpu",
        BLOCK_SIZE=(mask.q_block_size, mask.kv_block_size),
    )  # fmt: skip
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        got, want = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(got, want), name
        listed = getattr(ours, name.replace("num_blocks", "indices"))
        expected = getattr(theirs, name.replace("num_blocks", "indices"))
        meant = torch.arange(listed.shape[-1]) < got.unsqueeze(-1)
        assert torch.equal(listed[meant], expected[meant]), name
    assert ours.shape == theirs.shape and torch.equal(ours.to_dense(), theirs.to_dense())
    assert_same_mask(from_flex_block_mask(theirs), mask)


def test_a_mask_within_blocks_is_not_dropped_silently():
    causal = create_block_mask(lambda b, h, q, kv: q >= kv, 1, 1, 100, 100, device="cpu", BLOCK_SIZE=32)
    with pytest.raises(ValueError, match="got 3 partial blocks inside the sequence; pass drop_mask_mod=True"):
        from_flex_block_mask(causal)
    whole = from_flex_block_mask(causal, drop_mask_mod=True)
    assert torch.equal(whole.to_dense()[0, 0], torch.ones(4, 4).tril().bool())


def test_full_masks_and_expanded_lists():
    mask = BlockMask.full(130, 70, q_block_size=64, kv_block_size=32)
    assert_same_mask(from_flex_block_mask(to_flex_block_mask(mask)), mask)
    assert all(x.is_contiguous() for x in flash4_fields(mask).values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize(
    "shape",
    [
        dict(seq_len_q=128, seq_len_kv=256),
        dict(seq_len_q=111, seq_len_kv=205, num_heads=4, num_kv_heads=2),
        dict(seq_len_q=63, seq_len_kv=40, head_dim=72),
        dict(seq_len_q=128, seq_len_kv=192, contiguous=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_flex_is_exact(shape, dtype, biased):
    q, k, v = make_qkv(batch=2, dtype=dtype, **shape)
    mask = make_block_mask(
        seq_len_q=q.shape[1], seq_len_kv=k.shape[1], q_block_size=48, kv_block_size=32, num_heads=q.shape[2],
        empty_rows=True, full_rows=True,
    )  # fmt: skip
    bias = None
    if biased:
        bias = torch.randn(2, 1, k.shape[1])
        bias[..., ::3] = -torch.inf
    scale = q.shape[-1] ** -0.5
    out, lse = flex.flex_forward(q, k, v, mask, scale=scale, key_bias=bias, return_lse=True, compiled=False)
    truth, truth_lse = masked_attention_oracle(q, k, v, mask, key_bias=bias)
    eager, eager_lse = masked_attention_oracle(q, k, v, mask, key_bias=bias, dtype=dtype)
    assert lse is not None and lse.dtype == torch.float32
    assert_close_to_oracle(out, eager, truth)
    assert_close_to_oracle(lse, eager_lse, truth_lse, name="lse")
    alone, none = flex.flex_forward(q, k, v, mask, scale=scale, key_bias=bias, return_lse=False, compiled=False)
    assert none is None and torch.equal(alone, out)


def test_flex_mask_is_kept_on_the_mask():
    mask = make_block_mask(seq_len_q=100)
    assert flex._converted(mask) is flex._converted(mask)


def test_flex_options_keep_its_tiles_inside_our_blocks():
    options = flex._kernel_options(make_block_mask(seq_len_q=96, q_block_size=48, kv_block_size=32))
    assert options["BLOCK_M"] == 16 and options["BLOCK_N"] == 32 and "IS_DIVISIBLE" not in options
    # 384 is a multiple of 128 but not of the block, so lengths have to be checked inside the last block.
    options = flex._kernel_options(make_block_mask(seq_len_q=384, q_block_size=128, kv_block_size=256))
    assert options["IS_DIVISIBLE"] is False and "BLOCK_M" not in options


@settings(deadline=None, max_examples=40)
@given(masks())
def test_flash4_lists_say_the_same(mask):
    """Walked as FlashAttention-4 walks them: full blocks of `block_size`, cut at the end of the sequence."""
    fields = flash4_fields(mask)
    assert not fields["mask_block_cnt"].any()
    assert {str(x.dtype) for name, x in fields.items() if name != "block_size"} == {"torch.int32"}
    height, width = fields["block_size"]
    tokens = torch.zeros(mask.batch_size, mask.num_heads, mask.seq_len_q, mask.seq_len_kv, dtype=torch.bool)
    counts, indices = fields["full_block_cnt"], fields["full_block_idx"]
    for b, h, m in torch.cartesian_prod(*[torch.arange(n) for n in counts.shape]).tolist():
        blocks = indices[b, h, m, : counts[b, h, m]].tolist()
        assert blocks == sorted(blocks)
        for block in blocks:
            tokens[b, h, m * height : (m + 1) * height, block * width : (block + 1) * width] = True
    assert torch.equal(tokens, token_mask(mask))


@pytest.mark.skipif(flash4.installed(), reason="flash-attn-4 is installed")
def test_flash4_names_the_package_that_is_missing():
    mask = make_block_mask(seq_len_q=100)
    with pytest.raises(ImportError, match="pip install flash-attn-4"):
        to_flash4_block_sparse(mask)
    assert flash4.unsupported(torch.randn(1, 100, 2, 64), mask) == "needs the package flash-attn-4"


def test_flash4_wants_blocks_that_match_its_tiles():
    q = torch.empty(1, 512, 2, 128, dtype=torch.bfloat16, device="meta")

    def obstacle(major: int, blocks: tuple[int, int], query: torch.Tensor = q) -> str | None:
        mask = make_block_mask(seq_len_q=512, q_block_size=blocks[0], kv_block_size=blocks[1])
        return flash4._unsupported_shape(major, query, mask)

    assert obstacle(9, (128, 128)) is None and obstacle(9, (256, 128)) is None
    assert obstacle(9, (128, 64)) == "needs blocks of 128 x 128 here, got 128 x 64"
    assert obstacle(9, (384, 128)) is None
    assert obstacle(9, (384, 128), q[..., :96]) == "needs blocks of 128 x 128 here, got 384 x 128"
    assert obstacle(10, (256, 256)) is None
    assert obstacle(10, (128, 128)) == "needs blocks of 256 x 128 or multiples here, got 128 x 128"
    assert obstacle(12, (128, 128)) == "is block-sparse on compute capability 9 to 11, got 12"
    assert obstacle(9, (128, 128), q.float()) == "computes in bf16 and fp16, not torch.float32"
    assert obstacle(9, (128, 128), q[..., :100]) == "needs a head_dim that is a multiple of 8 up to 128, got 100"
    with pytest.raises(ValueError, match="`key_bias` must be None"):
        flash4.flash4_forward(
            q, q, q, make_block_mask(seq_len_q=512), scale=1.0, key_bias=torch.zeros(1, 1, 512), return_lse=False
        )


def test_flex_names_what_it_cannot_do():
    mask = make_block_mask(seq_len_q=100)
    assert flex.unsupported(torch.randn(1, 100, 2, 64), mask) == "needs a GPU, got cpu"

    def obstacle(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, **changes: int) -> str | None:
        query = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 100, 2, head_dim))
        return flex.unsupported(query, make_block_mask(seq_len_q=100, **changes))  # pyright: ignore[reportArgumentType]

    assert obstacle() is None
    assert obstacle(torch.float64) == "computes in bf16, fp16 and fp32, not torch.float64"
    assert obstacle(head_dim=8) == "needs a head_dim of at least 16, got 8"
    assert obstacle(kv_block_size=40) == "needs a kv_block_size that is a multiple of 16, got 40"


def test_blocks_of_variable_size_are_refused():
    mask = make_block_mask(seq_len_q=100)
    offsets = torch.tensor([[[0, 30, 100]]], dtype=torch.int32)
    variable: Any = SimpleNamespace(q_offsets=None, kv_offsets=offsets, to_dense=mask.to_dense)
    with pytest.raises(ValueError, match="uniform size for FlexAttention, got one with `kv_offsets`"):
        to_flex_block_mask(variable)
    with pytest.raises(ValueError, match="uniform size for FlashAttention-4, got one with `kv_offsets`"):
        flash4_fields(variable)
    query = torch.randn(1, 100, 2, 64)
    for module in (flex, flash4):
        assert module.unsupported(query, variable) == "does not take blocks of variable size (kv_offsets)"
