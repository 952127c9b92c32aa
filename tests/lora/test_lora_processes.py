"""Two processes train as one does that sees both their batches, whatever they share out: batches, weights, sequences.

Run as a script this file is one of the two processes: `python test_lora_processes.py FILE.json`, one run after another.
"""

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
from safetensors.torch import load_file

from vidsparse.errors import ConfigError, VidsparseError
from vidsparse_lora import length_extension
from vidsparse_lora.config import LengthExtensionConfig, from_dict
from vidsparse_lora.distribution import distribution_of

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = ROOT / "lora/vidsparse_lora/configs/accelerate"
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def train(settings: dict[str, Any]) -> None:
    length_extension.train(from_dict(LengthExtensionConfig, settings), lambda _: None)


def two_processes(runs: list[dict[str, Any]], folder: Path, device: str = "cpu") -> list[str]:
    """Runs one after another in the same two processes; each `{"settings": …, "fsdp": bool}`. What each said, if refused."""
    (folder / "runs.json").write_text(json.dumps(runs))
    paths = os.pathsep.join(str(ROOT / p) for p in (".", "kernels/torch-ext", "pipelines", "lora"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"} if device == "cpu" else {}
    done = subprocess.run(
        [*launch, str(folder / "runs.json")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "said.json").read_text())


def main(file: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    setattr(Accelerator, "end_training", lambda _: None)  # noqa: B010 the next run needs the group of processes
    said = []
    for run in json.loads(file.read_text()):
        for name, value in FSDP2.items():
            os.environ.pop(name, None)
            if run.get("fsdp"):
                os.environ[name] = value
        AcceleratorState._reset_state()
        try:
            train(run["settings"])
            said.append("")
        except VidsparseError as error:
            said.append(str(error))
    if os.environ["RANK"] == "0":
        (file.parent / "said.json").write_text(json.dumps(said))


@pytest.fixture
def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """Sparse and dense layers, a teacher, checkpointed blocks, an average; a batch of one."""
    return settings | {
        "batch_size": 1,
        "max_steps": 4,
        "caption_dropout": 0.5,
        "method_options": {"density": 0.5, "block_size": 16, "dense_layers": 1},
        "teacher_weight": 0.5,
        "teacher_frames": 9,
        "ema": 0.8,
        "validation_prompts": ["a red circle moves"],
        "validation_steps": 2,
    }


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one_with_both_batches(shared: dict[str, Any], tmp_path: Path) -> None:
    processes_are_one(shared | {"device": "cuda"}, tmp_path, 1e-4)


def test_two_processes_are_one_with_both_batches(shared: dict[str, Any], tmp_path: Path) -> None:
    """Gloo on a CPU."""
    processes_are_one(shared, tmp_path, 1e-5)
    # Weights shared out and the run resumed: the arithmetic is that of whole weights in one go.
    ddp, fsdp = adapter(tmp_path / "ddp"), adapter(tmp_path / "fsdp")
    assert all(torch.equal(ddp[k], fsdp[k]) for k in ddp)
    for name in ("fsdp", "sequences"):
        assert (tmp_path / name / "validation/step-000004/seed-0.mp4").stat().st_size > 0


def processes_are_one(shared: dict[str, Any], tmp_path: Path, tolerance: float) -> None:
    """One process collects four forwards a step, or two have two of them each, or half of all four."""
    validate = 0 if shared["device"] == "cpu" else -1

    def run(name: str, fsdp: bool = False, **changes: Any) -> dict[str, Any]:
        return {"settings": {**shared, "output_dir": str(tmp_path / name), **changes}, "fsdp": fsdp}

    train(run("one", gradient_accumulation=4)["settings"])
    said = two_processes(
        [
            run("ddp", gradient_accumulation=2),
            run("fsdp", gradient_accumulation=2, max_steps=2, fsdp=True),
            run("fsdp", gradient_accumulation=2, validate_every=validate, fsdp=True),
            run("sequences", gradient_accumulation=4, validate_every=validate, context_parallel=2),
            run("both", gradient_accumulation=4, context_parallel=2, max_steps=2, fsdp=True),
            run("odd", sizes=["48x48"], context_parallel=2),
        ],
        tmp_path,
        shared["device"],
    )
    assert said[:-1] == [""] * 5 and "`context_parallel` 2 does not divide the tokens" in said[-1], said
    expected, whole = losses(tmp_path / "one"), adapter(tmp_path / "one")
    for name in ("ddp", "fsdp", "sequences", "both"):
        found = losses(tmp_path / name)
        assert len(found) == (2 if name == "both" else 4) and len(expected) == 4
        assert all(abs(a - b) < tolerance * b for a, b in zip(found, expected, strict=False)), (name, found, expected)
        if name == "both":
            continue
        weights = adapter(tmp_path / name)
        assert whole.keys() == weights.keys()
        assert all(torch.allclose(whole[k], weights[k], rtol=1e-3, atol=1e-4) for k in whole), name
    # One process with one batch a step goes another way, so that the test above could fail.
    train(run("alone")["settings"])
    assert abs(losses(tmp_path / "alone")[-1] - expected[-1]) > 1e-3


def accelerator(kind: str, **changes: Any) -> Any:
    from accelerate.utils import DistributedType

    settings = {"num_processes": 2, "process_index": 1, "parallelism_config": None, "state": SimpleNamespace()}
    return SimpleNamespace(distributed_type=DistributedType[kind], **{**settings, **changes})


def test_what_cannot_be_shared_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="set up for DEEPSPEED, which wraps model and optimizer as one"):
        distribution_of(accelerator("DEEPSPEED"), 1)
    with pytest.raises(ConfigError, match="parallelism_config, whose context parallelism .* set `context_parallel`"):
        distribution_of(accelerator("MULTI_GPU", parallelism_config=object()), 1)
    with pytest.raises(ConfigError, match="`context_parallel` 3 does not divide the 2 processes"):
        distribution_of(accelerator("MULTI_GPU"), 3)
    found = distribution_of(accelerator("MULTI_GPU", num_processes=8, process_index=5), 4)
    assert (found.groups, found.group, found.place, found.fsdp) == (2, 1, 1, None)
    with (
        monkeypatch.context() as started,
        pytest.raises(ConfigError, match="2 processes .* joined 1.*`device` to 'cpu'"),
    ):
        started.setenv("WORLD_SIZE", "2")  # without a GPU each would train for itself in the same folder
        distribution_of(accelerator("NO", num_processes=1), 1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plugin = SimpleNamespace(fsdp_version=1)
    with pytest.raises(ConfigError, match="FSDP version 1.*set `fsdp_version: 2`"):
        distribution_of(accelerator("FSDP", state=SimpleNamespace(fsdp_plugin=plugin)), 1)


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_takes_the_shipped_configs(name: str, kind: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config: Any = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    assert config.distributed_type.value == kind and config.mixed_precision == "no"
    assert kind != "FSDP" or config.fsdp_config["fsdp_version"] == 2


if __name__ == "__main__":
    main(Path(sys.argv[1]))
