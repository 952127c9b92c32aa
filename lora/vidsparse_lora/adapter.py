"""The finished adapter: a LoRA file that stock diffusers loads, with the attention it was trained for in its header.

Header entries: `lora_adapter_metadata` (peft's settings, which diffusers reads) and `vidsparse` (JSON, read by
`vidsparse_pipelines.lora.read_training`). Weights of modules that the model itself lacks, such as the projections of
"sla", have keys that end in `.lora_extra.weight`; stock diffusers ignores them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from vidsparse.errors import ConfigError
from vidsparse.processors.binding import PROJECTION
from vidsparse_lora.config import TrainConfig
from vidsparse_lora.files import write_bytes
from vidsparse_lora.roles import STUDENT
from vidsparse_pipelines.lora import BIAS_WORD, EXTRA_KEY, find_lora_file
from vidsparse_pipelines.weights import check_safetensors

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "rank_pattern", "alpha_pattern")


def adapter_key(parameter_name: str, adapter: str = STUDENT) -> str:
    """`blocks.0.attn1.to_q.lora_A.student.weight` -> `transformer.blocks.0.attn1.to_q.lora_A.weight`."""
    if f".{PROJECTION}." in parameter_name:
        # A bias too gets a key that other loaders ignore: `proj_l_bias.lora_extra.weight`.
        return f"transformer.{parameter_name.removesuffix('.weight').replace('.bias', BIAS_WORD)}{EXTRA_KEY}"
    return f"transformer.{parameter_name.replace(f'.{adapter}.', '.')}"


def save_adapter(
    path: Path, weights: dict[str, Tensor], config: TrainConfig, peft_config: Any, training: dict[str, Any]
) -> Path:
    """Write an adapter.

    Args:
        path: the file.
        weights: by parameter name of the adapted transformer.
        config: of the run.
        peft_config: of the adapter.
        training: what is known about the training, in JSON values.

    Raises:
        OutputError: it cannot be written.
    """
    # Not all of peft's settings: a peft that lacks one of them would refuse the file.
    settings = {f"transformer.{name}": getattr(peft_config, name) for name in PEFT_SETTINGS}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(settings),
        "vidsparse": json.dumps({"version": 1, "kind": config.kind, **training, "config": config.to_dict()}),
    }
    tensors = {adapter_key(name): value.detach().float().cpu().contiguous() for name, value in weights.items()}
    write_bytes(path, save(tensors, metadata))
    return path


def start_from(path: str, parameters: list[tuple[str, torch.nn.Parameter]]) -> None:
    """Fill a fresh adapter from a file of `save_adapter`.

    Raises:
        ModelLoadError: the file is not there or broken.
        ConfigError: it has other weights than the adapter.
    """
    file = find_lora_file(path)
    if file is None:
        raise ConfigError(f"`init_lora` must be a local file or folder, got {path!r}.")
    check_safetensors(file)
    tensors = load_file(file)
    for name, parameter in parameters:
        key = adapter_key(name)
        if key not in tensors and key.endswith(EXTRA_KEY):
            continue
        if key not in tensors or tensors[key].shape != parameter.shape:
            found = "lacks it" if key not in tensors else f"has {list(tensors[key].shape)}"
            raise ConfigError(
                f"`init_lora` {path!r} does not fit `rank` and `targets`: {key!r} needs {list(parameter.shape)}, the "
                f"file {found}."
            )
        parameter.data.copy_(tensors[key])
