"""The calibration behind `tune`: what each choice costs in error and in time, measured once and kept.

Three parts, each saved as soon as it is done:

1. dense clips;
2. cells: in one step of every step range each layer tries every choice on its own query, key and value (error by head),
   and the step is repeated with one layer at a time replaced (what an error there does to the prediction);
3. gains: whole generations with one method in one step range (what an error of the prediction there does to the video).

First-order additivity of squared errors is assumed by whoever adds them up.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vidsparse
from vidsparse.break_even import CallShape, relative_cost
from vidsparse.errors import ConfigError, OutputError
from vidsparse.layout import LatentGrid
from vidsparse.methods import processor_class
from vidsparse.methods.tuned import DENSE, SKIP, TunedConfig
from vidsparse.processors.apply import TRANSFORMERS
from vidsparse.processors.binding import bind, unbind
from vidsparse.processors.context import RunState
from vidsparse.recipe import Recipe, TunedFor

from .compare import Clip, as_tensor
from .costs import read_shape
from .decode import can_stream, stream_clips, to_uint8
from .device import resolve_device
from .environment import device_name
from .generation import _call_arguments, _explain, _Run, _Stages
from .load import LoadedPipeline, load_pipeline
from .model_info import inspect_model
from .progress import Observer
from .provenance import model_identity, weights_of
from .runfile import write_json
from .settings import GenerateSettings
from .tune_budget import CellErrors, Choice, Problem, Table
from .tune_probe import Option, Probe, Replay, prediction
from .video import output_error

FORMAT, FORMAT_VERSION = "vidsparse-calibration", 1
STATE, FRAMES = "calibration.json", "dense.npz"
RANGE_ENDS = (0.125, 0.25, 0.5, 1.0)
LEAST_ERROR = 1e-12
BY_HEAD = ("radial", "pooled", "svg1", "random")
"""Methods that single heads can have: blocks of uniform size, no correction."""

FULL_PRICE = 1.1
"""Assumed time of a sparse call over all blocks where times are measured: dense heads beside sparse ones."""

PRICED_HEADS = (12, 128)
"""Heads and head dim of the call that `price_tokens` stands for: Wan 1.3B's."""


