"""The parts that a method is made of, and what is kept of them from step to step.

A method is a selector (which blocks, in which token order), perhaps a correction for what the selection drops, and a
schedule. `vidsparse.attention.attend` runs them in one path; a published method is one file that puts parts together.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from vidsparse.errors import ConfigError

if TYPE_CHECKING:
    from vidsparse.processors.context import AttentionContext
    from vidsparse_kernels import BlockMask
    from vidsparse_kernels.pooled_tail import Pools


class Selection:
    """The blocks of one call and the token orders they stand in.

    Attributes:
        block_mask: the blocks, over tokens in these orders.
        q_order, kv_order: None for the model's own order, else int32 `[batch, num_heads, video tokens]`: position p of
            the video tokens takes token order[p] of them. Text tokens keep their place.
        text_before, text_after: text tokens that keep their place, where there is an order.
        details: tensors that a correction may use (centroids, cluster sizes), by name.
        skipped: blocks that a correction leaves out as well, or None.
        backend: which kernel ran it and why, once it ran.
        exact: whether the latest call computed the dropped blocks as well.
        pools: means of the call's key and value that the selector made, for the correction of the same call only.
    """

    def __init__(
        self,
        block_mask: BlockMask,
        q_order: torch.Tensor | None = None,
        kv_order: torch.Tensor | None = None,
        text_before: int = 0,
        text_after: int = 0,
        details: dict[str, torch.Tensor] | None = None,
        skipped: BlockMask | None = None,
    ) -> None:
        self.block_mask = block_mask
        self.q_order, self.kv_order = q_order, kv_order
        self.text_before, self.text_after = text_before, text_after
        self.details = details or {}
        self.skipped = skipped
        self.backend: tuple[str, str] | None = None
        self.exact = False
        self.pools: Pools | None = None
        self._density: torch.Tensor | float | None = None

    @property
    def density(self) -> torch.Tensor | float:
        """Computed share of all (query, key) pairs, in real tokens; on the device of the mask, so that nobody waits."""
        if self._density is None:
            self._density = token_density(self.block_mask)
        return self._density

    def tensors(self) -> list[torch.Tensor]:
        """Everything that keeping this selection keeps in memory."""
        mask = self.block_mask
        kept = (mask.kv_num_blocks, mask.kv_indices, mask.q_offsets, mask.kv_offsets, self.q_order, self.kv_order)
        if self.skipped is not None:
            kept += self.skipped.kv_num_blocks, self.skipped.kv_indices
        return [x for x in (*kept, *self.details.values()) if x is not None]

    def take_pools(self) -> Pools | None:
        """`pools`, which are gone then: the selection may serve later calls, whose keys and values are others."""
        pools, self.pools = self.pools, None
        return pools

    def permute(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tokens in the orders of the mask."""
        if self.q_order is None or self.kv_order is None:
            return query, key, value
        from vidsparse_kernels import permute_tokens

        before, after = self.text_before, self.text_after
        key, value = permute_tokens((key, value), self.kv_order, text_before=before, text_after=after)
        return permute_tokens(query, self.q_order, text_before=before, text_after=after), key, value

    def permute_bias(self, key_bias: torch.Tensor | None) -> torch.Tensor | None:
        """A bias over keys in the order of the keys, `[batch, num_heads, seq_len]` where that differs by head."""
        if key_bias is None or self.kv_order is None:
            return key_bias
        order, end = self.kv_order.long(), key_bias.shape[-1] - self.text_after
        key_bias = key_bias.expand(*order.shape[:2], -1)
        video = key_bias[..., self.text_before : end].gather(2, order)
        return torch.cat([key_bias[..., : self.text_before], video, key_bias[..., end:]], -1)

    def restore(self, out: torch.Tensor) -> torch.Tensor:
        """The inverse of the query's order."""
        if self.q_order is None:
            return out
        from vidsparse_kernels import unpermute_tokens

        return unpermute_tokens(out, self.q_order, text_before=self.text_before, text_after=self.text_after)


def token_density(mask: BlockMask) -> torch.Tensor | float:
    """Share of the (query, key) pairs in listed blocks, as a tensor where counting would wait for the device."""
    if mask.device.type == "cpu":
        return mask.token_density
    return _pairs(mask).mean() / (mask.seq_len_q * mask.seq_len_kv)


def pairs_of_heads(mask: BlockMask, num_heads: int) -> torch.Tensor:
    """(query, key) pairs in listed blocks by head, fp32 `[num_heads]`, the mean over samples; nobody waits for them."""
    return _pairs(mask).mean(0).expand(num_heads).contiguous()


def _pairs(mask: BlockMask) -> torch.Tensor:
    """(query, key) pairs in listed blocks, `[batch, heads]` of the mask."""
    q_sizes, kv_sizes = mask.offsets("q").diff(dim=-1).float(), mask.offsets("kv").diff(dim=-1).float()
    listed = torch.arange(mask.kv_indices.shape[-1], device=mask.device) < mask.kv_num_blocks[..., None]
    lead = mask.kv_indices.shape[:3]
    per_key = kv_sizes.expand(*lead[:2], -1)[:, :, None, :].expand(*lead, -1)
    keys = (per_key.gather(3, mask.kv_indices.long()) * listed).sum(-1)
    return (keys * q_sizes).sum(-1)


