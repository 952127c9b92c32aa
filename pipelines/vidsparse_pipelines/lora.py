"""Load LoRA adapters into a pipeline, all or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError, ModelLoadError

from .weights import check_safetensors


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
        return f"{self.path}:{self.scale:g}"


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


def _read_state(pipe: Any, spec: LoraSpec) -> tuple[dict[str, Any], dict[str, Any] | None]:
    file = find_lora_file(spec.path)
    try:
        if file is None:
            return pipe.lora_state_dict(spec.path, return_lora_metadata=True)
        return pipe.lora_state_dict(str(file.parent), weight_name=file.name, return_lora_metadata=True)
    except Exception as error:
        raise ModelLoadError(f"The LoRA {spec.path!r} cannot be read ({_first_line(error)}).") from error


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
    states = [_read_state(pipe, spec) for spec in specs]
    for spec, (state, _) in zip(specs, states, strict=True):
        check_fits(state, pipe.transformer, spec.path)
    names = [f"lora_{i}" for i in range(len(specs))]
    for name, spec in zip(names, specs, strict=True):
        file = find_lora_file(spec.path)
        try:
            # Through the path, not the state dict: only so diffusers reads the metadata that holds lora_alpha.
            if file is None:
                pipe.load_lora_weights(spec.path, adapter_name=name)
            else:
                pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        except Exception as error:
            pipe.unload_lora_weights()
            raise ModelLoadError(f"The LoRA {spec.path!r} does not fit this model ({_first_line(error)}).") from error
    pipe.set_adapters(names, adapter_weights=[spec.scale for spec in specs])
