"""SparseProcessor: what a user hands to `set_attn_processor`; it holds a recipe and binds to the model."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from vidsparse.break_even import CallShape
from vidsparse.errors import ConfigError, UnboundProcessorError
from vidsparse.plan import Plan
from vidsparse.recipe import Recipe
from vidsparse.report import Report

if TYPE_CHECKING:
    import torch

    from vidsparse.layout import LatentGrid, TokenLayout
    from vidsparse.parts import Parts
    from vidsparse.processors.context import RunState
    from vidsparse_kernels import BlockMask


UNKNOWN_DENSITY = 0.3
"""Assumed for the estimate where the density of a selection depends on the video."""

SELECTING_ON_CPU = "selecting blocks from query and key costs more on a CPU than it saves"


class SparseProcessor(ABC):
    """A method with its settings, ready to be set on one or more transformers.

    Setting it on a model binds one light processor per video self-attention and leaves every other attention alone.
    Nothing that belongs to a run is kept here, so one processor may serve several models; each keeps its own state.

    Args:
        recipe: method and settings; default from `options`.
        strict: raise DenseFallbackError where a call would run dense, or on a slow backend on a GPU, without the recipe
            asking for it.
        options: fields of the method's config and of `Schedule`.

    Raises:
        ConfigError: an option is unknown or out of range, or the recipe is another method's.
    """

    method: ClassVar[str]
    config_class: ClassVar[type]
    always_dense: ClassVar[bool] = False
    has_projection: ClassVar[bool] = False
    corrects: ClassVar[bool] = False
    """Whether the method has a correction for the dropped blocks, which then no schedule can keep anything of."""

    def __init__(self, recipe: Recipe | None = None, *, strict: bool = False, **options: Any) -> None:
        from vidsparse.processors.binding import install

        if recipe is None:
            recipe = Recipe.from_options(self.method, **options)
        elif options:
            raise ConfigError(f"Give a recipe or options, not both; got a recipe and {', '.join(options)}.")
        if not isinstance(recipe, Recipe):
            raise ConfigError(f"`recipe` must be a Recipe, got {recipe!r}; give settings by name, as density=0.3.")
        if recipe.method != self.method:
            raise ConfigError(f"{type(self).__name__} takes recipes of {self.method!r}, got one of {recipe.method!r}.")
        self.recipe = recipe
        if self.corrects and recipe.schedule.keep != "nothing":
            raise self._two_corrections()
        self.strict = strict
        self._runs: list[weakref.ref[RunState]] = []
        install()

    def _two_corrections(self) -> ConfigError:
        return ConfigError(
            f"`keep` {self.recipe.schedule.keep!r} and the correction of method {self.method!r} would both stand for the "
            "dropped blocks; use one of them."
        )

    @property
    def config(self) -> Any:
        return self.recipe.config

    @abstractmethod
    def layout(self, grid: LatentGrid, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        """Blocks over the tokens of a grid and the text beside it."""

    def check(self, grid: LatentGrid) -> None:
        """Called before each forward of a model, the dense ones too: refuse a grid that cannot be served.

        Raises:
            ConfigError: a setting asks for more than the grid has.
        """
        return

    def parts(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        """The method on a layout and device, and a note for the report or None."""
        from vidsparse.parts import Parts

        mask, note = self.build_mask(layout, device)
        return Parts(mask), note

    def parts_with_reuse(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        """`parts`, with what the schedule keeps between steps.

        Raises:
            ConfigError: the schedule keeps the dropped blocks' attention and what was tuned has a correction of its own.
        """
        parts, note = self.parts(layout, device)
        keep = self.recipe.schedule.keep
        if keep == "nothing" or self.always_dense:
            return parts, note
        from vidsparse.corrections.kept_state import KeptState

        if parts.correction is not None:
            raise self._two_corrections()
        return replace(parts, correction=KeptState(residual=keep == "residual")), note

    def build_mask(self, layout: TokenLayout, device: Any) -> tuple[BlockMask, str | None]:
        """The block mask of a static method for a layout on a device, and a note for the report or None."""
        raise NotImplementedError(f"{type(self).__name__} selects blocks from query and key.")

    def report(self) -> Report:
        """What ran in the last (or current) generation, over all models this processor is bound to."""
        return Report.merged(run.report for ref in self._runs if (run := ref()) is not None)

    def dense_reason(
        self, step_index: int | None, num_steps: int | None, layer_index: int, seq_len: int
    ) -> str | None:
        """Why one attention call runs dense by the recipe, or None; arguments as for `Schedule.dense_reason`."""
        return self.recipe.schedule.dense_reason(step_index, num_steps, layer_index, seq_len)

    def slow_reason(
        self,
        parts: Parts,
        shape: CallShape,
        device_type: str,
        dtype: torch.dtype | None = None,
        dense_cost: float = 1.0,
    ) -> str | None:
        """Why dense attention is faster than this method, or None. A `min_tokens` that somebody set is final.

        Args:
            parts: the method on the layout of a call.
            shape: of the call.
            device_type: where it runs; only "cpu" and "cuda" were measured.
            dtype: in which attention is computed, default fp32.
            dense_cost: time of a dense call over that of the model's own attention, below 1 where our kernel runs it.
        """
        if self.recipe.schedule.min_tokens is not None:
            return None
        from vidsparse.break_even import relative_cost

        mask = parts.block_mask
        if device_type == "cuda":
            density = mask.density if mask is not None else parts.density or UNKNOWN_DENSITY
            selects = parts.selector is not None
            cost = relative_cost(
                shape,
                density,
                selects=selects,
                overhead=parts.overhead,
                factor=parts.factor,
                call_seconds=parts.call_seconds,
            )
        elif device_type != "cpu":
            return None
        elif mask is None or not parts.is_static:
            return SELECTING_ON_CPU
        else:
            import torch

            from vidsparse_kernels.block_sparse_attention.sdpa import relative_cost as cost_on_cpu

            density, cost = mask.density, cost_on_cpu(mask, dtype or torch.float32)
        cost /= dense_cost
        if cost <= 1:
            return None
        return f"dense is faster at {shape.seq_len:,} tokens and density {density:.2f}, an estimated {cost:.2f} times"

    def dense_cost(self, shape: CallShape, is_hopper: bool) -> float:
        """Estimated time of a dense call in inference over that of the model's own attention, at most 1."""
        from vidsparse.break_even import every_block_cost

        ours = is_hopper and self.recipe.schedule.dense_backend != "stock"
        return min(1.0, every_block_cost(shape)) if ours else 1.0

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
        """What a generation on `grid` will compute; builds the mask once, on the CPU.

        Args:
            grid: latent grid.
            num_steps: denoising steps, at least 1.
            num_layers: sparse-capable layers of the model, at least 1.
            device_type: where the generation will run; what runs dense because that is faster depends on it.
            dtype: in which attention will be computed, likewise; None (default) means fp32.
            heads: number and size of the model's heads; None (default): whether a GPU is faster dense is left open.
            is_hopper: whether the GPU is one that our kernel for dense calls runs on.

        Raises:
            ConfigError: a number is below 1.
        """
        import torch

        for name, value in (("num_steps", num_steps), ("num_layers", num_layers)):
            if value < 1:
                raise ConfigError(f"`{name}` of a plan must be at least 1, got {value}.")
        layout = self.layout(grid)
        parts, note = self.parts_with_reuse(layout, "cpu")
        schedule = self.recipe.schedule
        num_heads, head_dim = heads or (1, 128)
        shape = CallShape(1, num_heads, layout.seq_len, head_dim)
        judged = not self.always_dense and (device_type == "cpu" or heads is not None)
        # In other dtypes dense calls stay with the model's own attention (`vidsparse.processors.dense_calls`).
        cost = self.dense_cost(shape, is_hopper and dtype == torch.bfloat16)
        slow = judged and self.slow_reason(parts, shape, device_type, dtype, cost) is not None
        density = parts.block_mask.density if parts.block_mask is not None else parts.density
        if density is None:
            density, note = 1.0, "the density depends on the video; 1 is its upper bound"

        def cell(step: int, layer: int) -> float:
            dense = self.always_dense or schedule.dense_reason(step, num_steps, layer, layout.seq_len)
            return 1.0 if dense or slow else density

        return Plan(
            method=self.method,
            grid=grid,
            num_steps=num_steps,
            block_size=layout.block_size,
            block_density=1.0 if self.always_dense else density,
            density=tuple(tuple(cell(step, layer) for step in range(num_steps)) for layer in range(num_layers)),
            dense_steps=tuple(
                step for step in range(num_steps) if self.always_dense or schedule.is_dense_step(step, num_steps)
            ),
            dense_layers=tuple(
                layer for layer in range(num_layers) if self.always_dense or layer < schedule.dense_layers
            ),
            note=note,
        )

    def watch(self, run: RunState) -> None:
        """Include the report of a run in `report()`, as long as it lives."""
        self._runs = [ref for ref in self._runs if (known := ref()) is not None and known is not run]
        self._runs.append(weakref.ref(run))

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseProcessor:
        # Shared on purpose: it holds settings, and weak references do not copy.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.recipe, self.strict)

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        raise UnboundProcessorError(
            f"{type(self).__name__} was called without being bound to a model; set it with "
            "`transformer.set_attn_processor(processor)` or `vidsparse.apply(pipe, ...)`, not on one attention module."
        )


def _rebuild(cls: type[SparseProcessor], recipe: Recipe, strict: bool) -> SparseProcessor:
    return cls(recipe, strict=strict)
