"""The benchmark of whole models runs, and its forwards are steps of one generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vidsparse

METHODS = "pisa:density=0.5,vidsparse:density=0.5,vidsparse:density=0.5:refresh_every=2,radial:warmup_steps=1000"


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("bench_models")


def test_rows_of_given_methods(script: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "models.json"
    given = ["--device", "cpu", "--cases", "tiny", "--modes", "eager", "--methods", METHODS, "--output", str(output)]
    assert script.main(given) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["stock", script.OUR_DENSE, *METHODS.split(",")]
    assert not [row["error"] for row in rows if "error" in row]
    stock, dense, pisa, clusters, kept, warm_up = rows
    assert stock["density"] == dense["density"] == warm_up["density"] == 1.0
    for row in (pisa, clusters, kept):
        assert 0.3 < row["density"] < 0.7 and "dense_calls" not in row
    assert list(dense["dense_calls"]) == ["method dense"] and list(warm_up["dense_calls"]) == ["warm-up step"]
    assert all("clusters of queries" in row["notes"][0] and "first_step_s" in row for row in (clusters, kept))
    assert "mask_s" in pisa and clusters["forward_s"] and kept["forward_s"] is None


@torch.no_grad()
def test_forwards_are_steps(script: ModuleType) -> None:
    case, clock = script.CASES[script.TINY], script.Clock(torch.device("cpu"))
    model, inputs = script.build(case, clock.device), case.inputs(clock.device)
    handle = vidsparse.apply(model, "vidsparse", warmup_steps=0, dense_layers=0, min_tokens=0, refresh_every=3)
    script.block_times(model, inputs, case, clock, 3)
    rows = handle.report().rows
    assert [row.step for row in rows] == list(range(15)) and {row.branch for row in rows} == {"call 0"}
    handle.remove()


def test_mean_over_the_steps_of_a_selection(script: ModuleType) -> None:
    case, ms = script.CASES[script.TINY], iter([5.0, 1.0, 1.0] * 5)
    clock = script.Clock(torch.device("cpu"))
    clock.mark, clock.between = lambda: None, lambda start, end: next(ms)

    class Block(torch.nn.Module):
        def forward(self) -> None: ...

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block()])

        def forward(self, timestep: torch.Tensor, return_dict: bool) -> None:
            self.blocks[0]()

    inputs = {"timestep": torch.tensor([500])}
    assert script.block_times(Model(), inputs, case, clock, 3) == {"blocks": pytest.approx(7 / 3)}
    assert inputs["timestep"].item() == 485


@pytest.mark.parametrize("methods", ["nothing", "pisa:density=2", "pisa:density", "pisa:other=1"])
def test_unknown_methods_are_refused_at_once(
    script: ModuleType, methods: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main(["--device", "cpu", "--cases", "tiny", "--methods", methods])
    assert repr(methods) in capsys.readouterr().err
