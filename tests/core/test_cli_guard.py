"""`--guard` on the command line: what is printed, what the run file says, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidsparse import Recipe
from vidsparse.cli import BAD_INPUT, OK, launch, main
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


def test_ranks_decide_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each of two processes samples its own heads; were their sums not added, one would go dense without the other."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path))
    monkeypatch.chdir(tmp_path)
    tiny = save_tiny_wan(Path("tiny"), vae_patch=2)
    words = f"generate --model {tiny} -p cat --size 64x64 --frames 17 --steps 5 --seed 1 --sparse pooled --density 0.4"
    common = [*words.split(), "--warmup-steps", "1", "--dense-layers", "0", "--device", "cpu", "--min-tokens", "0"]
    guarded = [*common, "--guard", "0.97", "--json", "--ulysses-degree", "2", "-o", "two.png"]
    assert launch.launch(guarded, 2) == OK
    two = json.loads(capfd.readouterr().out)["report"]
    assert two["guard"]["raised"] and two["guard"]["calls"] == two["num_sparse_calls"]
    assert two["dense_calls"].get("raised by the guard", 0) > 0


RANK = """
import sys
import torch
from vidsparse.guard import Guard

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
import torch.distributed._functional_collectives
group = torch.distributed.group.WORLD.group_name
sums = torch.tensor([[[0.4 * rank, 1.0]], [[0.1, 0.5]]])
print(Guard().collect([("a", [sums])], group)["a"].agreement())
torch.distributed.destroy_process_group()
"""


def test_sums_of_the_ranks_belong_together(tmp_path: Path) -> None:
    """Alone, one rank would see an agreement of 0.6 and the other of 0.8; the worst sample has 0.4 of 2 wrong."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(tmp_path / "meet")],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [float(process.communicate(timeout=120)[0]) for process in started] == [0.8, 0.8]
