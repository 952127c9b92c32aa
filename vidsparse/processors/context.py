"""Where an attention call stands: layer, step, branch, layout; and the state of one generation behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vidsparse.guard import Guard
from vidsparse.layout import TokenLayout
from vidsparse.parts import LayerMemory, MemoryBudget, Parts
from vidsparse.processors.dense_calls import EveryBlock
from vidsparse.processors.parallel import Shards
from vidsparse.report import Report

if TYPE_CHECKING:
    from vidsparse.processors.base import SparseProcessor
    from vidsparse_kernels import BlockMask
    from vidsparse_kernels.pooled_tail import Pools

MAX_CALLS = 4
"""Forwards at one timestep that can be guidance branches where no pipeline names them."""

MAX_MASKS = 4
"""Layouts whose masks are kept; training on mixed lengths comes back to the same few."""


@dataclass(frozen=True)
class AttentionContext:
    """What one attention call knows about itself. Made for every layer before each forward of the model.

    Attributes:
        layer_index: position among the model's sparse-capable layers.
        layer_count: number of those layers.
        step_index: denoising step 0..N-1, None outside a generation (training).
        step_count: steps of the generation, None when nobody said.
        branch: guidance branch as the pipeline names it, or None.
        layout: the tokens.
        parts: what the method does here, None in a dense call.
        memory: what this layer and branch kept from earlier steps, None where there is nothing to keep (training).
        refresh_every: steps that a selection serves, 1: its own.
        backend: backend of `vidsparse_kernels.block_sparse_attention`; "auto" lets it choose at the call.
        bias_backend: likewise for calls with a mask over keys (padding of a prompt), which not every backend takes.
        projection: the layer's trained projection, for methods that have one.
        generator: for methods that draw random numbers; none does yet.
        shards: how the tokens lie on the ranks of a context-parallel group, None on one device.
        guarded: whether sampled rows of the call are compared with exact attention.
        every_block: for a dense call that is faster through our kernel, None where the model's own attention runs.
        pool: during a selection, makes the means of key and value over the kv-blocks of a mask for a correction that needs
            them; a selector that looks at means of keys calls it and leaves them on the selection.
    """

    layer_index: int
    layer_count: int
    step_index: int | None
    step_count: int | None
    branch: str | None
    layout: TokenLayout
    parts: Parts | None = None
    memory: LayerMemory | None = None
    refresh_every: int = 1
    backend: str = "auto"
    bias_backend: str = "auto"
    projection: torch.nn.Linear | None = None
    generator: torch.Generator | None = None
    shards: Shards | None = None
    guarded: bool = False
    every_block: EveryBlock | None = None
    pool: Callable[[BlockMask], Pools] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that the call has on this device."""
        return self.layout.seq_len if self.shards is None else self.shards.num_tokens