@dataclass
class Calibration:
    """Measurements on one model, shape and device; recipes that share them share the folder.

    Attributes:
        parent: folder in which the calibration's own is made, `calibration-...`.
        settings: of the generations, complete.
        clips: that tables are run on; the first `probe_clips` of them, one batch, serve cells and gains.
        options: choices beside dense.
        ends: of the step ranges, as shares of the steps.
        probe_clips: likewise, and the size of every batch.
        price_tokens: None: times measured here; else those of the GPU model of `vidsparse.break_even` at this length.
        budget_seconds: None for no limit.
        observer: receives progress.
    """

    parent: Path
    settings: GenerateSettings
    clips: list[Clip]
    options: list[Option]
    ends: tuple[float, ...] = RANGE_ENDS
    probe_clips: int = 2
    price_tokens: int | None = None
    budget_seconds: float | None = None
    observer: Observer = field(default_factory=Observer)

    def __post_init__(self) -> None:
        self.info = inspect_model(self.settings.model)
        self.steps = self.settings.num_inference_steps or 1
        bounds = [0, *(round(end * self.steps) for end in self.ends)]
        self.ranges = [(low, high) for low, high in zip(bounds, bounds[1:], strict=False) if high > low]
        self.folder = self.parent / f"calibration-{self.key}"
        self.state: dict[str, Any] = {}
        self._loaded: LoadedPipeline | None = None
        self._dense: np.ndarray | None = None
        self._replay: Replay | None = None
        self._started = time.perf_counter()

    def measure(self) -> None:
        """Everything that is missing.

        Raises:
            VidsparseError: one sentence.
        """
        if not self.state:
            self.open()
        self._tell()
        self.dense()
        self.cells()
        self.gains()

    @property
    def key(self) -> str:
        """Of all that determines the measurements, so that recipes of one model, shape and device share them."""
        settings = {k: v for k, v in self.settings.to_dict().items() if k not in ("prompt", "seed", "sparse")}
        whole = [settings, model_identity(self.info), device_name(self._device()), self.ranges, self.probe_clips]
        whole += [[clip.prompt, clip.seed] for clip in self.clips[: self.probe_clips]]
        return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:10]

    def open(self) -> None:
        """Make the folder, or take up what an earlier run left in it.

        Raises:
            OutputError: the folder cannot be made or read.
            ConfigError: another version made it.
        """
        path = self.folder / STATE
        empty = {"cells": {}, "gains": {}, "seconds": {}, "dense_seconds": None, "dense_clips": []}
        empty["calls_at_step_end"] = []
        self.state = {"format": FORMAT, "format_version": FORMAT_VERSION, "vidsparse": vidsparse.__version__, **empty}
        if path.exists():
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
                made_by = [data[name] for name in ("format", "format_version", "vidsparse")]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise OutputError(f"{str(path)!r} is no calibration; delete it to begin anew.") from error
            if made_by != [FORMAT, FORMAT_VERSION, vidsparse.__version__]:
                raise ConfigError(
                    f"The folder {str(self.folder)!r} was made by vidsparse {made_by[2]}, this is "
                    f"{vidsparse.__version__}; delete it to calibrate anew."
                )
            self.state = data
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(self.folder, error) from error

    def _save(self) -> None:
        write_json(self.folder / STATE, self.state)

    def _device(self) -> torch.device:
        return resolve_device(self.settings.device)

    def pipe(self) -> Any:
        if self._loaded is None:
            self.observer.stage("load")
            s = self.settings
            with _explain(_Stages(Observer(), {}), s, self.info):
                self._loaded = load_pipeline(
                    self.info, dtype=s.dtype, device=s.device, offload=s.offload, vae_tiling=s.vae_tiling,
                    flow_shift=s.flow_shift,
                )  # fmt: skip
            self._loaded.pipe.set_progress_bar_config(disable=True)
        return self._loaded.pipe

    @property
    def models(self) -> list[Any]:
        """The transformers of the pipeline."""
        found = (getattr(self.pipe(), name, None) for name in TRANSFORMERS)
        return [model for model in found if isinstance(model, torch.nn.Module)]

    def generate(self, clips: Sequence[Clip], on_step: Any = None, decode: bool = True) -> tuple[np.ndarray, float]:
        """Frames uint8 `[clips, frames, height, width, 3]` of a batch, and seconds from its first forward to the last."""
        pipe, started = self.pipe(), []
        loaded = self._loaded
        assert loaded is not None
        each = [_call_arguments(_Run(self.settings.with_(prompt=x.prompt), self.folder), loaded) for x in clips]
        arguments = each[0] | {
            "prompt": [clip.prompt for clip in clips],
            "generator": [torch.Generator("cpu").manual_seed(clip.seed) for clip in clips],
        }
        if "max_sequence_length" in arguments:
            arguments["max_sequence_length"] = max(x["max_sequence_length"] for x in each)
        streamed = can_stream(pipe)

        def first(*_: Any) -> None:
            if not started:
                started.append(time.perf_counter())

        def step_ends(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(step)
            self.observer.advance(step + 1)
            return tensors

        hooks = [model.register_forward_pre_hook(first) for model in self.models]
        kind = "latent" if streamed or not decode else "np"
        try:
            with _explain(_Stages(Observer(), {}), self.settings, self.info):
                output = pipe(**arguments, output_type=kind, callback_on_step_end=step_ends)
                if loaded.device.type == "cuda":
                    torch.cuda.synchronize(loaded.device)
                seconds = time.perf_counter() - started[0]
                if not decode:
                    return np.zeros(0, np.uint8), seconds
                if not streamed:
                    return np.stack([to_uint8(np.asarray(frames)) for frames in output.frames]), seconds
                return np.concatenate(list(stream_clips(pipe, output.frames, loaded.device)), 1), seconds
        finally:
            for hook in hooks:
                hook.remove()
            if streamed:
                pipe.maybe_free_model_hooks()

    def batches(self) -> list[list[Clip]]:
        size = max(1, self.probe_clips)
        return [self.clips[i : i + size] for i in range(0, len(self.clips), size)]

    def run_table(self, table: Table, batches: Sequence[list[Clip]]) -> tuple[np.ndarray, float, float]:
        """Frames of the clips with a table, seconds and the density of one of them."""
        handle = vidsparse.apply(self.pipe(), self.recipe(table))
        frames, seconds = [], 0.0
        try:
            for clips in batches:
                handle.reset()
                made, took = self.generate(clips)
                frames.append(made)
                seconds += took
            density = handle.report().mean_density or 1.0
        finally:
            handle.remove()
        return np.concatenate(frames), seconds, density

    def dense(self) -> np.ndarray:
        """Dense frames of all clips, batch by batch; what an earlier run kept of the same batches is not made again."""
        if self._dense is None:
            self._dense = self._kept_dense()
        if self._dense is None:
            self.observer.stage("dense 1", self.steps)
            self._keep_dense(self._record(self.batches()[0]))
            self._tell()
        while self._dense is None or len(self._dense) < len(self.clips):
            have = 0 if self._dense is None else len(self._dense)
            self.observer.stage(f"dense {have // self.probe_clips + 1}", self.steps)
            self._keep_dense(self.generate(self.clips[have : have + self.probe_clips])[0])
        return self._dense[: len(self.clips)]

    def _kept_dense(self) -> np.ndarray | None:
        """Frames of an earlier run, as far as whole batches are those of this one."""
        try:
            with np.load(self.folder / FRAMES) as data:
                frames = data["frames"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        kept, same = self.state["dense_clips"][: len(frames)], 0
        for clips in self.batches():
            mine = [[clip.prompt, clip.seed] for clip in clips]
            if kept[same : same + len(mine)] != mine:
                break
            same += len(mine)
        return frames[:same] if same else None

    def _keep_dense(self, frames: np.ndarray) -> None:
        self._dense = frames if self._dense is None else np.concatenate([self._dense, frames])
        path = self.folder / FRAMES
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".npz", delete=False) as file:
                np.savez_compressed(file, frames=self._dense)
            os.replace(file.name, path)
        except OSError as error:
            raise output_error(path, error) from error
        self.state["dense_clips"] = [[clip.prompt, clip.seed] for clip in self.clips[: len(self._dense)]]
        self._save()

    def _record(self, clips: list[Clip]) -> np.ndarray:
        """Dense generation of the first batch, every output of the transformers kept."""
        replay, ends = Replay(), []
        with replay.recording(self.models):
            frames, seconds = self.generate(clips, lambda step: ends.append(len(replay.outputs)))
        self._replay = replay
        self.state["dense_seconds"] = seconds
        self.state["calls_at_step_end"] = ends
        return frames

    def _first_call(self, step: int) -> int:
        return 0 if step == 0 else self.state["calls_at_step_end"][step - 1]

    def recorded(self) -> Replay:
        if self._replay is None:
            self.observer.stage("dense, again", self.steps)
            self._record(self.batches()[0])
        assert self._replay is not None
        return self._replay

    def cells(self) -> None:
        """Errors of every choice in every layer, head and step range, and what an error of a layer does."""
        for number, (low, high) in enumerate(self.ranges):
            missing = [o for o in self.options if o.label not in self._measured(number)]
            if not missing:
                continue
            self.observer.stage(f"cells {number + 1}/{len(self.ranges)}", self.steps)
            self._probe(number, (low + high - 1) // 2, missing)
            self._save()

    def _measured(self, number: int) -> set[str]:
        found = self.state["cells"].get(str(number))
        return set() if found is None else set(next(iter(found.values()))["by_head"])

    def _probe(self, number: int, step: int, options: list[Option]) -> None:
        replay, probe, run = self.recorded(), Probe(options), RunState()
        known = self.state["cells"].get(str(number), {})
        first, last = self._first_call(step), self.state["calls_at_step_end"][step]
        changes: dict[int, float] = {}
        probe.to_time = number == len(self.ranges) - 1
        for model in self.models:
            bind(probe, model, run=run)
        replaced = self._reference(options)

        def at(call: int, compute: Any) -> None:
            if not first <= call < last:
                return
            probe.looking, probe.replaced = True, None
            base = prediction(compute()).float()
            if known:
                return
            for layer in sorted(probe.sums):
                probe.replaced = (layer, replaced)
                change = (prediction(compute()).float() - base).square().mean()
                changes[layer] = changes.get(layer, 0.0) + float(change)
            probe.replaced = None

        def turn(step_done: int) -> None:
            # The decision which calls are looked at falls before a forward begins.
            probe.looking = step_done + 1 == step

        probe.looking = step == 0
        try:
            with replay.replaying(self.models, len(replay.outputs), at):
                self.generate(self.batches()[0], turn, decode=False)
        finally:
            for model in self.models:
                unbind(model)
        found = probe.results()
        if not found:
            raise ConfigError("No attention call of this model could be looked at, so there is nothing to tune.")
        for layer, errors in found.items():
            if known:
                for name in ("by_head", "l1_by_head", "density"):
                    known[str(layer)][name] |= errors[name]
                continue
            relative = sum(errors["by_head"][replaced])
            errors["weight"] = changes[layer] / (last - first) / max(relative, 1e-12)
            self.state["cells"].setdefault(str(number), {})[str(layer)] = errors
        # Times of a later run count by their ratio to the dense call beside them.
        ratio = (
            self.state["seconds"].get("", 1.0) / probe.seconds[""] if probe.seconds and self.state["seconds"] else 1.0
        )
        self.state["seconds"] |= {label: ratio * seconds for label, seconds in probe.seconds.items()}

    def _reference(self, options: Sequence[Option], method: str | None = None) -> str:
        """The middle choice of a method, for probes that need one."""
        labels = [o.label for o in options if method in (None, o.method)]
        return labels[len(labels) // 2]

    def gains(self) -> None:
        """What a method's error in a step range does to the video, measured on whole generations."""
        methods = list(dict.fromkeys(option.method for option in self.options))
        for method in methods:
            for number, (low, _) in enumerate(self.ranges):
                if f"{number}:{method}" in self.state["gains"] or (self.state["gains"] and self.late(2)):
                    continue
                self.observer.stage(f"gain {method} {number + 1}/{len(self.ranges)}", self.steps)
                label = self._reference(self.options, method)
                table = self._only(number, label)
                replay = self.recorded()
                handle = vidsparse.apply(self.pipe(), self.recipe(table))
                try:
                    with replay.replaying(self.models, self._first_call(low)):
                        frames, _ = self.generate(self.batches()[0])
                finally:
                    handle.remove()
                measured = mean_error(frames, self.dense()[: len(frames)])
                expected = sum(cell.weight * cell.error(label) for cell in self._cells_of(number))
                # Of a choice that is exact on this shape nothing can be learned.
                self.state["gains"][f"{number}:{method}"] = measured / expected if expected > LEAST_ERROR else None
                self._save()

    def _only(self, number: int, label: str) -> Table:
        layers = len(self.state["cells"][str(number)])
        row: list[Choice] = [label if r == number else DENSE for r in range(len(self.ranges))]
        return [list(row) for _ in range(layers)]

    def _cells_of(self, number: int) -> list[CellErrors]:
        return [
            CellErrors(x["by_head"], x["l1_by_head"], x["density"], x["weight"])
            for x in self.state["cells"][str(number)].values()
        ]

    def problem(self, by_head: bool = True) -> Problem:
        """What was measured, as a knapsack; `by_head`: heads of a layer may differ."""
        by_range = [self._cells_of(number) for number in range(len(self.ranges))]
        labels = [option.label for option in self.options]
        methods = {option.label: option.method for option in self.options} | {SKIP: SKIP}
        known = [x for x in self.state["gains"].values() if x is not None] or [1.0]
        gains: list[dict[str, float]] = []
        for number in range(len(self.ranges)):
            own = {k.split(":")[1]: v for k, v in self.state["gains"].items() if k.split(":")[0] == str(number)}
            own = {method: gain for method, gain in own.items() if gain is not None}
            gains.append(own or {"": statistics.fmean(known)})
        heads = [o.label for o in self.options if o.method in BY_HEAD] + [SKIP] if by_head else []
        cells = [[by_range[r][layer] for r in range(len(self.ranges))] for layer in range(len(by_range[0]))]
        steps = [high - low for low, high in self.ranges]
        prices = [[{x: self.price(x, cell.density[x]) for x in labels} for cell in row] for row in cells]
        full = self.price(None, 1.0)
        return Problem(cells, steps, gains, prices, full, labels, heads, methods)

    def price(self, label: str | None, density: float) -> float:
        """Time of a call over that of a dense one; label None: all blocks of a sparse call."""
        if self.price_tokens is None:
            seconds = self.state["seconds"]
            if label is None:
                return FULL_PRICE
            return seconds[label] / seconds[""]
        shape = CallShape(1, PRICED_HEADS[0], self.price_tokens, PRICED_HEADS[1])
        if label is None:
            return relative_cost(shape, 1.0)
        parts = self._parts[label]
        return relative_cost(
            shape, density, selects=parts.selector is not None, overhead=parts.overhead, factor=parts.factor
        )

    @functools.cached_property
    def _parts(self) -> dict[str, Any]:
        """What each choice says of its own costs."""
        processors = {o.label: processor_class(o.method)(**o.settings) for o in self.options}
        return {label: p.parts(p.layout(self.grid), "cpu")[0] for label, p in processors.items()}

    @property
    def grid(self) -> LatentGrid:
        s = self.settings
        return read_shape(self.settings.model).grid(s.num_frames or 1, s.height or 0, s.width or 0)

    def recipe(self, table: Table, psnr: float | None = None) -> Recipe:
        """A table as a recipe for this model, shape and device."""
        labels = sorted({x for row in table for cell in row for x in ((cell,) if isinstance(cell, str) else cell)})
        known = {option.label: option.choice for option in self.options}
        choices = tuple(known.get(label) or {"method": label} for label in labels)
        numbers = {label: number for number, label in enumerate(labels)}
        rows = tuple(
            tuple(numbers[c] if isinstance(c, str) else tuple(numbers[x] for x in c) for c in row) for row in table
        )
        ends = tuple(high / self.steps for _, high in self.ranges)
        tuned_for = TunedFor(
            model=self.info.name, grid=self.grid, num_steps=self.steps, device=device_name(self._device()), psnr=psnr,
            weights=weights_of(self.info),
        )  # fmt: skip
        return Recipe("tuned", TunedConfig(choices, ends, rows), tuned_for)

    def clip_seconds(self) -> float:
        """Denoising of one clip, in batches of the calibration."""
        return self.state["dense_seconds"] / len(self.batches()[0])

    def attention_seconds(self) -> float:
        """Of one dense clip, in batches of the calibration."""
        calls = len(read_layers(self.state)) * self.state["calls_at_step_end"][-1]
        return self.state["seconds"][""] * calls / len(self.batches()[0])

    def late(self, rounds: int = 0) -> bool:
        """Whether the time is up, with room for some rounds."""
        if self.budget_seconds is None:
            return False
        one = (self.state["dense_seconds"] or 0.0) * len(self.batches())
        return time.perf_counter() - self._started + rounds * one > self.budget_seconds

    def _tell(self) -> None:
        """Say what will be done; after the first dense batch also how long that takes."""
        if self.state["dense_seconds"] is None:
            self.observer.note(
                f"{len(self.options)} choices in {len(self.ranges)} step ranges, on {self.probe_clips} of "
                f"{len(self.clips)} clips; how long it takes is said after the first of them."
            )
            return
        left, one = self.estimate()
        if self.budget_seconds is not None and left > self.budget_seconds - (time.perf_counter() - self._started):
            fixed = left - 3 * one * len(self.batches())
            room = self.budget_seconds - (time.perf_counter() - self._started) - fixed
            batches = max(1, min(len(self.batches()), int(room // (3 * one))))
            if batches < len(self.batches()):
                self.clips = self.clips[: batches * self.probe_clips]
                self.observer.note(f"{len(self.clips)} clips in place of more, to keep to {self.budget_seconds:g} s.")
                left, one = self.estimate()
        self.observer.note(f"The calibration takes about {math.ceil(left / 60)} min from here.")

    def estimate(self) -> tuple[float, float]:
        """Seconds left, roughly, and those of one batch."""
        one = self.state["dense_seconds"]
        batches = len(self.batches())
        kept = 0 if self._dense is None else -(-len(self._dense) // self.probe_clips)
        layers = len(read_layers(self.state)) or read_shape(self.settings.model).num_layers
        left = (batches - min(kept, batches)) * one
        missing = [n for n in range(len(self.ranges)) if not set(o.label for o in self.options) <= self._measured(n)]
        left += len(missing) * one / self.steps * (1 + layers + len(self.options) / 4)
        for number, (low, _) in enumerate(self.ranges):
            todo = {o.method for o in self.options} - {
                k.split(":")[1] for k in self.state["gains"] if k[0] == str(number)
            }
            left += len(todo) * one * (1 - low / self.steps)
        return left + 2 * batches * one, one


def read_layers(state: dict[str, Any]) -> list[str]:
    """Layers that were measured so far."""
    return list(next(iter(state["cells"].values()), {}))


def error_of(psnr: float) -> float:
    """Mean squared error on a range of 1 for a PSNR in dB."""
    return 10 ** (-psnr / 10)


def psnr_of(error: float) -> float:
    """The inverse; at most 100 dB."""
    return -10 * math.log10(max(error, 1e-10))


def clip_psnrs(frames: np.ndarray, dense: np.ndarray) -> list[float]:
    """PSNR of each clip, uint8 `[clips, frames, height, width, 3]`."""
    found = []
    for ours, theirs in zip(frames, dense, strict=True):
        found.append(psnr_of(float((as_tensor(ours) - as_tensor(theirs)).square().mean()) / 4))
    return found


def mean_error(frames: np.ndarray, dense: np.ndarray) -> float:
    """Geometric mean of the clips' mean squared errors, whose PSNR is the mean of their PSNRs."""
    return error_of(statistics.fmean(clip_psnrs(frames, dense)))
