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

    Attributes:
        kv_num_blocks: int32 `[B|1, H|1, num_q_blocks]`, number of kv-blocks computed for each q-block.
        kv_indices: int32 `[B|1, H|1, num_q_blocks, max_blocks]`, their absolute indices, ascending; entries past the
            count are 0 and ignored.
        seq_len_q: number of query tokens.
        seq_len_kv: number of key/value tokens.
        q_block_size: tokens per q-block.
        kv_block_size: tokens per kv-block.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    seq_len_q: int
    seq_len_kv: int
    q_block_size: int
    kv_block_size: int
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
    ) -> BlockMask:
        """Build from block lists.

        Args:
            kv_num_blocks: integer `[B|1, H|1, num_q_blocks]`.
            kv_indices: integer `[B|1, H|1, num_q_blocks, max_blocks]`, ascending and unique up to the count.
            seq_len_q, seq_len_kv: tokens.
            q_block_size, kv_block_size: tokens per block.

        Raises:
            ValueError: a shape or dtype does not fit; on the CPU also when a count or an index is out of range or a
                list is not strictly ascending. On other devices values are not read, so that nothing waits.
        """
        num_q_blocks, num_kv_blocks = _check_sizes(seq_len_q, seq_len_kv, q_block_size, kv_block_size)
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
                f"`kv_num_blocks` must list {num_q_blocks} q-blocks ({seq_len_q} tokens in blocks of {q_block_size}), "
                f"got {kv_num_blocks.shape[2]}."
            )
        if kv_num_blocks.device != kv_indices.device:
            raise ValueError(
                f"`kv_num_blocks` and `kv_indices` must be on one device, got {kv_num_blocks.device} "
                f"and {kv_indices.device}."
            )
        if kv_indices.device.type == "cpu" and kv_indices.numel() + kv_num_blocks.numel() > 0:
            _check_values(kv_num_blocks, kv_indices, num_kv_blocks)
        counts = kv_num_blocks.to(torch.int32)
        valid = _valid_entries(counts, kv_indices.shape[-1])
        indices = torch.where(valid, kv_indices.to(torch.int32), 0)
        return cls(counts, indices, seq_len_q, seq_len_kv, q_block_size, kv_block_size)

    @classmethod
    def from_dense(
        cls, dense: Tensor, *, seq_len_q: int, seq_len_kv: int, q_block_size: int, kv_block_size: int
    ) -> BlockMask:
        """Build from a boolean block mask, True = computed.

        Args:
            dense: bool `[B|1, H|1, num_q_blocks, num_kv_blocks]` (blocks, not tokens).
            seq_len_q, seq_len_kv: tokens.
            q_block_size, kv_block_size: tokens per block.

        Raises:
            ValueError: `dense` is not boolean or its shape does not fit the lengths and block sizes.
        """
        num_q_blocks, num_kv_blocks = _check_sizes(seq_len_q, seq_len_kv, q_block_size, kv_block_size)
        if dense.dtype != torch.bool:
            raise ValueError(f"`dense` must be boolean, got {dense.dtype}.")
        if dense.ndim != 4 or tuple(dense.shape[2:]) != (num_q_blocks, num_kv_blocks):
            raise ValueError(
                f"`dense` must be [B|1, H|1, {num_q_blocks}, {num_kv_blocks}] for {seq_len_q} x {seq_len_kv} tokens in "
                f"blocks of {q_block_size} x {kv_block_size}, got {tuple(dense.shape)}."
            )
        _check_lead("dense", dense)
        counts = dense.sum(-1, dtype=torch.int32)
        indices = torch.argsort(dense.logical_not().to(torch.uint8), dim=-1, stable=True).to(torch.int32)
        if dense.device.type == "cpu":
            indices = indices[..., : max(1, int(counts.max()))]
        indices = torch.where(_valid_entries(counts, indices.shape[-1]), indices, 0)
        return cls(counts, indices, seq_len_q, seq_len_kv, q_block_size, kv_block_size)

    @classmethod
    def full(
        cls,
        seq_len_q: int,
        seq_len_kv: int,
        *,
        q_block_size: int,
        kv_block_size: int,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Every block, stored as one broadcast row: dense attention."""
        num_q_blocks, num_kv_blocks = _check_sizes(seq_len_q, seq_len_kv, q_block_size, kv_block_size)
        counts = torch.full((1, 1, num_q_blocks), num_kv_blocks, dtype=torch.int32, device=device)
        row = torch.arange(num_kv_blocks, dtype=torch.int32, device=device)
        indices = row.expand(1, 1, num_q_blocks, num_kv_blocks)
        return cls(counts, indices, seq_len_q, seq_len_kv, q_block_size, kv_block_size)

    def __repr__(self) -> str:
        return (
            f"BlockMask(batch={self.batch_size}, heads={self.num_heads}, tokens={self.seq_len_q}x{self.seq_len_kv}, "
            f"blocks={self.num_q_blocks}x{self.num_kv_blocks} of {self.q_block_size}x{self.kv_block_size}, "
            f"device={self.device})"
        )

    @property
    def batch_size(self) -> int:
        """Stored batch size; 1 means the same lists for every sample."""
        return self.kv_num_blocks.shape[0]

    @property
    def num_heads(self) -> int:
        """Stored number of heads; 1 means the same lists for every head."""
        return self.kv_num_blocks.shape[1]

    @property
    def num_q_blocks(self) -> int:
        return self.kv_num_blocks.shape[2]

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.seq_len_kv // self.kv_block_size)

    @property
    def device(self) -> torch.device:
        return self.kv_num_blocks.device

    @property
    def density(self) -> float:
        """Computed blocks / all blocks, in [0, 1]; broadcast dimensions count once. The first use reads the device."""
        if "density" not in self._cache:
            all_blocks = self.kv_num_blocks.numel() * self.num_kv_blocks
            self._cache["density"] = int(self.kv_num_blocks.sum(dtype=torch.int64)) / all_blocks
        return self._cache["density"]

    @property
    def token_density(self) -> float:
        """Computed (query, key) token pairs / all pairs: shorter last blocks count by their true size."""
        if "token_density" not in self._cache:
            counts = self.kv_num_blocks.to(torch.int64)
            if self.kv_indices.shape[-1] == 0:
                self._cache["token_density"] = 0.0
                return 0.0
            last = self.kv_indices.gather(-1, (counts - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
            missing = self.num_kv_blocks * self.kv_block_size - self.seq_len_kv
            has_tail = (counts > 0) & (last == self.num_kv_blocks - 1)
            kv_tokens = counts * self.kv_block_size - has_tail * missing
            q_tokens = torch.full((self.num_q_blocks,), self.q_block_size, dtype=torch.int64, device=self.device)
            q_tokens[-1] = self.seq_len_q - (self.num_q_blocks - 1) * self.q_block_size
            pairs = int((kv_tokens * q_tokens).sum())
            maps = self.batch_size * self.num_heads
            self._cache["token_density"] = pairs / (maps * self.seq_len_q * self.seq_len_kv)
        return self._cache["token_density"]

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
        return self._derive(counts, indices)

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
            ValueError: lengths, block sizes or stored batch and head sizes do not match.
        """
        for name in ("seq_len_q", "seq_len_kv", "q_block_size", "kv_block_size"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"Masks to unite must have the same `{name}`, got {getattr(self, name)} and {getattr(other, name)}."
                )
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
        return self._derive(present.sum(-1, dtype=torch.int32), torch.where(present, merged, 0).to(torch.int32))

    def complement(self) -> BlockMask:
        """The blocks that this mask does not compute."""
        return BlockMask.from_dense(
            self.to_dense().logical_not(),
            seq_len_q=self.seq_len_q,
            seq_len_kv=self.seq_len_kv,
            q_block_size=self.q_block_size,
            kv_block_size=self.kv_block_size,
        )

    def _derive(self, counts: Tensor, indices: Tensor) -> BlockMask:
        return BlockMask(counts, indices, self.seq_len_q, self.seq_len_kv, self.q_block_size, self.kv_block_size)


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
