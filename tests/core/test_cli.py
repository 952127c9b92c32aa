"""The command: help, the whole path, and every kind of bad input: one sentence, exit code 2, nothing written."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vidsparse import __version__
from vidsparse.cli import BAD_INPUT, BUG, INTERRUPTED, OK, main
from vidsparse_pipelines import video
from vidsparse_pipelines.testing import save_tiny_wan
from vidsparse_pipelines.video import read_video

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT, ROOT / "kernels" / "torch-ext", ROOT / "pipelines", ROOT / "lora"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SOURCES)), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("models") / "tiny", vae_patch=2)


@pytest.fixture
def short(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a fast run: one latent frame pair, two steps; the output folder is the current one."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    words = f"generate --model {tiny} --size 32x16 --frames 5 --steps 2 --warmup-steps 1 --dtype fp32 --device cpu"
    return words.split()


def files() -> list[str]:
    return sorted(path.name for path in Path.cwd().iterdir())


def test_help_is_fast_and_light() -> None:
    """Help must not pay for torch: the bound is generous, the import check is exact."""
    code = "import sys, vidsparse.cli as c; c.main(sys.argv[1:]); print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    for arguments in (["--help"], ["generate", "--help"], ["--version"]):
        since = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=True
        )
        assert time.perf_counter() - since < 5
        assert run.stdout.strip().endswith("[]")
        assert run.stderr == ""


def test_help_lists_every_promised_flag(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["generate", "--help"]) == OK
    text = capsys.readouterr().out
    flags = "prompt prompt-file negative-prompt model num-frames frames height width size num-inference-steps steps"
    flags += " guidance-scale flow-shift seed output fps sparse density warmup-steps dense-layers image lora offload"
    flags += " vae-tiling compile dtype device config strict json quiet"
    missing = [flag for flag in flags.split() if f"--{flag}" not in text]
    assert missing == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == OK
    assert capsys.readouterr().out.strip() == f"vidsparse {__version__}"


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == OK
    assert "radial" in capsys.readouterr().out
    assert main(["methods", "radial"]) == OK
    assert "--decay-factor (default 0.2)" in capsys.readouterr().out
    assert main(["methods", "nothing"]) == BAD_INPUT


def test_a_video_with_table_and_seed(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*short, "-p", "a red zebra", "--num_frames", "4", "-o", "clip.mp4"]) == OK
    out, err = capsys.readouterr()
    assert files() == ["clip.json", "clip.mp4"]
    assert read_video("clip.mp4").shape == (5, 16, 32, 3)
    seed = json.loads(Path("clip.json").read_text())["settings"]["seed"]
    assert f"clip.mp4  5 frames, 32x16, seed {seed}" in out
    assert "layers" in out and "step 0" in out and "dense: " in out
    assert "4 frames became 5" in err and "zebra" in err
    assert [line.split()[0] for line in err.splitlines() if line.split()[0] in ("load", "encode", "denoise", "decode", "write")] == [
        "load", "encode", "denoise", "decode", "write",
    ]  # fmt: skip


def test_json_is_all_of_stdout(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*short, "-p", "a cat \U0001f388", "-o", "clip.mp4", "--json", "--decay-factor", "0.4"]) == OK
    out = capsys.readouterr().out
    document = json.loads(out)
    assert out.isascii() and document["settings"]["prompt"] == "a cat \U0001f388"
    assert document["path"] == "clip.mp4" and document["json_path"] == "clip.json"
    assert document["settings"]["method_options"]["decay_factor"] == 0.4


def test_quiet_prints_the_path(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*short, "-p", "a cat", "-o", "out/clip.gif", "--quiet"]) == OK
    assert capsys.readouterr().out == "out/clip.gif\n"


def test_prompt_file_makes_several_videos(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("# two\na cat\n\na dog\n")
    assert main([*short, "--prompt-file", "prompts.txt", "-o", "out", "--seed", "7", "--json"]) == OK
    documents = json.loads(capsys.readouterr().out)
    assert [d["settings"]["seed"] for d in documents] == [7, 8]
    wanted = ["000-a-cat-seed7.json", "000-a-cat-seed7.mp4", "001-a-dog-seed8.json", "001-a-dog-seed8.mp4"]
    assert sorted(p.name for p in Path("out").iterdir()) == wanted


def test_prompt_file_in_a_config(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("a cat\na dog\n")
    Path("run.yaml").write_text("prompt-file: prompts.txt\njson: true\n")
    assert main([*short, "--config", "run.yaml", "-o", "out/", "--frames", "1"]) == OK
    assert [d["settings"]["prompt"] for d in json.loads(capsys.readouterr().out)] == ["a cat", "a dog"]


def test_config_repeats_a_run_and_the_command_line_wins(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*short, "-p", "a cat", "-o", "first.png", "--decay-factor", "0.3", "--vae-tiling"]) == OK
    assert main(["generate", "--config", "first.json", "-o", "again.png"]) == OK
    assert np.array_equal(read_video("first"), read_video("again"))
    assert (
        json.loads(Path("again.json").read_text())["settings"]
        == json.loads(Path("first.json").read_text())["settings"]
    )
    more = ["--steps", "1", "--sparse", "dense", "--size", "16x16", "--no-vae-tiling"]
    assert main(["generate", "--config", "first.json", "-o", "other.png", *more]) == OK
    settings = json.loads(Path("other.json").read_text())["settings"]
    assert (settings["num_inference_steps"], settings["sparse"], settings["vae_tiling"]) == (1, "dense", False)
    assert (settings["width"], settings["height"], settings["prompt"]) == (16, 16, "a cat")


def test_yaml_config(short: list[str], tiny: Path) -> None:
    Path("run.yaml").write_text(
        f"model: {tiny}\nprompt: a cat\nsize: 32x16\nframes: 1\nsteps: 2\ndevice: cpu\ndecay-factor: 0.5\nseed: 3\n"
    )
    assert main(["generate", "--config", "run.yaml", "--seed", "4"]) == OK
    assert files() == ["a-cat-seed4.json", "a-cat-seed4.png", "run.yaml"]
    settings = json.loads(Path("a-cat-seed4.json").read_text())["settings"]
    assert settings["method_options"]["decay_factor"] == 0.5 and settings["num_inference_steps"] == 2


def test_an_existing_video_is_replaced_and_said_so(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*short, "-p", "a cat", "-o", "clip.gif"]) == OK
    assert "is replaced" not in capsys.readouterr().err
    assert main([*short, "-p", "a dog", "-o", "clip.gif"]) == OK
    assert "'clip.gif' exists and is replaced." in capsys.readouterr().err
    assert json.loads(Path("clip.json").read_text())["settings"]["prompt"] == "a dog"


def test_the_json_never_replaces_another_file(short: list[str]) -> None:
    """`--config clip.json -o clip.mp4` must not cost the user the config, nor a second format the first one's JSON."""
    Path("clip.json").write_text('{"prompt": "a cat"}')
    assert main([*short, "--config", "clip.json", "-o", "clip.mp4", "--quiet"]) == OK
    assert main([*short, "--config", "clip.json", "-o", "clip.gif", "--quiet"]) == OK
    assert main([*short, "--config", "clip.json", "-o", "clip.gif", "--quiet"]) == OK
    assert files() == ["clip.gif", "clip.gif.json", "clip.json", "clip.mp4", "clip.mp4.json"]
    assert Path("clip.json").read_text() == '{"prompt": "a cat"}'
    assert json.loads(Path("clip.gif.json").read_text())["output"] == "clip.gif"


