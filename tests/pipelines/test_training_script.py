"""The training script computes what diffusers computes, and resumes."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("train_tiny_model")


@torch.no_grad()
def test_whole_clips_equal_chunks(script: ModuleType) -> None:
    c = script.SMOKE
    torch.manual_seed(0)
    chunked, whole = script.build_vae(c).eval(), script.build_vae(c).eval()
    whole.load_state_dict(chunked.state_dict())
    script.whole_clip_mode(whole)
    _, clips = script.draw(c, random.Random(0), 2, c.small, torch.device("cpu"))
    posterior = chunked.encode(clips).latent_dist
    mean, logvar = script.encode_moments(whole, clips)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-5, rtol=1e-5)
    out = script.decode_whole(whole, mean).clamp(-1, 1)
    assert out.shape[2] == c.num_frames
    torch.testing.assert_close(out, chunked.decode(mean).sample, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("padded_to", [64, 512])
def test_transformer_forward_equals_the_pipelines(script: ModuleType, padded_to: int) -> None:
    """One padding column with a bias stands for all that WanPipeline attends to."""
    c = script.SMOKE
    torch.manual_seed(0)
    tokenizer = script.build_tokenizer()
    model, encoder = script.build_transformer(c), script.build_text_encoder(c, len(tokenizer)).eval()
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    pipe = script.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=script.build_vae(c),
        scheduler=script.UniPCMultistepScheduler(),
        transformer=model,
    )
    captions = ["a red star spins on a black background", "a large blue ring"]
    latents, sigma = torch.randn(2, c.z_dim, 5, 4, 6), torch.tensor([0.3, 0.8])
    text, lengths = script.encode_text(tokenizer, encoder, captions, c, torch.device("cpu"))
    bias = script.text_bias(lengths, c.text_length, padded_to)
    out = script.transformer_forward(model, script.block_forward, latents, sigma, text, bias)
    embeds, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=padded_to)
    torch.testing.assert_close(out, model(latents, sigma * 1000, embeds).sample, atol=1e-5, rtol=1e-4)


def test_orthogonalize_gives_singular_values_near_one(script: ModuleType) -> None:
    for shape in ((3, 24, 40), (2, 40, 24)):
        values = torch.linalg.svdvals(script.orthogonalize(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.4


@pytest.mark.slow
def test_an_interrupted_training_goes_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, output = tmp_path / "work", tmp_path / "model"
    arguments = ["train", "--smoke", "--device", "cpu", "--work-dir", str(work), "--output", str(output)]
    for item in ("vae_seconds=4", "dit_seconds=2", "cached_small=8", "cached_large=4", "num_frames=9"):
        arguments += ["--set", item]
    monkeypatch.setattr(sys, "argv", [*arguments, "--stop-after", "1"])
    script.main()
    assert not output.exists() and (work / "vae_state.safetensors").exists()
    first = json.loads((work / "clock.json").read_text())["vae"]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    spent = json.loads((output / "training.json").read_text())["seconds"]
    assert spent["vae"] > first > 0 and spent["dit"] >= 2
    assert (output / "model_index.json").exists() and not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(sys, "argv", [*arguments, "--seed", "1"])
    with pytest.raises(SystemExit, match="another configuration"):
        script.main()
