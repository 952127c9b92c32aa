"""Comparisons end to end on a tiny model: pairing, the floor, what is resumed, the page, and bad input."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from vidsparse.cli import BAD_INPUT, OK, main
from vidsparse.errors import ConfigError
from vidsparse_pipelines import compare
from vidsparse_pipelines.clips.grammar import is_held_out
from vidsparse_pipelines.clips.metrics import psnr
from vidsparse_pipelines.compare import DENSE, FLOOR, RESULTS
from vidsparse_pipelines.testing import save_tiny_wan

RADIAL = "radial:density=0.5:warmup_steps=0:dense_layers=0:min_tokens=0"
POOLED = "pooled:density=0.4:warmup_steps=0:dense_layers=0:min_tokens=0"


def active_backend() -> str:
    """diffusers' default of the process."""
    return str(getattr(_AttentionBackendRegistry._active_backend, "value", _AttentionBackendRegistry._active_backend))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def arguments(tiny: Path, tmp_path: Path) -> list[str]:
    text = f"compare --model {tiny} --size 64x64 --frames 9 --steps 2 --dtype fp32 --device cpu -o {tmp_path / 'out'}"
    return [*text.split(), "-p", "a red cat", "-p", "a dog walks", "-r", RADIAL, "-r", POOLED]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / RESULTS).read_text())


def test_a_whole_comparison(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--seeds", "2", "--players", "3"]) == OK
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    data = results(tmp_path)
    assert data["complete"] and len(data["clips"]) == 4
    assert list(data["methods"]) == [DENSE, FLOOR, RADIAL, POOLED]
    radial, pooled, floor = (data["methods"][k] for k in (RADIAL, POOLED, FLOOR))
    for entry in (radial, pooled):
        assert entry["clips"] == 4 and 0.3 < entry["density"] < 0.9
        low, high = entry["psnr"]["bootstrap95"]
        assert low <= entry["psnr"]["mean"] <= high
        # Another kernel changes the clip less than leaving blocks out.
        assert floor["psnr"]["least"] > entry["psnr"]["mean"]
    assert floor["psnr"]["mean"] > 60 and "psnr" not in data["methods"][DENSE]
    assert data["methods"][DENSE]["denoise_speedup"]["mean"] == 1
    assert data["environment"]["packages"]["torch"] == torch.__version__
    # The value of a clip is that of its own frames against the dense ones of the same prompt and seed.
    files = sorted((tmp_path / "out" / "clips").glob("*.npz"))
    assert len(files) == 16
    by_method = {}
    for file in files:
        document = json.loads(file.with_suffix(".json").read_text())
        with np.load(file) as kept:
            by_method[document["method"], document["prompt"], document["seed"]] = compare.as_tensor(kept["frames"])
    row = data["clips"][3]
    ours, dense = (by_method[method, row["prompt"], row["seed"]] for method in (POOLED, DENSE))
    assert row["methods"][POOLED]["psnr"] == pytest.approx(float(psnr(ours, dense)), abs=1e-3)


def test_the_page_stands_alone(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--players", "1", "--no-floor", "--quiet"]) == OK
    path = capsys.readouterr().out.strip()
    page = Path(path).read_text()
    videos = re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)
    assert len(videos) == 3 == page.count("src=")
    assert all(base64.b64decode(video)[4:8] == b"ftyp" for video in videos)
    assert "a red cat (seed 0)" in page and "a dog walks (seed 0)" not in page
    assert "http" not in page.replace("https://github.com", "") and RADIAL in page


def test_finished_clips_are_not_made_again(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str]] = []
    real = compare.Comparison._finish

    def finish(self: Any, method: Any, clip: Any, *rest: Any) -> None:
        if len(made) == 3 and stop:
            raise KeyboardInterrupt
        made.append((method.label, clip.prompt))
        real(self, method, clip, *rest)

    monkeypatch.setattr(compare.Comparison, "_finish", finish)
    stop = True
    assert main([*arguments, "--no-floor"]) == 130
    assert len(made) == 3 and not results(tmp_path)["complete"]
    assert not [*(tmp_path / "out").rglob(".*")]
    stop = False
    assert main([*arguments, "--no-floor"]) == OK
    assert len(made) == 6 == len(set(made)) and results(tmp_path)["complete"]
    before = results(tmp_path)["methods"]
    assert main([*arguments, "--no-floor"]) == OK
    assert len(made) == 6 and results(tmp_path)["methods"] == before
    # A damaged file is made again; so is everything at another shape, beside the old.
    victim = next((tmp_path / "out" / "clips").glob("pooled*.json"))
    victim.write_text("{")
    assert main([*arguments, "--no-floor"]) == OK
    assert len(made) == 7
    assert main([*arguments, "--no-floor", "--steps", "1"]) == OK
    assert len(made) == 13 and len([*(tmp_path / "out" / "clips").glob("*.npz")]) == 12


