"""Everything that determines one generated video, checked on construction."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError

from .bundled import BUNDLED_MODEL
from .device import OFFLOADS, dtype_name
from .lora import LoraSpec

MAX_FRAMES = 10_000
MAX_PIXELS_PER_SIDE = 8192
MAX_STEPS = 1000
MAX_PROCESSES = 1024


def _whole(name: str, value: object, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"`{name}` must be a whole number from {low} to {high}, got {value!r}.")


def _number(name: str, value: object, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"`{name}` must be a number from {low:g} to {high:g}, got {value!r}.")
    if not low <= value <= high:
        raise ConfigError(f"`{name}` must be from {low:g} to {high:g}, got {value!r}.")


@dataclass(frozen=True)
class GenerateSettings:
    """What to generate and how. `None` means: the model's preset, or drawn (seed), or the model's own (flow shift).

    Args:
        prompt: what the video shows.
        negative_prompt: what to steer away from.
        model: bundled name, local diffusers folder, or hub id.
        num_frames: pixel frames; snapped up to what the VAE allows.
        height, width: pixels; must be multiples of what the model needs.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 turns it off.
        flow_shift: timestep shift of a flow-matching scheduler.
        seed: of the noise, drawn on the CPU, so equal on every device.
        fps: frames per second of the written video.
        sparse: name of a sparse attention method, or `dense`.
        method_options: options of that method; unset ones keep the method's defaults.
        recipe: a whole recipe in its plain form (`Recipe.to_dict`), in place of the two.
        image: first frame for an image-to-video model.
        loras: adapters with scales.
        offload: `none`, `model`, `group`, `sequential` or `auto`.
        vae_tiling: decode in overlapping tiles.
        compile: compile the transformer's blocks.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        strict: fail instead of running dense where sparse was asked for.
        ulysses_degree: processes that share the attention heads of one video, started by torchrun, a GPU each.

    Raises:
        ConfigError: a value is outside what is allowed.
    """

    prompt: str
    negative_prompt: str | None = None
    model: str = BUNDLED_MODEL
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    seed: int | None = None
    fps: float | None = None
    sparse: str = "radial"
    method_options: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    image: str | None = None
    loras: tuple[LoraSpec, ...] = ()
    offload: str = "auto"
    vae_tiling: bool = False
    compile: bool = False
    dtype: str = "auto"
    device: str = "auto"
    strict: bool = False
    ulysses_degree: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ConfigError("The prompt is empty; say what the video shows.")
        for name in ("negative_prompt", "model", "sparse", "image", "offload", "dtype", "device"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name not in ("negative_prompt", "image")):
                raise ConfigError(f"`{name}` must be text, got {value!r}.")
        for name in ("vae_tiling", "compile", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"`{name}` is true or false, got {getattr(self, name)!r}.")
        if not isinstance(self.method_options, dict):
            raise ConfigError(f"`method_options` must hold `name: value` pairs, got {self.method_options!r}.")
        if self.recipe is not None and (not isinstance(self.recipe, dict) or self.method_options):
            raise ConfigError("A recipe has the options of its method, so none can be given beside it.")
        _whole("num_frames", self.num_frames, 1, MAX_FRAMES)
        _whole("height", self.height, 1, MAX_PIXELS_PER_SIDE)
        _whole("width", self.width, 1, MAX_PIXELS_PER_SIDE)
        _whole("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _number("guidance_scale", self.guidance_scale, 0, 100)
        _number("flow_shift", self.flow_shift, 0.01, 100)
        _whole("seed", self.seed, 0, 2**63 - 1)
        _whole("ulysses_degree", self.ulysses_degree, 1, MAX_PROCESSES)
        _number("fps", self.fps, 0.1, 240)
        if self.offload not in OFFLOADS:
            raise ConfigError(f"The offload mode {self.offload!r} is unknown; use one of {', '.join(OFFLOADS)}.")
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.image is not None and not Path(self.image).expanduser().is_file():
            raise ConfigError(f"The image {self.image!r} does not exist.")

    def with_(self, **changes: Any) -> GenerateSettings:
        """A checked copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` reads it back."""
        data = asdict(self)
        data["loras"] = [str(spec) for spec in self.loras]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GenerateSettings:
        """Build from the JSON form. Raises ConfigError on an unknown key."""
        data = dict(data)
        unknown = sorted(set(data) - set(cls.__dataclass_fields__))
        if unknown:
            raise ConfigError(
                f"The setting {unknown[0]!r} is unknown; known are {', '.join(cls.__dataclass_fields__)}."
            )
        data["loras"] = tuple(LoraSpec.parse(text) for text in data.get("loras", ()))
        return cls(**data)
