"""What can be known about a model from its JSON files, before any weight is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError, ModelLoadError, UnsupportedModelError

from .bundled import BUNDLED_MODEL, bundled_model_path
from .presets import Preset, preset_for, supported_pipelines

# Families whose pipelines fix the rule in code: pixel multiple, frames per latent frame.
_FIXED_RULES = {
    "HunyuanVideoPipeline": (16, 4),
    "CogVideoXPipeline": (16, 4),
    "CogVideoXImageToVideoPipeline": (16, 4),
    "MochiPipeline": (16, 6),
    "LTXPipeline": (32, 8),
    "LTXImageToVideoPipeline": (32, 8),
}

# The Wan pipelines themselves refuse sizes that are no multiples of this, whatever the model could take.
_WAN_PIXELS = 16


@dataclass(frozen=True)
class ModelInfo:
    """A model's shape rules and defaults.

    Args:
        name: what the user asked for (bundled name, folder or hub id).
        folder: local folder with at least the JSON files.
        pipeline_class: diffusers class name in `model_index.json`.
        preset: defaults for this model.
        components: component folders that hold weights.
        multiple: `(height, width)` must be whole multiples of these pixels.
        temporal: pixel frames per latent frame; legal frame counts are `temporal * k + 1`.
        max_position: largest latent length per axis that the position encoding covers, None if unknown.
        takes_image: the pipeline is image-to-video.
    """

    name: str
    folder: Path
    pipeline_class: str
    preset: Preset
    components: tuple[str, ...]
    multiple: tuple[int, int]
    temporal: int
    max_position: int | None
    takes_image: bool

    def snap_frames(self, num_frames: int) -> int:
        """The smallest legal frame count that is not below `num_frames`."""
        return -(-(num_frames - 1) // self.temporal) * self.temporal + 1

    def frame_reason(self) -> str:
        """Why frame counts are snapped, for the message to the user."""
        return f"the VAE makes 1 frame, then {self.temporal} for each latent frame, so counts are {self.temporal}k+1"

    def check_size(self, height: int, width: int) -> None:
        """Raise ConfigError naming the nearest legal sizes unless `height` and `width` (pixels) fit the model."""
        nearest: list[tuple[int, ...]] = []
        for value, step in ((height, self.multiple[0]), (width, self.multiple[1])):
            below, above = value // step * step, -(-value // step) * step
            nearest.append(tuple(v for v in dict.fromkeys((below, above)) if v > 0))
        if nearest == [(height,), (width,)]:
            return
        heights, widths = (" or ".join(map(str, values)) for values in nearest)
        raise ConfigError(
            f"A height of {height} and width of {width} do not fit this model, which needs multiples of "
            f"{self.multiple[0]} and {self.multiple[1]}; use a height of {heights} and a width of {widths}."
        )

    def check_length(self, num_frames: int, height: int, width: int) -> None:
        """Raise ConfigError if the latent grid is longer than the model's position encoding."""
        if self.max_position is None:
            return
        frames = (num_frames - 1) // self.temporal + 1
        if frames > self.max_position:
            most = (self.max_position - 1) * self.temporal + 1
            raise ConfigError(f"{num_frames} frames are too many for this model; use at most {most}.")
        for name, value, step in (("height", height, self.multiple[0]), ("width", width, self.multiple[1])):
            if value // step > self.max_position:
                raise ConfigError(
                    f"A {name} of {value} is too large for this model; use at most {self.max_position * step}."
                )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(
            f"{str(path)!r} cannot be read ({error.strerror}); the model folder is incomplete."
        ) from error
    except ValueError as error:
        raise ModelLoadError(f"{str(path)!r} is not valid JSON; download the model again.") from error
    if not isinstance(data, dict):
        raise ModelLoadError(f"{str(path)!r} holds no JSON object; download the model again.")
    return data


