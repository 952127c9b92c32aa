"""`--guard` on the command line: what is printed, what the run file says, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vidsparse import Recipe
from vidsparse.cli import BAD_INPUT, OK, main
from vidsparse.cli.table import guard_lines
from vidsparse_pipelines.testing import save_tiny_wan

SHAPE = "--size 64x64 --frames 17 --steps 5 --seed 3"


def test_the_report_shows_what_the_guard_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_wan(tmp_path / "tiny")
    out = tmp_path / "clip.mp4"
    words = f"generate -p stars --model {model} {SHAPE} --sparse pooled --min-tokens 0 --guard 0.9999 -o {out}"
    assert main(words.split()) == OK
    printed = capsys.readouterr().out
    assert "guard 0.9999: agreement at least" in printed and "from step 2 density 0.50: layer 1" in printed
    document = json.loads((tmp_path / "clip.json").read_text())
    guard = document["report"]["guard"]
    assert document["settings"]["method_options"]["guard"] == guard["target"] == 0.9999
    assert [x["step"] for x in guard["raised"]] == [2, 3] and len(guard["agreement"][1]) == 5
    assert main(["generate", "--config", str(tmp_path / "clip.json"), "--quiet", "-o", str(out)]) == OK
    again = json.loads((tmp_path / "clip.json").read_text())
    assert again["report"]["guard"] == guard


def test_a_guard_over_a_recipe_file(tmp_path: Path) -> None:
    model = save_tiny_wan(tmp_path / "tiny")
    (tmp_path / "recipe.json").write_text(Recipe.from_options("pooled", density=0.5, min_tokens=0).to_json())
    words = f"generate -p stars --model {model} {SHAPE} --recipe {tmp_path / 'recipe.json'} --guard 0.9 --quiet"
    assert main([*words.split(), "-o", str(tmp_path / "clip.mp4")]) == OK
    assert json.loads((tmp_path / "clip.json").read_text())["report"]["guard"]["target"] == 0.9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--guard 95", "`guard` must be above 0 and below 1, such as 0.95, got 95"),
        ("--guard much", "--guard must be a number"),
    ],
)
def test_bad_input(arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "stars", *arguments.split(), "-o", str(tmp_path / "a.mp4")]) == BAD_INPUT
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_lines() -> None:
    raised = [{"layer": i, "name": "", "step": 3, "agreement": 0.9, "action": "dense"} for i in (1, 5)]
    raised += [{"layer": i, "name": "", "step": i, "agreement": 0.8, "action": "density 0.50"} for i in range(10, 30)]
    guard = {"target": 0.95, "least": 0.8, "calls": 40, "calls_below": 22, "agreement": [], "raised": raised}
    lines = guard_lines({"guard": guard})
    assert lines[:2] == [
        "guard 0.95: agreement at least 0.800; below in 22 of 40 calls",
        "  from step 3 dense: layers 1 (0.90), 5 (0.90)",
    ]
    assert lines[-1] == "  and 9 more, in the JSON" and len(lines) == 14
    assert guard_lines({"guard": {**guard, "least": None}}) == ["guard 0.95: nothing was sparse"]
    assert guard_lines({"guard": None}) == guard_lines({}) == []
