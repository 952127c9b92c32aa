"""HunyuanVideo, text-to-video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsparse_lora.families.base import Backbone, text_mask


class HunyuanBackbone(Backbone):
    """A text is kept as its pooled embedding, padded to the width of the others, and then one row per token.

    The model is distilled for guidance: it gets the preset's scale, at which the adapter will be used.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideoPipeline",)
    targets: ClassVar[str] = r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)"
    default_text_length: ClassVar[int] = 256

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        embeds, pooled, mask = self.pipe.encode_prompt(
            prompt=list(captions), max_sequence_length=self.text_length, device=self.device
        )
        rows = F.pad(pooled.float(), (0, embeds.shape[-1] - pooled.shape[-1]))
        return [
            torch.cat([row[None], e[m.bool()].float()]).cpu() for row, e, m in zip(rows, embeds, mask, strict=True)
        ]

    def pad_text(self, texts: Sequence[Tensor]) -> Tensor:
        return self._padded(texts, self.text_length + 1)

    def forward(self, latents: Tensor, sigma: Tensor, text: Any) -> Tensor:
        config, tokens = self.transformer.config, text[:, 1:]
        guidance = None
        if config.guidance_embeds:
            guidance = torch.full_like(sigma, self.info.preset.guidance_scale * 1000).to(latents.dtype)
        return self.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=tokens.to(latents.dtype),
            encoder_attention_mask=text_mask(tokens),
            pooled_projections=text[:, 0, : config.pooled_projection_dim].to(latents.dtype),
            guidance=guidance,
            return_dict=False,
        )[0]
