"""A recipe by layer, step range and head, as `vidsparse tune` writes it: every cell has the choice that was worth its error.

It computes what the methods it chooses from compute, so Sparse-vDiT's pattern for each head (arXiv 2506.03065) and
SpargeAttn's threshold for each head (arXiv 2502.18137) are tables of it too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vidsparse.checks import is_number, is_whole
from vidsparse.errors import ConfigError
from vidsparse.processors.base import SparseProcessor
from vidsparse.recipe import Recipe
from vidsparse.schedule import BY_RECIPE, UNKNOWN_STEP, Schedule

if TYPE_CHECKING:
    import torch

    from vidsparse.layout import LatentGrid, TokenLayout
    from vidsparse.parts import Parts
    from vidsparse.plan import Plan
    from vidsparse.processors.context import AttentionContext
    from vidsparse_kernels import BlockMask

Cell = int | tuple[int, ...]
"""Number of a choice, or one for each head."""

DENSE, SKIP = "dense", "skip"
NO_TABLE = "A tuned recipe comes from a file; make one with `vidsparse tune` and give it with `--recipe FILE`."


@dataclass(frozen=True)
class TunedConfig:
    """Settings of the method "tuned", as a recipe file holds them.

    Attributes:
        choices: what calls may do, each an object with `method` and that method's own options; "dense" is the model's
            own attention, "skip" leaves the output of a head 0 (Sparse-vDiT) and is for single heads only.
        step_ends: where each range of steps ends, as a share of all steps; ascending, the last one 1.
        table: for each layer one entry per range: the number of a choice, counted from 0, or a list with one for each
            head. Heads with different choices share one call, so they cannot attend by clusters or have a correction.
        schedule: further dense steps and layers, on top of the table; default none. Nothing is reused between steps.

    Raises:
        ConfigError: an entry is no choice, the table does not fit the ranges, or the schedule reuses something.
    """

    choices: tuple[dict[str, Any], ...] = ()
    step_ends: tuple[float, ...] = ()
    table: tuple[tuple[Cell, ...], ...] = ()
    schedule: Schedule = field(default_factory=lambda: Schedule(warmup_steps=0))

    def __post_init__(self) -> None:
        for name in ("choices", "step_ends", "table"):
            if not isinstance(getattr(self, name), list | tuple):
                raise ConfigError(f"`{name}` must be a list, got {getattr(self, name)!r}.")
        object.__setattr__(self, "choices", tuple(self.choices))
        object.__setattr__(self, "step_ends", tuple(self.step_ends))
        for choice in self.choices:
            if not isinstance(choice, dict) or "method" not in choice:
                raise ConfigError(f"An entry of `choices` is an object with a `method`, got {choice!r}.")
        ends = self.step_ends
        rising = all(is_number(end) and end > low for end, low in zip(ends, (0, *ends), strict=False))
        if ends and not (rising and ends[-1] == 1):
            raise ConfigError(f"`step_ends` must ascend from above 0 to 1, got {list(ends)!r}.")
        object.__setattr__(self, "table", tuple(self._row(row) for row in self.table))
        if self.schedule.refresh_every != 1:
            raise ConfigError(f"`refresh_every` of a tuned recipe must be 1, got {self.schedule.refresh_every}.")

    def _row(self, row: Any) -> tuple[Cell, ...]:
        if not isinstance(row, list | tuple) or len(row) != len(self.step_ends):
            raise ConfigError(
                f"A row of `table` must have an entry for each of the {len(self.step_ends)} step ranges, got {row!r}."
            )
        cells: list[Cell] = []
        for cell in row:
            heads = tuple(cell) if isinstance(cell, list | tuple) else (cell,)
            if not heads or not all(is_whole(choice) and 0 <= choice < len(self.choices) for choice in heads):
                raise ConfigError(
                    f"An entry of `table` must be a choice from 0 to {len(self.choices) - 1}, or a list of them, got "
                    f"{cell!r}."
                )
            cells.append(heads if isinstance(cell, list | tuple) else int(cell))
        return tuple(cells)

    def range_of(self, step: int, num_steps: int) -> int:
        """The range of a step among `num_steps`."""
        ends = [round(end * num_steps) for end in self.step_ends]
        return next((i for i, end in enumerate(ends) if step < end), len(ends) - 1)


class TunedProcessor(SparseProcessor):
    """Attention processor for a tuned recipe.

    Args:
        recipe: as `Recipe.from_json` reads it from the file.

    Raises:
        ConfigError: there is no table, or an option of a choice is unknown or out of range.

    Example:
        >>> pipe.transformer.set_attn_processor(TunedProcessor(Recipe.from_json(Path("recipe.json").read_text())))
    """

    method = "tuned"
    config_class = TunedConfig

    def __init__(self, recipe: Recipe | None = None, *, strict: bool = False, **options: Any) -> None:
        from vidsparse.methods import processor_class

        super().__init__(recipe, strict=strict, **options)
        if not self.config.table:
            raise ConfigError(NO_TABLE)
        self._processors: list[SparseProcessor | None] = []
        for choice in self.config.choices:
            own = {name: value for name, value in choice.items() if name != "method"}
            known = choice["method"] in (DENSE, SKIP)
            self._processors.append(None if known else processor_class(choice["method"])(**own))

    @property
    def names(self) -> list[str]:
        """Method of each choice."""
        return [choice["method"] for choice in self.config.choices]

    def cell(self, layer: int, step: int, num_steps: int | None) -> Cell:
        """What one layer does in one step.

        Raises:
            ConfigError: the model has more layers than the table.
        """
        config, tuned = self.config, self.recipe.tuned_for
        if layer >= len(config.table):
            raise ConfigError(
                f"The recipe was tuned for {len(config.table)} layers, this model has more; tune one for it."
            )
        steps = num_steps or (tuned.num_steps if tuned is not None else None) or step + 1
        return config.table[layer][config.range_of(step, steps)]

    def dense_reason(
        self, step_index: int | None, num_steps: int | None, layer_index: int, seq_len: int
    ) -> str | None:
        if step_index is None:
            return UNKNOWN_STEP
        cell = self.cell(layer_index, step_index, num_steps)
        dense = all(self.names[choice] == DENSE for choice in ((cell,) if isinstance(cell, int) else cell))
        return BY_RECIPE if dense else super().dense_reason(step_index, num_steps, layer_index, seq_len)

    def slow_reason(
        self,
        parts: Parts,
        shape: Any,
        device_type: str,
        dtype: torch.dtype | None = None,
        dense_cost: float = 1.0,
    ) -> str | None:
        # What a choice costs was weighed when the recipe was made.
        return None

    def layout(self, grid: LatentGrid, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        from vidsparse.layout import TokenLayout
        from vidsparse.selection.blocks import block_sizes

        if self.recipe.tuned_for is not None:
            self.recipe.tuned_for.check_grid(grid)
        return TokenLayout(grid, text_before, text_after, block_sizes(grid.num_tokens + text_before + text_after)[0])

    def parts(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        from vidsparse.parts import Parts
        from vidsparse.selection.cells import CellCorrection, CellSelector

        own = functools.cache(functools.partial(self._parts_of, layout, device))
        masks = functools.cache(functools.partial(_whole_mask, layout, device))
        selector = CellSelector(
            self._cell_of, len(self.config.table), own, masks, tuple(self.names), tuple(self._clusterings())
        )
        whole = {cell for row in self.config.table for cell in row if isinstance(cell, int)}
        corrects = any(own(choice).correction for choice in whole if self.names[choice] != DENSE)
        return Parts(selector=selector, correction=CellCorrection(self._cell_of, own) if corrects else None), None

    def _cell_of(self, context: AttentionContext) -> Cell:
        assert context.step_index is not None  # `dense_reason` has seen to it
        return self.cell(context.layer_index, context.step_index, context.step_count)

    def _parts_of(self, layout: TokenLayout, device: Any, choice: int) -> Parts:
        import torch

        processor = self._processors[choice]
        if processor is None:
            raise ConfigError(f"The choice {self.names[choice]!r} is for single heads of a layer only.")
        own = processor.layout(layout.grid, layout.text_before, layout.text_after)
        with torch.inference_mode(False):
            return processor.parts_with_reuse(own, device)[0]

    def _clusterings(self) -> list[tuple[int, int] | None]:
        """Numbers of clusters of each choice that keeps some from step to step."""
        configs: list[Any] = [None if processor is None else processor.config for processor in self._processors]
        return [(c.q_clusters, c.k_clusters) if hasattr(c, "q_clusters") else None for c in configs]

    def plan(
        self,
        grid: LatentGrid,
        num_steps: int,
        num_layers: int,
        device_type: str = "cpu",
        dtype: torch.dtype | None = None,
        heads: tuple[int, int] | None = None,
        is_hopper: bool = False,
    ) -> Plan:
        plan = super().plan(grid, num_steps, num_layers, device_type, dtype, heads, is_hopper)
        layout = self.layout(grid)
        density = functools.cache(functools.partial(self._density, layout))

        def of(layer: int, step: int) -> float:
            if self.dense_reason(step, num_steps, layer, layout.seq_len) is not None:
                return 1.0
            cell = self.cell(layer, step, num_steps)
            choices = (cell,) if isinstance(cell, int) else cell
            return sum(density(choice) for choice in choices) / len(choices)

        cells = tuple(tuple(of(layer, step) for step in range(num_steps)) for layer in range(num_layers))
        sparse = [cell for row in cells for cell in row if cell < 1]
        dense_steps = tuple(s for s in range(num_steps) if all(row[s] == 1 for row in cells))
        return replace(
            plan,
            density=cells,
            block_density=sum(sparse) / len(sparse) if sparse else 1.0,
            dense_steps=dense_steps,
            dense_layers=tuple(layer for layer, row in enumerate(cells) if all(cell == 1 for cell in row)),
            note=None,
        )

    def _density(self, layout: TokenLayout, choice: int) -> float:
        from vidsparse.processors.base import UNKNOWN_DENSITY

        if self.names[choice] in (DENSE, SKIP):
            return float(self.names[choice] == DENSE)
        parts = self._parts_of(layout, "cpu", choice)
        known = parts.block_mask.density if parts.block_mask is not None else parts.density
        return UNKNOWN_DENSITY if known is None else known


def _whole_mask(layout: TokenLayout, device: Any, name: str) -> BlockMask:
    """All blocks, or none, for heads that are dense or skipped beside others."""
    import torch

    from vidsparse.selection.blocks import block_sizes
    from vidsparse_kernels import BlockMask

    q_size, kv_size = block_sizes(layout.seq_len)
    with torch.inference_mode(False):
        full = BlockMask.full(
            layout.seq_len, layout.seq_len, q_block_size=q_size, kv_block_size=kv_size, device=device
        )
        return full if name == DENSE else replace(full, kv_num_blocks=torch.zeros_like(full.kv_num_blocks), _cache={})
