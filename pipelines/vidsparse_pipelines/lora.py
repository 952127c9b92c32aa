"""Load LoRA adapters into a pipeline, all or nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError, ModelLoadError

from .bundled import bundled_adapters
from .rope import stretch_time
from .weights import check_safetensors

_PEFT_PREFIX = "base_model.model."

EXTRA_KEY = ".lora_extra.weight"
BIAS_WORD = "_bias"
"""Follows the name of a module in the key of its bias."""
"""End of the keys of modules that the model itself lacks, after the module's path."""

TRAINING_VERSION = 1
"""Form of what `vidsparse train` writes into an adapter's header."""


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
    if path in bundled_adapters():
        return bundled_adapters()[path]
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return None
    raise ModelLoadError(
        f"The LoRA {path!r} does not exist; give a .safetensors file, its folder, a hub id, or one that ships with the "
        f"bundled model: {', '.join(bundled_adapters())}."
    )


def check_lora_files(specs: tuple[LoraSpec, ...]) -> None:
    """Check that every local adapter exists and is whole, before a model is loaded."""
    for spec in specs:
        file = find_lora_file(spec.path)
        if file is not None:
            check_safetensors(file)


def read_training(path: str) -> dict[str, Any] | None:
    """What `vidsparse train` wrote into an adapter's header, None for a hub id or an adapter of another trainer.

    Returns:
        `recipe` (method, settings, schedule), `num_frames` and `sizes` (height, width) of the training,
        `num_inference_steps` and `guidance_scale` where the adapter is for these only, and more.

    Raises:
        ModelLoadError: the file is missing or broken, or was written by a later version.
    """
    file = find_lora_file(path)
    if file is None:
        return None
    check_safetensors(file)
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    text = header.get("__metadata__", {}).get("vidsparse")
    if text is None:
        return None
    training = json.loads(text)
    if training.get("version") != TRAINING_VERSION:
        raise ModelLoadError(
            f"The LoRA {path!r} was written by another version of vidsparse (format {training.get('version')!r}); "
            "upgrade vidsparse."
        )
    return training


