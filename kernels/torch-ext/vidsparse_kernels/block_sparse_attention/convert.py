"""Block masks of other libraries: torch FlexAttention's BlockMask and FlashAttention-4's block-sparse tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..block_mask import BlockMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


def to_flex_block_mask(block_mask: BlockMask) -> FlexBlockMask:
    """The same mask for `torch.nn.attention.flex_attention`, forward and backward.

    Blocks that the end of a sequence cuts are listed as partial, as `create_block_mask` does, all others as full.
    FlexAttention runs `mask_mod` on partial blocks only when compiled, but on every score in eager mode, where it does
    not look at the lists; so the `mask_mod` given here holds the whole mask, as a table of blocks.

    Args:
        block_mask: blocks of uniform size; broadcast dimensions stay of size 1.

    Raises:
        ValueError: the blocks have variable sizes, which FlexAttention has no form for.
    """
    # torch calls this module a prototype: only who converts depends on it.
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    _check_uniform(block_mask, "FlexAttention")
    table = block_mask.to_dense()
    batch_size, num_heads = table.shape[:2]
    seq_len_kv, q_block_size, kv_block_size = block_mask.seq_len_kv, block_mask.q_block_size, block_mask.kv_block_size

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # A compiled kernel may ask about tokens past the end of the last block's sequence, never past the block.
        listed = table[b % batch_size, h % num_heads, q_idx // q_block_size, kv_idx // kv_block_size]
        return listed & (kv_idx < seq_len_kv)

    cut = torch.zeros(table.shape[2:], dtype=torch.bool, device=table.device)
    if block_mask.seq_len_q % q_block_size:
        cut[-1] = True
    if seq_len_kv % kv_block_size:
        cut[:, -1] = True
    partial, full = _lists(table & cut), _lists(table & ~cut)
    return FlexBlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=(q_block_size, kv_block_size),
        mask_mod=mask_mod,
        seq_lengths=(block_mask.seq_len_q, seq_len_kv),
    )


def from_flex_block_mask(flex_mask: FlexBlockMask, *, drop_mask_mod: bool = False) -> BlockMask:
    """The blocks of a FlexAttention mask.

    Args:
        flex_mask: lists with batch and head dimension.
        drop_mask_mod: also take masks with partial blocks inside the sequence, and compute those blocks whole.

    Returns:
        Partial and full blocks together, on the device of `flex_mask`.

    Raises:
        ValueError: `flex_mask` has no batch and head dimension, or it has partial blocks that no end of a sequence
            explains (the values are read from the device for this) and `drop_mask_mod` is False.
    """
    if flex_mask.kv_indices.ndim != 4:
        raise ValueError(
            f"`flex_mask` must have lists [batch, heads, q-blocks, kv-blocks], got {tuple(flex_mask.kv_indices.shape)}."
        )
    (seq_len_q, seq_len_kv), (q_block_size, kv_block_size) = flex_mask.seq_lengths, flex_mask.BLOCK_SIZE
    num_kv_blocks = -(-seq_len_kv // kv_block_size)
    dense = _table(flex_mask.kv_num_blocks, flex_mask.kv_indices, num_kv_blocks)
    if not drop_mask_mod:
        inner = dense[:, :, : seq_len_q // q_block_size, : seq_len_kv // kv_block_size]
        num_partial = int(inner.sum())
        if num_partial:
            raise ValueError(
                f"`flex_mask` must mask whole blocks, got {num_partial} partial blocks inside the sequence; pass "
                "drop_mask_mod=True to compute them whole."
            )
    if flex_mask.full_kv_num_blocks is not None:
        assert flex_mask.full_kv_indices is not None
        dense = dense | _table(flex_mask.full_kv_num_blocks, flex_mask.full_kv_indices, num_kv_blocks)
    return BlockMask.from_dense(
        dense, seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, q_block_size=q_block_size, kv_block_size=kv_block_size
    )


def flash4_fields(block_mask: BlockMask) -> dict[str, Any]:
    """What `flash_attn.cute.block_sparsity.BlockSparseTensorsTorch` takes, by the names of its fields.

    All blocks are listed as full: without a mask_mod a partial block differs only by being slower. FlashAttention-4
    walks a list from its end and cuts at the end of the sequence only in the first block it meets, so lists must
    ascend. It wants the partial lists too; they are empty.

    Returns:
        `mask_block_cnt` int32 `[B|1, H|1, num_q_blocks]` and `mask_block_idx` int32 `[B|1, H|1, num_q_blocks, 1]`,
        zeros; `full_block_cnt` and `full_block_idx` int32, the lists of `block_mask`; `block_size`.

    Raises:
        ValueError: the blocks have variable sizes.
    """
    _check_uniform(block_mask, "FlashAttention-4")
    counts, indices = block_mask.kv_num_blocks.contiguous(), block_mask.kv_indices.contiguous()
    if indices.shape[-1] == 0:
        indices = indices.new_zeros(*indices.shape[:3], 1)
    return dict(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=indices.new_zeros(*indices.shape[:3], 1),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(block_mask.q_block_size, block_mask.kv_block_size),
    )


def to_flash4_block_sparse(block_mask: BlockMask) -> Any:
    """The mask as FlashAttention-4's `BlockSparseTensorsTorch`, for `block_sparse_tensors=` of its functions.

    Raises:
        ImportError: the package flash-attn-4 is not installed.
        ValueError: the blocks have variable sizes.
    """
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("FlashAttention-4 is needed: `pip install flash-attn-4`.") from error
    return BlockSparseTensorsTorch(**flash4_fields(block_mask))


def _check_uniform(block_mask: BlockMask, library: str) -> None:
    for name in ("q_offsets", "kv_offsets"):
        if getattr(block_mask, name, None) is not None:
            raise ValueError(f"`block_mask` must have blocks of uniform size for {library}, got one with `{name}`.")


def _lists(table: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and lists as wide as the table: FlexAttention takes the number of kv-blocks from the width."""
    indices = torch.argsort(table.logical_not().to(torch.uint8), dim=-1, stable=True)
    return table.sum(-1, dtype=torch.int32), indices.to(torch.int32)


def _table(counts: Tensor, indices: Tensor, num_kv_blocks: int) -> Tensor:
    """Bool `[B, H, q-blocks, num_kv_blocks]` from lists of any width."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    columns = torch.where(valid, indices, num_kv_blocks).to(torch.int64)
    dense = torch.zeros(*indices.shape[:3], num_kv_blocks + 1, dtype=torch.bool, device=indices.device)
    return dense.scatter_(-1, columns, True)[..., :-1]
