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


def test_the_byte_for_roles_is_no_race_and_a_tile_is_one(sanitize):
    source = (
        (sanitize.KERNELS / "torch-ext/vidsparse_kernels/block_sparse_attention/hopper.py").read_text().splitlines()
    )

    def line(text: str) -> int:
        return next(number for number, found in enumerate(source, 1) if text in found)

    def report(write: int) -> str:
        access = "access at block_sparse_forward_hopper_kernel+0x100 in hopper.py"
        start = line("def block_sparse_forward_hopper_kernel(")
        return (
            f"========= Error: Race reported between Read {access}:{start}\n"
            f"=========     and Write {access}:{write} [11 hazards]\n"
        )

    roles, tile = line("gl.warp_specialize("), line("o_smem.index(consumer)")
    end = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"
    found = sanitize.outcome(report(roles) + end.format(1, 1), 0, "racecheck")
    assert (found["errors"], found["role_bytes"]) == (0, 1) and "Race" in found["says"]
    found = sanitize.outcome(report(roles) + report(tile) + end.format(2, 2), 0, "racecheck")
    assert (found["errors"], found["role_bytes"]) == (1, 1)


def test_wrong_names_exit_with_2(sanitize, capsys):
    assert sanitize.main(["--families", "forwards"]) == 2
    assert sanitize.main(["--tools", "memchk"]) == 2
    assert '"forwards"' in capsys.readouterr().err
