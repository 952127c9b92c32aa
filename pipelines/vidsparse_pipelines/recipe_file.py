"""Recipe files: reading one, what it says about the generation, and whether it fits the model and the shape asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError
from vidsparse.layout import LatentGrid
from vidsparse.methods import processor_class
from vidsparse.recipe import Recipe

from .costs import read_shape
from .device import resolve_device
from .environment import device_name
from .model_info import ModelInfo
from .provenance import weights_of
from .settings import GenerateSettings

STEPS_RANGE = (0.5, 2.0)
"""Step counts that a recipe serves, as shares of the one it was tuned on."""


def read_recipe(path: str) -> dict[str, Any]:
    """The recipe in a file, checked, in its plain form.

    Raises:
        ConfigError: the file cannot be read or is no recipe.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The recipe {path!r} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The recipe {path!r} is not UTF-8 text.") from error
    try:
        recipe = Recipe.from_json(text)
        processor_class(recipe.method)(recipe)
    except ConfigError as error:
        raise ConfigError(f"{path!r} is no recipe of this version: {error}") from error
    return recipe.to_dict()


def suggested(recipe: dict[str, Any]) -> dict[str, Any]:
    """Settings that a recipe was tuned with, for what the user leaves open: model and steps, and size and length.

    Returns:
        Fields of `GenerateSettings`; empty for a recipe that was not tuned.
    """
    tuned = recipe.get("tuned_for") or {}
    found: dict[str, Any] = {}
    if tuned.get("model") is not None:
        found["model"] = tuned["model"]
    if tuned.get("num_steps") is not None:
        found["num_inference_steps"] = tuned["num_steps"]
    if tuned.get("grid") is not None and "model" in found:
        shape, grid = read_shape(found["model"]), LatentGrid(**tuned["grid"])
        rows, columns = (shape.spatial * size for size in shape.patch[1:])
        found["num_frames"] = (grid.frames * shape.patch[0] - 1) * shape.info.temporal + 1
        found["height"], found["width"] = grid.height * rows, grid.width * columns
    return found


def check_recipe(settings: GenerateSettings, info: ModelInfo) -> list[str]:
    """Notes for the user about a recipe that is used with complete settings.

    Raises:
        ConfigError: it was tuned for another model, shape or number of steps.
    """
    if settings.recipe is None:
        return []
    recipe = Recipe.from_dict(settings.recipe)
    tuned = recipe.tuned_for
    if tuned is None:
        return []
    if tuned.weights is not None and tuned.weights != weights_of(info):
        raise ConfigError(
            f"The recipe was tuned for the model {tuned.model!r}, whose weights are not those of {info.name!r}; tune one "
            "for it with `vidsparse tune`."
        )
    steps = settings.num_inference_steps or 1
    if tuned.num_steps is not None:
        low, high = (round(tuned.num_steps * share) for share in STEPS_RANGE)
        if not low <= steps <= high:
            raise ConfigError(f"The recipe was tuned for {low} to {high} steps, got {steps}; choose another --steps.")
    if tuned.grid is not None:
        shape = read_shape(settings.model)
        tuned.check_grid(shape.grid(settings.num_frames or 1, settings.height or 0, settings.width or 0))
    here = device_name(resolve_device(settings.device))
    if tuned.device is not None and tuned.device.split(",")[0] != here.split(",")[0]:
        return [f"The recipe weighs the times of {tuned.device}; on {here} its quality holds, its speed may not."]
    return []
