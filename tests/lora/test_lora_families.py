"""Every family that can be trained: what its model gets is what its pipeline gives it, and stock diffusers loads the result."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vidsparse.errors import ConfigError, UnsupportedModelError
from vidsparse_lora import length_extension
from vidsparse_lora.config import DistillConfig, LengthExtensionConfig
from vidsparse_lora.distill import sparsify_loss
from vidsparse_lora.families import FAMILIES, Backbone, family_of, inspect_trainable
from vidsparse_lora.objective import sample_sigma
from vidsparse_lora.session import Session
from vidsparse_pipelines.lora import LoraSpec, load_loras, read_training
from vidsparse_pipelines.testing import tiny_tokenizer, tiny_wan_pipeline

diffusers: Any = importlib.import_module("diffusers")
TEXT: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1}


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, **TEXT)).eval()


def ltx() -> Any:
    four = (8, 8, 8, 8)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=four,
        decoder_block_out_channels=four,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.LTXPipeline(
        scheduler=scheduler, vae=vae, text_encoder=t5(), tokenizer=tiny_tokenizer(), transformer=transformer
    )


def cogvideox() -> Any:
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=17,
        max_text_seq_length=32,
        use_rotary_positional_embeddings=True,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return diffusers.CogVideoXPipeline(
        tokenizer=tiny_tokenizer(), text_encoder=t5(), vae=vae, transformer=transformer, scheduler=scheduler
    )


def hunyuan() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    llama = LlamaModel(LlamaConfig(num_hidden_layers=3, bos_token_id=2, **sizes, **TEXT)).eval()
    clip = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, **{**sizes, "hidden_size": 8}, **TEXT)).eval()
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=tiny_tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip,
        tokenizer_2=tiny_tokenizer(),
    )


def wan_two_experts() -> Any:
    pipe, other = tiny_wan_pipeline(), tiny_wan_pipeline(seed=1)
    parts = {k: v for k, v in pipe.components.items() if k != "transformer_2"}
    return diffusers.WanPipeline(**parts, transformer_2=other.transformer, boundary_ratio=0.875)


def wan_image() -> Any:
    return tiny_wan_pipeline(from_image=True)


def wan_image_clip() -> Any:
    """Wan 2.1: the picture goes through CLIP too."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    parts = tiny_wan_pipeline(from_image=True).components
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "patch_size": 16}
    encoder = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=2, image_size=32, **sizes)).eval()
    processor = CLIPImageProcessor(crop_size=32, size=32)
    plain = parts["transformer"]
    transformer = type(plain)(**{**plain.config, "image_dim": 8, "added_kv_proj_dim": 24})
    transformer.load_state_dict(plain.state_dict(), strict=False)
    for name in ("transformer", "transformer_2", "image_encoder", "image_processor"):
        parts.pop(name, None)
    return diffusers.WanImageToVideoPipeline(
        **parts, transformer=transformer, image_encoder=encoder, image_processor=processor
    )


