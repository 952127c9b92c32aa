"""`vidsparse plan`: the text, the JSON, and one sentence for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vidsparse.cli import BAD_INPUT, OK, main


def run(arguments: str) -> int:
    return main(arguments.split())


def test_a_published_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan --model wan-1.3b --frames 80 --device h200 --density 0.4") == OK
    out = capsys.readouterr().out
    assert "80 frames become 81: the VAE makes 1 frame, then 4" in out
    assert "32,760 in a latent grid of 21 x 30 x 52" in out
    assert "30 layers of 12 heads of 128" in out
    assert "steps 0-11   steps 12-49" in out and "dense" in out
    assert "NVIDIA H200 (recorded" in out
    assert "Sparse attention (radial) should make denoising 1." in out


def test_json_is_all_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan --model wan-14b --size 720p --device h200 --sparse pisa --top-p 0.9 --json") == OK
    data = json.loads(capsys.readouterr().out)
    assert data["helps"] is True and data["tokens"] == 75_600
    assert data["speedup"] == pytest.approx(data["seconds_dense"] / data["seconds_expected"])
    assert len(data["plan"]["density"]) == 40 and len(data["plan"]["density"][0]) == 50
    assert any("depends on the video" in note for note in data["notes"])
    assert data["memory"]["transformer"] == pytest.approx(2 * 14.29e9, rel=0.01)


def test_it_says_when_sparse_does_not_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan --model wan-1.3b --frames 17 --size 256x256 --device h200") == OK
    assert "Sparse attention will not help here: dense is faster" in capsys.readouterr().out


def test_the_bundled_model_on_this_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run("plan --device cpu") == OK
    out = capsys.readouterr().out
    assert "2,016 in a latent grid of 21 x 8 x 12" in out and "measured on this machine" in out
    assert len([*tmp_path.rglob("*.json")]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model wan-2b", "is unknown; give one of vidsparse-tiny, wan-1.3b"),
        ("--model ./nowhere", "neither 'vidsparse-tiny', nor a folder"),
        ("--model wan-1.3b --device h200 --size 833x480", "use a height of 480 and a width of 832 or 848"),
        ("--model wan-1.3b --device h200 --size big", "or one of 480p, 720p"),
        ("--model wan-1.3b --device h200 --frames 0", "--frames must be a whole number of at least 1"),
        ("--model wan-1.3b --device h200 --steps x", "--steps must be a whole number"),
        ("--model wan-1.3b --device h300", "recorded devices are h200"),
        ("--model wan-1.3b --device h200 --sparse radical", "'radical' is unknown; use one of"),
        ("--model wan-1.3b --device h200 --densty 0.3", "did you mean --density"),
        ("--model wan-1.3b --device h200 --density 3", "`density` must be in (0, 1]"),
    ],
)
def test_bad_input(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments.split()]) == BAD_INPUT
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and "Traceback" not in err
