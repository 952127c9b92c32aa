"""The default command: the bundled model, found without a model option, sparse where planned."""

import json
from pathlib import Path

import pytest

from vidsparse.cli import OK, main
from vidsparse_pipelines.model_info import inspect_model
from vidsparse_pipelines.video import read_video


def test_bundled_model_has_its_preset_and_rules() -> None:
    info = inspect_model()
    assert info.preset.name == "vidsparse-tiny"
    assert (info.multiple, info.temporal) == ((16, 16), 4), (
        "the pipeline refuses multiples of 8 that the VAE would take"
    )
    assert info.snap_frames(300) == 301


def test_default_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Few frames and steps, so that it fits any machine; the size, guidance and method are the defaults."""
    monkeypatch.chdir(tmp_path)
    prompt = "a red circle moves right, navy background"
    assert (
        main(["generate", "-p", prompt, "--frames", "16", "--steps", "2", "--warmup-steps", "1", "--seed", "1"]) == OK
    )
    stem = "a-red-circle-moves-right-navy-background-seed1"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{stem}.json", f"{stem}.mp4"]
    assert read_video(f"{stem}.mp4").shape == (17, 64, 96, 3)
    document = json.loads(Path(f"{stem}.json").read_text())
    assert document["settings"]["model"] == "vidsparse-tiny" and document["settings"]["guidance_scale"] == 4.0
    assert 0 < document["report"]["sparse_density"] < 1
    assert document["report"]["num_sparse_calls"] == 14 and document["report"]["num_calls"] == 32
    assert "16 frames became 17" in capsys.readouterr().err
