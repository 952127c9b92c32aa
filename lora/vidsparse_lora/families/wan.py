"""Wan: 2.1 and 2.2, text-to-video and image-to-video, the bundled model; one expert of A14B at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsparse.errors import UnsupportedModelError
from vidsparse_lora.families.base import Backbone


class WanBackbone(Backbone):
    """Text-to-video."""

    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    no_split: ClassVar[str | None] = None
    targets: ClassVar[str] = r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"

    def normalised(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        mean, std = (
            torch.tensor(v, device=latents.device).view(1, -1, 1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        embeds, _ = self.pipe.encode_prompt(
            prompt=list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            device=self.device,
        )
        # Wan pads with zeros and attends to them, so the padding need not be kept.
        used = embeds.abs().amax(-1) > 0
        lengths = [int(row.nonzero().max()) + 1 if row.any() else 1 for row in used]
        return [e[:n].float().cpu() for e, n in zip(embeds, lengths, strict=True)]

    def forward(self, latents: Tensor, sigma: Tensor, text: Any, image: Tensor | None = None) -> Tensor:
        return self.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=text.to(latents.dtype),
            encoder_hidden_states_image=None if image is None else image.to(latents.dtype),
            return_dict=False,
        )[0]


class WanImageBackbone(WanBackbone):
    """Image-to-video: each video's own first frame is its picture. Latents are kept with their condition's channels.

    Wan 2.1 also reads the picture through CLIP.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline",)
    from_image: ClassVar[bool] = True

    def check(self) -> None:
        if self.transformer.config.pos_embed_seq_len is not None:
            raise UnsupportedModelError(
                f"{self.info.name!r} takes a first and a last picture, and training gives it the first; use the "
                "image-to-video model."
            )
        if self.pipe.config.expand_timesteps:
            raise UnsupportedModelError(
                f"{self.info.name!r} gives each token its own timestep, which training does not do yet."
            )

    @property
    def latent_channels(self) -> int:
        return self.pipe.vae.config.z_dim

    @torch.no_grad()
    def encode_video(self, clips: Tensor) -> Tensor:
        """`[batch, channels + mask channels + channels, latent frames, h, w]`: video, mask, first frame."""
        clean = super().encode_video(clips)
        still = torch.zeros_like(clips)
        still[:, :, 0] = clips[:, :, 0]
        condition = super().encode_video(still)
        mask = torch.zeros_like(clean[:, :1]).repeat(1, self.pipe.vae_scale_factor_temporal, 1, 1, 1)
        mask[:, :, 0] = 1
        return torch.cat([clean, mask, condition], dim=1)

    @torch.no_grad()
    def encode_first_frame(self, clips: Tensor) -> Tensor | None:
        if self.transformer.config.image_dim is None:
            return None
        from PIL import Image

        frames = ((clips[:, :, 0] + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        return self.pipe.encode_image([Image.fromarray(frame) for frame in frames], self.device).float()

    def split(self, latents: Tensor, text: Tensor, image: Tensor | None = None) -> tuple[Tensor, Any]:
        return latents[:, : self.latent_channels], (text, latents[:, self.latent_channels :], image)

    def forward(self, latents: Tensor, sigma: Tensor, text: Any, image: Tensor | None = None) -> Tensor:
        embeds, condition, image = text
        # A teacher's window begins at the picture.
        condition = condition[:, :, : latents.shape[2]].to(latents.dtype)
        return super().forward(torch.cat([latents, condition], dim=1), sigma, embeds, image)