def looks_like_folder(model: str) -> bool:
    """Whether `model` is meant as a path rather than as a hub id `owner/name`."""
    return model.startswith((".", "/", "~", "\\")) or model.count("/") != 1 or Path(model).exists()


def locate(model: str) -> Path:
    """A local folder with the JSON files of `model`: the bundled one, a folder, or fetched from the Hub.

    Raises:
        ModelLoadError: no such folder; not a diffusers folder; hub id unknown or not reachable.
    """
    if model == BUNDLED_MODEL and not Path(model).exists():
        return bundled_model_path(model)
    if looks_like_folder(model):
        folder = Path(model).expanduser()
        if not folder.exists():
            raise ModelLoadError(
                f"The model {model!r} is neither {BUNDLED_MODEL!r}, nor a folder here, nor a hub id OWNER/NAME; "
                "give --model the path of a diffusers folder."
            )
        if not (folder / "model_index.json").is_file():
            raise ModelLoadError(
                f"{model!r} is no diffusers pipeline folder (it has no model_index.json); "
                "give --model a folder saved by a diffusers pipeline's save_pretrained."
            )
        return folder
    return _fetch(model, ["*.json", "*/*.json"])


def _fetch(model: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError

    try:
        folder = Path(snapshot_download(model, allow_patterns=patterns))
    except HFValidationError as error:
        raise ModelLoadError(f"{model!r} is no valid hub id OWNER/NAME and no folder here.") from error
    except Exception as error:
        raise unreachable(model, error) from error
    if not (folder / "model_index.json").is_file():
        raise ModelLoadError(f"The hub model {model!r} is no diffusers pipeline (it has no model_index.json).")
    return folder


def unreachable(model: str, error: BaseException) -> ModelLoadError:
    """One sentence for a hub id that could not be fetched."""
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return ModelLoadError(
            f"The hub model {model!r} is gated; accept its terms on the Hub and log in, then try again."
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelLoadError(
            f"There is no model {model!r} on the Hub (or it is private); check the id, "
            "or give --model the path of a local diffusers folder."
        )
    return ModelLoadError(
        f"The model {model!r} is not on this machine and the Hub cannot be reached; "
        "give --model the path of a local diffusers folder, or leave it out for the bundled model."
    )


def inspect_model(model: str = BUNDLED_MODEL) -> ModelInfo:
    """Read the JSON files of `model` (bundled name, local diffusers folder or hub id).

    Raises:
        ModelLoadError: not found, not a pipeline, or unreadable.
        UnsupportedModelError: a pipeline class that `generate` cannot drive; lists those it can.
    """
    folder = locate(model)
    index = _read_json(folder / "model_index.json")
    name = str(index.get("_class_name", ""))
    preset = preset_for(model, name)
    if name not in supported_pipelines() or preset is None:
        raise UnsupportedModelError(
            f"The pipeline class {name!r} of {model!r} is not supported; supported are {', '.join(supported_pipelines())}."
        )
    components = tuple(k for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and v[0])
    max_position = None
    if name in _FIXED_RULES:
        pixels, temporal = _FIXED_RULES[name]
        multiple = (pixels, pixels)
    else:
        vae = _read_json(folder / "vae" / "config.json")
        transformer = _read_json(folder / "transformer" / "config.json")
        patch = transformer.get("patch_size", (1, 2, 2))
        temporal = int(vae.get("scale_factor_temporal", 4))
        spatial = int(vae.get("scale_factor_spatial", 8))
        multiple = (math.lcm(spatial * int(patch[1]), _WAN_PIXELS), math.lcm(spatial * int(patch[2]), _WAN_PIXELS))
        max_position = transformer.get("rope_max_seq_len")
    return ModelInfo(
        name=model,
        folder=folder,
        pipeline_class=name,
        preset=preset,
        components=components,
        multiple=multiple,
        temporal=temporal,
        max_position=max_position,
        takes_image="ImageToVideo" in name,
    )
