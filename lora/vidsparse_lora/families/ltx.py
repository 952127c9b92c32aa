"""LTX-Video, text-to-video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsparse_lora.families.base import Backbone, text_mask


class LTXBackbone(Backbone):
    pipelines: ClassVar[tuple[str, ...]] = ("LTXPipeline",)
    default_text_length: ClassVar[int] = 128
    no_split: ClassVar[str | None] = (
        "it hides the padding of its text by a mask, which diffusers' Ulysses does not take"
    )

    def normalised(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        return self.pipe._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompt=list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            device=self.device,
        )
        return [e[m.bool()].float().cpu() for e, m in zip(embeds, mask, strict=True)]

    def forward(self, latents: Tensor, sigma: Tensor, text: Any) -> Tensor:
        pipe, (frames, height, width) = self.pipe, latents.shape[2:]
        patch = (pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)
        spatial = pipe.vae_spatial_compression_ratio
        out = self.transformer(
            hidden_states=pipe._pack_latents(latents, *patch),
            encoder_hidden_states=text.to(latents.dtype),
            timestep=sigma * 1000,
            encoder_attention_mask=text_mask(text),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(
                pipe.vae_temporal_compression_ratio / (self.fps or self.info.preset.fps),
                spatial,
                spatial,
            ),
            return_dict=False,
        )[0]
        return pipe._unpack_latents(out, frames, height, width, *patch)
