"""Two processes train as one does that sees both their batches: the same losses, the same adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vidsparse.errors import ConfigError
from vidsparse_lora import length_extension
from vidsparse_lora.config import LengthExtensionConfig, from_dict

ROOT = Path(__file__).resolve().parents[2]


ACCELERATE = ROOT / "lora/vidsparse_lora/configs/accelerate"


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_processes_are_one_with_both_batches(settings: dict[str, Any], tmp_path: Path) -> None:
    """Gloo on a CPU; the one process collects two forwards for each step."""
    settings |= {"batch_size": 1, "caption_dropout": 0.5, "method_options": {"density": 0.5, "block_size": 16}}
    one, two = tmp_path / "one", tmp_path / "two"
    config = {**settings, "gradient_accumulation": 2, "output_dir": str(one)}
    length_extension.train(from_dict(LengthExtensionConfig, config), lambda _: None)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({**settings, "output_dir": str(two)}))
    paths = os.pathsep.join(str(ROOT / p) for p in (".", "kernels/torch-ext", "pipelines", "lora"))
    script = str(ROOT / "lora/vidsparse_lora/length_extension.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(
        [*launch, "--config", str(path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = losses(one), losses(two)
    assert len(found) == len(expected) == settings["max_steps"]
    assert all(abs(a - b) < 1e-5 * b for a, b in zip(found, expected, strict=True)), (found, expected)
    whole, shared = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, two))
    assert whole.keys() == shared.keys()
    assert all(torch.allclose(whole[k], shared[k], rtol=1e-3, atol=1e-4) for k in whole)
    # One process with one batch a step goes another way, so that the test above could fail.
    alone = {**settings, "output_dir": str(tmp_path / "alone")}
    length_extension.train(from_dict(LengthExtensionConfig, alone), lambda _: None)
    assert abs(losses(tmp_path / "alone")[-1] - expected[-1]) > 1e-3


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_weights_are_refused(kind: str) -> None:
    from accelerate.utils import DistributedType

    from vidsparse_lora.session import _check_distribution

    with pytest.raises(ConfigError, match=f"set up for {kind}, and training shares out batches alone"):
        _check_distribution(SimpleNamespace(distributed_type=DistributedType[kind], parallelism_config=None))
    with pytest.raises(ConfigError, match="set up for parallelism_config"):
        _check_distribution(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, parallelism_config=object()))
    _check_distribution(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, parallelism_config=None))


def test_accelerate_takes_the_shipped_config() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ACCELERATE / "ddp.yaml"))
    assert config.distributed_type.value == "MULTI_GPU" and config.mixed_precision == "no"