def settings_for(
    specs: tuple[LoraSpec, ...], given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """How to generate with adapters: as they were trained, where the user says nothing else.

    Args:
        specs: the adapters.
        given: settings that the user gave, by their names in `GenerateSettings`, and `size`.

    Returns:
        Settings that the user did not give, options of the sparse method, and notes for the user.

    Raises:
        ConfigError: an adapter was trained for another method or number of steps than was asked for, or two adapters
            differ in it.
        ModelLoadError: a file is missing or broken.
    """
    trained = [(spec.path, training) for spec in specs if (training := read_training(spec.path)) is not None]
    if not trained:
        return {}, {}, []
    path, training = trained[0]
    recipe = training["recipe"]
    for other_path, other in trained[1:]:
        for what, key in (("attention", "recipe"), ("number of steps", "num_inference_steps")):
            if other[key] != training[key]:
                raise ConfigError(
                    f"The LoRAs {path!r} and {other_path!r} were trained for another {what} each; use one of them."
                )
    method = recipe["method"]
    asked = given.get("sparse")
    if asked not in (None, "dense", method):
        raise ConfigError(
            f"The LoRA {path!r} was trained for the attention {method!r}, not {asked!r}; leave --sparse out."
        )
    settings: dict[str, Any] = {"sparse": method}
    options: dict[str, Any] = {}
    if asked != "dense":
        options = {k: v for k, v in recipe["config"].items() if k != "schedule"} | recipe["config"]["schedule"]
    notes = []
    frames, (height, width) = max(training["num_frames"]), training["sizes"][-1]
    if given.get("num_frames") is None:
        settings["num_frames"] = frames
    elif str(given["num_frames"]) not in map(str, training["num_frames"]):
        notes.append(f"The LoRA {path!r} was trained at {frames} frames.")
    if all(given.get(name) is None for name in ("size", "height", "width")):
        settings |= {"height": height, "width": width}
    steps = training.get("num_inference_steps")
    if steps is not None:
        for name, words in (("num_inference_steps", "{:g} steps"), ("flow_shift", "a flow shift of {:g}")):
            asked_for = given.get(name)
            if asked_for is not None and not _equal(asked_for, training[name]):
                made_for = words.format(training[name])
                raise ConfigError(f"The LoRA {path!r} was trained for {made_for}, not {asked_for}.")
        settings |= {"num_inference_steps": steps, "flow_shift": training["flow_shift"]}
    if training.get("guidance_scale") is not None:
        settings["guidance_scale"] = training["guidance_scale"]
    return {name: value for name, value in settings.items() if given.get(name) is None}, options, notes


def _equal(typed: Any, number: float) -> bool:
    try:
        return float(typed) == number
    except (TypeError, ValueError):
        return False


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
        parent = key.removeprefix("transformer.").removesuffix(EXTRA_KEY).rpartition(".")[0]
        if key.endswith(EXTRA_KEY) and parent not in modules:
            raise ModelLoadError(
                f"The LoRA {path!r} does not fit this model: it adds to {parent!r}, which the model lacks."
            )
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


def few_step_scheduler(flow_shift: float) -> Any:
    """The scheduler of few-step adapters: plain steps along the velocity, with which they were trained."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=flow_shift)


def _add_projections(transformer: Any, state: dict[str, Any], scale: float) -> None:
    """Give attention modules the projections that an adapter holds beside its LoRA; the method "sla" takes them up."""
    import torch

    for key, weight in state.items():
        if not key.endswith(EXTRA_KEY) or key.endswith(BIAS_WORD + EXTRA_KEY):
            continue
        parent, _, name = key.removeprefix("transformer.").removesuffix(EXTRA_KEY).rpartition(".")
        attention = transformer.get_submodule(parent)
        like = next(attention.parameters())
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], device=like.device, dtype=torch.float32)
        bias = state.get(key.removesuffix(EXTRA_KEY) + BIAS_WORD + EXTRA_KEY)
        linear.weight.data.copy_(weight * scale)
        linear.bias.data.copy_(torch.zeros_like(linear.bias) if bias is None else bias * scale)
        present = getattr(attention, name, None)
        if present is not None:
            linear.weight.data += present.weight.data
            if present.bias is not None:
                linear.bias.data += present.bias.data
        setattr(attention, name, linear.requires_grad_(False))


def _target(pipe: Any, spec: LoraSpec) -> Any:
    """The transformer that an adapter is for: of two experts (Wan 2.2 A14B) the one that it was trained on.

    Raises:
        ModelLoadError: it was trained on an expert that this model lacks.
    """
    training = read_training(spec.path)
    if training is None or training.get("expert") is None:
        return pipe.transformer
    if getattr(pipe, "transformer_2", None) is None:
        raise ModelLoadError(
            f"The LoRA {spec.path!r} was trained on one of two transformers, and this model has one; use the model that "
            "it was trained on."
        )
    return pipe.transformer_2 if training["expert"] == "low" else pipe.transformer


def _ropes(specs: tuple[LoraSpec, ...]) -> dict[str, Any] | None:
    """How the positions were stretched in training, None where they were not.

    Raises:
        ModelLoadError: two adapters differ in it.
    """
    found = [(spec.path, training.get("rope")) for spec in specs if (training := read_training(spec.path)) is not None]
    for path, rope in found[1:]:
        if rope != found[0][1]:
            raise ModelLoadError(
                f"The LoRAs {found[0][0]!r} and {path!r} were trained with positions stretched differently; use one."
            )
    return found[0][1] if found else None


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
    targets = [_target(pipe, spec) for spec in specs]
    ropes = _ropes(specs)
    for spec, adapter, target in zip(specs, adapters, targets, strict=True):
        check_fits(adapter.state, target, spec.path)
    names = [f"lora_{i}" for i in range(len(specs))]
    for name, spec, adapter, target in zip(names, specs, adapters, targets, strict=True):
        file = find_lora_file(spec.path)
        where = {} if target is pipe.transformer else {"load_into_transformer_2": True}
        try:
            # Through the path, not the state dict: only so diffusers reads the metadata that holds lora_alpha.
            if adapter.bare:
                pipe.transformer.load_lora_adapter(
                    adapter.state, prefix=None, adapter_name=name, metadata=adapter.metadata
                )
            elif file is None:
                pipe.load_lora_weights(spec.path, adapter_name=name)
            else:
                pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, **where)
        except Exception as error:
            pipe.unload_lora_weights()
            raise ModelLoadError(f"The LoRA {spec.path!r} does not fit this model ({_first_line(error)}).") from error
    pipe.set_adapters(names, adapter_weights=[spec.scale for spec in specs])
    for spec, adapter, target in zip(specs, adapters, targets, strict=True):
        _add_projections(target, adapter.state, spec.scale)
        if ropes is not None:
            stretch_time(target, **ropes)
        training = read_training(spec.path)
        if training is not None and training.get("num_inference_steps") is not None:
            pipe.scheduler = few_step_scheduler(training["flow_shift"])
