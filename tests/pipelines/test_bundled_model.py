"""The bundled model as a stranger gets it: sizes, format, card, reconstruction, and stock diffusers alone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vidsparse.errors import ModelLoadError
from vidsparse_pipelines import bundled_model_path
from vidsparse_pipelines.bundled import BUNDLED_MODEL, bundled_adapters
from vidsparse_pipelines.clips import render, sample_params, vocabulary
from vidsparse_pipelines.clips.grammar import sample_split
from vidsparse_pipelines.clips.metrics import psnr
from vidsparse_pipelines.load import load_pipeline
from vidsparse_pipelines.lora import LoraSpec, find_lora_file, load_loras, settings_for
from vidsparse_pipelines.model_info import inspect_model

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(bundled_model_path())


def test_files_fit_the_package(folder: Path) -> None:
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    assert max(sizes) <= 16 * MEBIBYTE
    assert sum(sizes) <= 32 * MEBIBYTE
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def test_card_lists_every_file_with_its_hash(folder: Path) -> None:
    lines = re.findall(r"^([0-9a-f]{64})  (.+)$", (folder / "README.md").read_text(), re.MULTILINE)
    listed = {name: digest for digest, name in lines}
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"}
    assert listed == {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}


def test_tokenizer_knows_the_grammar_and_nothing_else(folder: Path) -> None:
    tokens = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    assert set(tokens) == {"<pad>", "</s>", "<unk>", *vocabulary()}


def test_stock_diffusers_loads_and_runs_it(folder: Path) -> None:
    """In a process that cannot import vidsparse; with the pipeline's default text length of 512."""
    code = f"""
import sys, torch
sys.modules["vidsparse"] = sys.modules["vidsparse_pipelines"] = None
from diffusers import WanPipeline
pipe = WanPipeline.from_pretrained({str(folder)!r})
pipe.set_progress_bar_config(disable=True)
out = pipe("a red star spins on a black background", height=32, width=48, num_frames=5, num_inference_steps=2,
           guidance_scale=4.0, output_type="pt", generator=torch.Generator().manual_seed(0)).frames
print(tuple(out.shape), bool(out.isfinite().all()), round(float(out.std()), 3) > 0.01)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.split("\n")[-2] == "(1, 5, 3, 32, 48) True True"


@torch.no_grad()
def test_vae_reconstructs_late_frames_as_well_as_early_ones(folder: Path) -> None:
    """Held-out clips at full length through the pipeline's own chunk-by-chunk decode."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    vae: Any = AutoencoderKLWan.from_pretrained(folder / "vae")
    rng = random.Random("reconstruction")
    specs = [sample_split(rng, held_out=True) for _ in range(2)]
    clips = render(sample_params(specs, rng, 64, 96), 81, 64, 96)
    out = torch.cat([vae.decode(vae.encode(c[None]).latent_dist.mode()).sample for c in clips])
    assert psnr(out[:, :, :9], clips[:, :, :9]).mean() > 30
    assert psnr(out[:, :, -9:], clips[:, :, -9:]).mean() > 30


def test_adapters_that_ship_fit_and_say_how_they_are_used() -> None:
    assert set(bundled_adapters()) == {"tiny-321", "tiny-4-steps"}
    settings, options, _ = settings_for((LoraSpec("tiny-4-steps"),), {})
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["sparse"]) == (4, 1.0, "radial")
    assert options["density"] == 0.5 and options["warmup_steps"] == 0
    settings, options, _ = settings_for((LoraSpec("tiny-321"),), {})
    assert (settings["num_frames"], settings["sparse"]) == (321, "pooled")
    assert (options["density"], options["dense_layers"], options["refresh_every"]) == (0.2, 0, 2)
    pipe = load_pipeline(inspect_model(BUNDLED_MODEL), dtype="float32", device="cpu", offload="none").pipe
    before = pipe.transformer.blocks[0].attn1.to_q.weight.clone()
    load_loras(pipe, (LoraSpec("tiny-4-steps", 0.5),))
    layer = pipe.transformer.blocks[0].attn1.to_q
    assert torch.equal(layer.base_layer.weight, before) and layer.lora_B["lora_0"].weight.abs().max() > 0
    with pytest.raises(ModelLoadError, match="ships with the bundled model: tiny-321, tiny-4-steps"):
        find_lora_file("tiny-5-steps")
