"""Checkpoints: one safetensors file each, whole or not there, from which a run goes on exactly.

Random numbers follow from the seed and the step, and so does the position in the data, so weights, optimizer, average and
step are all that there is to save.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from vidsparse.errors import ConfigError, ModelLoadError, OutputError
from vidsparse_lora.files import write_bytes
from vidsparse_pipelines.weights import check_safetensors

PATTERN = "step-*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    step: optimizer steps done.
    seconds: of training, in all runs together.
    tensors: by name, on the CPU.
    """

    step: int
    seconds: float
    tensors: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, settings: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, then remove the oldest beyond `keep`.

    Raises:
        OutputError: it cannot be written; those before it are as they were.
    """
    path = folder / f"step-{checkpoint.step:08d}.safetensors"
    metadata = {
        "step": str(checkpoint.step),
        "seconds": repr(checkpoint.seconds),
        "settings": json.dumps(settings, sort_keys=True),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    try:
        write_bytes(path, save(tensors, metadata))
    except OutputError as error:
        known = checkpoints(folder)
        kept = f"the last one, {known[-1].name!r}, is good" if known else "there is none yet"
        raise OutputError(f"{str(error).rstrip('.')}; of the checkpoints {kept}.") from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, the oldest first."""
    return sorted(folder.glob(PATTERN))


def last_checkpoint(folder: Path, settings: dict[str, Any], log: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None.

    Raises:
        ConfigError: it was made with other settings.
    """
    for path in reversed(checkpoints(folder)):
        try:
            check_safetensors(path)
        except ModelLoadError as error:
            log(f"{error} The one before it is used.")
            continue
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        before, now = json.loads(metadata["settings"]), json.loads(json.dumps(settings))
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if changed:
            raise ConfigError(
                f"{str(folder.parent)!r} holds a run with another `{changed[0]}` ({before.get(changed[0])!r}, not "
                f"{now.get(changed[0])!r}); choose another `output_dir`."
            )
        return Checkpoint(int(metadata["step"]), float(metadata["seconds"]), load_file(path))
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimizer's state by name."""
    return {
        f"{prefix}{index}.{key}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
