"""`vidsparse bench`: right results first, then times; rows are appended; a wrong kernel stops it."""

from __future__ import annotations

import csv
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from vidsparse.cli import BAD_INPUT, BUG, OK, main
from vidsparse_kernels.testing import make_block_mask, make_qkv, masked_attention_oracle
from vidsparse_pipelines import bench

SMALL = "bench --device cpu --grid 4x8x12 --heads 2 --head-dim 32 --milliseconds 2".split()


def test_rows_of_all_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "rows.csv"
    assert main([*SMALL, "--density", "0.3,0.6", "--csv", str(file)]) == OK
    out = capsys.readouterr().out
    assert "results are right" in out and "one attention call" in out and "one transformer block" in out
    assert "a denoising loop" in out
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == bench.COLUMNS
    names = [(row["level"], row["name"]) for row in rows]
    assert names.count(("kernel", "sparse sdpa")) == 2
    assert ("kernel", "sparse, selected from q and k") in names and ("kernel", "sparse, radial mask built") in names
    for level in ("block", "pipeline"):
        assert names.count((level, "pooled")) == 2 and (level, "stock") in names
    sparse = [row for row in rows if row["level"] == "pipeline" and row["name"] == "pooled"]
    assert [round(float(row["density"]), 1) for row in sparse] == [0.3, 0.6] and "2 steps" in sparse[0]["counts"]
    for row in rows:
        assert 0 < float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"])
        assert row["tokens"] == "384" and row["torch"] == torch.__version__
        # Only the dense ones have nothing to be compared with.
        assert (row["speedup"] == "") == (row["name"] == "stock" or row["name"].startswith("dense"))
    kernel = next(row for row in rows if row["name"] == "sparse sdpa")
    flops = 4 * 384**2 * 2 * 32 * float(kernel["density"])
    assert float(kernel["tflops"]) == pytest.approx(flops / float(kernel["ms"]) / 1e9, rel=0.05, abs=1e-4)
    before = file.read_text()
    assert main([*SMALL, "--level", "block", "--csv", str(file)]) == OK
    after = file.read_text()
    assert after.startswith(before) and after.count("ms_p20") == 1


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--level", "kernel", "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["environment"]["packages"]["torch"] == torch.__version__
    assert {row["level"] for row in data["rows"]} == {"kernel"}
    assert any("triton" in note for note in data["notes"])


def test_a_wrong_kernel_stops_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench.block_sparse_attention

    def wrong(*args: Any, **options: Any) -> Any:
        out = real(*args, **options)
        return out if options.get("backend") != "sdpa" else out * 1.001

    monkeypatch.setattr(bench, "block_sparse_attention", wrong)
    file = tmp_path / "rows.csv"
    assert main([*SMALL, "--csv", str(file)]) == BUG
    out, err = capsys.readouterr()
    assert "so no speed is reported" in err and out == "" and not file.exists()


@pytest.mark.parametrize("level", ["block", "pipeline"])
def test_a_wrong_model_stops_it(
    level: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = import_module("vidsparse.attention")
    real = attention.block_sparse_attention

    def wrong(*args: Any, **options: Any) -> Any:
        out = real(*args, **options)
        return out * 1.5 if isinstance(out, torch.Tensor) else (out[0] * 1.5, out[1])

    monkeypatch.setattr(attention, "block_sparse_attention", wrong)
    assert main([*SMALL, "--level", level]) == BUG
    assert "every pair kept is off by" in capsys.readouterr().err


def test_sampled_rows_find_a_wrong_row() -> None:
    query, key, value = make_qkv(seq_len_q=200, head_dim=16)
    mask = make_block_mask(seq_len_q=200, q_block_size=64, kv_block_size=64, empty_rows=True)
    out = masked_attention_oracle(query, key, value, mask, dtype=torch.float32)[0]
    bench.check_rows(out, query, key, value, mask, "output")
    out[:, 199, 1, 0] += 1e-3
    with pytest.raises(bench.WrongResult, match="so no speed is reported"):
        bench.check_rows(out, query, key, value, mask, "output")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--level", "layer"], "--level must be kernel or block or pipeline"),
        (["--density", "2"], "must be in (0, 1]"),
        (["--density", "x"], "--density must be a number"),
        (["--methods", "radical"], "must be one of radial"),
        (["--grid", "4x8"], "use FRAMESxHEIGHTxWIDTH"),
        (["--heads", "0"], "--heads must be at least 1"),
        (["--milliseconds", "0"], "must be above 0"),
        (["--device", "tpu"], "unknown"),
    ],
)
def test_bad_input(more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *more]) == BAD_INPUT
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_csv_of_others_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("a,b\n1,2\n")
    assert main([*SMALL, "--csv", str(file)]) == BAD_INPUT
    assert "has other columns" in capsys.readouterr().err and file.read_text() == "a,b\n1,2\n"
    assert main([*SMALL, "--csv", str(tmp_path)]) == BAD_INPUT
    assert "is a folder" in capsys.readouterr().err