class RunState:
    """State of one generation, shared by the transformers that take part in it (Wan 2.2 has two).

    Args:
        num_steps: asked for the number of steps when the model's forward is not told.
    """

    def __init__(self, num_steps: Callable[[], int | None] | None = None) -> None:
        self.report = Report()
        self.parts: dict[tuple[SparseProcessor, TokenLayout, str], tuple[Parts, str | None]] = {}
        self.guard = Guard()
        self.budget = MemoryBudget()
        self._memories: dict[tuple[str, str | None], LayerMemory] = {}
        self._ask_num_steps = num_steps
        self._in_training = False
        self.reset()

    def reset(self) -> None:
        """Forget step and branch; the report is cleared when the next generation starts, so it can be read until then."""
        self.step: int | None = None
        self.num_steps: int | None = None
        self.branch: str | None = None
        self._in_context = False
        self._counted = False
        self._entries: dict[str, int] = {}
        self._last_timestep: float | None = None
        self._calls_at_timestep = 0
        self._branches: set[str] = set()
        self._starting = True
        self.guard.reset()
        self.forget()

    def forget(self, branch: str | None = None) -> None:
        """Drop what layers kept, of one branch or of all: nothing of one video reaches the next."""
        for name, of in list(self._memories):
            if branch is None or of == branch:
                self._memories.pop((name, of)).clear()
        self.budget.refused = 0
        if branch is None:
            self.budget.most = 0

    def forget_layer(self, layer_name: str) -> None:
        """Drop what one layer kept, of all branches: it goes on with other settings."""
        for name, branch in list(self._memories):
            if name == layer_name:
                self._memories[name, branch].clear()

    @property
    def is_last_step(self) -> bool:
        return self.step is not None and self.num_steps is not None and self.step >= self.num_steps - 1

    def may_keep(self, training: bool) -> bool:
        """Whether this forward belongs to a generation whose steps can be told apart."""
        if self.step is None or (training and not self._in_context):
            return False
        return self._in_context or self._calls_at_timestep <= MAX_CALLS

    def enter(self, branch: str, step_index: int | None, num_steps: int | None) -> None:
        """The pipeline opened a cache context for one forward; older diffusers give no index, so entries are counted."""
        if step_index is not None:
            again = step_index == 0 and self._entries.get(branch) == 0
            # Training between two generations forgets the step, but not the entries.
            latest = max([*self._entries.values(), -1 if self.step is None else self.step])
            if again or step_index < latest:
                self.reset()
            self._entries[branch] = step_index
        else:
            self._entries[branch] = self._entries.get(branch, -1) + 1
        self.step = self._entries[branch]
        self.branch = branch
        self._counted = step_index is None
        self._in_context = True
        self.num_steps = num_steps

    def leave(self) -> None:
        self._in_context = False

    def start_forward(self, timestep: Any, training: bool) -> None:
        """Settle step and branch for a forward that begins now.

        Args:
            timestep: the model's timestep argument. Read (one value, waits for the device) only when the pipeline gives
                no step index.
            training: gradients are recorded and the model trains: there is no step then.
        """
        in_training = training and not self._in_context
        if in_training != self._in_training:
            # A generation between training steps has a report of its own.
            self._in_training, self._starting = in_training, True
        if in_training:
            self.step = self.num_steps = self.branch = None
        elif not self._in_context or self._counted:
            self._observe(timestep)
        if self.num_steps is None and self.step is not None and self._ask_num_steps is not None:
            self.num_steps = self._ask_num_steps()
        if self._starting:
            self.report.clear()
            self._starting = False

    def _observe(self, timestep: Any) -> None:
        if timestep is None:
            self.step = None
            return
        # Image-to-video with a timestep per token has 0 on the given frame, so the largest is the true one.
        value = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
        again = self._in_context and value == self._last_timestep and self.branch in self._branches
        if again or (self._last_timestep is not None and value > self._last_timestep):
            branch, counted, in_context = self.branch, self._counted, self._in_context
            self.reset()
            if in_context and branch is not None:
                self._entries[branch], self.step = 0, 0
                self.branch, self._counted, self._in_context = branch, counted, True
        if not self._in_context:
            if value != self._last_timestep:
                self.step = 0 if self.step is None or self._last_timestep is None else self.step + 1
                self._calls_at_timestep = 0
            self.branch = f"call {self._calls_at_timestep}"
            self._calls_at_timestep += 1
        if value != self._last_timestep:
            self._branches.clear()
        if self.branch is not None:
            self._branches.add(self.branch)
        self._last_timestep = value

    def parts_of(
        self,
        processor: SparseProcessor,
        layout: TokenLayout,
        device: torch.device,
        layouts: int = 1,
        quiet: bool = False,
    ) -> Parts:
        """The method on a layout, its static mask built once per layout and device; `layouts` of them in one forward."""
        where = (processor, layout, str(device))
        if where not in self.parts:
            while len(self.parts) >= max(MAX_MASKS, layouts):
                self.parts.pop(next(iter(self.parts)))
            # A mask made in inference mode could not be saved for a backward pass later.
            with torch.inference_mode(False):
                self.parts[where] = processor.parts_with_reuse(layout, device)
        parts, note = self.parts[where]
        if note is not None and not quiet:
            self.report.note(note)
        return parts

    def memory(self, layer_name: str, limit_gib: float | None) -> LayerMemory:
        """What a layer keeps in this generation for the branch of the current forward."""
        self.budget.limit = None if limit_gib is None else int(limit_gib * 2**30)
        return self._memories.setdefault((layer_name, self.branch), LayerMemory(self.budget))

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled model starts its own generation too, and has no pipeline to ask.
        return RunState, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> RunState:
        # A copied model starts its own generation; the pipeline it asks for the number of steps stays the same.
        copy = RunState(self._ask_num_steps)
        memo[id(self)] = copy
        return copy
