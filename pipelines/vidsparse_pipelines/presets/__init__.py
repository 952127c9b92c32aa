"""Defaults per model, one JSON file each; found by the model's name, else by its pipeline class."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Preset:
    """Defaults that a model was made for.

    Args:
        name: the preset's own name, recorded beside every result.
        height, width: pixels.
        num_frames: pixel frames.
        fps: frames per second of the written video.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 turns it off.
        flow_shift: timestep shift of a flow-matching scheduler; None where the family takes none.
        negative_prompt: text to steer away from.
        max_sequence_length: text tokens that the model gets at least; None keeps the pipeline's own.
        models: last part of hub ids or folder names that this preset is for.
        pipeline_classes: diffusers pipelines that fall back to this preset when no name matches.
        sizes: names for `--size`, each `[height, width]`.
    """

    name: str
    height: int
    width: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float | None
    negative_prompt: str = ""
    max_sequence_length: int | None = None
    models: tuple[str, ...] = ()
    pipeline_classes: tuple[str, ...] = ()
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


def all_presets() -> list[Preset]:
    """Every preset that ships with the package, by file name."""
    presets = []
    for path in sorted(Path(__file__).parent.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        data["models"] = tuple(data.get("models", ()))
        data["pipeline_classes"] = tuple(data.get("pipeline_classes", ()))
        data["sizes"] = {name: (size[0], size[1]) for name, size in data.get("sizes", {}).items()}
        presets.append(Preset(**data))
    return presets


def supported_pipelines() -> list[str]:
    """Pipeline classes that `generate` can drive."""
    return sorted({name for preset in all_presets() for name in preset.pipeline_classes})


def preset_for(model: str, pipeline_class: str) -> Preset | None:
    """The preset of `model` (hub id or folder), else the one of its pipeline class, else None."""
    last = model.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1].lower()
    presets = all_presets()
    for preset in presets:
        if last in (name.lower() for name in preset.models):
            return preset
    return next((preset for preset in presets if pipeline_class in preset.pipeline_classes), None)