def test_no_name_left_for_the_json(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("clip.json", "clip.mp4.json"):
        Path(name).write_text("3")
    assert main([*short, "-p", "x", "-o", "clip.mp4"]) == BAD_INPUT
    assert "choose another --output" in capsys.readouterr().err and files() == ["clip.json", "clip.mp4.json"]


def test_flags_in_a_config_file(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("prompt: a cat\nquiet: true\noutput: clip.png\nframes: 1\nvae-tiling: on\n")
    assert main([*short, "--config", "run.yaml", "--frames", "1"]) == OK
    assert capsys.readouterr() == ("clip.png\n", "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("framez: 5", "did you mean --frames?"),
        ("steps: two", "must be a whole number, got 'two'"),
        ("frames: [5]", "num_frames"),
        ("dtype: 16", "`dtype` must be text, got 16"),
        ("negative-prompt: 7", "`negative_prompt` must be text"),
        ("model: 3", "`model` must be text"),
        ("compile: 2", "`compile` is true or false, got 2"),
        ("method-options: 3", "`method_options` must hold"),
        ("quiet: maybe", "--quiet is true or false"),
        ("output-path: x", "did you mean"),
    ],
)
def test_bad_config_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(f"prompt: a cat\n{line}\n")
    assert main(["generate", "--config", "run.yaml"]) == BAD_INPUT
    assert words in capsys.readouterr().err and files() == ["run.yaml"]


BAD = {
    "no prompt": ([], "give --prompt TEXT or --prompt-file FILE"),
    "empty prompt": (["-p", " "], "prompt is empty"),
    "both prompts": (["-p", "x", "--prompt-file", "y"], "not both"),
    "prompt file missing": (["--prompt-file", "none.txt"], "cannot be read"),
    "prompt file empty": (["--prompt-file", os.devnull], "has no prompt"),
    "unknown hub id": (["-p", "x", "-m", "nobody/nothing"], "path of a local diffusers folder"),
    "no such folder": (["-p", "x", "-m", "nothing"], "path of a diffusers folder"),
    "no pipeline folder": (["-p", "x", "-m", "."], "no model_index.json"),
    "no frames": (["-p", "x", "--frames", "0"], "num_frames"),
    "negative frames": (["-p", "x", "--num-frames", "-3"], "num_frames"),
    "absurd frames": (["-p", "x", "--frames", "99999999"], "from 1 to 10000"),
    "frames no number": (["-p", "x", "--frames", "many"], "--num-frames must be a whole number, got 'many'"),
    "frames too long for the model": (["-p", "x", "--frames", "900"], "use at most 509"),
    "size not divisible": (["-p", "x", "--size", "100x50"], "use a height of 48 or 64 and a width of 96 or 112"),
    "size not understood": (["-p", "x", "--size", "big"], "WIDTHxHEIGHT"),
    "unknown method": (
        ["-p", "x", "--sparse", "magic"],
        "The method 'magic' is unknown; use one of radial, ",
    ),
    "unknown option": (["-p", "x", "--dekay-factor", "1"], "did you mean --decay-factor?"),
    "misspelt flag": (["-p", "x", "--stepz", "1"], "did you mean --steps?"),
    "unquoted prompt": (["-p", "a", "cat"], "quote the prompt"),
    "density zero": (["-p", "x", "--density", "0"], "density"),
    "density above one": (["-p", "x", "--density", "1.2"], "density"),
    "density no number": (["-p", "x", "--density", "half"], "--density must be a number"),
    "dense takes no density": (["-p", "x", "--sparse", "dense", "--density", "0.5"], "--density"),
    "no steps": (["-p", "x", "--steps", "0"], "num_inference_steps"),
    "bad dtype": (["-p", "x", "--dtype", "int4"], "auto, float32, bfloat16, float16"),
    "bad offload": (["-p", "x", "--offload", "disk"], "none, model, group, sequential, auto"),
    "offload on the CPU": (["-p", "x", "--offload", "model"], "needs a GPU"),
    "bad device": (["-p", "x", "--device", "tpu"], "auto, cpu, cuda or cuda:N"),
    "bad format": (["-p", "x", "-o", "clip.avi"], ".mp4, .webm, .gif, .png"),
    "image for a text model": (["-p", "x", "--image", __file__], "takes no image"),
    "image missing": (["-p", "x", "--image", "none.png"], "does not exist"),
    "lora missing": (["-p", "x", "--lora", "none.safetensors:0.5"], "does not exist"),
    "config missing": (["-p", "x", "--config", "none.yaml"], "cannot be read"),
    "negative seed": (["-p", "x", "--seed", "-1"], "seed"),
    "value missing": (["-p"], "requires an argument"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(short: list[str], capsys: pytest.CaptureFixture[str], case: str) -> None:
    arguments, words = BAD[case]
    assert main([*short, *arguments]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert words in err and out == ""
    sentences = [line for line in err.splitlines() if line.startswith("vidsparse: ")]
    assert len(sentences) == 1 and err.splitlines()[-1] == sentences[0] and "Traceback" not in err
    assert files() == []


def test_cuda_without_cuda(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert main([*short, "-p", "x", "--device", "cuda"]) == BAD_INPUT
    assert "use --device cpu or auto" in capsys.readouterr().err and files() == []


def test_output_under_a_file(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("x")
    assert main([*short, "-p", "x", "-o", "taken/clip.mp4"]) == BAD_INPUT
    assert "is a file, not a folder" in capsys.readouterr().err and files() == ["taken"]


def test_read_only_folder(
    short: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(video.tempfile, "TemporaryFile", refuse)  # as root, permissions alone would not refuse
    assert main([*short, "-p", "x", "-o", "out/clip.mp4"]) == BAD_INPUT
    assert "is not writable" in capsys.readouterr().err and files() == []


def test_disk_full(short: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(video.Image.Image, "save", full)
    assert main([*short, "-p", "x", "-o", "out/clip.png"]) == BAD_INPUT
    assert "disk is full" in capsys.readouterr().err and files() == []


def test_a_bug_is_called_a_bug(
    short: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero\nsecond line")

    monkeypatch.setattr("vidsparse_pipelines.generation.load_pipeline", broken)
    assert main([*short, "-p", "x", "--quiet"]) == BUG
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "This is a bug" in err and out == "" and files() == []
    assert main([*short, "-p", "x", "--verbose", "--quiet"]) == BUG
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 143)])
def test_interrupt_while_denoising(tiny: Path, tmp_path: Path, number: int, code: int) -> None:
    """A real process, a real signal: no file stays, the exit code says what happened."""
    arguments = f"-p x --model {tiny} --size 64x64 --frames 33 --steps 900 --device cpu --dtype fp32 -o out/clip.mp4"
    process = subprocess.Popen(
        [sys.executable, "-m", "vidsparse.cli", "generate", *arguments.split()],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("encode"):
                break
        time.sleep(0.3)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in err
