"""A recipe: everything that decides what is computed, in a form that can be saved, shared and compared."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from vidsparse.errors import ConfigError
from vidsparse.layout import LatentGrid
from vidsparse.schedule import Schedule

VERSION = 1

TUNED_RANGE = (0.5, 2.0)
"""Video tokens that a tuned recipe serves, as shares of those it was tuned on."""


@dataclass(frozen=True)
class TunedFor:
    """What a recipe was tuned on; None where it does not matter.

    Attributes:
        model: hub id or name of the model.
        grid: latent grid of the video.
        num_steps: denoising steps.
        device: name of the device whose times were weighed.
        weights: commit or sha256 of the model's files.
        psnr: against dense, mean over the clips it was tuned on, in dB.
    """

    model: str | None = None
    grid: LatentGrid | None = None
    num_steps: int | None = None
    device: str | None = None
    weights: str | None = None
    psnr: float | None = None

    def check_grid(self, grid: LatentGrid) -> None:
        """Raise ConfigError where a video is so much shorter, longer, smaller or larger that the recipe says nothing of it."""
        if self.grid is None:
            return
        low, high = (round(self.grid.num_tokens * share) for share in TUNED_RANGE)
        if not low <= grid.num_tokens <= high:
            raise ConfigError(
                f"The recipe was tuned for {low:,} to {high:,} video tokens (grid {self.grid}), this video has "
                f"{grid.num_tokens:,} (grid {grid}); choose another size or length, or tune a recipe for it."
            )


@dataclass(frozen=True)
class Recipe:
    """A method with its settings and schedule.

    Attributes:
        method: name of the method, one of `vidsparse.methods.PROCESSORS`.
        config: the method's config (`RadialConfig`, ...), which holds the schedule.
        tuned_for: where the settings come from, default nowhere in particular.

    Raises:
        ConfigError: the method is unknown or the config is another method's.
    """

    method: str
    config: Any
    tuned_for: TunedFor | None = None

    def __post_init__(self) -> None:
        from vidsparse.methods import processor_class

        expected = processor_class(self.method).config_class
        if type(self.config) is not expected:
            raise ConfigError(
                f"`config` of method {self.method!r} must be a {expected.__name__}, got {type(self.config).__name__}."
            )

    @classmethod
    def from_options(cls, method: str, **options: Any) -> Recipe:
        """Build from flat options: fields of the method's config and of `Schedule`.

        Raises:
            ConfigError: the method or an option is unknown, or a value is out of range.
        """
        from vidsparse.methods import method_options, processor_class

        known = method_options(method)
        for name in options:
            if name not in known:
                raise ConfigError(f"`{name}` is no option of method {method!r}; it takes {', '.join(known)}.")
        config_class = processor_class(method).config_class
        schedule_fields = {f.name for f in dataclasses.fields(Schedule)}
        timing = {name: value for name, value in options.items() if name in schedule_fields}
        own = {name: value for name, value in options.items() if name not in schedule_fields}
        try:
            schedule = dataclasses.replace(config_class().schedule, **timing)
            return cls(method, config_class(**own, schedule=schedule))
        except TypeError as error:
            raise ConfigError(f"An option of method {method!r} has the wrong type: {error}.") from error

    @property
    def schedule(self) -> Schedule:
        return self.config.schedule

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the version of the form."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: another version, a missing or unknown name, or a value out of range.
        """
        if data.get("version") != VERSION:
            raise ConfigError(f"A recipe of version {VERSION} is needed, got version {data.get('version')!r}.")
        unknown = set(data) - {"version", "method", "config", "tuned_for"}
        if unknown or not isinstance(data.get("method"), str) or not isinstance(data.get("config"), dict):
            raise ConfigError(f"A recipe has method, config and tuned_for, got {', '.join(sorted(data))}.")
        config = dict(data["config"])
        schedule = config.pop("schedule", {})
        if not isinstance(schedule, dict):
            raise ConfigError(f"`schedule` of a recipe must be an object of named settings, got {schedule!r}.")
        recipe = cls.from_options(data["method"], **config, **schedule)
        tuned = data.get("tuned_for")
        if tuned is None:
            return recipe
        if not isinstance(tuned, dict):
            raise ConfigError(
                f"`tuned_for` of a recipe must be an object with model, grid and num_steps, got {tuned!r}."
            )
        try:
            grid = LatentGrid(**tuned["grid"]) if tuned.get("grid") else None
            return dataclasses.replace(recipe, tuned_for=TunedFor(**{**tuned, "grid": grid}))
        except TypeError as error:
            raise ConfigError(f"`tuned_for` of a recipe has model, grid and num_steps: {error}.") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The inverse of `to_json`.

        Raises:
            ConfigError: the text is no JSON object or no recipe.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"A recipe must be JSON, got text that is not: {error}.") from error
        if not isinstance(data, dict):
            raise ConfigError(f"A recipe must be a JSON object, got {type(data).__name__}.")
        return cls.from_dict(data)