class Selector(Protocol):
    """Chooses the blocks of a call."""

    def select(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> Selection:
        """The selection for `[batch, seq_len, num_heads, head_dim]`; not differentiated, and the same for the same input."""
        ...


class Correction(Protocol):
    """Makes good some of what a selection drops."""

    needs_lse: bool

    def correct(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        selection: Selection,
        context: AttentionContext,
        scale: float,
        key_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The corrected output; tokens stand in the order of the selection."""
        ...


@runtime_checkable
class JointCorrection(Correction, Protocol):
    """A correction that some cases have in one kernel with the attention that it corrects."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        selection: Selection,
        context: AttentionContext,
        scale: float,
        key_bias: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Attention and correction, whose backend the selection then names; None where they are two steps."""
        ...


@runtime_checkable
class PoolingCorrection(Correction, Protocol):
    """A correction that needs means of keys and values over kv-blocks, of which a selector may need those of keys."""

    def pool(self, key: torch.Tensor, value: torch.Tensor, block_mask: BlockMask) -> Pools:
        """The means over the kv-blocks of a mask, whose lists count for nothing; not differentiated."""
        ...


@dataclass(frozen=True)
class Parts:
    """A method on one layout and device.

    Attributes:
        block_mask: the mask of a static method, None where a selector looks at q and k.
        selector: for every other method.
        correction: None for plain block-sparse attention.
        density: what a selector will take, where that is known before seeing q and k.
        overhead: estimated time of selecting and ordering, as a share of a dense call.
        factor: estimated time of the sparse call over that of uniform blocks without a correction.
        call_seconds: what a call takes at least on the host, where that is more than usual.
    """

    block_mask: BlockMask | None = None
    selector: Selector | None = None
    correction: Correction | None = None
    density: float | None = None
    overhead: float = 0.0
    factor: float = 1.0
    call_seconds: float = 0.0

    @property
    def is_static(self) -> bool:
        """Whether a call is one block-sparse attention over a mask known beforehand."""
        return self.block_mask is not None and self.correction is None


@dataclass
class LayerMemory:
    """What one layer keeps between the steps of one generation, for one guidance branch.

    Attributes:
        budget: shared by all memories of a run.
        kept: by name.
        step: step in which the selection was made.
        loads: under context parallelism what each head of this rank computes, once known (`processors.parallel`).
        heads: all heads by rank, once they were dealt out by their loads.
    """

    budget: MemoryBudget
    kept: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    loads: torch.Tensor | None = None
    heads: tuple[int, ...] | None = None
    _signature: tuple[Any, ...] | None = None
    _sizes: dict[str, int] = field(default_factory=dict)

    def open(self, query: torch.Tensor, layout: Any) -> None:
        """Forget everything when the call is of another shape than the last one."""
        signature = (tuple(query.shape), query.dtype, str(query.device), layout)
        if signature != self._signature:
            self.clear()
            self._signature = signature

    def get(self, name: str) -> Any:
        return self.kept.get(name)

    def selects_anew(self, step: int, refresh_every: int) -> bool:
        """Whether the selection that is kept, if one is, does not serve this step."""
        return self.step is None or not 0 <= step - self.step < refresh_every

    def keep(self, name: str, value: Any, tensors: list[torch.Tensor]) -> bool:
        """Keep something for later steps; False, with a note in the report, where the budget has no room for it."""
        size = sum(x.numel() * x.element_size() for x in tensors)
        if not self.budget.take(size - self._sizes.get(name, 0)):
            self.drop(name)
            return False
        self.kept[name], self._sizes[name] = value, size
        return True

    def has_room(self, size: int) -> bool:
        """Whether so many bytes could be kept beside what is there."""
        return self.budget.limit is None or self.budget.used + size <= self.budget.limit

    def drop(self, name: str) -> None:
        self.kept.pop(name, None)
        self.budget.take(-self._sizes.pop(name, 0))

    def clear(self) -> None:
        for name in list(self.kept):
            self.drop(name)
        self.step = None


class MemoryBudget:
    """Bytes that reuse may keep over all layers and branches of a run.

    Attributes:
        limit: bytes, None for no limit.
        used: bytes now.
        most: bytes at the fullest.
        refused: times that something had no room.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.used, self.most, self.refused = limit, 0, 0, 0

    def take(self, size: int) -> bool:
        if size > 0 and self.limit is not None and self.used + size > self.limit:
            self.refused += 1
            return False
        self.used += size
        self.most = max(self.most, self.used)
        return True


def size_in_words(size: int) -> str:
    """Bytes as people read them."""
    unit, power = next((x for x in (("GiB", 30), ("MiB", 20)) if size >= 1 << x[1]), ("KiB", 10))
    return f"{size / (1 << power):.1f} {unit}"


def check_reuse(limit_gib: float | None, device: torch.device) -> None:
    """Refuse a limit on what reuse may keep that the memory of a device cannot hold.

    Raises:
        ConfigError: the limit is above all the memory of the device.
    """
    if limit_gib is None:
        return
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if limit_gib * 2**30 > total:
        raise ConfigError(
            f"`reuse_gib` must be at most the {total / 2**30:.0f} GiB of memory of {device}, got {limit_gib:g}."
        )
