"""Which denoising steps and layers run dense attention."""

from __future__ import annotations

from dataclasses import dataclass

from vidsparse.checks import is_number, is_whole
from vidsparse.errors import ConfigError

ASSUMED_WARMUP_STEPS = 12
"""Warm-up when nobody says how many steps there are: 12 of 50, as in Radial Attention (arXiv 2506.19852, section 5)."""

KEEPS = ("nothing", "state", "residual")
DENSE_BACKENDS = ("auto", "stock")

WARMUP = "warm-up step"
COOLDOWN = "cool-down step"
DENSE_LAYER = "dense layer"
METHOD_DENSE = "method dense"
GUARDED = "raised by the guard"
BY_RECIPE = "dense in the recipe"
SHORT = "sequence below min_tokens"
UNKNOWN_STEP = "step unknown"
UNKNOWN_COUNT = f"number of steps unknown: {ASSUMED_WARMUP_STEPS} warm-up steps assumed"

ASKED_FOR = frozenset({WARMUP, COOLDOWN, DENSE_LAYER, METHOD_DENSE, BY_RECIPE, GUARDED})
"""Reasons that a recipe asks for; any other reason to run dense is a fallback and raises under `strict`."""


@dataclass(frozen=True)
class Schedule:
    """Dense steps and layers of one generation. A step is an index 0..N-1, not the scheduler's timestep.

    Attributes:
        warmup_steps: first steps that run dense. None (default): a quarter of the steps, rounded (half to even), as
            12 of 50 in Radial Attention; 5 of 20, 2 of 8, 1 of 4, 0 of 1. When the number of steps cannot be learned,
            12.
        cooldown_steps: last steps that run dense, default 0. Ignored while the number of steps is unknown.
        dense_layers: first layers that run dense in every step, default 0.
        refresh_every: steps that one selection of blocks serves, per layer and guidance branch, at least 1 (default:
            every step selects anew). For methods that select from query and key; a static mask never changes.
        keep: what else is kept until the next selection, so needs `refresh_every` above 1: "nothing" (default); "state":
            attention over the dropped blocks, computed in the step of the selection, which is then exact and costs a
            dense step, and merged into the steps after it (FlashBlock); "residual": the same with its share of the mass
            kept too (Re-ttention). For any method without a correction of its own. Takes the memory of one attention
            output per layer and branch.
        reuse_gib: most memory that reuse may keep, in GiB over all layers and branches; layers that find no room
            select in every step and the report says so. Default None: no limit.
        min_tokens: sequences shorter than this run dense, in tokens; 0 never. None (default): in generations a call runs
            dense where that is estimated to be faster (`vidsparse.break_even`), in training nothing does.
        guard: agreement with exact attention, in (0, 1), that sparse calls of a generation shall have on sampled query
            rows: 1 minus the squared relative error. A layer that falls short attends more densely, or dense, from the
            next step on, and the report says so (`vidsparse.guard`). Default None: nothing is compared.
        dense_backend: which kernel dense calls run on. "auto" (default, but for the method "dense"): our kernel over all
            blocks where that is estimated to be faster, which is on a Hopper GPU, in bf16, in inference, for calls without
            a mask; the output differs by rounding. "stock": always the model's own attention.

    Raises:
        ConfigError: a number is out of range.
    """

    warmup_steps: int | None = None
    cooldown_steps: int = 0
    dense_layers: int = 0
    refresh_every: int = 1
    keep: str = "nothing"
    reuse_gib: float | None = None
    min_tokens: int | None = None
    guard: float | None = None
    dense_backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "cooldown_steps", "dense_layers", "min_tokens"):
            value = getattr(self, name)
            if value is None and name in ("warmup_steps", "min_tokens"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"`{name}` must be a whole number of at least 0, got {value!r}.")
        if not is_whole(self.refresh_every) or self.refresh_every < 1:
            raise ConfigError(
                f"`refresh_every` must be a whole number of at least 1 step, got {self.refresh_every!r}."
            )
        if self.keep not in KEEPS:
            raise ConfigError(f"`keep` must be one of {', '.join(KEEPS)}, got {self.keep!r}.")
        if self.keep != "nothing" and self.refresh_every == 1:
            raise ConfigError(f"`keep` {self.keep!r} needs `refresh_every` of at least 2 steps, got 1.")
        if self.reuse_gib is not None and (isinstance(self.reuse_gib, bool) or not self.reuse_gib >= 0):
            raise ConfigError(f"`reuse_gib` must be at least 0, got {self.reuse_gib!r}.")
        if self.dense_backend not in DENSE_BACKENDS:
            raise ConfigError(
                f"`dense_backend` must be one of {', '.join(DENSE_BACKENDS)}, got {self.dense_backend!r}."
            )
        if self.guard is not None and (not is_number(self.guard) or not 0 < self.guard < 1):
            raise ConfigError(f"`guard` must be above 0 and below 1, such as 0.95, got {self.guard!r}.")

    def warmup(self, num_steps: int | None) -> int:
        """Number of dense first steps of a generation of `num_steps` steps (None: not known)."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return ASSUMED_WARMUP_STEPS if num_steps is None else round(num_steps / 4)

    def is_dense_step(self, step_index: int, num_steps: int | None) -> bool:
        """Whether every layer of this step runs dense."""
        return self.step_reason(step_index, num_steps) is not None

    def step_reason(self, step_index: int | None, num_steps: int | None) -> str | None:
        """Why a step runs dense, or None. `step_index` None means no step at all (training): sparse."""
        if step_index is None:
            return None
        if step_index < self.warmup(num_steps):
            return UNKNOWN_COUNT if num_steps is None and self.warmup_steps is None else WARMUP
        if num_steps is not None and step_index >= num_steps - self.cooldown_steps:
            return COOLDOWN
        return None

    def short_reason(self, seq_len: int) -> str | None:
        """Why a sequence is too short to run sparse, or None."""
        return SHORT if self.min_tokens is not None and seq_len < self.min_tokens else None

    def dense_reason(
        self, step_index: int | None, num_steps: int | None, layer_index: int, seq_len: int
    ) -> str | None:
        """Why one attention call runs dense, or None when it may be sparse.

        Args:
            step_index: denoising step, None outside a generation.
            num_steps: steps of the generation, None when not known.
            layer_index: position among the model's sparse-capable layers.
            seq_len: tokens of the sequence.
        """
        reason = self.step_reason(step_index, num_steps)
        if reason is not None:
            return reason
        if layer_index < self.dense_layers:
            return DENSE_LAYER
        return self.short_reason(seq_len)
