"""Load LoRA adapters into a pipeline, all or nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError, ModelLoadError

from .weights import check_safetensors

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraSpec:
    """One adapter: a file, folder or hub id, and the factor its update is multiplied with."""

    path: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraSpec:
        """Parse `PATH[:scale]`."""
        path, _, tail = text.rpartition(":")
        try:
            scale = float(tail)
        except ValueError:
            return cls(text)
        return cls(path, scale) if path else cls(text)

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("--lora needs PATH or PATH:scale, got an empty path.")
        if not abs(self.scale) <= 100:
            raise ConfigError(f"A LoRA scale must be within [-100, 100], got {self.scale}.")

    def __str__(self) -> str:
        return f"{self.path}:{self.scale}"


def find_lora_file(path: str) -> Path | None:
    """The safetensors file that `path` names, or None if it is to be taken as a hub id."""
    local = Path(path).expanduser()
    if local.is_dir():
        named = local / "pytorch_lora_weights.safetensors"
        files = [named] if named.is_file() else sorted(local.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelLoadError(
                f"The LoRA folder {path!r} holds {len(files)} safetensors files; name the one to load."
            )
        return files[0]
    if local.is_file():
        if local.suffix != ".safetensors":
            raise ModelLoadError(f"The LoRA file {path!r} is no .safetensors file.")
        return local
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return None
    raise ModelLoadError(f"The LoRA {path!r} does not exist; give a .safetensors file, its folder, or a hub id.")


def check_lora_files(specs: tuple[LoraSpec, ...]) -> None:
    """Check that every local adapter exists and is whole, before a model is loaded."""
    for spec in specs:
        file = find_lora_file(spec.path)
        if file is not None:
            check_safetensors(file)


@dataclass(frozen=True)
class _Adapter:
    """One adapter's weights.

    state: keys `transformer.<module>.lora_A.weight`; without `transformer.` where `bare`.
    metadata: the settings kept with a bare adapter, above all lora_alpha.
    bare: not saved by a pipeline: by a transformer's own `save_lora_adapter`, or by peft.
    """

    state: dict[str, Any]
    metadata: dict[str, Any] | None
    bare: bool


def _read(pipe: Any, spec: LoraSpec) -> _Adapter:
    file = find_lora_file(spec.path)
    try:
        if file is None:
            state, metadata = pipe.lora_state_dict(spec.path, return_lora_metadata=True)
        else:
            state, metadata = pipe.lora_state_dict(str(file.parent), weight_name=file.name, return_lora_metadata=True)
        if file is not None and state and all(key.startswith(_PEFT_PREFIX) for key in state):
            settings = file.parent / "adapter_config.json"
            if not settings.is_file():
                raise ModelLoadError(
                    f"The LoRA {spec.path!r} was saved by peft but its adapter_config.json is not beside it."
                )
            state = {key.removeprefix(_PEFT_PREFIX): value for key, value in state.items()}
            metadata = json.loads(settings.read_text(encoding="utf-8"))
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"The LoRA {spec.path!r} cannot be read ({_first_line(error)}).") from error
    bare = not any(key.startswith(("transformer.", "text_encoder.")) for key in state)
    return _Adapter(state, metadata, bare)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def check_fits(state: dict[str, Any], transformer: Any, path: str) -> None:
    """Check that every LoRA pair in `state` has a module of the right size in `transformer`.

    Args:
        state: diffusers keys `transformer.<module>.lora_A.weight` `[rank, in_features]` and `lora_B` `[out_features, rank]`.
        transformer: the model to adapt.
        path: for the message.

    Raises:
        ModelLoadError: names the first module that is missing or has another size, or says that no key fits.
    """
    modules = dict(transformer.named_modules())
    found = 0
    for key in sorted(state):
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            continue
        name = key.removeprefix("transformer.").rsplit(".lora_", 1)[0]
        module = modules.get(name)
        module = getattr(module, "base_layer", module)
        weight = getattr(module, "weight", None)
        if weight is None:
            raise ModelLoadError(
                f"The LoRA {path!r} does not fit this model: it changes {name!r}, which the model lacks."
            )
        side, axis, word = ("A", 1, "inputs") if ".lora_A." in key else ("B", 0, "outputs")
        have, need = state[key].shape[1 if side == "A" else 0], weight.shape[axis]
        if have != need:
            raise ModelLoadError(
                f"The LoRA {path!r} does not fit this model: {name!r} has {need} {word} here, the LoRA was made for {have}."
            )
        found += 1
    if not found:
        raise ModelLoadError(f"{path!r} holds no LoRA weights for this model's transformer.")


def load_loras(pipe: Any, specs: tuple[LoraSpec, ...]) -> None:
    """Load every adapter with its scale. All are checked before the first is attached, so a failure changes nothing.

    Raises:
        ModelLoadError: an adapter cannot be read or does not fit.
    """
    if not specs:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise ModelLoadError(f"{type(pipe).__name__} takes no LoRA.")
    adapters = [_read(pipe, spec) for spec in specs]
    for spec, adapter in zip(specs, adapters, strict=True):
        check_fits(adapter.state, pipe.transformer, spec.path)
    names = [f"lora_{i}" for i in range(len(specs))]
    for name, spec, adapter in zip(names, specs, adapters, strict=True):
        file = find_lora_file(spec.path)
        try:
            # Through the path, not the state dict: only so diffusers reads the metadata that holds lora_alpha.
            if adapter.bare:
                pipe.transformer.load_lora_adapter(
                    adapter.state, prefix=None, adapter_name=name, metadata=adapter.metadata
                )
            elif file is None:
                pipe.load_lora_weights(spec.path, adapter_name=name)
            else:
                pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        except Exception as error:
            pipe.unload_lora_weights()
            raise ModelLoadError(f"The LoRA {spec.path!r} does not fit this model ({_first_line(error)}).") from error
    pipe.set_adapters(names, adapter_weights=[spec.scale for spec in specs])
