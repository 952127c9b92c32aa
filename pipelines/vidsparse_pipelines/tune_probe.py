"""What `tune` puts into a generation to measure: a processor that tries choices on real calls, and a replay of outputs.

A probe never changes the generation it looks at. In a probed step every layer computes dense attention and, beside it,
each choice on the same query, key and value; then the step is repeated with one layer at a time replaced.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vidsparse.attention import attend
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.methods import processor_class
from vidsparse.methods.dense import DenseConfig
from vidsparse.methods.tuned import SKIP
from vidsparse.parts import LayerMemory, MemoryBudget, Parts, Selection
from vidsparse.processors.base import SparseProcessor
from vidsparse.processors.context import AttentionContext
from vidsparse.schedule import METHOD_DENSE
from vidsparse.selection.blocks import block_sizes
from vidsparse_kernels import BlockMask

TIMED_CALLS = 5


@dataclass(frozen=True)
class Option:
    """A choice that is measured.

    Attributes:
        label: as the user wrote it, `NAME:OPTION=VALUE:...`.
        method, settings: what it means.
    """

    label: str
    method: str
    settings: dict[str, Any]

    @property
    def choice(self) -> dict[str, Any]:
        """Its form in a recipe."""
        return {"method": self.method, **self.settings}


@dataclass
class Sums:
    """Sums over the calls of one layer, by head, on the device of the calls; `label` "" is dense attention itself."""

    squares: dict[str, torch.Tensor] = field(default_factory=dict)
    absolutes: dict[str, torch.Tensor] = field(default_factory=dict)
    density: dict[str, list[float | torch.Tensor]] = field(default_factory=dict)

    def add(self, label: str, x: torch.Tensor) -> None:
        x = x.float()
        for sums, value in ((self.squares, x.square()), (self.absolutes, x.abs())):
            value = value.sum((0, 1, 3), dtype=torch.float64)
            sums[label] = sums[label] + value if label in sums else value


class Probe(SparseProcessor):
    """Dense attention that looks at choices; one object serves all transformers of a pipeline.

    Attributes:
        options: that are tried.
        looking: whether calls go through the probe at all; else they are the model's own.
        sums: by layer, filled by calls with `replaced` None.
        replaced: layer and label of the choice whose output stands in for the dense one, or None.
        seconds: by label ("" is dense), medians of timed calls.
    """

    method = "dense"
    config_class = DenseConfig

    def __init__(self, options: Sequence[Option]) -> None:
        super().__init__()
        self.options = {option.label: option for option in options}
        self._processors = {o.label: processor_class(o.method)(**o.settings) for o in options}
        self._parts: dict[tuple[str, TokenLayout, str], Parts] = {}
        self.looking, self.to_time = False, False
        self.replaced: tuple[int, str] | None = None
        self.sums: dict[int, Sums] = {}
        self.seconds: dict[str, float] = {}

    def layout(self, grid: LatentGrid, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        return TokenLayout(grid, text_before, text_after, block_sizes(grid.num_tokens + text_before + text_after)[0])

    def dense_reason(
        self, step_index: int | None, num_steps: int | None, layer_index: int, seq_len: int
    ) -> str | None:
        return None if self.looking else METHOD_DENSE

    def slow_reason(
        self,
        parts: Parts,
        shape: Any,
        device_type: str,
        dtype: torch.dtype | None = None,
        dense_cost: float = 1.0,
    ) -> str | None:
        return None

    def parts(self, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        q_size, kv_size = block_sizes(layout.seq_len)
        full = BlockMask.full(
            layout.seq_len, layout.seq_len, q_block_size=q_size, kv_block_size=kv_size, device=device
        )
        return Parts(selector=_Everything(Selection(full)), correction=_Try(self)), None

    def attend_as(
        self, label: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext,
        memory: LayerMemory | None = None, **options: Any,
    ) -> tuple[torch.Tensor, float | torch.Tensor]:  # fmt: skip
        """Output of a choice on a call, and its density."""
        parts = self.parts_of(label, context.layout, query.device)
        out, selection = attend(query, key, value, replace(context, parts=parts, memory=memory), **options)
        mask = parts.block_mask
        return out, selection.density if selection is not None else mask.density if mask is not None else 1.0

    def parts_of(self, label: str, layout: TokenLayout, device: Any) -> Parts:
        """A choice on a layout, made once."""
        where = (label, layout, str(device))
        if where not in self._parts:
            processor = self._processors[label]
            own = processor.layout(layout.grid, layout.text_before, layout.text_after)
            with torch.inference_mode(False):
                self._parts[where] = processor.parts_with_reuse(own, device)[0]
        return self._parts[where]

    def call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
        context: AttentionContext, **options: Any,
    ) -> torch.Tensor:  # fmt: skip
        """What a call returns: `out`, but in a replaced layer the choice's output."""
        if self.replaced is not None:
            layer, label = self.replaced
            if context.layer_index != layer:
                return out
            return self.attend_as(label, query, key, value, context, **options)[0]
        sums = self.sums.setdefault(context.layer_index, Sums())
        sums.add("", out)
        for label in self.options:
            tried, density = self.attend_as(label, query, key, value, context, **options)
            sums.add(label, tried - out)
            sums.density.setdefault(label, []).append(density)
        if self.to_time:
            self._time(query, key, value, context, **options)
            self.to_time = False
        return out

    def _time(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext, **options: Any
    ) -> None:
        def dense() -> None:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            torch.nn.functional.scaled_dot_product_attention(q, k, v)

        runs: dict[str, Callable[[], Any]] = {"": dense}
        for label in self.options:
            # Clusters start from those of the step before, as they do in a generation.
            memory = LayerMemory(MemoryBudget())
            runs[label] = functools.partial(self.attend_as, label, query, key, value, context, memory, **options)
        times: dict[str, list[float]] = {label: [] for label in runs}
        for turn in range(TIMED_CALLS + 1):
            for label, run in runs.items():
                _wait(query)
                since = time.perf_counter()
                run()
                _wait(query)
                if turn:
                    times[label].append(time.perf_counter() - since)
        self.seconds = {label: statistics.median(values) for label, values in times.items()}

    def results(self) -> dict[int, dict[str, Any]]:
        """What was summed, by layer, in plain numbers; forgotten here."""
        found = {}
        for layer, sums in sorted(self.sums.items()):
            whole, mean = float(sums.squares[""].sum()), sums.absolutes[""].tolist()
            squares = {SKIP if x == "" else x: [v / whole for v in s.tolist()] for x, s in sums.squares.items()}
            absolutes = {SKIP if x == "" else x: s.tolist() for x, s in sums.absolutes.items()}
            found[layer] = {
                # A head that is skipped loses its whole output.
                "by_head": squares,
                "l1_by_head": {x: [v / m for v, m in zip(s, mean, strict=True)] for x, s in absolutes.items()},
                "density": {x: sum(map(float, d)) / len(d) for x, d in sums.density.items()} | {SKIP: 0.0},
            }
        self.sums = {}
        return found


