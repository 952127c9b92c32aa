"""`vidsparse tune` end to end on a tiny model: what is measured, what is kept, the recipe, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vidsparse.cli import BAD_INPUT, OK, main
from vidsparse.recipe import Recipe
from vidsparse_pipelines import tune
from vidsparse_pipelines.compare import Clip
from vidsparse_pipelines.testing import save_tiny_wan
from vidsparse_pipelines.tune import Target, Tuning, clip_psnrs, prepare

SHAPE = "--size 64x64 --frames 9 --steps 2 --dtype fp32 --device cpu"
CHOICES = ("pooled:density=0.5", "pooled:density=0.25", "svg1:density=0.3:kind=temporal")
"""The last one is exact on so few tokens: a choice without error must not divide by it."""
PROMPTS = ("a red cat", "a dog walks")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("models") / "tiny")


def make(tiny: Path, folder: Path, target: Target, **changes: Any) -> Tuning:
    settings = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "dtype": "fp32", "device": "cpu"}
    options = {"choices": CHOICES, "prompts": PROMPTS, "probe_clips": 2, "price_tokens": 32_760, "model": str(tiny)}
    return prepare(folder / "recipe.json", target, **{**settings, **options, **changes})


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuning, dict[str, Any]]:
    tuning = make(tiny, tmp_path_factory.mktemp("tuned"), Target(psnr=45.0))
    return tuning, tuning.run()


def test_the_recipe_gives_what_was_said(tuned: tuple[Tuning, dict[str, Any]]) -> None:
    tuning, data = tuned
    recipe = Recipe.from_json(tuning.output.read_text())
    assert (
        recipe.tuned_for is not None
        and recipe.tuned_for.grid == tuning.calibration.grid
        and recipe.tuned_for.num_steps == 2
    )
    best = data["best"]
    assert 0.5 < best["attention"] < 0.9 and best["density"] < 1
    # What the file computes is what was measured: the same clips, the same PSNR.
    import vidsparse

    handle = vidsparse.apply(tuning.calibration.pipe(), recipe, strict=True)
    frames, _ = tuning.calibration.generate(tuning.calibration.clips)
    handle.remove()
    assert np.mean(clip_psnrs(frames, tuning.calibration.dense())) == pytest.approx(best["psnr"], abs=0.01)
    assert recipe.tuned_for.psnr == pytest.approx(best["psnr"], abs=0.01)


def test_cells_hold_the_error_of_the_call_itself(tuned: tuple[Tuning, dict[str, Any]]) -> None:
    """The same call, caught from a dense run, through the method alone."""
    from vidsparse import make_context
    from vidsparse.attention import attend
    from vidsparse.layout import TokenLayout

    tuning, _ = tuned
    caught: list[tuple[torch.Tensor, ...]] = []
    block = tuning.calibration.models[0].blocks[1].attn1
    from diffusers.models.attention_dispatch import dispatch_attention_fn as real
    from diffusers.models.transformers import transformer_wan

    def catch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rest: Any) -> torch.Tensor:
        if key.shape[1] == query.shape[1] == tuning.calibration.grid.num_tokens:
            caught.append((query, key, value))
        return real(query, key, value, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_wan, "dispatch_attention_fn", catch)
        tuning.calibration.generate(tuning.calibration.clips, decode=False)
    assert block is not None and len(caught) == 2 * 2 * 2
    # The last range is the second of two steps; two layers, two guidance branches.
    number = len(tuning.calibration.ranges) - 1
    step = (tuning.calibration.ranges[number][0] + tuning.calibration.ranges[number][1] - 1) // 2
    label = "pooled:density=0.25"
    context = make_context(TokenLayout(tuning.calibration.grid), Recipe.from_options("pooled", density=0.25), "cpu")
    squares, whole = torch.zeros(2, dtype=torch.float64), 0.0
    for branch in range(2):
        q, k, v = caught[(step * 2 + branch) * 2 + 1]
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        dense = torch.nn.functional.scaled_dot_product_attention(qt, kt, vt).transpose(1, 2)
        difference = (attend(q, k, v, context)[0] - dense).double()
        squares = squares[: q.shape[2]] + difference.square().sum((0, 1, 3))
        whole += float(dense.double().square().sum())
    measured = tuning.calibration.state["cells"][str(number)]["1"]["by_head"][label]
    assert measured == pytest.approx((squares / whole).tolist(), rel=1e-3)


def test_a_second_run_measures_nothing_again(tiny: Path, tuned: tuple[Tuning, dict[str, Any]]) -> None:
    first, data = tuned
    again = make(tiny, first.output.parent, Target(psnr=45.0))
    made: list[int] = []
    generate = again.calibration.generate
    again.calibration.generate = lambda *args, **rest: made.append(1) or generate(*args, **rest)  # type: ignore[method-assign]
    result = again.run()
    assert len(made) == len(result["rounds"]) and again.calibration.key == first.calibration.key
    assert [x["psnr"] for x in result["rounds"]] == pytest.approx([x["psnr"] for x in data["rounds"]], abs=1e-3)
    assert (
        again.calibration.state["cells"] == first.calibration.state["cells"]
        and again.calibration.state["gains"] == first.calibration.state["gains"]
    )


def test_a_new_choice_is_the_only_one_measured(tiny: Path, tuned: tuple[Tuning, dict[str, Any]]) -> None:
    first, _ = tuned
    more = make(tiny, first.output.parent, Target(share=0.6), choices=[*CHOICES, "pooled:density=0.9"])
    before = json.dumps(first.calibration.state["cells"]["0"]["0"]["by_head"]["pooled:density=0.25"])
    data = more.run()
    cell = more.calibration.state["cells"]["0"]["0"]
    assert "pooled:density=0.9" in cell["by_head"] and json.dumps(cell["by_head"]["pooled:density=0.25"]) == before
    assert data["best"]["attention"] <= 0.6 and data["best"]["psnr"] < 60


def test_looking_changes_nothing(tuned: tuple[Tuning, dict[str, Any]]) -> None:
    """Models are as before: no hook, no forward of ours, and dense clips come out as the first ones did."""
    tuning, _ = tuned
    for model in tuning.calibration.models:
        assert "forward" not in vars(model) and not model._forward_pre_hooks
    frames, _ = tuning.calibration.generate(tuning.calibration.clips)
    assert np.array_equal(frames, tuning.calibration.dense())


def test_a_replay_gives_back_the_generation(tuned: tuple[Tuning, dict[str, Any]]) -> None:
    tuning, _ = tuned
    replay = tuning.calibration.recorded()
    computed: list[int] = []
    hook = tuning.calibration.models[0].blocks[0].register_forward_hook(lambda *_: computed.append(1))
    with replay.replaying(tuning.calibration.models, 3):
        frames, _ = tuning.calibration.generate(tuning.calibration.clips)
    hook.remove()
    assert np.array_equal(frames, tuning.calibration.dense()) and len(computed) == len(replay.outputs) - 3


@pytest.mark.parametrize("rule", ["sparse-vdit", "sparge"])
def test_the_rules_make_recipes_too(tiny: Path, tuned: tuple[Tuning, dict[str, Any]], rule: str) -> None:
    choices = [
        "svg1:density=0.3:kind=temporal",
        "svg1:density=0.3:kind=spatial",
        "pooled:top_p=0.5",
        "pooled:top_p=0.9",
    ]
    tuning = make(tiny, tuned[0].output.parent, Target(share=0.9), choices=choices, rule=rule)
    data = tuning.run()
    table = Recipe.from_json(tuning.output.read_text()).config.table
    assert data["best"]["attention"] >= 0.85 and len({row[-1] for row in table}) >= 1
    assert all(cell == table[0][0] for cell in table[0])  # the first layer is dense


def test_generate_and_compare_use_the_file(
    tiny: Path, tuned: tuple[Tuning, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(tuned[0].calibration.recipe(tuned[0].rounds[0]["table"]).to_json())
    clip = tmp_path / "clip.mp4"
    assert (
        main(["generate", "--recipe", str(file), "-p", "a cat", "-o", str(clip), "--dtype", "fp32", "--strict"]) == OK
    )
    document = json.loads(clip.with_suffix(".json").read_text())
    settings = document["settings"]
    assert (settings["sparse"], settings["width"], settings["num_frames"], settings["num_inference_steps"]) == (
        "tuned",
        64,
        9,
        2,
    )
    assert document["report"]["num_sparse_calls"] > 0 and set(document["report"]["dense_calls"]) <= {
        "dense in the recipe"
    }
    # The JSON beside the video makes it again, without the recipe's file.
    file.rename(tmp_path / "moved.json")
    capsys.readouterr()
    assert (
        main(["generate", "--config", str(clip.with_suffix(".json")), "-o", str(tmp_path / "again.mp4"), "-q"]) == OK
    )
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["settings"] == settings
    text = f"compare --model {tiny} {SHAPE} -p cat --no-floor -q -o {tmp_path / 'out'} -r {tmp_path / 'moved.json'}"
    assert main(text.split()) == OK
    methods = json.loads((tmp_path / "out" / "compare.json").read_text())["methods"]
    assert 20 < methods[str(tmp_path / "moved.json")]["psnr"]["mean"] < 90


def bad(capsys: pytest.CaptureFixture[str], command: str) -> str:
    assert main(command.split()) == BAD_INPUT
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err and err.count("\n") == 1, err
    return err


def test_a_recipe_for_something_else_is_refused(
    tiny: Path, tuned: tuple[Tuning, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(tuned[0].calibration.recipe(tuned[0].rounds[0]["table"]).to_json())
    ask = f"generate --recipe {file} -p cat -o {tmp_path / 'no.mp4'}"
    assert "whose weights are not those of" in bad(capsys, f"{ask} --model vidsparse-tiny")
    assert "tuned for 24 to 96 video tokens (grid 3x4x4), this video has 112" in bad(capsys, f"{ask} --frames 25")
    assert "tuned for 1 to 4 steps, got 9" in bad(capsys, f"{ask} --steps 9")
    assert "Give --recipe or --sparse, not both" in bad(capsys, f"{ask} --sparse radial")
    assert "Give --recipe or --density, not both" in bad(capsys, f"{ask} --density 0.3")
    assert "cannot be read" in bad(capsys, f"generate --recipe {tmp_path / 'none.json'} -p cat")
    file.write_text("{}")
    assert "is no recipe of this version" in bad(capsys, ask)
    assert "make one with `vidsparse tune`" in bad(capsys, f"generate --sparse tuned --model {tiny} -p cat {SHAPE}")
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "Give one target"),
        ("--target-psnr 28 --max-time 3", "Give one target"),
        ("--target-psnr x", "--target-psnr must be a number"),
        ("--target-psnr -3", "must be a number above 0"),
        ("--max-attention 1.5", "must be in (0, 1]"),
        ("--target-psnr 28 --rule best", "use one of budget, sparse-vdit, sparge"),
        ("--target-psnr 28 -c dense", "cannot be a choice"),
        ("--target-psnr 28 -c pooled:refresh_every=3", "cannot be a choice"),
        ("--target-psnr 28 -c nosuch", "must be one of radial"),
        ("--target-psnr 28 -o recipe.yaml", "A recipe is a .json file"),
        ("--target-psnr 28 --prompts 0", "--prompts must be above 0"),
    ],
)
def test_bad_input_is_one_sentence(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in bad(capsys, f"tune {options}")


def test_targets_out_of_reach_say_what_is_within(tiny: Path, tuned: tuple[Tuning, dict[str, Any]]) -> None:
    folder = tuned[0].output.parent
    with pytest.raises(
        tune.ConfigError, match=r"leaves every call dense; .* about \d+\.\d dB at \d+% of the attention"
    ):
        make(tiny, folder, Target(psnr=140.0), choices=CHOICES[:2]).run()
    with pytest.raises(
        tune.ConfigError, match=r"attention time of 1% cannot be reached; the fastest table here takes \d+%"
    ):
        make(tiny, folder, Target(share=0.01)).run()
    with pytest.raises(tune.ConfigError, match="cannot go with --price-tokens"):
        make(tiny, folder, Target(seconds=0.01)).run()
    with pytest.raises(tune.ConfigError, match=r"takes only 1e-06 s here|cannot take only 1e-06 s here"):
        make(tiny, folder, Target(seconds=1e-6), price_tokens=None).run()
    with pytest.raises(tune.ConfigError, match="Dense attention takes .* give a --max-time below that"):
        make(tiny, folder, Target(seconds=1e6), price_tokens=None).run()


def test_little_time_means_fewer_clips(tiny: Path, tmp_path: Path) -> None:
    tuning = make(
        tiny, tmp_path, Target(share=0.7), prompts=["a cat", "a dog", "a red dog", "a blue cat"], probe_clips=1,
        budget_seconds=0.01, choices=CHOICES[:1],
    )  # fmt: skip
    data = tuning.run()
    assert data["clips"] == 1 and len(data["rounds"]) == 1
    assert [clip.prompt for clip in tuning.calibration.clips] == ["a cat"] and isinstance(
        tuning.calibration.clips[0], Clip
    )
