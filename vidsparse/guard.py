"""The guard: a few query rows of every sparse call against exact attention, and denser attention where they differ.

What is promised is the *agreement* of a call: 1 - |out - exact|^2 / |exact|^2, the share of the exact output's energy that
is right, over sampled rows and heads, with everything that a method does for what it drops. 0.95 is a relative error of
22 %. It is not the share of the softmax mass in the computed blocks (recall): that knows nothing of the values, would call
an output bad for what its correction makes good, and would miss a correction, or a kernel, that is wrong.

In a call 32 rows of the video, evenly spread, are compared in a sixth of the heads; rows and heads move on with step and
layer, and do not depend on chance. The numbers stay on the device. Once a step, before its first forward, those of the
step before are read, all layers in one copy that was begun right after the forward. A layer below the target attends at
twice its density from this step on, then at four times, then dense; it never goes back within one generation, and all
guidance branches do the same, because a difference between them would be multiplied by the guidance scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vidsparse.parts import Parts
    from vidsparse.processors.base import SparseProcessor
    from vidsparse.processors.context import AttentionContext

ROWS = 32
"""Query rows of a call, for each sampled head."""

HEAD_GROUPS = 6
"""A call samples one of so many groups of heads, the groups in turn."""

FACTOR = 2.0
"""By which a density rises at a time."""

LEVELS = 3
"""Densities that layers of one model may have at a time: the one asked for, and those up to `DENSEST`."""

DENSEST = 0.6
"""Above this density a layer goes dense, which takes hardly longer."""

STRIDES = 0.6180339887498949, 0.7548776662466927
"""By which, in shares of the distance of two rows, a sample moves from layer to layer and from step to step."""


class Measured:
    """Agreement of one layer's calls in one forward; on the way from the device until it is read.

    Args:
        sums: `[calls * batch, 2]` on the host: squared errors and squared norms.
        ready: event after which `sums` are there, None where they are.
    """

    def __init__(self, sums: torch.Tensor, ready: Any = None) -> None:
        self._sums, self._ready = sums, ready

    def agreement(self) -> float:
        """Of the worst sample, from 0 (nothing in common, or not finite) to 1."""
        if self._ready is not None:
            self._ready.synchronize()
            self._ready = None
        error, norm = self._sums.double().unbind(-1)
        # Nothing to attend to (norm 0) agrees when the output is 0 too.
        worst = float((error / norm.clamp(min=1e-300)).nan_to_num(1.0, 1.0).max())
        return round(max(0.0, 1.0 - worst), 5)


class Guard:
    """What the guard knows of one generation."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nothing was measured, nothing is raised."""
        self._levels: dict[str, int] = {}
        self._ladder: dict[Any, SparseProcessor | None] = {}
        self._pending: list[tuple[str, Measured]] = []
        self._step: int | None = None

    def level(self, layer_name: str) -> int:
        """How often a layer was raised."""
        return self._levels.get(layer_name, 0)

    def decide(self, step: int, target: float) -> dict[str, float]:
        """At the first forward of a step: raise the layers that fell short in the step before.

        Returns:
            Their agreement by name; empty in later forwards of a step.
        """
        if step == self._step:
            return {}
        self._step = step
        worst: dict[str, float] = {}
        for name, measured in self._pending:
            worst[name] = min(worst.get(name, 1.0), measured.agreement())
        self._pending.clear()
        short = {name: value for name, value in worst.items() if value < target}
        for name in short:
            self._levels[name] = self.level(name) + 1
        return short

    def collect(self, found: Iterable[tuple[str, list[torch.Tensor]]], group: str | None) -> dict[str, Measured]:
        """Take in what the layers of one forward measured, in one copy to the host that nobody waits for.

        Args:
            found: layer names and, for each call, what `measure` gave.
            group: of ranks that share the heads, whose sums belong together; None for one device.

        Returns:
            What was measured, by layer.
        """
        by_layer = [(name, calls) for name, calls in found if calls]
        calls = [call for _, of_layer in by_layer for call in of_layer]
        if not calls:
            return {}
        if all(call.shape == calls[0].shape for call in calls):
            together = torch.stack(calls).sum(2).flatten(0, 1)
        else:
            together = torch.cat([call.sum(1) for call in calls])
        if group is not None:
            collectives = torch.ops._c10d_functional
            together = collectives.wait_tensor(collectives.all_reduce(together, "sum", group))
        host, ready = together.to("cpu", non_blocking=True), None
        if together.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(together.device))
        parts = host.split([sum(len(call) for call in of_layer) for _, of_layer in by_layer])
        measured = {name: Measured(part, ready) for (name, _), part in zip(by_layer, parts, strict=True)}
        self._pending += measured.items()
        return measured

    def denser(self, processor: SparseProcessor, parts: Parts, level: int, where: Any) -> SparseProcessor | None:
        """The method at `FACTOR ** level` times its density, the same object each time; None for dense.

        Args:
            processor: the method as it was asked for.
            parts: it on the layout of the calls.
            level: 1 or more.
            where: what `parts` belong to.
        """
        if (where, level) not in self._ladder:
            self._ladder[where, level] = denser(processor, parts, level)
        return self._ladder[where, level]


