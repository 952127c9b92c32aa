"""Other ways through `generate`: image-to-video, a family whose VAE is decoded whole, an offloaded VAE."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vidsparse.errors import ConfigError
from vidsparse_pipelines.decode import can_stream, to_uint8
from vidsparse_pipelines.generation import generate
from vidsparse_pipelines.load import LoadedPipeline, load_pipeline
from vidsparse_pipelines.settings import GenerateSettings
from vidsparse_pipelines.testing import save_tiny_wan, tiny_tokenizer
from vidsparse_pipelines.video import read_video


def settings(model: Path, **changes: Any) -> GenerateSettings:
    base: dict[str, Any] = {
        "prompt": "a cat",
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "seed": 3,
    }
    base |= {"height": 32, "width": 64, "dtype": "float32", "device": "cpu", "sparse": "dense"}
    return GenerateSettings(model=str(model), **{**base, **changes})


def frames_of(loaded: LoadedPipeline, **call: Any) -> np.ndarray:
    """What diffusers makes by itself."""
    output = loaded.pipe(
        prompt="a cat",
        negative_prompt="",
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=2.0,
        height=32,
        width=64,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **call,
    )
    return to_uint8(np.asarray(output.frames[0]))


def save_tiny_ltx(folder: Path) -> Path:
    from transformers import T5Config, T5EncoderModel

    diffusers: Any = importlib.import_module("diffusers")
    torch.manual_seed(0)
    four = (8, 8, 8, 8)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=four,
        decoder_block_out_channels=four,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    text = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)).eval()
    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text,
        tokenizer=tiny_tokenizer(),
        transformer=transformer,
    )
    pipe.save_pretrained(folder)
    return folder


def test_family_with_its_own_decode(tmp_path: Path) -> None:
    model = save_tiny_ltx(tmp_path / "ltx")
    loaded = load_pipeline(str(model), dtype="float32", device="cpu")
    assert not can_stream(loaded.pipe)
    result = generate(settings(model, num_frames=8, fps=25), tmp_path / "out" / "clip.png", loaded=loaded)
    assert result.notes[0].startswith("8 frames became 9") and "8k+1" in result.notes[0]
    assert np.array_equal(read_video(result.path), frames_of(loaded, frame_rate=25))
    with pytest.raises(ConfigError, match="use a height of 32 or 64"):
        generate(settings(model, height=48), tmp_path / "no.mp4", loaded=loaded)


def test_image_to_video(tmp_path: Path) -> None:
    model = save_tiny_wan(tmp_path / "i2v", vae_patch=None, from_image=True)
    loaded = load_pipeline(str(model), dtype="float32", device="cpu")
    assert loaded.info.takes_image and can_stream(loaded.pipe)
    picture = tmp_path / "first.png"
    pixels = np.random.default_rng(0).integers(0, 255, (32, 64, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    result = generate(settings(model, image=str(picture)), tmp_path / "out" / "clip.png", loaded=loaded)
    assert np.array_equal(read_video(result.path), frames_of(loaded, image=Image.fromarray(pixels)))
    with pytest.raises(ConfigError, match="give one with --image"):
        generate(settings(model), tmp_path / "no.mp4", loaded=loaded)
    picture.write_text("no picture")
    with pytest.raises(ConfigError, match="cannot be read"):
        generate(settings(model, image=str(picture)), tmp_path / "no.mp4", loaded=loaded)


def test_offloaded_vae_is_brought_back(tmp_path: Path) -> None:
    """Whole-model offloading hangs a hook on the VAE that only `decode` calls; the stream has to call it too."""
    from accelerate import cpu_offload_with_hook

    model = save_tiny_wan(tmp_path / "tiny", vae_patch=2)
    loaded = load_pipeline(str(model), dtype="float32", device="cpu")
    expected = frames_of(loaded)
    cpu_offload_with_hook(loaded.pipe.vae, "cpu")
    calls: list[str] = []
    hook = loaded.pipe.vae._hf_hook
    real = hook.pre_forward
    hook.pre_forward = lambda *a, **k: calls.append("moved") or real(*a, **k)
    result = generate(settings(model), tmp_path / "out" / "clip.png", loaded=loaded)
    assert calls and np.array_equal(read_video(result.path), expected)
