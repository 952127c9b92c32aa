"""Quality as the knob: measure what each choice costs in error and time, spend one budget, write a recipe.

Four parts, each kept in the folder beside the recipe and not measured again:

1. dense clips of the calibration's prompts;
2. cells: in one step of every step range each layer tries every choice on its own query, key and value (error by head),
   and the step is repeated with one layer at a time replaced (what an error there does to the prediction);
3. gains: whole generations with one method in one step range (what an error of the prediction there does to the video);
4. rounds: the table that the budget buys is run on all prompts, and the budget corrected by what came out.

First-order additivity of squared errors is assumed between 2 and 4; every round says how far it was off.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

import vidsparse
from vidsparse.break_even import CallShape, relative_cost
from vidsparse.errors import ConfigError, OutputError
from vidsparse.layout import LatentGrid
from vidsparse.methods.tuned import DENSE, SKIP, TunedConfig
from vidsparse.processors.apply import TRANSFORMERS
from vidsparse.processors.binding import bind, unbind
from vidsparse.processors.context import RunState
from vidsparse.recipe import Recipe, TunedFor

from .bundled import BUNDLED_MODEL
from .clips.grammar import caption, sample_split
from .compare import Clip, as_tensor, parse_recipe
from .costs import read_shape
from .decode import can_stream, stream_frames, to_uint8
from .environment import device_name, environment
from .generation import _call_arguments, _explain, _Run, _Stages, resolve_settings
from .load import LoadedPipeline, load_pipeline
from .model_info import inspect_model
from .progress import Observer
from .provenance import model_identity, weights_of
from .runfile import write_json
from .settings import GenerateSettings
from .tune_budget import CellErrors, Choice, Problem, Table, within_cost, within_error
from .tune_probe import Option, Probe, Replay, prediction
from .tune_rules import RULES
from .video import output_error

FORMAT, FORMAT_VERSION = "vidsparse-calibration", 1
STATE, FRAMES = "calibration.json", "dense.npz"
RANGE_ENDS = (0.125, 0.25, 0.5, 1.0)
LEAST_ERROR = 1e-12
TOLERANCE_DB = 0.3
MAX_ROUNDS = 4
BY_HEAD = ("radial", "pooled", "svg1", "random")
"""Methods that single heads can have: blocks of uniform size, no correction."""

BANDS = tuple(f"svg1:density={d}:kind={k}" for k in ("spatial", "temporal") for d in (0.15, 0.3, 0.5))
MENUS = {
    # On a CPU selecting from query and key costs more than it saves.
    "cpu": (
        *(f"radial{size}{sink}" for size in ("", ":block_size=32") for sink in ("", ":sink_frames=0")),
        *BANDS,
    ),
    "cuda": (
        "radial",
        *(f"radial:density={d}" for d in (0.45, 0.6)),
        *(f"pooled:density={d}" for d in (0.1, 0.2, 0.35, 0.5, 0.7)),
        *BANDS,
        *(f"semantic:density={d}" for d in (0.1, 0.2, 0.35)),
        *(f"vidsparse:density={d}" for d in (0.05, 0.1, 0.15, 0.25, 0.4)),
    ),
}
RULE_MENUS = {
    "sparse-vdit": BANDS,
    "sparge": tuple(f"pooled:top_p={p}" for p in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)),
}
PRICED_HEADS = (12, 128)
"""Heads and head dim of the call that `price_tokens` stands for: Wan 1.3B's."""


@dataclass(frozen=True)
class Target:
    """What the recipe shall reach; one of them is given.

    Attributes:
        psnr: against dense, mean over clips, in dB.
        seconds: of denoising one clip of the calibration on this device.
        share: of the dense run's attention time.
    """

    psnr: float | None = None
    seconds: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("psnr", "seconds", "share") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError("Give one target: --target-psnr DB, --max-time SECONDS or --max-attention SHARE.")
        value = getattr(self, given[0])
        if not math.isfinite(value) or value <= 0:
            raise ConfigError(f"The target must be a number above 0, got {value:g}.")
        if self.share is not None and self.share > 1:
            raise ConfigError(f"--max-attention must be in (0, 1], got {self.share:g}.")


def calibration_prompts(count: int) -> list[str]:
    """Prompts of the bundled model's training split, one and two objects in turn: none of them is held out."""
    rng = Random("tune")
    return [caption(sample_split(rng, held_out=False, two_objects=i % 2 == 1)) for i in range(count)]


