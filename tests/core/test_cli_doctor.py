"""`vidsparse doctor`: it finds what is there, tells a wrong kernel from a missing one, and exits accordingly."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from vidsparse.cli import BAD_INPUT, BUG, OK, doctor, main, self_test

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def outcome_of(found: dict, op: str, backend: str) -> dict:
    return next(o for o in found["self_test"] if (o["op"], o["backend"]) == (op, backend))


def test_json_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--json"]) == OK
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["packages"]["torch"] == torch.__version__
    # Every kernel has a reference that runs anywhere.
    for op in (self_test.ATTENTION, self_test.CLUSTERS, self_test.GRADIENTS, *self_test.OPS):
        assert outcome_of(found, op, "reference")["state"] == self_test.RUNS
    assert outcome_of(found, self_test.WITH_TAIL, "separate")["state"] == self_test.RUNS
    for op in (self_test.ATTENTION, self_test.CLUSTERS, self_test.GRADIENTS, self_test.WITH_TAIL):
        hopper = outcome_of(found, op, "hopper_with_tail" if op == self_test.WITH_TAIL else "hopper")
        assert hopper["state"] == self_test.MISSING and hopper["reason"] == "needs a CUDA GPU"
    assert "WanTransformer3DModel" in found["families"]["Wan"]
    assert "radial" in found["methods"] and "dense" in found["methods"]
    assert sum(o["seconds"] for o in found["self_test"]) < 10


def test_a_wrong_kernel_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = self_test.linear_branch
    monkeypatch.setattr(self_test, "linear_branch", lambda *args, **kwargs: real(*args, **kwargs) * 1.01)
    assert main(["doctor", "--device", "cpu"]) == BUG
    out = capsys.readouterr().out
    assert "linear_branch                    reference        WRONG: the output is off by" in out
    assert "1 problem(s):" in out and "All well" not in out


def swap_first(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, :2] = x[:, :2].flip(1)
    return x


@pytest.mark.parametrize("op", [self_test.ATTENTION, self_test.CLUSTERS, self_test.WITH_TAIL, *self_test.OPS])
def test_every_check_notices_an_error(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small error in the function under test, of the kind a broken kernel makes, is no pass."""
    names = {"block_selection": "pool_blocks", "clustering": "cluster", "permutation": "permute_tokens"}
    names |= {"pooled_tail": "pooled_tail_attention", self_test.CLUSTERS: self_test.ATTENTION}
    name = names.get(op, op)
    backend = "separate" if op == self_test.WITH_TAIL else "reference"
    real = getattr(self_test, name)

    def broken(*args: object, **kwargs: object) -> object:
        out = real(*args, **kwargs)
        if name == "pool_blocks":
            return {kind: x + 0.01 for kind, x in out.items()}
        if name == "cluster":
            out.labels[..., 0] += 1
            return out
        if name == "sampled_error":
            return out * 1.01
        if name == "pooled_tail_attention":
            return swap_first(out[0]), out[1]
        return swap_first(out)

    self_test.CHECKS[op](backend, torch.device("cpu"))
    monkeypatch.setattr(self_test, name, broken)
    with pytest.raises(AssertionError):
        self_test.CHECKS[op](backend, torch.device("cpu"))


def test_a_kernel_that_fails_to_start_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(self_test, "cluster", broken)
    found = [o for o in self_test.run(torch.device("cpu"), 10) if (o.op, o.backend) == ("clustering", "reference")]
    assert [(o.state, o.reason) for o in found] == [(self_test.WRONG, "RuntimeError: no kernel image is available")]


def test_what_has_no_time_is_left_out_and_said() -> None:
    found = list(self_test.run(torch.device("cpu"), 1e-9))
    assert {o.state for o in found} == {self_test.LEFT_OUT}
    assert all("--seconds" in str(o.reason) for o in found)


def test_reasons_name_the_pip_line() -> None:
    from vidsparse_kernels import UnsupportedBackendError

    error = UnsupportedBackendError('backend "flash4" needs the package flash-attn-4; use backend="sdpa".')
    assert self_test.short_reason(str(error), "flash4") == "not installed: pip install flash-attn-4"
    error = UnsupportedBackendError('backend "triton" needs a GPU; use backend="reference" or "auto" for this case.')
    assert self_test.short_reason(str(error), "triton") == "needs a GPU"


def test_old_and_missing_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    have: dict[str, str | None] = dict(doctor.REQUIRED)
    assert doctor.package_problems(have) == []
    assert doctor.package_problems({**have, "torch": "2.11.0+cu130"}) == []
    assert doctor.package_problems({**have, "diffusers": "0.9.1"}) == [
        "diffusers 0.9.1 is too old: pip install 'diffusers>=0.36'"
    ]
    environment = import_module("vidsparse_pipelines.environment")
    real = environment.package_version
    monkeypatch.setattr(environment, "package_version", lambda name: None if name == "peft" else real(name))
    assert main(["doctor", "--device", "cpu", "--json"]) == BUG
    assert json.loads(capsys.readouterr().out)["problems"] == ["peft is not installed: pip install 'peft>=0.17'"]


def test_least_versions_are_those_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    lines = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    declared = dict(found for line in lines for found in re.findall(r"^([\w-]+)>=([\d.]+)", line))
    assert {name: declared[name] for name in doctor.REQUIRED} == doctor.REQUIRED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], "unknown"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--seconds", "x"], "--seconds"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == BAD_INPUT
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and "Traceback" not in err
