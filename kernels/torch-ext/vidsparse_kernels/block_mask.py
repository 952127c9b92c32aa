"""BlockMask: which kv-blocks each q-block attends to, as lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Lists of kv-blocks per (batch, head, q-block), in FlexAttention's names.

    Build one with `from_indices`, `from_dense` or `full`; they check the arguments. A dimension of size 1 in batch or
    head is a broadcast: the mask is stored once. No length has to be a multiple of its block size: the last block is
    then shorter. The tensors must not be written to afterwards, because derived forms are cached on the instance.

    With offsets the blocks of a side have any sizes, also 0: clusters, or tiles of a 3-D grid. A block is then computed
    in tiles of the block size: 150 tokens in tiles of 64 cost 192, less where its neighbour is listed too.

    Attributes:
        kv_num_blocks: int32 `[B|1, H|1, num_q_blocks]`, number of kv-blocks computed for each q-block.
        kv_indices: int32 `[B|1, H|1, num_q_blocks, max_blocks]`, their absolute indices, ascending; entries past the
            count are 0 and ignored.
        seq_len_q: number of query tokens.
        seq_len_kv: number of key/value tokens.
        q_block_size: tokens per q-block; with `q_offsets`, per tile of a q-block.
        kv_block_size: tokens per kv-block; with `kv_offsets`, per tile of a kv-block.
        q_offsets: int32 `[B|1, H|1, num_q_blocks + 1]`, first token of each q-block, ascending from 0 to `seq_len_q`;
            None: blocks of uniform size.
        kv_offsets: int32 `[B|1, H|1, num_kv_blocks + 1]`, likewise, from 0 to `seq_len_kv`.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    seq_len_q: int
    seq_len_kv: int
    q_block_size: int
    kv_block_size: int
    q_offsets: Tensor | None = None
    kv_offsets: Tensor | None = None
    _cache: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_indices(
        cls,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        *,
        seq_len_q: int,
        seq_len_kv: int,
        q_block_size: int,
        kv_block_size: int,
        q_offsets: Tensor | None = None,
        kv_offsets: Tensor | None = None,
    ) -> BlockMask:
        """Build from block lists.

        Args:
            kv_num_blocks: integer `[B|1, H|1, num_q_blocks]`.
            kv_indices: integer `[B|1, H|1, num_q_blocks, max_blocks]`, ascending and unique up to the count.
            seq_len_q, seq_len_kv: tokens.
            q_block_size, kv_block_size: tokens per block, or per tile of it on a side with offsets.
            q_offsets, kv_offsets: integer `[B|1, H|1, blocks + 1]`, first token of each block; None: uniform blocks.

        Raises:
            ValueError: a shape or dtype does not fit; on the CPU also when a count or an index is out of range, a list
                is not strictly ascending, or offsets do not ascend from 0 to the length. On other devices values are
                not read, so that nothing waits.
        """
        q_offsets, kv_offsets, num_q_blocks, num_kv_blocks = _check_blocks(
            seq_len_q, seq_len_kv, q_block_size, kv_block_size, q_offsets, kv_offsets
        )
        for name, tensor, ndim in (("kv_num_blocks", kv_num_blocks, 3), ("kv_indices", kv_indices, 4)):
            if tensor.ndim != ndim:
                raise ValueError(f"`{name}` must have {ndim} dimensions, got shape {tuple(tensor.shape)}.")
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
                raise ValueError(f"`{name}` must have an integer dtype, got {tensor.dtype}.")
        _check_lead("kv_num_blocks", kv_num_blocks)
        if kv_indices.shape[:3] != kv_num_blocks.shape:
            raise ValueError(
                f"`kv_indices` must start with the shape of `kv_num_blocks` {tuple(kv_num_blocks.shape)}, "
                f"got {tuple(kv_indices.shape)}."
            )
        if kv_num_blocks.shape[2] != num_q_blocks:
            raise ValueError(
                f"`kv_num_blocks` must list {num_q_blocks} q-blocks "
                f"({_describe(seq_len_q, q_block_size, q_offsets)}), got {kv_num_blocks.shape[2]}."
            )
        if kv_num_blocks.device != kv_indices.device:
            raise ValueError(
                f"`kv_num_blocks` and `kv_indices` must be on one device, got {kv_num_blocks.device} "
                f"and {kv_indices.device}."
            )
        _check_beside("kv_num_blocks", kv_num_blocks, q_offsets, kv_offsets)
        if kv_indices.device.type == "cpu" and kv_indices.numel() + kv_num_blocks.numel() > 0:
            _check_values(kv_num_blocks, kv_indices, num_kv_blocks)
        counts = kv_num_blocks.to(torch.int32)
        valid = _valid_entries(counts, kv_indices.shape[-1])
        indices = torch.where(valid, kv_indices.to(torch.int32), 0)
        return cls(counts, indices, seq_len_q, seq_len_kv, q_block_size, kv_block_size, q_offsets, kv_offsets)

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        *,
        seq_len_q: int,
        seq_len_kv: int,
        q_block_size: int,
        kv_block_size: int,
        q_offsets: Tensor | None = None,
        kv_offsets: Tensor | None = None,
    ) -> BlockMask:
        """Build from a boolean block mask, True = computed.

        Args:
            dense: bool `[B|1, H|1, num_q_blocks, num_kv_blocks]` (blocks, not tokens).
            seq_len_q, seq_len_kv: tokens.
            q_block_size, kv_block_size: tokens per block, or per tile of it on a side with offsets.
            q_offsets, kv_offsets: as for `from_indices`.

        Raises:
            ValueError: `dense` is not boolean or its shape does not fit the lengths and block sizes or offsets; on the
                CPU also when offsets do not ascend from 0 to the length.
        """
        q_offsets, kv_offsets, num_q_blocks, num_kv_blocks = _check_blocks(
            seq_len_q, seq_len_kv, q_block_size, kv_block_size, q_offsets, kv_offsets
        )
        if dense.dtype != torch.bool:
            raise ValueError(f"`dense` must be boolean, got {dense.dtype}.")
        if dense.ndim != 4 or tuple(dense.shape[2:]) != (num_q_blocks, num_kv_blocks):
            raise ValueError(
                f"`dense` must be [B|1, H|1, {num_q_blocks}, {num_kv_blocks}] "
                f"({_describe(seq_len_q, q_block_size, q_offsets)} by {_describe(seq_len_kv, kv_block_size, kv_offsets)}"
                f"), got {tuple(dense.shape)}."
            )
        _check_lead("dense", dense)
        _check_beside("dense", dense, q_offsets, kv_offsets)
        counts = dense.sum(-1, dtype=torch.int32)
        indices = torch.argsort(dense.logical_not().to(torch.uint8), dim=-1, stable=True).to(torch.int32)
        if dense.device.type == "cpu":
            indices = indices[..., : max(1, int(counts.max()))]
        indices = torch.where(_valid_entries(counts, indices.shape[-1]), indices, 0)
        return cls(counts, indices, seq_len_q, seq_len_kv, q_block_size, kv_block_size, q_offsets, kv_offsets)

    @classmethod
    def full(
        cls,
        seq_len_q: int,
        seq_len_kv: int,
        *,
        q_block_size: int,
        kv_block_size: int,
        q_offsets: Tensor | None = None,
        kv_offsets: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Every block, stored as one broadcast row: dense attention; on the device of the offsets, if any."""
        q_offsets, kv_offsets, num_q_blocks, num_kv_blocks = _check_blocks(
            seq_len_q, seq_len_kv, q_block_size, kv_block_size, q_offsets, kv_offsets
        )
        for offsets in (q_offsets, kv_offsets):
            if device is None and offsets is not None:
                device = offsets.device
        counts = torch.full((1, 1, num_q_blocks), num_kv_blocks, dtype=torch.int32, device=device)
        _check_beside("device", counts, q_offsets, kv_offsets)
        row = torch.arange(num_kv_blocks, dtype=torch.int32, device=device)
        indices = row.expand(1, 1, num_q_blocks, num_kv_blocks)
        return cls(counts, indices, seq_len_q, seq_len_kv, q_block_size, kv_block_size, q_offsets, kv_offsets)

    def __repr__(self) -> str:
        return (
            f"BlockMask(batch={self.batch_size}, heads={self.num_heads}, tokens={self.seq_len_q}x{self.seq_len_kv}, "
            f"blocks={self.num_q_blocks}x{self.num_kv_blocks} of {self.q_block_size}x{self.kv_block_size}, "
            f"variable={self.variable}, device={self.device})"
        )

    @property
    def variable(self) -> bool:
        """Whether either side has blocks of any sizes."""
        return self.q_offsets is not None or self.kv_offsets is not None

    @property
    def batch_size(self) -> int:
        """Stored batch size of lists and offsets; 1 means the same for every sample."""
        return self._lead()[0]

    @property
    def num_heads(self) -> int:
        """Stored number of heads of lists and offsets; 1 means the same for every head."""
        return self._lead()[1]

    @property
    def num_q_blocks(self) -> int:
        return self.kv_num_blocks.shape[2]

    @property
    def num_kv_blocks(self) -> int:
        if self.kv_offsets is not None:
            return self.kv_offsets.shape[2] - 1
        return -(-self.seq_len_kv // self.kv_block_size)

    @property
    def device(self) -> torch.device:
        return self.kv_num_blocks.device

    @property
    def density(self) -> float:
        """Computed blocks / all blocks; broadcast dimensions count once. The first use reads the device.

        In [0, 1] for blocks of uniform size. With offsets it counts tiles of q_block_size x kv_block_size against the
        tiles of dense attention, so the padding of blocks to tiles is part of it, and it can exceed 1.
        """
        if "density" not in self._cache:
            if self.variable:
                self._cache["density"] = self._tile_density()
            else:
                all_blocks = self.kv_num_blocks.numel() * self.num_kv_blocks
                self._cache["density"] = int(self.kv_num_blocks.sum(dtype=torch.int64)) / all_blocks
        return self._cache["density"]

    @property
    def token_density(self) -> float:
        """Listed (query, key) token pairs / all pairs, in [0, 1]: blocks count by their true size, without padding."""
        if "token_density" not in self._cache:
            q_sizes, kv_sizes = self.offsets("q").diff(), self.offsets("kv").diff()
            if self.kv_indices.shape[-1] == 0:
                self._cache["token_density"] = 0.0
                return 0.0
            lead = torch.broadcast_shapes(self.kv_indices.shape[:2], kv_sizes.shape[:2])
            listed = self.kv_indices.to(torch.int64).flatten(2).expand(*lead, -1)
            listed = kv_sizes.to(torch.int64).expand(*lead, -1).gather(-1, listed)
            listed = listed.unflatten(-1, self.kv_indices.shape[2:])
            kv_tokens = (listed * _valid_entries(self.kv_num_blocks, listed.shape[-1])).sum(-1)
            pairs = int((kv_tokens * q_sizes).expand(*self._lead(), -1).sum())
            maps = self.batch_size * self.num_heads
            self._cache["token_density"] = pairs / (maps * self.seq_len_q * self.seq_len_kv)
        return self._cache["token_density"]

    def offsets(self, side: str) -> Tensor:
        """int32 `[B|1, H|1, blocks + 1]`: first token of each block of side "q" or "kv", uniform blocks too."""
        explicit = self.q_offsets if side == "q" else self.kv_offsets
        if explicit is not None:
            return explicit
        blocks, size, length = (
            (self.num_q_blocks, self.q_block_size, self.seq_len_q)
            if side == "q"
            else (self.num_kv_blocks, self.kv_block_size, self.seq_len_kv)
        )
        starts = torch.arange(blocks + 1, dtype=torch.int64, device=self.device) * size
        return starts.clamp(max=length).to(torch.int32).view(1, 1, -1)

    def to_dense(self) -> Tensor:
        """Boolean block mask `[B|1, H|1, num_q_blocks, num_kv_blocks]`, True = computed."""
        *lead, max_blocks = self.kv_indices.shape
        valid = _valid_entries(self.kv_num_blocks, max_blocks)
        columns = torch.where(valid, self.kv_indices, self.num_kv_blocks).to(torch.int64)
        dense = torch.zeros(*lead, self.num_kv_blocks + 1, dtype=torch.bool, device=self.device)
        return dense.scatter_(-1, columns, True)[..., :-1]

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on `device`; itself when it is already there."""
        counts, indices = self.kv_num_blocks.to(device), self.kv_indices.to(device)
        if counts is self.kv_num_blocks and indices is self.kv_indices:
            return self
        moved = (None if offsets is None else offsets.to(device) for offsets in (self.q_offsets, self.kv_offsets))
        return self._derive(counts, indices, *moved)

    def transpose(self) -> tuple[Tensor, Tensor]:
        """Lists the other way round, for backward passes: which q-blocks attend to each kv-block.

        Computed on the device without waiting for it, then kept on the instance.

        Returns:
            `q_num_blocks` int32 `[B|1, H|1, num_kv_blocks]` and `q_indices` int32
            `[B|1, H|1, num_kv_blocks, max_blocks]`, ascending, 0 past the count.
        """
        if "transpose" not in self._cache:
            batch, heads, num_q_blocks, max_blocks = self.kv_indices.shape
            valid = _valid_entries(self.kv_num_blocks, max_blocks)
            columns = torch.where(valid, self.kv_indices, self.num_kv_blocks).to(torch.int64).flatten(2)
            # A stable sort by kv-block keeps the q-blocks of one kv-block in ascending order.
            order = torch.argsort(columns, dim=-1, stable=True)
            counts = torch.zeros(batch, heads, self.num_kv_blocks + 1, dtype=torch.int64, device=self.device)
            counts = counts.scatter_add_(-1, columns, torch.ones_like(columns))[..., :-1]
            starts = counts.cumsum(-1) - counts
            longest = num_q_blocks if self.device.type != "cpu" else max(1, int(counts.max()))
            slots = torch.arange(longest, device=self.device)
            position = (starts.unsqueeze(-1) + slots).clamp(max=max(0, columns.shape[-1] - 1))
            if columns.shape[-1] == 0:
                rows = torch.zeros_like(position)
            else:
                rows = order.gather(-1, position.flatten(2)).view_as(position) // max_blocks
            rows = torch.where(slots < counts.unsqueeze(-1), rows, 0)
            self._cache["transpose"] = (counts.to(torch.int32), rows.to(torch.int32))
        return self._cache["transpose"]

    def union(self, other: BlockMask) -> BlockMask:
        """Blocks computed by either mask.

        Raises:
            ValueError: lengths, block sizes, offsets or stored batch and head sizes do not match. The values of
                offsets are compared on the CPU only.
        """
        for name in ("seq_len_q", "seq_len_kv", "q_block_size", "kv_block_size"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"Masks to unite must have the same `{name}`, got {getattr(self, name)} and {getattr(other, name)}."
                )
        for name in ("q_offsets", "kv_offsets"):
            if not _same_offsets(getattr(self, name), getattr(other, name)):
                raise ValueError(f"Masks to unite must have the same `{name}`, got different ones.")
        absent = self.num_kv_blocks
        lists = [
            torch.where(_valid_entries(mask.kv_num_blocks, mask.kv_indices.shape[-1]), mask.kv_indices, absent)
            for mask in (self, other)
        ]
        lead = torch.broadcast_shapes(lists[0].shape[:3], lists[1].shape[:3])
        merged = torch.cat([x.expand(*lead, x.shape[-1]) for x in lists], -1).sort(-1).values
        repeated = torch.zeros_like(merged, dtype=torch.bool)
        repeated[..., 1:] = merged[..., 1:] == merged[..., :-1]
        merged = torch.where(repeated, absent, merged).sort(-1).values[..., :absent]
        present = merged < absent
        counts = present.sum(-1, dtype=torch.int32)
        return self._derive(counts, torch.where(present, merged, 0).to(torch.int32), self.q_offsets, self.kv_offsets)

    def complement(self) -> BlockMask:
        """The blocks that this mask does not compute."""
        return BlockMask.from_dense(
            self.to_dense().logical_not(),
            seq_len_q=self.seq_len_q,
            seq_len_kv=self.seq_len_kv,
            q_block_size=self.q_block_size,
            kv_block_size=self.kv_block_size,
            q_offsets=self.q_offsets,
            kv_offsets=self.kv_offsets,
        )

    def _lead(self) -> tuple[int, int]:
        shapes = [x.shape[:2] for x in (self.kv_num_blocks, self.q_offsets, self.kv_offsets) if x is not None]
        batch, heads = torch.broadcast_shapes(*shapes)
        return batch, heads

    def _tile_density(self) -> float:
        # Tile lists belong to the operator; only their sums are needed here.
        from .block_sparse_attention.tiles import tile_lists

        kv_tiles, _ = tile_lists(self, self.kv_block_size)
        q_tiles = -(-self.offsets("q").diff() // self.q_block_size)
        computed = int((kv_tiles.to(torch.int64) * q_tiles).expand(*self._lead(), -1).sum())
        dense = -(-self.seq_len_q // self.q_block_size) * -(-self.seq_len_kv // self.kv_block_size)
        return computed / (self.batch_size * self.num_heads * dense)

    def _derive(
        self, counts: Tensor, indices: Tensor, q_offsets: Tensor | None, kv_offsets: Tensor | None
    ) -> BlockMask:
        return BlockMask(
            counts,
            indices,
            self.seq_len_q,
            self.seq_len_kv,
            self.q_block_size,
            self.kv_block_size,
            q_offsets,
            kv_offsets,
        )


def _check_sizes(seq_len_q: int, seq_len_kv: int, q_block_size: int, kv_block_size: int) -> tuple[int, int]:
    """Check that all four are positive; return the numbers of q-blocks and kv-blocks."""
    sizes = {
        "seq_len_q": seq_len_q,
        "seq_len_kv": seq_len_kv,
        "q_block_size": q_block_size,
        "kv_block_size": kv_block_size,
    }
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {size!r}.")
    return -(-seq_len_q // q_block_size), -(-seq_len_kv // kv_block_size)


def _check_blocks(
    seq_len_q: int,
    seq_len_kv: int,
    q_block_size: int,
    kv_block_size: int,
    q_offsets: Tensor | None,
    kv_offsets: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Check sizes and offsets; return the offsets as int32 and the numbers of q-blocks and kv-blocks."""
    num_q_blocks, num_kv_blocks = _check_sizes(seq_len_q, seq_len_kv, q_block_size, kv_block_size)
    q_offsets = _check_offsets("q_offsets", q_offsets, seq_len_q)
    kv_offsets = _check_offsets("kv_offsets", kv_offsets, seq_len_kv)
    if q_offsets is not None:
        num_q_blocks = q_offsets.shape[2] - 1
    if kv_offsets is not None:
        num_kv_blocks = kv_offsets.shape[2] - 1
    return q_offsets, kv_offsets, num_q_blocks, num_kv_blocks


def _check_offsets(name: str, offsets: Tensor | None, seq_len: int) -> Tensor | None:
    if offsets is None:
        return None
    if offsets.ndim != 3 or offsets.shape[2] < 2 or 0 in offsets.shape[:2]:
        raise ValueError(f"`{name}` must be [B|1, H|1, blocks + 1], got shape {tuple(offsets.shape)}.")
    if offsets.dtype.is_floating_point or offsets.dtype.is_complex or offsets.dtype == torch.bool:
        raise ValueError(f"`{name}` must have an integer dtype, got {offsets.dtype}.")
    if offsets.device.type == "cpu":
        first, last = offsets[..., 0], offsets[..., -1]
        if bool((first != 0).any()) or bool((last != seq_len).any()):
            raise ValueError(
                f"`{name}` must start at 0 and end at {seq_len}, got {first.flatten()[:4].tolist()} and "
                f"{last.flatten()[:4].tolist()}."
            )
        smallest = int(offsets.diff().min())
        if smallest < 0:
            raise ValueError(f"`{name}` must not descend, got a step of {smallest}.")
    return offsets.to(torch.int32)


def _check_beside(name: str, tensor: Tensor, q_offsets: Tensor | None, kv_offsets: Tensor | None) -> None:
    """Check that batch and heads of the offsets go with those of `tensor`, on one device."""
    lead = tuple(tensor.shape[:2])
    for other, offsets in (("q_offsets", q_offsets), ("kv_offsets", kv_offsets)):
        if offsets is None:
            continue
        if offsets.device != tensor.device:
            raise ValueError(f"`{other}` must be on the device of `{name}` ({tensor.device}), got {offsets.device}.")
        if any(a != b and 1 not in (a, b) for a, b in zip(offsets.shape[:2], lead)):
            raise ValueError(
                f"`{other}` must have a batch and heads that are 1 or go with {lead}, got {tuple(offsets.shape)}."
            )
        lead = tuple(max(a, b) for a, b in zip(offsets.shape[:2], lead))


def _same_offsets(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one is other or one.device.type != "cpu" or other.device.type != "cpu":
        return one.shape[2] == other.shape[2]
    return one.shape == other.shape and torch.equal(one, other)


def _describe(seq_len: int, block_size: int, offsets: Tensor | None) -> str:
    if offsets is None:
        return f"{seq_len} tokens in blocks of {block_size}"
    return f"{offsets.shape[2] - 1} blocks by their offsets"


def _check_lead(name: str, tensor: Tensor) -> None:
    if 0 in tensor.shape[:2]:
        raise ValueError(f"`{name}` must have at least one sample and one head, got shape {tuple(tensor.shape)}.")


def _check_values(counts: Tensor, indices: Tensor, num_kv_blocks: int) -> None:
    max_blocks = indices.shape[-1]
    low, high = int(counts.min()), int(counts.max())
    if low < 0 or high > max_blocks:
        raise ValueError(f"`kv_num_blocks` must be between 0 and {max_blocks}, got values from {low} to {high}.")
    if max_blocks == 0:
        return
    valid = _valid_entries(counts, max_blocks)
    low, high = int(torch.where(valid, indices, 0).min()), int(torch.where(valid, indices, 0).max())
    if low < 0 or high >= num_kv_blocks:
        raise ValueError(f"`kv_indices` must be between 0 and {num_kv_blocks - 1}, got values from {low} to {high}.")
    if bool((valid[..., 1:] & (indices[..., 1:] <= indices[..., :-1])).any()):
        raise ValueError("`kv_indices` must be strictly ascending within each list; sort them and drop repeats.")


def _valid_entries(counts: Tensor, max_blocks: int) -> Tensor:
    """Bool `[..., max_blocks]`: which entries of the lists are meant."""
    return torch.arange(max_blocks, device=counts.device) < counts.unsqueeze(-1)