def is_denser(raised: Parts, parts: Parts, level: int) -> bool:
    """Whether a raised method really computes more: a mask may have a largest density. True where it is not known."""
    densities = [x.block_mask.density if x.block_mask is not None else x.density for x in (raised, parts)]
    return None in densities or densities[0] > densities[1] * FACTOR ** (level - 0.5)


def denser(processor: SparseProcessor, parts: Parts, level: int) -> SparseProcessor | None:
    """The method at `FACTOR ** level` times its density; None where that is above `DENSEST` or it has none to raise.

    A method that takes a share of the softmax mass (`top_p`) in place of a density misses a quarter of what it missed.
    """
    config, options = processor.config, {field.name for field in dataclasses.fields(processor.config)}
    now = parts.block_mask.density if parts.block_mask is not None else parts.density
    changes: dict[str, Any]
    if now is not None and "density" in options:
        raised = now * FACTOR**level
        if level >= LEVELS or raised > DENSEST:
            return None
        changes = {"density": raised}
    elif "top_p" in options and level < LEVELS:
        top_p = getattr(config, "mass", None) or config.top_p
        if top_p is None:
            return None
        changes = {"top_p": 1 - (1 - top_p) / 4**level}
    else:
        return None
    recipe = dataclasses.replace(processor.recipe, config=dataclasses.replace(config, **changes))
    return type(processor)(recipe, strict=processor.strict)


def measure(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    context: AttentionContext,
    key_bias: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor | None:
    """Squared error and norm of the sampled rows of a call, fp32 `[batch, rows, 2]` on its device.

    None while a CUDA graph is recorded, which would replay one step's sample for ever.

    Args:
        query, key, value, out: of the whole sequence in the model's order, `[batch, seq_len, num_heads, head_dim]`.
        context: of the call.
        key_bias, scale: as the call had them.
    """
    from vidsparse_kernels import sampled_error

    if query.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    first, among, count, offset, heads = sample(context, query.shape[2])
    return sampled_error(
        query.to(out.dtype),
        key.to(out.dtype),
        value.to(out.dtype),
        out,
        first=first,
        among=among,
        count=count,
        offset=offset,
        heads=heads,
        key_bias=key_bias,
        scale=scale,
    )


def sample(context: AttentionContext, num_heads: int) -> tuple[int, int, int, int, tuple[int, int]]:
    """Rows and heads of a call: first row and number of video rows, rows taken, their offset, and the range of heads."""
    among = context.layout.grid.num_tokens
    step, layer = context.step_index or 0, context.layer_index
    offset = int((layer * STRIDES[0] + step * STRIDES[1]) % 1.0 * among)
    size = -(-num_heads // HEAD_GROUPS)
    # The last group overlaps the one before it, so that all are of one size.
    begin = min((step + layer) % -(-num_heads // size) * size, num_heads - size)
    return context.layout.text_before, among, min(ROWS, among), offset, (begin, begin + size)
