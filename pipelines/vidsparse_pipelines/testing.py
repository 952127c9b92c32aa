"""Tiny random pipelines of the real diffusers classes, for tests: built offline, run in well under a second."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

_WORDS = "a an the red green blue yellow circle square star cat dog moves walks to left right up down on grass".split()


def tiny_tokenizer() -> Any:
    """A word tokenizer that knows a handful of words; pad 0, end 1, unknown 2."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )


def tiny_wan_pipeline(
    vae_patch: int | None = None, num_layers: int = 2, seed: int = 0, from_image: bool = False
) -> Any:
    """A random `WanPipeline` (28 thousand transformer parameters) whose attention matters.

    Args:
        vae_patch: 2 gives the VAE of Wan 2.2 TI2V and of the bundled model (patchified pixels, transformer patch 1);
            None the VAE of Wan 2.1 (transformer patch 2). Sizes must be multiples of 16 pixels either way.
        num_layers: transformer blocks.
        seed: of the weights.
        from_image: give a `WanImageToVideoPipeline` without image encoder, as in Wan 2.2 A14B.
    """
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    # Through Any: diffusers exports its classes lazily, which type checkers cannot follow.
    diffusers: Any = importlib.import_module("diffusers")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        patched = vae_patch is not None
        pixels = 3 * vae_patch**2 if patched else 3
        extra: dict[str, Any] = {}
        if patched:
            extra = {"patch_size": vae_patch, "in_channels": pixels, "out_channels": pixels}
            extra |= {"scale_factor_spatial": 8 * vae_patch}
        vae = diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            **extra,
        )
        transformer = diffusers.WanTransformer3DModel(
            patch_size=(1, 1, 1) if patched else (1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16 + (16 + 4 if from_image else 0),
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=num_layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=128,
        )
        for block in transformer.blocks:
            # Default initialisation makes attention nearly irrelevant, and equality tests vacuous.
            for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out[0]):
                torch.nn.init.normal_(linear.weight, std=2.0 / linear.in_features**0.5)
        config = UMT5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            pad_token_id=0,
            eos_token_id=1,
        )
        text_encoder = UMT5EncoderModel(config).eval()
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = diffusers.WanImageToVideoPipeline if from_image else diffusers.WanPipeline
    return pipeline(
        tokenizer=tiny_tokenizer(), text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
    )


def save_tiny_wan(folder: str | Path, **options: Any) -> Path:
    """Save `tiny_wan_pipeline(**options)` as a diffusers folder and return it."""
    pipe = tiny_wan_pipeline(**options)
    pipe.save_pretrained(folder)
    return Path(folder)
