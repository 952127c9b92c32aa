"""Load a diffusers pipeline, attach a sparse method, generate, write the video."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundled import bundled_model_path
    from .generation import Result, generate, generate_many
    from .load import LoadedPipeline, load_pipeline
    from .lora import LoraSpec
    from .model_info import ModelInfo, inspect_model
    from .settings import GenerateSettings
    from .video import VideoWriter, contact_sheet, iter_video, read_video, write_video

# Names are imported on first use, so that the command line can answer without torch.
_HOMES = {
    "bundled_model_path": "bundled",
    "Result": "generation",
    "generate": "generation",
    "generate_many": "generation",
    "LoadedPipeline": "load",
    "load_pipeline": "load",
    "LoraSpec": "lora",
    "ModelInfo": "model_info",
    "inspect_model": "model_info",
    "GenerateSettings": "settings",
    "VideoWriter": "video",
    "contact_sheet": "video",
    "iter_video": "video",
    "read_video": "video",
    "write_video": "video",
}

__all__ = [
    "GenerateSettings",
    "LoadedPipeline",
    "LoraSpec",
    "ModelInfo",
    "Result",
    "VideoWriter",
    "bundled_model_path",
    "contact_sheet",
    "generate",
    "generate_many",
    "inspect_model",
    "iter_video",
    "load_pipeline",
    "read_video",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
