"""Whole runs on a tiny model: they learn, they go on exactly where they stopped, and what they save loads elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from vidsparse.cli import main
from vidsparse.errors import ConfigError, ModelLoadError, OutputError
from vidsparse_lora import distill as distillation
from vidsparse_lora import files, length_extension
from vidsparse_lora.checkpoint import checkpoints
from vidsparse_lora.config import DistillConfig, LengthExtensionConfig, TrainConfig
from vidsparse_lora.objective import flow_loss
from vidsparse_lora.session import Session

ROOT = Path(__file__).resolve().parents[2]


def quiet(_: str) -> None:
    pass


def log_of(folder: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def final_state(folder: str | Path) -> dict[str, Tensor]:
    # Read, not mapped: a test may damage the file.
    return load(checkpoints(Path(folder) / "checkpoints")[-1].read_bytes())


def train(config: TrainConfig) -> Path:
    if isinstance(config, DistillConfig):
        return distillation.train(config, quiet)
    assert isinstance(config, LengthExtensionConfig)
    return length_extension.train(config, quiet)


def test_sparsifying_learns(distill: Callable[..., DistillConfig]) -> None:
    """The student comes nearer to the teacher at noise that it was not trained on; LoRA and projections together."""
    options = {"density": 0.2, "dense_layers": 0}
    config = distill(method="sla", method_options=options, rank=8, alpha=8, learning_rate=5e-3, caption_dropout=0.0)
    session = Session(config, quiet)

    def distance() -> float:
        session.step = 10**6
        return sum(distillation.sparsify_loss(session, micro).item() for micro in range(8))

    before = distance()
    for step in range(100):
        session.step = step
        session.backward(distillation.sparsify_loss(session, 0))
        session.update("student")
    assert distance() < 0.75 * before


def test_the_sparse_path_was_trained(lengthen: Callable[..., LengthExtensionConfig]) -> None:
    config = lengthen(max_steps=1, teacher_weight=1.0, teacher_frames=9)
    train(config)
    (line,) = log_of(config.output_dir)
    assert 0 < line["density"] < 0.8 and line["teacher_loss"] > 0 and line["grad_norm"] > 0


# Going on


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["length-extension", "few-step"])
@pytest.mark.parametrize("stop_in", [1, 2, 5])
def test_stopped_and_started_again_is_never_stopped(
    kind: str, stop_in: int, lengthen: Any, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with dropout, caption dropout, accumulation, average and a rate that changes with the step."""
    both = {"lora_dropout": 0.2, "ema": 0.9, "gradient_accumulation": 2, "lr_schedule": "cosine", "max_steps": 6}

    def config(name: str) -> Any:
        if kind == "few-step":
            return distill(**both, stage="few-step", steps=2, student_every=2, output_dir=str(tmp_path / name))
        return lengthen(**both, teacher_weight=0.5, teacher_frames=9, output_dir=str(tmp_path / name))

    whole = train(config("whole"))
    original, calls = Session.update, 0

    def update(self: Session, role: str) -> Tensor:
        nonlocal calls
        calls += 1
        if self.step == stop_in:
            raise Killed  # between the backward pass and the optimizer
        return original(self, role)

    monkeypatch.setattr(Session, "update", update)
    with pytest.raises(Killed):
        train(config("parts"))
    monkeypatch.setattr(Session, "update", original)
    assert not (tmp_path / "parts" / whole.name).exists() and calls
    parts = train(config("parts"))
    expected, found = load_file(whole), load_file(parts)
    assert expected.keys() == found.keys() and any(v.any() for k, v in found.items() if "lora_B" in k)
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    expected, found = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    assert all(torch.equal(expected[k], found[k]) for k in expected) and expected.keys() == found.keys()
    lines = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in log_of(tmp_path / n)]
        for n in ("whole", "parts")
    ]
    assert lines[0] == lines[1]


