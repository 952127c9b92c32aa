"""What a result was made from: which weights, as content rather than as a name that can change its meaning."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from .bundled import BUNDLED_MODEL
from .lora import LoraSpec, find_lora_file
from .model_info import ModelInfo, looks_like_folder
from .settings import GenerateSettings

MAX_HASHED_WEIGHTS = 256 * 2**20
"""Bytes of weights up to which they are hashed too (a fraction of a second); above, only a folder's JSON files are."""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def model_identity(info: ModelInfo) -> dict[str, str]:
    """Name of the model, and `commit` for the Hub or else `sha256` of its files, with `covers` saying of which.

    The hash is that of the lines `<sha256 of the file>  <path in the folder>`, in the order of the paths.
    """
    if info.name != BUNDLED_MODEL and not looks_like_folder(info.name):
        return {"name": info.name, "commit": info.folder.name}
    names = ["model_index.json"]
    for part in (info.folder / component for component in info.components):
        names += [f"{part.name}/{f.name}" for f in part.glob("*") if f.suffix in (".json", ".safetensors")]
    weights = sum((info.folder / name).stat().st_size for name in names if name.endswith(".safetensors"))
    covers = "configuration and weights" if weights <= MAX_HASHED_WEIGHTS else "configuration"
    if weights > MAX_HASHED_WEIGHTS:
        names = [name for name in names if name.endswith(".json")]
    lines = "".join(f"{_sha256(info.folder / name)}  {name}\n" for name in sorted(names))
    return {"name": info.name, "sha256": hashlib.sha256(lines.encode()).hexdigest(), "covers": covers}


def weights_of(info: ModelInfo) -> str:
    """What tells a model's weights from others: the commit of a hub model, else the sha256 of its files."""
    identity = model_identity(info)
    return identity.get("commit") or identity["sha256"]


def input_hashes(settings: GenerateSettings) -> dict[str, str]:
    """sha256 of the image and of every local LoRA file, by path."""
    paths = [Path(settings.image).expanduser()] if settings.image is not None else []
    paths += [file for file in (find_lora_file(spec.path) for spec in settings.loras) if file is not None]
    return {os.path.abspath(path): _sha256(path) for path in paths}


def with_absolute_paths(settings: GenerateSettings) -> GenerateSettings:
    """The same settings, to be read from any folder: local paths are spelt out."""

    def absolute(path: str) -> str:
        return os.path.abspath(Path(path).expanduser())

    changes: dict[str, Any] = {}
    if settings.model != BUNDLED_MODEL and looks_like_folder(settings.model):
        changes["model"] = absolute(settings.model)
    if settings.image is not None:
        changes["image"] = absolute(settings.image)
    changes["loras"] = tuple(
        LoraSpec(absolute(spec.path), spec.scale) if Path(spec.path).expanduser().exists() else spec
        for spec in settings.loras
    )
    return settings.with_(**changes)
