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


def test_numbers_handed_over_are_no_race_if_the_control_shows_the_same(sanitize, monkeypatch):
    kernel = "block_sparse_forward_hopper_kernel"

    def report(file: str, text: str) -> str:
        lines = sanitize.sources(kernel, file)[0]
        number = next(number for number, found in enumerate(lines) if text in found)
        return (
            f"========= Error: Race reported between Read access at {kernel}+0x100 in {file}:1\n"
            f"=========     and Write access at {kernel}+0x200 in {file}:{number} [3 hazards]\n"
        )

    end = "========= RACECHECK SUMMARY: 1 hazards displayed (1 errors, 0 warnings)\n"
    verdict = report("hopper.py", "verdicts.index(slot * 2 + consumer).store(") + end
    for text in (verdict, report("hopper_schedule.py", "items.index(slot).store(") + end):
        found = sanitize.outcome(text, 0, "racecheck")
        assert (found["errors"], found["handed_over"]) == (0, 1)
    assert sanitize.outcome(report("hopper.py", "o_smem.index(consumer)") + end, 0, "racecheck")["errors"] == 1

    def run(control: str) -> int:
        texts = {"hand_over": control, "hopper": verdict}

        def one_run(family, tool, deadline):
            return {"family": family, "tool": tool, **sanitize.outcome(texts[family] if tool else "", 0, tool)}

        monkeypatch.setattr(sanitize, "one_run", one_run)
        monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(sanitize.torch.cuda, "get_device_name", lambda: "a GPU")
        return sanitize.main(["--families", "hand_over,hopper", "--tools", "racecheck"])

    assert run(report("hand_over.py", "number.store(") + end) == 0
    assert run(CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed")) == 1


def test_wrong_names_exit_with_2(sanitize, capsys):
    assert sanitize.main(["--families", "forwards"]) == 2
    assert sanitize.main(["--tools", "memchk"]) == 2
    assert '"forwards"' in capsys.readouterr().err