def _wait(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


@dataclass(frozen=True)
class _Everything:
    selection: Selection

    def select(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> Selection:
        return self.selection


@dataclass
class _Try:
    """The probe as a correction, which is handed the call and the dense output."""

    probe: Probe
    needs_lse: bool = False

    def correct(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
        lse: torch.Tensor | None, selection: Selection, context: AttentionContext, scale: float,
        key_bias: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        return self.probe.call(query, key, value, out, context, scale=scale, key_bias=key_bias)


class Replay:
    """The transformers' outputs of a generation, in the order of their calls, given back instead of being computed.

    Attributes:
        outputs: of every call, on the CPU.
        calls: made so far in this generation.
    """

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.calls = 0

    @contextmanager
    def recording(self, models: Sequence[Any]) -> Iterator[None]:
        """Keep what the models return."""

        def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.outputs.append(_moved(output, "cpu"))
            return output

        self.outputs = []
        with self._around(models, call):
            yield

    @contextmanager
    def replaying(
        self, models: Sequence[Any], until: int, at: Callable[[int, Callable[[], Any]], None] | None = None
    ) -> Iterator[None]:
        """Give back the first `until` outputs.

        Args:
            until: calls that are not computed.
            at: called in each of them with its number and a function that computes it after all.
        """

        def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            number = self.calls
            self.calls += 1
            if number >= until:
                return forward(*args, **kwargs)
            if at is not None:
                at(number, lambda: forward(*args, **kwargs))
            tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
            return _moved(self.outputs[number], next(tensors).device)

        self.calls = 0
        with self._around(models, call):
            yield

    @contextmanager
    def _around(self, models: Sequence[Any], call: Callable[..., Any]) -> Iterator[None]:
        before = [(model, vars(model).get("forward")) for model in models]
        for model in models:
            model.forward = functools.partial(call, model.forward)
        try:
            yield
        finally:
            for model, own in before:
                if own is None:
                    del model.forward
                else:
                    model.forward = own


def prediction(output: Any) -> torch.Tensor:
    """The tensor in a transformer's output."""
    return output[0] if isinstance(output, tuple | list) else output.sample


def _moved(output: Any, device: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.detach().to(device, copy=True)
    if isinstance(output, tuple | list):
        return type(output)(_moved(x, device) for x in output)
    return type(output)(**{name: _moved(x, device) for name, x in output.items()})