def flux() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    words = tiny_tokenizer()
    words.model_max_length = 77
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.36,
            shift_factor=0.12,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, **sizes, **TEXT)).eval(),
        tokenizer=words,
        text_encoder_2=t5(),
        tokenizer_2=tiny_tokenizer(),
        transformer=transformer,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "wan": tiny_wan_pipeline,
    "wan-image": wan_image,
    "wan-experts": wan_two_experts,
    "hunyuan": hunyuan,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "wan-image-clip": wan_image_clip,
    "flux": flux,
}
ALL = ["wan-image", "wan-image-clip", "hunyuan", "ltx", "cogvideox", "flux"]
LAYERS = {"hunyuan": 7, "flux": 7}
"""Modules that get a LoRA; a single block has no output of its own. Elsewhere 8."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    made = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp("models") / name
        build().save_pretrained(made[name])
    return made


@pytest.fixture
def config(lengthen: Any, folders: dict[str, Path], tmp_path: Path) -> Callable[..., LengthExtensionConfig]:
    def make(name: str, **changes: Any) -> LengthExtensionConfig:
        here = {"cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / (changes.get("expert") or "run"))}
        return lengthen(**{"model": str(folders[name]), "max_steps": 2, "batch_size": 1, **here, **changes})

    return make


def quiet(_: str) -> None:
    pass


def backbone_of(pipe: Any, folder: Path, **options: Any) -> Backbone:
    info = inspect_trainable(str(folder))
    return family_of(info)(pipe, info, torch.device("cpu"), torch.float32, 32, **options)


def load(name: str, folder: Path) -> Any:
    pipe = getattr(diffusers, inspect_trainable(str(folder)).pipeline_class).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_family_has_a_model_here(folders: dict[str, Path]) -> None:
    assert {family_of(inspect_trainable(str(folder))) for folder in folders.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ["wan", *ALL])
def test_model_gets_what_its_pipeline_gives_it(name: str, folders: dict[str, Path]) -> None:
    """The first step of the stock pipeline, repeated through the family's own file: the same output."""
    pipe = load(name, folders[name])
    backbone = backbone_of(pipe, folders[name])
    seen: list[tuple[dict[str, Any], Tensor]] = []

    def record(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((kwargs, output[0].clone()))

    hook = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    clip = torch.rand(1, 3, 17, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    call: dict[str, Any] = {"guidance_scale": {"hunyuan": 6.0, "flux": 3.5}.get(name, 1.0)}
    if name != "flux":
        call["num_frames"] = 17
    if name == "wan-image-clip":
        clip = ((clip + 1) * 127.5).round() / 127.5 - 1  # A picture has eight bits.
        call |= {"image": VaeImageProcessor.numpy_to_pil((clip[:, :, 0] / 2 + 0.5).permute(0, 2, 3, 1).numpy())[0]}
    if name == "wan-image":
        call |= {"image": clip[:, :, 0] / 2 + 0.5}
    with torch.no_grad():
        pipe(
            prompt="a red circle moves",
            height=64,
            width=64,
            num_inference_steps=1,
            max_sequence_length=32,
            output_type="latent",
            generator=torch.Generator().manual_seed(2),
            **call,
        )
    hook.remove()
    (arguments, expected), *_ = seen
    latents = arguments["hidden_states"]
    text: Any = backbone.pad_text(backbone.encode_text(["a red circle moves"]))
    if name == "ltx":
        shape = (arguments["num_frames"], arguments["height"], arguments["width"])
        latents, expected = (pipe._unpack_latents(x, *shape) for x in (latents, expected))
    if name == "cogvideox":
        latents, expected = latents.transpose(1, 2), expected.transpose(1, 2)
    if name == "flux":
        latents, expected = (pipe._unpack_latents(x, 64, 64, 8)[:, :, None] for x in (latents, expected))
    if name.startswith("wan-image"):
        cached = backbone.encode_video(clip)
        clean, text = backbone.split(cached, text, backbone.encode_first_frame(clip))
        assert torch.allclose(latents[:, clean.shape[1] :], text[1], atol=1e-5)  # mask and first frame
        latents = latents[:, : clean.shape[1]]
    sigma = arguments["timestep"].reshape(-1)[:1].float() / (1 if name == "flux" else 1000)
    if name == "wan-image-clip":
        blind = (text[0], text[1], torch.zeros_like(text[2]))
        assert not torch.allclose(backbone.velocity(latents, sigma, blind), expected, atol=1e-5)
    with torch.no_grad():
        found = backbone.velocity(latents, sigma, text)
        other = backbone.velocity(latents, (sigma + 0.5) % 1, text)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(other, expected, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_latents_are_those_that_the_pipeline_decodes(name: str, folders: dict[str, Path]) -> None:
    """Undone by the pipeline's own lines, normalised latents are the VAE's."""
    pipe = load(name, folders[name])
    backbone = backbone_of(pipe, folders[name])
    clip = torch.rand(1, 3, 17, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        raw = pipe.vae.encode(clip[:, :, 0] if name == "flux" else clip).latent_dist.mode()
    found = backbone.encode_video(clip)[:, : backbone.latent_channels]
    config = pipe.vae.config
    if name == "ltx":
        found = pipe._denormalize_latents(found, pipe.vae.latents_mean, pipe.vae.latents_std, config.scaling_factor)
    elif name == "flux":
        found = (found / config.scaling_factor + config.shift_factor)[:, :, 0]
    elif name.startswith("wan-image"):
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        found = found * std + mean
    else:
        found = found / config.scaling_factor
    assert torch.allclose(found, raw, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_trained_two_steps_and_loaded_by_stock_diffusers(name: str, config: Any, folders: dict[str, Path]) -> None:
    size: dict[str, Any] = {"sizes": ["128x128"]} if name == "ltx" else {}
    if name == "flux":
        # In one frame radial attention leaves nothing out.
        size |= {"method": "pooled", "method_options": {"density": 0.5, "dense_layers": 0}, "sizes": ["384x384"]}
        size |= {"num_frames": [1], "num_clips": 2, "validation_steps": 1, "validation_clips": 1}
    session, file = trained(config(name, teacher_weight=0.5, teacher_frames=9, **size))
    assert (session.roles.handle.report().sparse_density or 1) < 1
    layers = {n.split(".lora_")[0] for n in session.optimized["student"].names}
    assert len(layers) == LAYERS.get(name, 8)
    if name == "flux":
        session.validate()
        assert list(file.parent.glob("validation/*/*.png"))
    _, clean, text = session.batch(0)
    sigma = torch.tensor([0.6])
    session.roles.handle.remove()
    session.backbone.transformer.eval()
    pipe = load(name, folders[name])
    stock = backbone_of(pipe, folders[name])
    with torch.no_grad():
        expected = session.backbone.velocity(clean, sigma, text)
        plain = stock.velocity(clean, sigma, text)
        pipe.load_lora_weights(str(file.parent))
        found = stock.velocity(clean, sigma, text)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found - plain).abs().max() > 1e-4


def trained(config: LengthExtensionConfig) -> tuple[Session, Path]:
    kept: list[Session] = []
    original = Session.save_adapter

    def keep(self: Session) -> Path:
        kept.append(self)
        return original(self)

    Session.save_adapter = keep
    try:
        file = length_extension.train(config, quiet)
    finally:
        Session.save_adapter = original
    return kept[0], file


def test_two_experts(config: Any, folders: dict[str, Path], distill: Any) -> None:
    """Each in its own run and range of noise, loaded by diffusers into its own transformer, and so by `generate`."""
    with pytest.raises(ConfigError, match="two transformers.*set `expert`"):
        length_extension.train(config("wan-experts"), quiet)
    with pytest.raises(ConfigError, match="has one transformer"):
        length_extension.train(config("wan", expert="low"), quiet)
    with pytest.raises(ConfigError, match="takes both experts"):
        Session(distill(model=str(folders["wan-experts"]), expert="low", stage="few-step"), quiet)
    files, expected, inputs = [], [], None
    for expert in ("high", "low"):
        session, file = trained(config("wan-experts", expert=expert))
        draws = session.sample_sigma(200, torch.Generator().manual_seed(0))
        assert (draws >= 0.875).all() if expert == "high" else (draws < 0.875).all()
        files.append(file)
        _, clean, text = session.batch(0)
        inputs = inputs or (clean, torch.tensor([0.5]), text)
        session.roles.handle.remove()
        session.backbone.transformer.eval()
        with torch.no_grad():
            expected.append(session.backbone.velocity(*inputs))
    assert inputs is not None
    for ours in (False, True):
        pipe = load("wan-experts", folders["wan-experts"])
        if ours:
            load_loras(pipe, tuple(LoraSpec(str(file)) for file in files))
        else:
            pipe.load_lora_weights(str(files[0].parent), adapter_name="a")
            pipe.load_lora_weights(str(files[1].parent), adapter_name="b", load_into_transformer_2=True)
        for expert, wanted in zip(("high", "low"), expected, strict=True):
            with torch.no_grad():
                found = backbone_of(pipe, folders["wan-experts"], expert=expert).velocity(*inputs)
            assert torch.allclose(found, wanted, atol=1e-5), (ours, expert)
    training = read_training(str(files[1]))
    assert training is not None and training["expert"] == "low"


def test_merged_with_a_style_by_weight(config: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """0.7 of ours and 0.4 of another trainer's LoRA, of another rank and alpha: each weight moves by that sum."""
    from peft import LoraConfig

    _, file = trained(config("wan"))
    pipe = load("wan", folders["wan"])
    pipe.transformer.add_adapter(LoraConfig(r=3, lora_alpha=9, target_modules=["to_q", "to_out.0"]), "style")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in pipe.transformer.named_parameters():
        if ".style." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    style = {n.replace(".style.", "."): p.data for n, p in pipe.transformer.named_parameters() if ".style." in n}
    style_file = tmp_path / "style"
    pipe.save_lora_weights(style_file, transformer_lora_layers=style, transformer_lora_adapter_metadata=None)
    specs = (LoraSpec(str(file), 0.7), LoraSpec(str(style_file), 0.4))
    merged = load("wan", folders["wan"])
    load_loras(merged, specs)
    merged.fuse_lora()
    merged.unload_lora_weights()
    ours = load_file(file)
    before = dict(load("wan", folders["wan"]).transformer.named_parameters())
    for name, parameter in merged.transformer.named_parameters():
        module, expected = name.removesuffix(".weight"), before[name].detach()
        if f"transformer.{module}.lora_A.weight" in ours:
            update = ours[f"transformer.{module}.lora_B.weight"] @ ours[f"transformer.{module}.lora_A.weight"]
            expected = expected + 0.7 * 2.0 * update  # alpha 4 over rank 2
        if f"{module}.lora_A.weight" in style:
            # Without metadata diffusers takes alpha = rank.
            expected = expected + 0.4 * style[f"{module}.lora_B.weight"] @ style[f"{module}.lora_A.weight"]
        assert torch.allclose(parameter, expected, atol=1e-5), name
    changed = {n for n, p in merged.transformer.named_parameters() if not torch.equal(p, before[n])}
    assert (
        len(changed) == 2 * 4 + 2 * 2
    )  # ours in the self-attention; the style's q and out in the cross-attention too


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_part_of_the_noise_levels(sampling: str) -> None:
    """The draws of a range are those of the whole distribution that fall into it."""
    whole = sample_sigma(200_000, 5.0, sampling, torch.Generator().manual_seed(0))
    part = sample_sigma(50_000, 5.0, sampling, torch.Generator().manual_seed(1), (0.6, 0.9))
    expected = whole[(whole >= 0.6) & (whole < 0.9)]
    assert part.min() >= 0.6 and part.max() <= 0.9
    for share in (0.1, 0.5, 0.9):
        assert abs(part.quantile(share) - expected.quantile(share)) < 0.01


def test_v_prediction_is_the_schedulers(folders: dict[str, Path]) -> None:
    """From x_t and the v that the loss asks for, the scheduler itself finds the clean latents."""
    pipe = load("cogvideox", folders["cogvideox"])
    backbone = backbone_of(pipe, folders["cogvideox"])
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 4, 3, 4, 4, generator=generator) for _ in range(2))
    sigma = torch.tensor([0.25, 0.6])
    noisy = backbone.add_noise(clean, noise, sigma)
    alpha = pipe.scheduler.alphas_cumprod[[250, 600]].view(-1, 1, 1, 1, 1).float()
    right = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    assert backbone.loss(right, clean, noise, sigma) < 1e-10 < backbone.loss(noise - clean, clean, noise, sigma)
    assert torch.allclose(alpha.sqrt() * noisy - (1 - alpha).sqrt() * right, clean, atol=1e-5)
    draws = backbone.sample_sigma(4000, 9.0, "logit-normal", torch.Generator().manual_seed(0))
    assert abs(draws.mean() - 0.5) < 0.02 and draws.std() > 0.27  # even, whatever the settings say


def test_refusals(
    config: Any, distill: Callable[..., DistillConfig], folders: dict[str, Path], tmp_path: Path
) -> None:
    whys = {"cogvideox": "is trained by v-prediction", "wan-image": "needs pictures", "flux": "makes images"}
    with pytest.raises(ConfigError, match=r"makes images; set `num_frames` to 1, got \[17\]"):
        length_extension.train(config("flux"), quiet)
    for name, why in whys.items():
        with pytest.raises(ConfigError, match=f"few-step.*{why}; use sparsify"):
            Session(distill(model=str(folders[name]), stage="few-step"), quiet)
    with pytest.raises(ConfigError, match="`expert` must be 'high' or 'low', got 'both'"):
        config("wan", expert="both")
    index = folders["ltx"] / "model_index.json"
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(index.read_text().replace("LTXPipeline", "MochiPipeline"))
    with pytest.raises(UnsupportedModelError, match="Training takes a WanPipeline, .*is a MochiPipeline"):
        length_extension.train(config("wan", model=str(other)), quiet)


def test_sparsify_of_another_family(
    distill: Callable[..., DistillConfig], folders: dict[str, Path], tmp_path: Path
) -> None:
    """An untrained dense student is the teacher, to the bit; a sparse one is not."""
    losses = []
    for method, options in (("dense", {}), ("radial", {"density": 0.5, "block_size": 16, "dense_layers": 0})):
        changes = {
            "model": str(folders["cogvideox"]),
            "cache_dir": str(tmp_path),
            "output_dir": str(tmp_path / method),
        }
        losses.append(
            sparsify_loss(Session(distill(method=method, method_options=options, **changes), quiet), 0).item()
        )
    assert losses[0] == 0.0 < losses[1]


def test_adapter_names_its_family(config: Any) -> None:
    file = length_extension.train(config("cogvideox", max_steps=1), quiet)
    with safe_open(file, "pt") as opened:
        assert all(key.startswith("transformer.transformer_blocks.") for key in opened.keys())  # noqa: SIM118
