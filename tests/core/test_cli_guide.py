"""Every command of docs/guide.md, run as it stands there, in one folder from top to bottom."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidsparse.cli import OK, main

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [line for line in lines if not line.startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guide")


def test_there_is_something_to_run() -> None:
    assert all(line.startswith("vidsparse ") for line in commands())
    assert {shlex.split(line)[1] for line in commands()} >= {"doctor", "plan", "show"}


def test_help_of_every_command_is_light() -> None:
    """No command pays for torch before it runs."""
    names = [["--help"], *([name, "--help"] for name in ("doctor", "plan", "show", "compare", "bench"))]
    code = (
        f"import sys, vidsparse.cli as c\nassert [c.main(n) for n in {names}] == [0] * {len(names)}\n"
        "print([m for m in ('torch', 'diffusers', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    root = GUIDE.parents[1]
    sources = [str(root / part) for part in (".", "kernels/torch-ext", "pipelines", "lora")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sources)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("[]") and run.stderr == ""


@pytest.mark.parametrize("command", commands())
def test_command(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if " show " in command:
        pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    threads = torch.get_num_threads()
    code = main(shlex.split(command)[1:])
    torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert code == OK, err
    assert out