def test_another_dense_kernel_is_used_and_left() -> None:
    """diffusers' own reset would leave the kernel as the default of the process."""
    before = active_backend()
    with compare.dense_backend("_native_math"):
        assert active_backend() == "_native_math"
    assert active_backend() == before


def test_a_kernel_that_does_not_run_is_a_note(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "floor_method", lambda tokens: compare.Method(FLOOR, DENSE, {}, "sage"))
    assert main(arguments) == OK
    data = results(tmp_path)
    assert FLOOR not in data["methods"] and any(note.startswith("There is no floor: sage") for note in data["notes"])
    assert active_backend() == "native"


def test_adherence_is_paired() -> None:
    entries = [{"timings_s": dict.fromkeys(compare.STAGES, 1.0), "right": right} for right in (True, False, True)]
    dense = [{"timings_s": dict.fromkeys(compare.STAGES, 2.0), "right": right} for right in (False, True, True)]
    found = compare.summary(compare.Method("radial", "radial", {}), dict(enumerate(entries)), dict(enumerate(dense)))
    assert found["adherence"]["right"] == 2 and found["adherence"]["count"] == 3
    assert found["adherence"]["only_this_right"] == found["adherence"]["only_dense_right"] == 1
    assert found["denoise_speedup"]["mean"] == 2 and found["denoise_speedup"]["bootstrap95"] == [2, 2]


def test_prompts_are_held_out_and_fixed() -> None:
    prompts = compare.held_out_prompts(6)
    assert prompts == compare.held_out_prompts(6) and len({text for text, _ in prompts}) == 6
    assert all(is_held_out(spec) for _, spec in prompts)
    assert [len(spec.objects) for _, spec in prompts] == [1, 2, 1, 2, 1, 2]


def test_recipes() -> None:
    method = compare.parse_recipe("radial:density=0.3:warmup-steps=2:variant=release")
    assert (method.name, method.options) == ("radial", {"density": 0.3, "warmup_steps": 2, "variant": "release"})
    with pytest.raises(ConfigError, match="NAME:OPTION=VALUE"):
        compare.parse_recipe("radial:density")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["-r", "radical"], "must be one of radial"),
        (["-r", "radial:density=3"], "`density` must be in (0, 1]"),
        (["-r", RADIAL], "recipes must differ"),
        (["-p", "a red cat"], "A prompt is given twice"),
        (["--prompt-file", "x"], "not both"),
        (["--seeds", "0"], "--seeds must be"),
        (["--size", "33x32"], "do not fit this model"),
        (["--frames", "x"], "--frames must be a whole number"),
        (["--model", "nowhere"], "neither"),
    ],
)
def test_bad_input(
    arguments: list[str], more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *more]) == BAD_INPUT
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and [*tmp_path.iterdir()] == []


def test_without_lpips_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from vidsparse_pipelines.compare import load_lpips

    notes: list[str] = []
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert load_lpips(notes) is False and notes == ["There is no LPIPS: pip install lpips."]


def test_folders_of_others(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    assert main(arguments) == BAD_INPUT
    assert "is there and is no comparison" in capsys.readouterr().err
    (folder / RESULTS).write_text("[]")
    assert main(arguments) == BAD_INPUT
    assert "is no comparison" in capsys.readouterr().err
    old = {"format": compare.FORMAT, "format_version": 1, "environment": {"vidsparse": "0.0.1"}}
    (folder / RESULTS).write_text(json.dumps(old))
    assert main(arguments) == BAD_INPUT
    err = capsys.readouterr().err
    assert "was made by vidsparse 0.0.1" in err and "another --output" in err and err.count("\n") == 1
    assert sorted(p.name for p in folder.iterdir()) == [RESULTS, "mine.txt"]


def test_image_to_video_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_wan(tmp_path / "i2v", from_image=True)
    assert main(["compare", "--model", str(model), "-p", "a cat", "-o", str(tmp_path / "out")]) == BAD_INPUT
    assert "makes videos from an image" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_own_prompts_are_needed_for_other_models(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--model", str(tiny)]) == BAD_INPUT
    assert "give --prompt or --prompt-file" in capsys.readouterr().err
