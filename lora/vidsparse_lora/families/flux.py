"""FLUX.1, images: a video of one frame."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsparse_lora.families.base import Backbone
from vidsparse_pipelines.costs import FLUX_PRESET
from vidsparse_pipelines.model_info import ModelInfo, locate

PIPELINE = "FluxPipeline"


def flux_info(model: str) -> ModelInfo | None:
    """What is known of a FLUX model from its files, None for another; `generate` drives videos alone."""
    folder = locate(model)
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if index.get("_class_name") != PIPELINE:
        return None
    components = tuple(k for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and v[0])
    return ModelInfo(model, folder, PIPELINE, FLUX_PRESET, components, (16, 16), 1, None, False)


class FluxBackbone(Backbone):
    """A text is kept as CLIP's pooled embedding, padded to the width of T5's, and then T5's rows with their padding.

    The dev model is distilled for guidance: it gets the preset's scale, at which the adapter will be used.
    """

    pipelines: ClassVar[tuple[str, ...]] = (PIPELINE,)
    targets: ClassVar[str] = r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)"
    default_text_length: ClassVar[int] = 512
    images: ClassVar[bool] = True
    no_split: ClassVar[str | None] = None

    @property
    def latent_channels(self) -> int:
        return self.pipe.vae.config.latent_channels

    @torch.no_grad()
    def encode_video(self, clips: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = vae.encode(clips[:, :, 0].to(vae.device, vae.dtype)).latent_dist.mode().float()
        return self.normalised(latents)[:, :, None]

    def normalised(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return (latents - config.shift_factor) * config.scaling_factor

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=list(captions), prompt_2=None, max_sequence_length=self.text_length, device=self.device
        )
        rows = F.pad(pooled.float(), (0, embeds.shape[-1] - pooled.shape[-1]))
        return list(torch.cat([rows[:, None], embeds.float()], dim=1).cpu())

    def pad_text(self, texts: Sequence[Tensor]) -> Tensor:
        return self._padded(texts, self.text_length + 1)

    def forward(self, latents: Tensor, sigma: Tensor, text: Any) -> Tensor:
        pipe, config, tokens = self.pipe, self.transformer.config, text[:, 1:].to(latents.dtype)
        batch, channels, _, height, width = latents.shape
        guidance = torch.full_like(sigma, self.info.preset.guidance_scale) if config.guidance_embeds else None
        out = self.transformer(
            hidden_states=pipe._pack_latents(latents[:, :, 0], batch, channels, height, width),
            timestep=sigma.to(latents.dtype),
            guidance=guidance,
            pooled_projections=text[:, 0, : config.pooled_projection_dim].to(latents.dtype),
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=latents.device, dtype=latents.dtype),
            img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, latents.dtype),
            return_dict=False,
        )[0]
        ratio = pipe.vae_scale_factor
        return pipe._unpack_latents(out, height * ratio, width * ratio, ratio)[:, :, None]
