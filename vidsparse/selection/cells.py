"""A selection by cell: what a call does depends on its layer, its step and its head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vidsparse.errors import ConfigError
from vidsparse.parts import JointCorrection, Parts, Selection
from vidsparse.selection.heads import join_heads

if TYPE_CHECKING:
    from vidsparse.methods.tuned import Cell
    from vidsparse.parts import Correction
    from vidsparse.processors.context import AttentionContext
    from vidsparse_kernels import BlockMask


@dataclass
class CellSelector:
    """Selects as the choice of a call's cell does; the correction of that choice is `CellCorrection`'s to find.

    Attributes:
        cell: of a call, by layer and step.
        layers: that the table has.
        parts: of a choice on this layout, by number; asked for once each.
        masks: of "dense" and "skip", for single heads beside others.
        names: method of each choice.
        clusterings: for each choice, settings of the clusters it keeps from step to step, None without.
    """

    cell: Callable[[AttentionContext], Cell]
    layers: int
    parts: Callable[[int], Parts]
    masks: Callable[[str], BlockMask]
    names: Sequence[str]
    clusterings: Sequence[tuple[int, int] | None]
    _static: dict[int, Selection] = field(default_factory=dict)
    _joined: dict[Cell, Selection] = field(default_factory=dict)

    def select(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> Selection:
        if context.layer_count != self.layers:
            raise ConfigError(
                f"The recipe was tuned for {self.layers} layers, this model has {context.layer_count}; tune one for it."
            )
        cell = self.cell(context)
        if isinstance(cell, int):
            return self._one(cell, query, key, context)
        return self._by_head(cell, query, key, context)

    def _one(self, choice: int, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> Selection:
        if choice in self._static:
            return self._static[choice]
        parts = self.parts(choice)
        if parts.selector is None:
            assert parts.block_mask is not None
            selection = self._static[choice] = Selection(parts.block_mask)
            return selection
        memory, clustering = context.memory, self.clusterings[choice]
        if memory is not None and clustering is not None:
            if memory.get("clustering") not in (None, clustering):
                memory.drop("centroids")
            memory.keep("clustering", clustering, [])
        return parts.selector.select(query, key, context)

    def _by_head(
        self, cell: tuple[int, ...], query: torch.Tensor, key: torch.Tensor, context: AttentionContext
    ) -> Selection:
        total, own = query.shape[2], tuple(range(query.shape[2]))
        if context.shards is not None:
            # Ulysses: this rank has some of the heads.
            total, own = context.shards.num_heads, context.shards.own_heads
        if len(cell) != total:
            raise ConfigError(f"The recipe was tuned for {len(cell)} heads, this model has {total}; tune one for it.")
        cell = tuple(cell[head] for head in own)
        if cell in self._joined:
            return self._joined[cell]
        choices = sorted(set(cell))
        heads = [[h for h, own in enumerate(cell) if own == choice] for choice in choices]
        masks, fixed = [], True
        for choice, own in zip(choices, heads, strict=True):
            if self.names[choice] in ("dense", "skip"):
                masks.append(self.masks(self.names[choice]))
                continue
            parts = self.parts(choice)
            if parts.block_mask is not None:
                masks.append(parts.block_mask)
                continue
            assert parts.selector is not None
            fixed = False
            q, k = (torch.stack([x[:, :, h] for h in own], 2) for x in (query, key))
            masks.append(parts.selector.select(q, k, context).block_mask)
        selection = Selection(join_heads(masks, heads, query.shape[2], query.shape[0]))
        if fixed:
            self._joined[cell] = selection
        return selection


@dataclass
class CellCorrection:
    """The correction of the choice that a call's cell has; single heads have none.

    Attributes:
        cell: of a call.
        parts: of a choice, by number.
    """

    cell: Callable[[AttentionContext], Cell]
    parts: Callable[[int], Parts]
    needs_lse: bool = True

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
        correction = self._of(context)
        if not isinstance(correction, JointCorrection):
            return None
        return correction.attend(query, key, value, selection, context, scale, key_bias)

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
        correction = self._of(context)
        if correction is None:
            return out
        return correction.correct(query, key, value, out, lse, selection, context, scale, key_bias)

    def _of(self, context: AttentionContext) -> Correction | None:
        cell = self.cell(context)
        return self.parts(cell).correction if isinstance(cell, int) else None
