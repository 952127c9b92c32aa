"""The script around compute-sanitizer: what it makes of its output. The runs themselves need a GPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def sanitize(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("sanitize_kernels")


CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACE = "========= Error: Race reported\n========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"


@pytest.mark.parametrize(
    ("text", "code", "tool", "errors"),
    [
        (CLEAN, 0, "memcheck", 0),
        ("========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 3 errors\n", 0, "memcheck", 3),
        (RACE, 0, "racecheck", 2),
        (CLEAN, 1, "memcheck", None),
        ("Device not supported", 1, "memcheck", None),
        ("", 0, None, 0),
        ("Traceback", 1, None, None),
    ],
    ids=["clean", "memory", "race", "the program failed", "no sanitizer", "plain", "plain, failed"],
)
def test_outcome(sanitize, text, code, tool, errors):
    found = sanitize.outcome(text, code, tool)
    assert found["errors"] == errors
    assert bool(found["says"]) == (errors != 0)


def test_wrong_names_exit_with_2(sanitize, capsys):
    assert sanitize.main(["--families", "forwards"]) == 2
    assert sanitize.main(["--tools", "memchk"]) == 2
    assert '"forwards"' in capsys.readouterr().err
