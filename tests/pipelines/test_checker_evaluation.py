"""The evaluation script, end to end on a random pipeline of the real classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vidsparse_pipelines.clips import vocabulary
from vidsparse_pipelines.clips.checker import Checker, CheckerConfig, save_checker, validate_checker

HEIGHT, WIDTH, FRAMES = 32, 48, 9


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("evaluate_tiny_model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("evaluation")
    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1] * 4, latents_std=[0.5] * 4, scale_factor_temporal=2, scale_factor_spatial=2,
    )  # fmt: skip
    text = UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=64,
    )  # fmt: skip
    # The pipeline's annotations name other classes than it takes.
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(
        tokenizer=fast,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    ).save_pretrained(path / "model")
    checker = Checker(CheckerConfig(height=24, width=8, scene_width=8, temporal_width=16)).eval()
    validate_checker(checker, "cpu", 4, sizes=((24, 36),), num_frames=9)
    save_checker(checker, path / "checker.safetensors")
    return path


def run(script: ModuleType, folder: Path, output: Path, *more: str) -> dict:
    arguments = (
        f"--size {HEIGHT}x{WIDTH} --frames {FRAMES} --steps 2 --batch 2 --num-prompts 2 --num-pairs 2 --device cpu"
    )
    places = [
        "--model",
        str(folder / "model"),
        "--checker",
        str(folder / "checker.safetensors"),
        "--output",
        str(output),
    ]
    script.main([*places, *arguments.split(), *more])
    return json.loads((output / "results.json").read_text())


def test_end_to_end(script, folder, tmp_path):
    method = "dense,radial:density=0.5:warmup_steps=0:dense_layers=0"
    data = run(script, folder, tmp_path, "--method", method, "--other-seed", "3", "--sheet-columns", "3")
    assert data["complete"] and len(data["clips"]) == 4
    labels = ["real", "reconstructed", *method.split(","), script.OTHER_SEED]
    assert list(data["methods"]) == labels
    dense, radial, other = (data["methods"][k] for k in labels[2:])
    for entry in (dense, radial):
        assert entry["clips"] == 4 and entry["seconds"]["denoise"] > 0 and entry["seconds"]["decode"] > 0
        assert entry["adherence"]["all_right"]["count"] == 4
        assert entry["adherence"]["one_object"]["count"] == entry["adherence"]["two_objects"]["count"] == 2
        assert entry["adherence"]["attributes"]["color"]["count"] == 6
    assert "psnr_against_dense" not in dense
    assert radial["psnr_against_dense"]["clips"] == 4 and other["psnr_against_dense"]["clips"] == 3
    assert radial["psnr_against_dense"]["mean"] > other["psnr_against_dense"]["mean"]
    low, high = radial["ssim_against_dense"]["bootstrap95"]
    assert low <= radial["ssim_against_dense"]["mean"] <= high <= 1
    assert radial["report"]["sparse_density"] < 1 and radial["report"]["num_sparse_calls"] == 4
    assert sum(radial["paired_with_dense"].values()) == 4
    assert data["checker"]["on_held_out_real_clips"]["all_right"]["count"] == 4
    assert data["methods"]["reconstructed"]["psnr_against_real"]["clips"] == 4
    assert data["command"].startswith("python scripts/evaluate_tiny_model.py --model") and data["versions"]["torch"]
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["one_object.png", "results.json", "two_objects.png"]
    width, height = Image.open(tmp_path / "two_objects.png").size
    assert width == 92 + 3 * (WIDTH + 2) and height == 2 * (16 + 3 * (HEIGHT + 2))


def test_ends_in_time_and_writes_what_it_has(script, folder, tmp_path):
    data = run(script, folder, tmp_path, "--method", "dense", "--batch", "1", "--seconds", "6", "--reserve", "5.9")
    assert not data["complete"] and len(data["clips"]) < 4
    assert {p.name for p in tmp_path.iterdir()} <= {"results.json", "one_object.png", "two_objects.png"}


def test_decoding_is_the_pipelines(script, folder):
    pipe = WanPipeline.from_pretrained(str(folder / "model"))
    pipe.set_progress_bar_config(disable=True)
    parser_values = {
        "device": "cpu",
        "size": f"{HEIGHT}x{WIDTH}",
        "frames": FRAMES,
        "steps": 2,
        "decode_batch": 1,
        "share_warmup": 0,
    }
    args = script.argparse.Namespace(**parser_values, guidance_scale=4.0, max_sequence_length=64)
    ev = script.Evaluator(pipe, Checker(CheckerConfig(24, 8, 8, 16)).eval(), args)
    prompts, seeds = ["a red star spins", "a blue ring bounces"], [3, 4]
    clips, *_ = ev.generate(script.Method("dense", "dense", {}), prompts, seeds)
    output: Any = pipe(
        prompts, height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=2, guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(s) for s in seeds], max_sequence_length=64, output_type="pt",
    )  # fmt: skip
    wanted = script.to_bytes(output.frames.transpose(1, 2) * 2 - 1)
    assert clips.shape == wanted.shape == (2, 3, FRAMES, HEIGHT, WIDTH)
    assert (clips.int() - wanted.int()).abs().max() <= 1


def test_prompts_are_held_out_and_fixed(script):
    one, two = script.draw_prompts(0, 20, 20)
    assert all(len(c.spec.objects) == 1 for c in one)
    assert all(len(c.spec.objects) == 2 for c in two)
    from vidsparse_pipelines.clips.grammar import is_held_out

    assert all(is_held_out(c.spec) for c in one + two)
    again = script.draw_prompts(0, 20, 20)
    assert [c.prompt for c in again[0]] == [c.prompt for c in one]
    assert len({c.seed for c in one + two}) == 40
    batches = script.batches_of(one[:5], two[:3], 2)
    assert [len(b) for b in batches] == [2, 2, 2, 1, 1]
    assert [len(b[0].spec.objects) for b in batches] == [1, 2, 1, 2, 1]


def test_methods(script):
    methods = script.parse_methods("radial:density=0.3:variant=release")
    assert [m.name for m in methods] == ["dense", "radial"]
    assert methods[1].options == {"density": 0.3, "variant": "release"}
    with pytest.raises(SystemExit, match="NAME:OPTION=VALUE"):
        script.parse_methods("radial:density")


def test_bootstrap_covers_the_mean(script):
    rng = Random(0)
    values = [rng.gauss(20, 2) for _ in range(200)]
    entry = script.bootstrap(values)
    low, high = entry["bootstrap95"]
    assert low < sum(values) / 200 < high and 0.4 < high - low < 0.7


def test_shared_warmup_changes_nothing(script, folder, tmp_path):
    """Going on from dense steps that another run made gives the clips that a run of its own gives."""
    method = "radial:density=0.5:dense_layers=0"
    common = ("--steps", "4", "--num-pairs", "0", "--other-seed", "0", "--no-warm-run")
    alone = run(script, folder, tmp_path / "alone", "--method", method + ":warmup_steps=2", *common)
    more = ("--method", f"{method},random:density=0.5", "--share-warmup", "2", "--baseline", method)
    shared = run(script, folder, tmp_path / "shared", *more, *common)
    for first, second in zip(alone["clips"], shared["clips"], strict=True):
        assert first["psnr"][method + ":warmup_steps=2"] == second["psnr"][method] < 90
    against = shared["methods"]["random:density=0.5"]["minus_baseline"]["psnr"]
    differences = [c["psnr"]["random:density=0.5"] - c["psnr"][method] for c in shared["clips"]]
    assert against["clips"] == 2 and abs(against["mean"] - sum(differences) / 2) < 2e-3
