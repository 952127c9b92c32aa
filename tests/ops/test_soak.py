"""The soak script: right backends pass, a wrong one is caught, and a failure can be run again."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
OPTIONS = ["--device", "cpu", "--backends", "reference,sdpa", "--max-tokens", "100", "--combinations", "20"]


@pytest.fixture
def soak(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("soak_block_sparse")


@pytest.fixture
def cases(soak) -> ModuleType:
    return sys.modules["soak_cases"]


def run(soak: ModuleType, tmp_path: Path, *options: str) -> tuple[int, dict]:
    output = tmp_path / "soak.json"
    code = soak.main([*OPTIONS, "--output", str(output), *options])
    return code, json.loads(output.read_text())


def perturb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the backend "sdpa" wrong by 3 %."""
    attend = sys.modules["soak_checks"].block_sparse_attention

    def wrong(*arguments, backend, **options):
        out = attend(*arguments, backend=backend, **options)
        return 1.03 * out if backend == "sdpa" and isinstance(out, torch.Tensor) else out

    monkeypatch.setattr(sys.modules["soak_checks"], "block_sparse_attention", wrong)


def test_backends_of_the_cpu_pass(soak, tmp_path):
    code, report = run(soak, tmp_path, "--cases", "60", "--seconds", "300")
    assert code == 0 and report["num_failures"] == 0 and report["failures"] == []
    assert report["cases"] == 60
    reference, sdpa = report["backends"]["reference"], report["backends"]["sdpa"]
    assert reference["forward"] + reference["backward"] == 60 and reference["not_done"] == {}
    assert reference["backward"] > 20 and reference["variable"] > 5 and reference["repeated"] == 2
    assert sdpa["forward"] > 20 and sdpa["backward"] == 0
    assert 'backend "sdpa" has no backward' in sdpa["not_done"]
    assert set(reference["by_dtype"]) == {"bfloat16", "float16", "float32"}
    assert set(reference["worst"]) == {"output", "lse", *(f"gradient of {x}" for x in ("query", "key", "value"))}
    assert all(0 < worst["ratio"] <= 1 for worst in reference["worst"].values())


def test_a_wrong_kernel_is_caught_and_its_case_reproduces(soak, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        perturb(patch)
        code, report = run(soak, tmp_path, "--cases", "40", "--seconds", "300")
        assert code == 1 and report["num_failures"] > 0
        assert {failure["backend"] for failure in report["failures"]} == {"sdpa"}
        first = report["failures"][0]
        assert "output: " in first["error"]
        command = shlex.split(first["reproduce"])
        assert command[:2] == ["python", "scripts/soak_block_sparse.py"]
        output = tmp_path / "again.json"
        assert soak.main([*command[2:], "--output", str(output)]) == 1
        (again,) = json.loads(output.read_text())["failures"]
        assert again == first
    assert soak.main(command[2:]) == 0


def test_an_element_that_nobody_wrote_is_caught(soak, tmp_path, monkeypatch):
    attend = sys.modules["soak_checks"].block_sparse_attention

    def incomplete(query, *arguments, backend, **options):
        result = attend(query, *arguments, backend=backend, **options)
        if backend == "sdpa" and query.shape[1] > 1:
            out = torch.empty(query.shape, dtype=query.dtype)
            out[:, :-1] = result[:, :-1]
            return out
        return result

    monkeypatch.setattr(sys.modules["soak_checks"], "block_sparse_attention", incomplete)
    code, report = run(soak, tmp_path, "--cases", "20", "--seconds", "300", "--kind", "uniform")
    assert code == 1
    assert all("output: not finite" in failure["error"] for failure in report["failures"])


def test_an_error_is_a_failure_and_the_run_goes_on(soak, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(sys.modules["soak_checks"], "block_sparse_attention", broken)
    code, report = run(soak, tmp_path, "--cases", "15", "--seconds", "300")
    assert code == 1 and report["cases"] == 15 and report["num_failures"] == 30
    assert len(report["failures"]) == 20
    assert report["failures"][0]["error"] == "RuntimeError: no kernel image"


def test_lengths_and_layouts_stay_within_what_is_compiled(soak, cases):
    """All cases of one combination look the same to Triton, or the run would compile all the time."""
    arguments = soak.parse([*OPTIONS, "--max-tokens", "500"])
    pool = cases.make_pool(arguments)
    assert len(pool) == 20 and len({c.head_dim for c in pool}) > 6
    for combination in pool:
        key = cases.compile_key(combination, combination.seq_len_q, combination.seq_len_kv)
        for lengths in cases.lengths_alike(combination, 500):
            assert cases.compile_key(combination, *lengths) == key
    assert sum(len(cases.lengths_alike(c, 500)) for c in pool) > 500
    case = cases.make_case(arguments, pool, 0)
    for x, layout, shape in zip(
        case.tensors, case.combination.layouts, case.combination.shapes(*case.about["seq_len"]), strict=False
    ):
        assert tuple(x.shape) == shape
        strides, _ = cases.strides_of(layout, shape)
        assert [cases._kind(n) for n in x.stride()] == [cases._kind(n) for n in strides]


@pytest.mark.parametrize("layout", ["large batch", "large tokens", "large heads"])
def test_large_layouts_lead_beyond_int32_within_the_buffer(cases, layout):
    for shape in ((2, 1500, 4, 128), (2, 2, 2, 128), (2, 77, 2, 128)):
        strides, _ = cases.strides_of(layout, shape)
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        assert 2**31 < last < cases.LARGE_ELEMENTS - 4 * (1 << 23)
        # Four tensors of a case lie side by side.
        room = 1 << (14 if layout == "large tokens" else 23)
        dim = cases.LARGE_DIMS[layout]
        assert sum((n - 1) * s for i, (n, s) in enumerate(zip(shape, strides, strict=True)) if i != dim) < room
        assert 4 * room <= strides[dim]


def test_shared_out_cases_are_the_same_cases(soak, tmp_path):
    """Two processes find what one does, and each case is run by exactly one of them."""
    options = ["--cases", "8", "--seconds", "300", "--combinations", "3"]
    # The processes have one thread each, and sums of several round otherwise.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _, alone = run(soak, tmp_path, *options)
    finally:
        torch.set_num_threads(threads)
    code, shared = run(soak, tmp_path, *options, "--workers", "2")
    assert code == 0 and shared["cases"] == 8 and shared["stopped"] is None
    assert shared["backends"] == alone["backends"]


def test_a_worker_that_dies_is_a_failure(soak, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    code, report = run(soak, tmp_path, "--cases", "30", "--seconds", "300", "--workers", "2")
    assert code == 1 and report["cases"] == 0
    assert report["stopped"].startswith("worker 0 ended with code 1 and reported nothing; worker 1")


@pytest.mark.parametrize(
    "options",
    [["--backends", "cuddn"], ["--case", "7"], ["--large"], ["--workers", "-1"], ["--dtypes", "bf16"]],
    ids=["backend", "case", "large", "workers", "dtypes"],
)
def test_wrong_arguments_exit_with_2(soak, capsys, options):
    assert soak.main([*OPTIONS, *options]) == 2
    assert "--" in capsys.readouterr().err
