"""A generation repeated from its run file, with query, key and selection of one attention call kept."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidsparse.attention_maps import Call
from vidsparse.errors import ConfigError
from vidsparse.parts import Selection

from .generation import _attach, _explain, _frames, _Run, _Stages, resolve_settings
from .load import load_pipeline
from .model_info import inspect_model
from .progress import Observer
from .runfile import changes, read_run
from .settings import GenerateSettings


@dataclass(frozen=True)
class RecordedRun:
    """One call of a generation, and the video.

    Attributes:
        call: query and key of the call.
        selection: its blocks and token orders on the CPU, None where it was dense.
        settings: of the generation.
        step, layer, branch: of the call.
        frames: uint8 `[latent frames, height, width, 3]`: of every latent frame its first pixel frame.
        notes: for the user.
    """

    call: Call
    selection: Selection | None
    settings: GenerateSettings
    step: int
    layer: int
    branch: str | None
    frames: np.ndarray
    notes: tuple[str, ...]


def record_run(
    path: str | Path, *, step: int | None = None, layer: int | None = None, observer: Observer | None = None
) -> RecordedRun:
    """Repeat a generation and keep one call of its first guidance branch.

    Args:
        path: the JSON beside a video.
        step: default at 60 % of the steps.
        layer: among the sparse-capable layers, default the middle one.
        observer: receives progress.

    Raises:
        ConfigError: the file is no run of this version, or has no such step or layer.
    """
    document = read_run(path)
    observer = observer or Observer()
    settings = GenerateSettings.from_dict(document["settings"]).with_(compile=False, ulysses_degree=1, strict=False)
    info = inspect_model(settings.model)
    notes = changes(document, settings, info)
    settings, _ = resolve_settings(settings, info)
    steps = settings.num_inference_steps or 1
    step = steps * 6 // 10 if step is None else step
    if not 0 <= step < steps:
        raise ConfigError(f"--step must be from 0 to {steps - 1} in this run, got {step}.")
    stages = _Stages(observer, {})
    stages.enter("load")
    with _explain(stages, settings, info):
        loaded = load_pipeline(
            info, dtype=settings.dtype, device=settings.device, offload=settings.offload,
            vae_tiling=settings.vae_tiling, loras=settings.loras, flow_shift=settings.flow_shift,
        )  # fmt: skip
    stages.leave()
    loaded.pipe.set_progress_bar_config(disable=True)
    handle = _attach(loaded.pipe, settings)
    if handle is None:
        raise ConfigError(f"vidsparse cannot attach to {info.pipeline_class}, so nothing can be recorded of it.")
    try:
        layers = next(iter(handle._bindings.values())).layers
        layer = len(layers) // 2 if layer is None else layer
        if not 0 <= layer < len(layers):
            raise ConfigError(f"--layer must be from 0 to {len(layers) - 1} in this model, got {layer}.")
        tap = _Tap(step)
        for binding in handle._bindings.values():
            tap.put_on(binding.layers[layer])
        run = _Run(settings, info.folder)
        with _explain(stages, settings, info):
            frames = np.concatenate(list(_frames(run, loaded, handle, stages)))
            stages.leave()
    finally:
        handle.remove()
    if tap.call is None:
        raise ConfigError(f"Layer {layer} made no attention call in step {step}; choose another --step or --layer.")
    of_latent = [min(i * info.temporal, len(frames) - 1) for i in range(tap.call.layout.grid.frames)]
    return RecordedRun(
        tap.call, tap.selection, settings, step, layer, tap.branch, frames[of_latent], (*notes, *run.notes)
    )


class _Tap:
    """Keeps query and key of the first call of a step, and what was selected there."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.call: Call | None = None
        self.selection: Selection | None = None
        self.branch: str | None = None

    def put_on(self, layer: Any) -> None:
        """Stand before a layer's attention call, whatever form it has, and its sparse part."""
        for name, tokens in (("attend", 1), ("attend_heads_first", 2)):
            setattr(layer, name, types.MethodType(self._seeing(getattr(type(layer), name), tokens), layer))
        layer._attend_here = types.MethodType(self._selecting(type(layer)._attend_here), layer)

    def _wants(self, context: Any) -> bool:
        return context is not None and context.step_index == self.step and self.branch in (None, context.branch)

    def _seeing(self, attend: Callable[..., Any], tokens: int) -> Callable[..., Any]:
        def wrapped(layer: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
            context = layer.context
            # A second attention, over image or adapter tokens, has keys of another length.
            if self.call is None and self._wants(context) and query.shape == key.shape:
                q, k = ((x if tokens == 1 else x.transpose(1, 2))[0].float().cpu() for x in (query, key))
                if len(q) == context.layout.seq_len:
                    self.call, self.branch = Call(q, k, context.layout), context.branch
            return attend(layer, query, key, *args, **kwargs)

        return wrapped

    def _selecting(self, attend_here: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(layer: Any, query: Any, key: Any, value: Any, context: Any, *args: Any) -> Any:
            if self.selection is not None or not self._wants(context):
                return attend_here(layer, query, key, value, context, *args)
            parts, found = context.parts, []
            if parts.selector is None:
                found = [Selection(parts.block_mask)]
            else:
                kept = None if context.memory is None else context.memory.get("selection")
                found = [] if kept is None else [kept]
                selector = _Seen(parts.selector, found)
                context = replace(context, parts=replace(parts, selector=selector))
            out = attend_here(layer, query, key, value, context, *args)
            last = found[-1]
            q_order, kv_order = (None if x is None else x[:1].cpu() for x in (last.q_order, last.kv_order))
            self.selection = Selection(last.block_mask.to("cpu"), q_order, kv_order)
            return out

        return wrapped


class _Seen:
    """A selector that also keeps what it selects."""

    def __init__(self, inner: Any, found: list[Selection]) -> None:
        self.inner, self.found = inner, found

    def select(self, query: torch.Tensor, key: torch.Tensor, context: Any) -> Selection:
        self.found.append(self.inner.select(query, key, context))
        return self.found[-1]
