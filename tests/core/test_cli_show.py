"""`vidsparse show`: what is drawn is what the mask computes; files are whole; bad input is one sentence."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vidsparse import LatentGrid, RadialProcessor, TokenLayout
from vidsparse.cli import BAD_INPUT, OK, main
from vidsparse.plots import View, middle_token
from vidsparse_kernels.testing import make_variable_block_mask, token_mask
from vidsparse_pipelines.testing import save_tiny_wan

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")


@pytest.mark.parametrize("token", [0, 77, 5 * 6 * 7 - 1])
def test_reach_is_the_row_of_the_token_mask(token: int) -> None:
    processor = RadialProcessor(block_size=16, decay_factor=0.5)
    layout = processor.layout(LatentGrid(5, 6, 7), 3, 4)
    mask, _ = processor.build_mask(layout, None)
    view = View(mask, layout)
    row = token_mask(mask)[0, 0, 3 + token, 3 : 3 + 210]
    assert torch.equal(view.reach(token), row.view(5, 6, 7))
    assert 0 < view.reach(77).float().mean() < 1
    assert view.head_density() == pytest.approx([mask.token_density])


def test_reach_through_token_orders_and_variable_blocks() -> None:
    """In the order of the mask, head by head, compared with the tokens moved back one by one."""
    grid, text = LatentGrid(3, 4, 5), 6
    layout = TokenLayout(grid, text_before=text)
    total = text + grid.num_tokens
    mask = make_variable_block_mask(
        seq_len_q=total, num_q_blocks=7, num_kv_blocks=9, num_heads=2, offsets_heads=2, q_block_size=16,
        kv_block_size=16,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    q_order, kv_order = (
        torch.stack([torch.randperm(60, generator=generator) for _ in range(2)])[None].int() for _ in range(2)
    )
    view = View(mask, layout, q_order, kv_order)
    tokens = token_mask(mask)
    for head in (0, 1):
        for token in (0, 31, 59):
            position = q_order[0, head].tolist().index(token)
            wanted = torch.zeros(60, dtype=torch.bool)
            for place, key in enumerate(kv_order[0, head].tolist()):
                wanted[key] = tokens[0, head, text + position, text + place]
            assert torch.equal(view.reach(token, head).flatten(), wanted)
        density = tokens[0, head].double().mean()
        assert view.head_density()[head] == pytest.approx(float(density))
        offsets = mask.offsets("kv")[0, head].tolist()
        first = int(view.blocks_of_tokens(head).flatten()[kv_order[0, head, 0]])
        assert offsets[first] <= text < offsets[first + 1]


def test_png_and_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures"
    assert main(f"show --grid 9x8x8 --density 0.5 --token 4,2,3 -o {out}".split()) == OK
    assert capsys.readouterr().out.splitlines() == [str(out / "show.png"), str(out / "show.html")]
    assert sorted(p.name for p in out.iterdir()) == ["show.html", "show.png"]
    assert Image.open(out / "show.png").size[0] > 600
    page = (out / "show.html").read_text()
    assert "9x8x8, 576 tokens" in page and "density=0.5" in page
    image = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert image and Image.open(io.BytesIO(base64.b64decode(image[1]))).format == "PNG"
    # Nothing is fetched from elsewhere.
    assert "http" not in page and page.count("src=") == 1


def test_the_grid_of_a_model(tmp_path: Path) -> None:
    assert main(f"show --model wan-1.3b --frames 17 -o {tmp_path / 'a.html'}".split()) == OK
    assert "5x30x52, 7,800 tokens" in (tmp_path / "a.html").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


@pytest.mark.parametrize("method", ["pooled", "semantic"])
def test_selecting_methods_are_drawn_from_a_run(method: str, tmp_path: Path) -> None:
    model = save_tiny_wan(tmp_path / "tiny")
    run = f"show --sparse {method} --density 0.4 --model {model} --size 64x64 --frames 17 --steps 4"
    assert main([*run.split(), "--head", "1", "-o", str(tmp_path / "a.html")]) == OK
    page = (tmp_path / "a.html").read_text()
    # The last step, and the only layer of two that is not dense.
    assert f"{method} on a latent grid of 5x4x4, step 3, layer 1" in page
    densities = re.search(r"density of all pairs</th><td>([\d., ]+)<", page)
    assert densities and len(densities[1].split(",")) == 2
    assert all(0.1 < float(value) < 0.9 for value in densities[1].split(","))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["show", "--grid", "9x8x8"]) == BAD_INPUT
    err = capsys.readouterr().err
    assert "pip install 'vidsparse[plot]'" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--grid 9x8", "use FRAMESxHEIGHTxWIDTH"),
        ("--grid 9x8x8 --token 9,0,0", "outside the grid 9x8x8"),
        ("--grid 9x8x8 --token 9", "use FRAME,ROW,COLUMN"),
        ("--grid 9x8x8 --head 1", "--head must be from 0 to 0"),
        ("--grid 9x8x8 -o a.pdf", "must end in .png or .html"),
        ("--grid 9x8x8 --sparse pooled", "drawn from a run"),
        ("--grid 9x8x8 --sparse nothing", "'nothing' is unknown"),
        ("--model nothing", "is unknown; give one of"),
        ("--model wan-14b --frames 0", "at least 1"),
    ],
)
def test_bad_input(
    arguments: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", *arguments.split()]) == BAD_INPUT
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_the_middle_token() -> None:
    assert middle_token(LatentGrid(21, 30, 52)) == 10 * 1560 + 15 * 52 + 26


def make_run(folder: Path, method: str = "pooled") -> Path:
    model = save_tiny_wan(folder / "tiny")
    run = f"generate -p stars --model {model} --size 64x64 --frames 17 --steps 4 --seed 3 --sparse {method} --quiet"
    insist = [] if method == "dense" else ["--min-tokens", "0"]
    assert main([*run.split(), *insist, "-o", str(folder / "clip.mp4")]) == OK
    return folder / "clip.json"


@pytest.mark.parametrize("method", ["dense", "radial", "semantic"])
def test_a_run_is_repeated_and_drawn(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, method)
    capsys.readouterr()
    out = tmp_path / "pictures"
    assert main(f"show --from-run {run} --head 1 --layer 1 -o {out}".split()) == OK
    assert capsys.readouterr().out.splitlines() == [str(out / "show.png"), str(out / "show.html")]
    page = (out / "show.html").read_text()
    # 60 % of four steps.
    assert "step 2 of 4, layer 1, branch cond, head 1" in page and "http" not in page
    recalls = re.search(r"recall by head</th><td>([^<]+)<", page)
    assert recalls
    if method == "dense":
        assert recalls[1] == "1 (dense)"
    else:
        assert all(0.05 < float(value) <= 1 for value in recalls[1].split(", "))
    assert Image.open(out / "show.png").size[1] > 900


def test_what_is_recorded_is_the_call(tmp_path: Path) -> None:
    """Energy, maps and recall of the recorded query and key against plain softmax over all pairs."""
    from vidsparse.run_plots import recall
    from vidsparse_pipelines.record_run import record_run

    run = record_run(make_run(tmp_path), layer=1, step=3)
    call, grid = run.call, run.call.layout.grid
    assert run.frames.shape[0] == grid.frames == 5 and run.selection is not None
    n = grid.num_tokens
    weights = (call.query[:, 0] @ call.key[:, 0].T * call.query.shape[-1] ** -0.5).softmax(-1) * n
    places = torch.arange(n)
    t, h, w = places // 16, places % 16 // 4, places % 4
    apart = (t[:, None] - t).abs()
    near = ((h[:, None] - h) ** 2 + (w[:, None] - w) ** 2).float().sqrt().long()
    by_time, by_space = call.energy(0)
    assert by_time.tolist() == pytest.approx([float(weights[apart == d].mean()) for d in range(5)], rel=1e-4)
    assert by_space.tolist() == pytest.approx([float(weights[near == d].mean()) for d in range(5)], rel=1e-4)
    assert torch.allclose(call.attention_map(0), weights, rtol=1e-3, atol=1e-5)
    assert torch.allclose(call.token_map(37, 0).flatten(), weights[37], rtol=1e-4)
    view = View(run.selection.block_mask, call.layout)
    kept = token_mask(run.selection.block_mask)[0, 0]
    sampled = torch.arange(24) * n // 24
    assert recall(call, view, 0) == pytest.approx(
        float(((weights * kept).sum(1) / weights.sum(1))[sampled].mean()), rel=1e-4
    )
    assert call.clusters(0).shape == (5, 4, 4)


def test_a_run_of_another_model_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    weights = next((tmp_path / "tiny" / "transformer").glob("*.safetensors"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    save_file({name: x + 0.01 if x.is_floating_point() else x for name, x in tensors.items()}, weights)
    capsys.readouterr()
    assert main(["generate", "--config", str(run), "--quiet", "-o", str(tmp_path / "again.mp4")]) == OK
    assert "has changed since this run was made" in capsys.readouterr().err
    assert main(["show", "--from-run", str(run), "-o", str(tmp_path / "a.html")]) == OK
    assert "has changed since this run was made" in (tmp_path / "a.html").read_text()


def test_run_files_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    path = tmp_path / "clip.json"
    path.write_text(json.dumps({"format": "vidsparse-run", "format_version": 7, "settings": {"prompt": "x"},
                                "versions": {"vidsparse": "9.1"}}))  # fmt: skip
    for command in (["show", "--from-run", str(path)], ["generate", "--config", str(path)]):
        assert main(command) == BAD_INPUT
        err = capsys.readouterr().err
        assert "vidsparse 9.1" in err and "make the video anew" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--from-run nothing.json", "cannot be read"),
        ("--from-run clip.txt", "is not JSON"),
        ("--from-run other.json", "is no run file"),
        ("--from-run other.json --grid 9x8x8", "leave --grid out"),
        ("--from-run other.json --density 0.2", "leave --density out"),
    ],
)
def test_bad_run_files(
    arguments: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clip.txt").write_text("no json")
    Path("other.json").write_text("{}")
    assert main(["show", *arguments.split()]) == BAD_INPUT
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
