"""Several processes for one video from the command line: what is refused, and two processes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vidsparse.cli import BAD_INPUT, OK, is_first, launch, main
from vidsparse_pipelines.ranks import check_processes, indivisible
from vidsparse_pipelines.testing import save_tiny_wan
from vidsparse_pipelines.video import read_video


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path))
    # With NCCL_DEBUG NCCL prints its version to stdout.
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "NCCL_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--num-gpus 64", "--num-gpus 64 was asked for, but this machine has"),
        ("--num-gpus 2 --device cpu", "contradict each other"),
        ("--num-gpus two", "--num-gpus must be a whole number, got 'two'"),
        ("--num-gpus 0", "--num-gpus must be a whole number of at least 1, got 0"),
        ("--ulysses-degree 2", "needs 2 processes, but there is 1; give --num-gpus 2 instead"),
        ("--ulysses-degree 2 --num-gpus 3", "either --num-gpus or --ulysses-degree, not both"),
        ("--ulysses-degree 0", "`ulysses_degree` must be a whole number from 1 to"),
        ("--num-gpus 64 --steps 0", "num_inference_steps"),
    ],
)
def test_refusals_are_one_sentence_before_any_work(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidsparse_pipelines.generation.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    assert main(["generate", "-p", "a cat", "-o", "clip.png", *arguments.split()]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.startswith("vidsparse: ") and err.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []


def test_processes_that_would_all_do_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["generate", "-p", "a cat", "-o", "clip.png"]) == BAD_INPUT
    assert "2 processes that would all make the same video; give --ulysses-degree 2." in capsys.readouterr().err


def test_only_the_first_process_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_first()
    monkeypatch.setenv("RANK", "1")
    assert is_first(), "a rank without torchrun means nothing"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_first()
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    assert main(["generate", "-p", "a cat", "--no-such-option", "1"]) == BAD_INPUT
    assert len(waited) == 1, "the first process speaks before this one"
    assert "--no-such-option" in capsys.readouterr().err


def test_num_gpus_in_a_config_and_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "launch", lambda *given: launched.append(given) or 7)
    Path("run.yaml").write_text("num-gpus: 2\nprompt: a cat\n")
    assert main(["generate", "--config", "run.yaml", "--verbose"]) == 7
    assert launched == [(["generate", "--config", "run.yaml", "--verbose"], 2, True)]


def test_too_few_gpus_for_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidsparse.errors import ConfigError

    monkeypatch.setenv("WORLD_SIZE", "4")
    check_processes(4, "cpu")
    check_processes(1, "cuda:1")
    with pytest.raises(ConfigError, match="one GPU for 4 processes"):
        check_processes(4, "cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 processes need 4 GPUs, but this machine has 2"):
        check_processes(4, "auto")
    # Two machines with two GPUs each.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_processes(4, "auto")


def test_tokens_that_do_not_divide() -> None:
    from diffusers.hooks.context_parallel import EquipartitionSharder

    class Mesh:
        def size(self) -> int:
            return 2

    with pytest.raises(AssertionError) as error:
        EquipartitionSharder.shard(torch.zeros(1, 3), 1, Mesh())  # pyright: ignore[reportArgumentType]
    assert indivisible(error.value) and not indivisible(AssertionError("other"))


def test_two_processes_make_the_same_video(capfd: pytest.CaptureFixture[str]) -> None:
    tiny = save_tiny_wan(Path("tiny"), vae_patch=2)
    words = f"generate --model {tiny} -p cat --size 32x16 --frames 5 --steps 2 --warmup-steps 0 --dense-layers 0"
    common = [*words.split(), "--dtype", "fp32", "--device", "cpu", "--min-tokens", "0", "--json"]
    # No seed: the first process draws one for both.
    assert launch.launch([*common, "--ulysses-degree", "2", "-o", "two.png"], 2) == OK
    two = json.loads(capfd.readouterr().out)
    seed = str(two["settings"]["seed"])
    assert main([*common, "-o", "one.png", "--seed", seed]) == OK
    one = json.loads(capfd.readouterr().out)
    assert two["settings"]["ulysses_degree"] == 2
    assert two["report"] == one["report"] and "context" not in json.dumps(two["report"])
    assert np.abs(read_video("one").astype(int) - read_video("two").astype(int)).max() <= 1
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["one", "one.json", "tiny", "two", "two.json"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("way", ["num-gpus", "torchrun"])
def test_two_gpus_make_the_same_video(way: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The bundled model in two processes, started by the command itself or by torchrun; sparse though that is slower at
    its size. Frames as PNGs, which need no ffmpeg."""
    words = "generate -p a-red-star-spins --frames 33 --steps 4 --warmup-steps 1 --dtype fp32 --seed 1 --min-tokens 0"
    common = [*words.split(), "--json"]
    if way == "num-gpus":
        assert main([*common, "--num-gpus", "2", "-o", "two.png"]) == OK
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, "-m", "vidsparse.cli", *common, "--ulysses-degree", "2", "-o", "two.png"]
        subprocess.run(command, check=True, timeout=150)
    two = json.loads(capfd.readouterr().out)
    assert main([*common, "-o", "one.png"]) == OK
    one = json.loads(capfd.readouterr().out)
    assert two["settings"]["ulysses_degree"] == 2
    assert one["report"]["num_sparse_calls"] == two["report"]["num_sparse_calls"] > 0
    assert two["report"]["sparse_density"] == one["report"]["sparse_density"] < 1
    assert "triton" in json.dumps(two["report"]) and "context parallel" not in json.dumps(two["report"])
    assert np.abs(read_video("one").astype(int) - read_video("two").astype(int)).max() <= 2