def test_killed_process_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    """A real SIGKILL, at whatever moment it comes, on the command that a user types."""
    config = tmp_path / "c.yaml"
    settings |= {"max_steps": 400, "checkpoint_every": 1, "ema": 0.9, "lora_dropout": 0.1}
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "vidsparse.cli", "train", "length-extension", str(config)]
    paths = os.pathsep.join(str(ROOT / p) for p in (".", "kernels/torch-ext", "pipelines", "lora"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    said = tmp_path / "stderr.txt"
    with said.open("w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
    folder = Path(settings["output_dir"]) / "checkpoints"
    try:
        limit = time.monotonic() + 120
        while len(checkpoints(folder)) < 2 and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, f"it ended before it could be killed: {said.read_text()[-2000:]}"
    step = int(checkpoints(folder)[-1].stem.split("-")[1])
    assert 2 <= step < 400
    steps = [f"max_steps={step + 3}", "checkpoint_every=1000"]
    assert main(["train", "length-extension", str(config), "--set", *steps]) == 0
    other = str(tmp_path / "other")
    assert main(["train", "length-extension", str(config), "--set", *steps, f"output_dir={other}"]) == 0
    found, expected = final_state(settings["output_dir"]), final_state(other)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def test_full_disk_keeps_the_last_checkpoint(lengthen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = lengthen()
    synced, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:  # config.yaml and the first checkpoint still have room
            raise OSError(28, "No space left on device")
        synced(descriptor)

    train(lengthen(max_steps=1, output_dir=config.output_dir + "-warm"))  # so that the cache is full
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match=r"The disk is full.*the last one, 'step-00000002.safetensors', is good"):
        train(config)
    monkeypatch.setattr(files.os, "fsync", synced)
    assert [p.name for p in checkpoints(Path(config.output_dir) / "checkpoints")] == ["step-00000002.safetensors"]
    train(config)
    whole = lengthen(output_dir=config.output_dir + "-whole")
    train(whole)
    expected, found = final_state(whole.output_dir), final_state(config.output_dir)
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_broken_checkpoint_is_passed_over(lengthen: Any) -> None:
    config = lengthen(max_steps=4)
    train(config)
    last = checkpoints(Path(config.output_dir) / "checkpoints")[-1]
    expected = final_state(config.output_dir)
    last.write_bytes(last.read_bytes()[:-10])
    said: list[str] = []
    length_extension.train(config, said.append)
    assert any("truncated" in text for text in said) and "going on from step 2" in said
    found = final_state(config.output_dir)
    assert all(torch.equal(expected[k], found[k]) for k in expected)


def test_only_so_many_checkpoints_stay(lengthen: Any) -> None:
    config = lengthen(checkpoint_every=1, keep_checkpoints=3)
    train(config)
    kept = [p.stem for p in checkpoints(Path(config.output_dir) / "checkpoints")]
    assert kept == ["step-00000004", "step-00000005", "step-00000006"]


def test_another_configuration_in_the_same_folder(lengthen: Any) -> None:
    train(lengthen(max_steps=1))
    with pytest.raises(
        ConfigError, match=r"holds a run with another `rank` \(2, not 4\); choose another `output_dir`"
    ):
        train(lengthen(max_steps=2, rank=4))


def test_time_limit_counts_over_runs(lengthen: Any) -> None:
    config = lengthen(max_steps=100_000, max_seconds=0.2, checkpoint_every=1000)
    file = train(config)
    steps = int(checkpoints(Path(config.output_dir) / "checkpoints")[-1].stem.split("-")[1])
    assert 1 <= steps < 1000 and file.is_file()
    train(config)
    assert int(checkpoints(Path(config.output_dir) / "checkpoints")[-1].stem.split("-")[1]) == steps


# What is saved


def velocity(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 3, 8, 8, generator=generator), torch.randn(1, 6, 32, generator=generator)
    with torch.no_grad():
        return transformer(latents, torch.tensor([500.0]), text, return_dict=False)[0]


def test_stock_diffusers_loads_the_adapter(distill: Any, tiny_model: Path) -> None:
    """In a process without vidsparse's own loader: the same output as the trained model, with alpha unlike rank."""
    import diffusers

    config = distill(ema=0.5, method="sla", method_options={"density": 0.5}, rank=2, alpha=6)
    trained: list[Session] = []

    def keep(self: Session) -> Path:
        trained.append(self)
        return original(self)

    original = Session.save_adapter
    Session.save_adapter = keep
    try:
        file = train(config)
    finally:
        Session.save_adapter = original
    session = trained[0]
    session.optimized["student"].swap_average()
    session.roles.handle.remove()
    expected = velocity(session.backbone.transformer.eval())
    pipe: Any = diffusers.WanPipeline.from_pretrained(tiny_model)  # pyright: ignore[reportPrivateImportUsage]
    plain = velocity(pipe.transformer)
    pipe.load_lora_weights(str(file.parent))
    found = velocity(pipe.transformer)
    assert torch.allclose(found, expected, atol=1e-6) and (found - plain).abs().max() > 1e-3
    # Half of it, and merged into the weights.
    pipe.set_adapters(pipe.get_active_adapters(), [0.5])
    half = velocity(pipe.transformer)
    assert (half - plain).abs().max() > 1e-4 and not torch.allclose(half, found, atol=1e-4)
    pipe.set_adapters(pipe.get_active_adapters(), [1.0])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.allclose(velocity(pipe.transformer), found, atol=1e-5)


def test_header_says_what_it_was_trained_for(lengthen: Any) -> None:
    from vidsparse.recipe import Recipe
    from vidsparse_pipelines.lora import read_training

    file = train(lengthen(max_steps=1))
    training = read_training(str(file))
    assert training is not None
    recipe = Recipe.from_dict(training["recipe"])
    assert recipe.method == "radial" and recipe.config.density == 0.5 and recipe.schedule.min_tokens == 0
    assert training["num_frames"] == [17] and training["sizes"] == [[64, 64]] and training["trained_steps"] == 1
    assert training["num_inference_steps"] is None and training["flow_shift"] == 3.0
    assert training["model"]["sha256"]
    assert (Path(file.parent) / "config.yaml").is_file()
    assert yaml.safe_load((file.parent / "config.yaml").read_text())["rank"] == 2


def test_start_from_an_adapter(lengthen: Any, tmp_path: Path) -> None:
    first = train(lengthen(output_dir=str(tmp_path / "first")))
    session = Session(lengthen(init_lora=str(first), output_dir=str(tmp_path / "second")), quiet)
    saved = load_file(first)
    for name, weight in session.optimized["student"].weights().items():
        assert torch.equal(weight, saved[f"transformer.{name.replace('.student.', '.')}"])
    with pytest.raises(ConfigError, match="`init_lora` .* does not fit `rank` and `targets`"):
        Session(lengthen(init_lora=str(first), rank=3, output_dir=str(tmp_path / "third")), quiet)
    with pytest.raises(ModelLoadError, match="does not exist"):
        Session(lengthen(init_lora="/nowhere.safetensors", output_dir=str(tmp_path / "fourth")), quiet)


# The command line


def generate(tmp_path: Path, model: Path, *options: str) -> dict[str, Any]:
    output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}.mp4"
    command = ["generate", "--prompt", "a red circle", "--model", str(model), "--device", "cpu", "--seed", "1"]
    code = main([*command, "--dtype", "float32", "--output", str(output), "--quiet", *options])
    assert code == 0
    return json.loads(output.with_suffix(".json").read_text())


def test_a_projection_holds_for_its_own_linear_branch(tmp_path: Path) -> None:
    from vidsparse import Recipe
    from vidsparse.cli.train import follow_adapters
    from vidsparse_pipelines.lora import TRAINING_VERSION

    training = {"version": TRAINING_VERSION, "recipe": Recipe.from_options("sla").to_dict()}
    training |= {"num_frames": [17], "sizes": [[64, 64]]}
    path = str(tmp_path / "sla.safetensors")
    save_file({"x": torch.zeros(1)}, path, metadata={"vidsparse": json.dumps(training)})
    given = {"loras": (path,)}
    for options, extra in (({"coverage": "non_selected"}, []), ({}, ["--coverage", "non_selected"])):
        with pytest.raises(ConfigError, match="was trained with coverage 'all', not 'non_selected'"):
            follow_adapters(given, options, extra, None)
    with pytest.raises(ConfigError, match="with feature_map 'softmax', not 'relu'"):
        follow_adapters(given, {}, ["--feature-map=relu"], None)
    _, options = follow_adapters(given, {}, ["--coverage", "all", "--density", "0.2"], None)
    assert options["feature_map"] == "softmax" and "density" not in options


def test_generate_follows_the_adapter(
    lengthen: Any, distill: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = str(train(lengthen(max_steps=1, output_dir=str(tmp_path / "lora"))))
    found = generate(tmp_path, tiny_model, "--lora", lora, "--steps", "2")
    settings = found["settings"]
    assert (settings["num_frames"], settings["height"], settings["width"]) == (17, 64, 64)
    assert settings["sparse"] == "radial"
    options = settings["method_options"]
    assert (options["density"], options["block_size"], options["min_tokens"]) == (0.5, 16, 0)
    assert found["report"]["num_sparse_calls"] > 0
    # What the user says comes first, and is said where it is not what was trained.
    capsys.readouterr()
    found = generate(tmp_path, tiny_model, "--lora", lora, "--steps", "2", "--density", "0.7", "--frames", "9")
    assert found["settings"]["method_options"]["density"] == 0.7 and found["settings"]["num_frames"] == 9
    assert "was trained at 17 frames" in capsys.readouterr().err
    dense = generate(tmp_path, tiny_model, "--lora", lora, "--steps", "2", "--sparse", "dense")
    assert dense["settings"]["sparse"] == "dense" and dense["report"]["num_sparse_calls"] == 0
    assert main(["generate", "-p", "x", "--model", str(tiny_model), "--lora", lora, "--sparse", "semantic"]) == 2
    assert "was trained for the attention 'radial', not 'semantic'" in capsys.readouterr().err

    few = train(distill(max_steps=1, stage="few-step", steps=2, output_dir=str(tmp_path / "few")))
    found = generate(tmp_path, tiny_model, "--lora", str(few))
    assert (found["settings"]["num_inference_steps"], found["settings"]["guidance_scale"]) == (2, 1.0)
    assert found["report"]["num_sparse_calls"] == 4 and not found["report"]["dense_calls"]
    assert main(["generate", "-p", "x", "--model", str(tiny_model), "--lora", str(few), "--steps", "20"]) == 2
    assert "was trained for 2 steps, not 20" in capsys.readouterr().err
    assert main(["generate", "-p", "x", "--model", str(tiny_model), "--lora", str(few), "--flow-shift", "7"]) == 2
    assert "was trained for a flow shift of 3, not 7" in capsys.readouterr().err
    assert main(["generate", "-p", "x", "--model", str(tiny_model), "--lora", str(few), "--lora", lora]) == 2
    assert "were trained for another" in capsys.readouterr().err


def test_projection_of_an_adapter_is_taken_up(distill: Any, tiny_model: Path, tmp_path: Path) -> None:
    options = {"density": 0.5, "dense_layers": 0}
    lora = train(distill(method="sla", method_options=options, max_steps=3, learning_rate=0.05))
    tensors = load_file(lora)
    extra = {k: v for k, v in tensors.items() if k.endswith(".proj_l.lora_extra.weight")}
    assert len(extra) == 2 and all(v.any() for v in extra.values())
    biases = [v for k, v in tensors.items() if k.endswith(".proj_l_bias.lora_extra.weight")]
    assert len(biases) == 2 and all(v.ndim == 1 and v.any() for v in biases)
    with safe_open(lora, "pt") as file:
        metadata = file.metadata()
    without = tmp_path / "without.safetensors"
    save_file({k: v for k, v in tensors.items() if k not in extra}, without, metadata)
    from vidsparse_pipelines.video import read_video

    videos = []
    for index, path in enumerate((lora, without)):
        output = tmp_path / f"video-{index}.gif"
        command = ["generate", "-p", "a red circle", "--model", str(tiny_model), "--device", "cpu", "--seed", "1"]
        command += ["--dtype", "float32", "--steps", "2", "--lora", str(path), "--output", str(output), "--quiet"]
        assert main(command) == 0
        videos.append(read_video(output).astype(int))
    assert (videos[0] != videos[1]).any()


def test_train_command_refuses_in_one_sentence(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings))

    def refused(*changes: str) -> str:
        assert main(["train", "length-extension", str(config), "--set", *changes]) == 2
        text = capsys.readouterr().err.strip()
        assert text.count("\n") == 0
        return text

    assert "`rnak` is no setting" in refused("rnak=3")
    assert "not understood" in refused("rank=3", "oops")
    assert "use 17" in refused("num_frames=16")
    assert "needs multiples of" in refused("sizes=[60x64]")
    assert "`density` must be" in refused("method_options.density=1.5")
    assert "is not installed" in refused("trackers=[no-such-tracker]")
    assert "there is no folder" in refused("data=/nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "The data set is empty" in refused(f"data={empty}")
    assert not (Path(settings["output_dir"]) / "checkpoints").exists()


def test_validation_writes_videos_and_leaves_no_trace_in_the_weights(lengthen: Any, tmp_path: Path) -> None:
    with_it = lengthen(
        max_steps=4, ema=0.9, validate_every=2, validation_clips=2, validation_steps=2, output_dir=str(tmp_path / "a")
    )
    without = lengthen(max_steps=4, ema=0.9, output_dir=str(tmp_path / "b"))
    train(with_it)
    train(without)
    expected, found = final_state(tmp_path / "a"), final_state(tmp_path / "b")
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    for step in (2, 4):
        folder = tmp_path / "a/validation" / f"step-{step:06d}"
        assert sorted(p.name for p in folder.iterdir()) == ["figures.json", "seed-0.mp4", "seed-1.mp4"]
        assert len(json.loads((folder / "figures.json").read_text())["prompts"]) == 2


def test_figures_of_long_clips() -> None:
    """Real clips follow their captions in every window; those of other captions do not, and one that restarts is seen."""
    from random import Random

    from vidsparse_lora.validation import held_out_specs, measure
    from vidsparse_pipelines.clips import render, sample_params
    from vidsparse_pipelines.clips.grammar import is_held_out

    specs = held_out_specs(2, seed=1)
    assert all(is_held_out(spec) and spec.relation != "in front of" for spec in specs)
    clips = render(sample_params(specs, Random(0), 64, 96), 161, 64, 96)
    device = torch.device("cpu")
    real = measure(clips, specs, device)
    assert real["attributes"] > 0.95 and real["adherence_first"] >= 0.5 and real["color_drift"] < 0.1
    assert measure(clips, specs[::-1], device)["attributes"] < 0.6
    again = torch.cat([clips[:, :, :80]] * 2 + [clips[:, :, :1]], dim=2)
    assert measure(again, specs, device)["restart"] < 0.01 < 0.3 < real["restart"]
    faded = clips * torch.linspace(1, 0.2, 161).view(1, 1, -1, 1, 1)
    assert measure(faded, specs, device)["color_drift"] > 0.2
    assert measure(clips[:, :, :17], specs, device) == {}


def test_flow_loss_is_zero_for_the_right_velocity() -> None:
    clean, noise = torch.ones(1, 1, 1, 2, 2), torch.full((1, 1, 1, 2, 2), 3.0)
    assert flow_loss(noise - clean, clean, noise) == 0
    assert flow_loss(clean - noise, clean, noise) == 16
