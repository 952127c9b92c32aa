"""Tiny random pipelines of the real Wan class, built offline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

CALL = {
    "prompt": "a red ball",
    "negative_prompt": "blurry",
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
    "height": 128,
    "width": 128,
    "num_frames": 17,
    "max_sequence_length": 16,
    "output_type": "latent",
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(["a red ball rolls to the left; a blue square blinks; blurry"], trainer)
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def sharpen(model: Any) -> Any:
    """Larger attention weights: with the usual init attention hardly moves the output and equality proves nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "to_q"):
                for linear in (module.to_q, module.to_k, module.to_v, module.to_out[0]):
                    spread = 2.0 / linear.weight.shape[1] ** 0.5
                    linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * spread)
    return model


def make_transformer(num_layers: int = 3, seed: int = 0, cls: str = "WanTransformer3DModel", **config: Any) -> Any:
    import diffusers

    torch.manual_seed(seed)
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    return sharpen(getattr(diffusers, cls)(**{**settings, **config})).eval()


def make_pipeline(num_layers: int = 3, experts: int = 1, **config: Any) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=640,
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=1,
            num_heads=4,
            relative_attention_num_buckets=8,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    second = {}
    if experts == 2:
        second = {"transformer_2": make_transformer(num_layers, seed=7, **config), "boundary_ratio": 0.875}
    pipe = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=make_transformer(num_layers, **config),
        **second,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def build_transformer() -> Callable[..., Any]:
    return make_transformer


@pytest.fixture
def build_pipeline() -> Callable[..., Any]:
    return make_pipeline


@pytest.fixture
def generate() -> Callable[..., torch.Tensor]:
    """Run a pipeline with a fixed seed; latents `[1, 16, frames, height / 8, width / 8]`."""

    def run(pipe: Any, **changes: Any) -> torch.Tensor:
        return pipe(**{**CALL, **changes}, generator=torch.Generator().manual_seed(0)).frames

    return run


@pytest.fixture
def forward() -> Callable[..., torch.Tensor]:
    """One forward of a transformer with fixed inputs."""

    def run(model: Any, frames: int = 5, size: int = 16, batch: int = 1, timestep: float = 500.0, **extra: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(batch, model.config.in_channels, frames, size, size, generator=generator)
        text = torch.randn(batch, 6, 32, generator=generator)
        return model(latents, torch.full((batch,), timestep), text, return_dict=False, **extra)[0]

    return run