def make_options(labels: Sequence[str]) -> list[Option]:
    """The choices from their text, each once.

    Raises:
        ConfigError: as for `parse_recipe`; or a choice that reuses something between steps.
    """
    options = []
    for label in dict.fromkeys(labels):
        method = parse_recipe(label)
        if method.name in (DENSE, "tuned", "sla") or "refresh_every" in method.options:
            raise ConfigError(
                f"{label!r} cannot be a choice: give a method such as radial or pooled, without what it reuses between "
                "steps; dense always is one."
            )
        options.append(Option(label, method.name, method.options))
    return options


@dataclass
class Tuning:
    """One calibration and the recipe that comes of it.

    Attributes:
        output: the recipe's file; a folder `calibration-...` beside it keeps what was measured.
        settings: of the generations, complete.
        clips: of the calibration.
        options: choices beside dense.
        target: what to reach.
        rule: "budget", or a baseline of `tune_rules`.
        by_head: whether heads may differ.
        ends: of the step ranges, as shares of the steps.
        probe_clips: clips that cells and gains are measured on, in one batch.
        price_tokens: None: times measured here; else those of the GPU model of `vidsparse.break_even` at this length.
        budget_seconds: None for no limit.
        observer: receives progress.
    """

    output: Path
    settings: GenerateSettings
    clips: list[Clip]
    options: list[Option]
    target: Target
    rule: str = "budget"
    by_head: bool = True
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
        self._loaded: LoadedPipeline | None = None
        self._dense: np.ndarray | None = None
        self._replay: Replay | None = None
        self._started = time.perf_counter()
        self.folder = self.output.parent / f"calibration-{self.key}"
        self.state: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []

    # What was measured, on disk.

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
        empty = {"cells": {}, "gains": {}, "seconds": {}, "dense_seconds": None, "calls_at_step_end": []}
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

    # Generating.

    def _device(self) -> torch.device:
        from .device import resolve_device

        return resolve_device(self.settings.device)

    def _pipe(self) -> Any:
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
        found = (getattr(self._pipe(), name, None) for name in TRANSFORMERS)
        return [model for model in found if isinstance(model, torch.nn.Module)]

    def _generate(self, clips: Sequence[Clip], on_step: Any = None, decode: bool = True) -> tuple[np.ndarray, float]:
        """Frames uint8 `[clips, frames, height, width, 3]` of a batch, and seconds from its first forward to the last."""
        pipe, started = self._pipe(), []
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
                parts = (output.frames[i : i + 1] for i in range(len(clips)))
                frames = [np.concatenate(list(stream_frames(pipe, x, loaded.device))) for x in parts]
                return np.stack(frames), seconds
        finally:
            for hook in hooks:
                hook.remove()
            if streamed:
                pipe.maybe_free_model_hooks()

    def _batches(self) -> list[list[Clip]]:
        size = max(1, self.probe_clips)
        return [self.clips[i : i + size] for i in range(0, len(self.clips), size)]

    def _run_table(self, table: Table, batches: Sequence[list[Clip]]) -> tuple[np.ndarray, float, float]:
        """Frames of the clips with a table, seconds and the density of one of them."""
        handle = vidsparse.apply(self._pipe(), self.recipe(table))
        frames, seconds = [], 0.0
        try:
            for clips in batches:
                handle.reset()
                made, took = self._generate(clips)
                frames.append(made)
                seconds += took
            density = handle.report().mean_density or 1.0
        finally:
            handle.remove()
        return np.concatenate(frames), seconds, density

    # The four parts.

    def dense(self) -> np.ndarray:
        """Dense frames of all clips, batch by batch."""
        path = self.folder / FRAMES
        if self._dense is None:
            try:
                with np.load(path) as data:
                    self._dense = data["frames"]
            except (OSError, ValueError, KeyError):
                self._dense = None
        if self._dense is None:
            self.observer.stage("dense 1", self.steps)
            self._keep_dense(self._record(self._batches()[0]))
            self._tell()
        while self._dense is None or len(self._dense) < len(self.clips):
            have = 0 if self._dense is None else len(self._dense)
            self.observer.stage(f"dense {have // self.probe_clips + 1}", self.steps)
            frames, _ = self._generate(self.clips[have : have + self.probe_clips])
            self._keep_dense(frames)
        return self._dense[: len(self.clips)]

    def _keep_dense(self, frames: np.ndarray) -> None:
        self._dense = frames if self._dense is None else np.concatenate([self._dense, frames])
        path = self.folder / FRAMES
        try:
            np.savez_compressed(path, frames=self._dense)
        except OSError as error:
            raise output_error(path, error) from error
        self._save()

    def _record(self, clips: list[Clip]) -> np.ndarray:
        """Dense generation of the first batch, every output of the transformers kept."""
        replay, ends = Replay(), []
        with replay.recording(self.models):
            frames, seconds = self._generate(clips, lambda step: ends.append(len(replay.outputs)))
        self._replay = replay
        self.state["dense_seconds"] = seconds
        self.state["calls_at_step_end"] = ends
        return frames

    def _first_call(self, step: int) -> int:
        return 0 if step == 0 else self.state["calls_at_step_end"][step - 1]

    def _recorded(self) -> Replay:
        if self._replay is None:
            self.observer.stage("dense, again", self.steps)
            self._record(self._batches()[0])
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
        replay, probe, run = self._recorded(), Probe(options), RunState()
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
                self._generate(self._batches()[0], turn, decode=False)
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
        self.state["seconds"] |= {k: v for k, v in probe.seconds.items() if k or "" not in self.state["seconds"]}

    def _reference(self, options: Sequence[Option], method: str | None = None) -> str:
        """The middle choice of a method, for probes that need one."""
        labels = [o.label for o in options if method in (None, o.method)]
        return labels[len(labels) // 2]

    def gains(self) -> None:
        """What a method's error in a step range does to the video, measured on whole generations."""
        methods = list(dict.fromkeys(option.method for option in self.options))
        for method in methods:
            for number, (low, _) in enumerate(self.ranges):
                if f"{number}:{method}" in self.state["gains"] or (self.state["gains"] and self._late(2)):
                    continue
                self.observer.stage(f"gain {method} {number + 1}/{len(self.ranges)}", self.steps)
                label = self._reference(self.options, method)
                table = self._only(number, label)
                replay = self._recorded()
                handle = vidsparse.apply(self._pipe(), self.recipe(table))
                try:
                    with replay.replaying(self.models, self._first_call(low)):
                        frames, _ = self._generate(self._batches()[0])
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

    # Solving.

    def problem(self) -> Problem:
        """What was measured, as a knapsack."""
        by_range = [self._cells_of(number) for number in range(len(self.ranges))]
        labels = [option.label for option in self.options]
        methods = {option.label: option.method for option in self.options} | {SKIP: SKIP}
        known = [x for x in self.state["gains"].values() if x is not None] or [1.0]
        gains: list[dict[str, float]] = []
        for number in range(len(self.ranges)):
            own = {k.split(":")[1]: v for k, v in self.state["gains"].items() if k.split(":")[0] == str(number)}
            own = {method: gain for method, gain in own.items() if gain is not None}
            gains.append(own or {"": statistics.fmean(known)})
        heads = [o.label for o in self.options if o.method in BY_HEAD] + [SKIP] if self.by_head else []
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
                return 1.1
            return seconds[label] / seconds[""]
        shape = CallShape(1, PRICED_HEADS[0], self.price_tokens, PRICED_HEADS[1])
        if label is None:
            return relative_cost(shape, 1.0)
        parts = self._parts(label)
        return relative_cost(
            shape, density, selects=parts.selector is not None, overhead=parts.overhead, factor=parts.factor
        )

    def _parts(self, label: str) -> Any:
        """What a choice says of its own costs."""
        from vidsparse.methods import processor_class

        option = next(o for o in self.options if o.label == label)
        processor = processor_class(option.method)(**option.settings)
        kept = self.__dict__.setdefault("_parts_kept", {})
        if label not in kept:
            kept[label] = processor.parts(processor.layout(self.grid), "cpu")[0]
        return kept[label]

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

    def solve(self, problem: Problem, psnr: float | None, share: float | None) -> Table:
        """The table of the rule in force for a predicted PSNR, or for a share of the dense attention time."""
        if self.rule == "budget":
            if psnr is not None:
                return within_error(problem, error_of(psnr))
            assert share is not None
            return within_cost(problem, share)
        low, high = 1e-9, 1e3
        rule = RULES[self.rule]

        def fits(knob: float) -> bool:
            error, cost = problem.total(rule(problem, knob))
            return error <= error_of(psnr) if psnr is not None else cost >= (share or 0)

        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if fits(middle) else (low, middle)
        return rule(problem, low)

    # The whole.

    def _late(self, rounds: int = 0) -> bool:
        """Whether the time is up, with room for some rounds."""
        if self.budget_seconds is None:
            return False
        one = (self.state["dense_seconds"] or 0.0) * len(self._batches())
        return time.perf_counter() - self._started + rounds * one > self.budget_seconds

    def run(self) -> dict[str, Any]:
        """Measure what is missing, find the table, check it and write the recipe.

        Raises:
            ConfigError: the target cannot be reached; the message has the best that can be had.
        """
        self.open()
        self._tell()
        self.dense()
        self.cells()
        self.gains()
        problem = self.problem()
        rounds = self.rounds = self._rounds(problem)
        best = self._best(rounds)
        recipe = self.recipe(best["table"], round(best["psnr"], 2))
        write_json(self.output, recipe.to_dict())
        data = {
            "recipe": str(self.output),
            "target": {k: v for k, v in vars(self.target).items() if v is not None},
            "rule": self.rule,
            "clips": len(self.clips),
            "rounds": [{k: v for k, v in x.items() if k != "table"} for x in rounds],
            "best": {k: v for k, v in best.items() if k != "table"},
            "dense_seconds": self._dense_seconds(),
            "took_s": round(time.perf_counter() - self._started, 1),
            "environment": environment(),
        }
        self.state["results"] = [*self.state.get("results", []), data]
        self._save()
        return data

    def _dense_seconds(self) -> float:
        """Denoising of one clip, in batches of the calibration."""
        return self.state["dense_seconds"] / len(self._batches()[0])

    def _share(self, problem: Problem) -> float | None:
        """The share of the dense attention time that the target leaves, None for a target in dB.

        Raises:
            ConfigError: the time cannot be reached, or dense attention reaches it.
        """
        target = self.target
        least = problem.total(problem.at_price(1e30))[1]
        if target.share is not None:
            if target.share < least:
                raise ConfigError(
                    f"An attention time of {target.share:.0%} cannot be reached; the fastest table here takes {least:.0%} "
                    f"of the dense one, at a predicted {psnr_of(problem.total(problem.at_price(1e30))[0]):.1f} dB."
                )
            return target.share
        if target.seconds is None:
            return None
        if self.price_tokens is not None:
            raise ConfigError("--max-time is in seconds of this device, so it cannot go with --price-tokens.")
        dense = self._dense_seconds()
        layers, calls = len(problem.cells), self.state["calls_at_step_end"][-1]
        attention = self.state["seconds"][""] * layers * calls / len(self._batches()[0])
        if target.seconds >= dense:
            raise ConfigError(
                f"Dense attention takes {dense:.2f} s here; give a --max-time below that, got {target.seconds:g}."
            )
        share = 1 - (dense - target.seconds) / attention
        if share < least:
            fastest = dense - attention * (1 - least)
            raise ConfigError(
                f"Denoising cannot take only {target.seconds:g} s here; the fastest table takes about {fastest:.2f} s of "
                f"the dense run's {dense:.2f} s."
            )
        return share

    def _rounds(self, problem: Problem) -> list[dict[str, Any]]:
        """Run tables on all clips until one meets the target; what each gave."""
        share, target, rounds = self._share(problem), self.target.psnr, []
        aim, seen = target, set()
        for number in range(MAX_ROUNDS):
            table = self.solve(problem, aim, share)
            error, cost = problem.total(table)
            if is_dense(table):
                self._refuse_dense(problem)
            if str(table) in seen or (number and self._late()):
                break
            seen.add(str(table))
            self.observer.stage(f"round {number + 1}", self.steps)
            frames, seconds, density = self._run_table(table, self._batches())
            psnrs = clip_psnrs(frames, self.dense())
            rounds.append(
                {
                    "aim": aim,
                    "predicted_psnr": psnr_of(error),
                    "psnr": statistics.fmean(psnrs),
                    "psnr_of_clips": [round(x, 2) for x in psnrs],
                    "attention": cost,
                    "density": density,
                    "seconds": seconds / len(self.clips),
                    "table": table,
                }
            )
            last = rounds[-1]
            self.observer.note(
                f"Round {number + 1}: {last['predicted_psnr']:.1f} dB predicted, {last['psnr']:.1f} dB measured, "
                f"{cost:.0%} of the attention time."
            )
            if target is None or abs(last["psnr"] - target) <= TOLERANCE_DB:
                break
            aim = next_aim([(x["aim"], x["psnr"]) for x in rounds], target)
        return rounds

    def _refuse_dense(self, problem: Problem) -> None:
        """Raises ConfigError: what is asked for leaves nothing but dense attention."""
        table = within_cost(problem, 0.98)
        error, cost = problem.total(table)
        if cost >= 1 or is_dense(table):
            raise ConfigError("No choice is faster than dense attention here, so there is nothing to tune.")
        raise ConfigError(
            f"A target of {self.target.psnr:g} dB leaves every call dense; the most that can be had with something saved is "
            f"about {psnr_of(error):.1f} dB at {cost:.0%} of the attention time."
        )

    def _best(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """The round nearest to the target."""
        target = self.target.psnr
        if target is None:
            return rounds[-1]
        return min(rounds, key=lambda x: abs(x["psnr"] - target))

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
            fixed = left - 3 * one * len(self._batches())
            room = self.budget_seconds - (time.perf_counter() - self._started) - fixed
            batches = max(1, min(len(self._batches()), int(room // (3 * one))))
            if batches < len(self._batches()):
                self.clips = self.clips[: batches * self.probe_clips]
                self.observer.note(f"{len(self.clips)} clips in place of more, to keep to {self.budget_seconds:g} s.")
                left, one = self.estimate()
        self.observer.note(f"The calibration takes about {math.ceil(left / 60)} min from here.")

    def estimate(self) -> tuple[float, float]:
        """Seconds left, roughly, and those of one batch."""
        one = self.state["dense_seconds"]
        batches = len(self._batches())
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


def next_aim(tried: list[tuple[float, float]], target: float) -> float:
    """The PSNR to predict next, from pairs of (predicted aim, measured): between two that enclose the target, else on."""
    below = max((pair for pair in tried if pair[1] <= target), key=lambda pair: pair[1], default=None)
    above = min((pair for pair in tried if pair[1] > target), key=lambda pair: pair[1], default=None)
    if below is not None and above is not None and above[1] > below[1]:
        return below[0] + (above[0] - below[0]) * (target - below[1]) / (above[1] - below[1])
    aim, measured = tried[-1]
    return aim + target - measured


def is_dense(table: Table) -> bool:
    """Whether a table leaves every call as it is."""
    return all(choice == DENSE for row in table for choice in row)


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


def prepare(
    output: str | Path,
    target: Target,
    *,
    choices: Sequence[str] = (),
    rule: str = "budget",
    prompts: Sequence[str] = (),
    num_prompts: int | None = None,
    seed: int = 0,
    by_head: bool = True,
    probe_clips: int | None = None,
    price_tokens: int | None = None,
    budget_seconds: float | None = None,
    observer: Observer | None = None,
    **settings: Any,
) -> Tuning:
    """Check everything; nothing is loaded yet.

    Args:
        output: the recipe's file, ending in .json.
        target: what to reach.
        choices: as for `compare.parse_recipe`; none: a menu for the device.
        rule: "budget", or a baseline: "sparse-vdit", "sparge".
        prompts: of the calibration; none: the bundled model's own.
        num_prompts: how many of those, default 4 on a CPU and 16 on a GPU.
        seed: of the first clip.
        by_head, probe_clips, price_tokens, budget_seconds, observer: as in `Tuning`.
        settings: fields of `GenerateSettings`.

    Raises:
        VidsparseError: one sentence.
    """
    from .device import resolve_device

    output = Path(output).expanduser()
    if output.suffix != ".json":
        raise ConfigError(f"A recipe is a .json file, got --output {str(output)!r}.")
    if rule not in ("budget", *RULES):
        raise ConfigError(f"The rule {rule!r} is unknown; use one of budget, {', '.join(RULES)}.")
    for name, value in (
        ("--prompts", num_prompts),
        ("--budget-seconds", budget_seconds),
        ("--price-tokens", price_tokens),
    ):
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be above 0, got {value:g}.")
    model = settings.get("model", BUNDLED_MODEL)
    info = inspect_model(model)
    if info.takes_image:
        raise ConfigError(f"The model {model!r} makes videos from an image, which `tune` cannot give it yet.")
    gpu = resolve_device(settings.get("device", "auto")).type == "cuda"
    texts = list(dict.fromkeys(prompts))
    if not texts:
        if model != BUNDLED_MODEL:
            raise ConfigError("Prompts are made up for the bundled model only; give --prompt or --prompt-file.")
        texts = calibration_prompts(num_prompts or (16 if gpu else 4))
    texts = texts[:num_prompts]
    full, notes = resolve_settings(GenerateSettings(prompt=texts[0], **{**settings, "seed": seed}), info)
    options = make_options(choices or (RULE_MENUS.get(rule) or MENUS["cuda" if gpu else "cpu"]))
    if probe_clips is None:
        probe_clips = (8 if gpu else 2) if model == BUNDLED_MODEL else 1
    clips = [Clip(text, seed + 10_000 + i) for i, text in enumerate(texts)]
    tuning = Tuning(
        output, full, clips, options, target, rule, by_head or rule != "budget", RANGE_ENDS,
        min(probe_clips, len(clips)), price_tokens, budget_seconds, observer or Observer(),
    )  # fmt: skip
    for note in notes:
        tuning.observer.note(note)
    return tuning
