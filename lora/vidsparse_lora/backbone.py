"""What training needs of a family: latents of a video, embeddings of a text, the velocity at noisy latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidsparse.errors import UnsupportedModelError
from vidsparse_pipelines.model_info import ModelInfo

TRAINABLE = ("WanPipeline",)
DEFAULT_TEXT_LENGTH = 512


@dataclass
class WanBackbone:
    """A loaded text-to-video Wan pipeline (2.1, 2.2 TI2V, the bundled model).

    Attributes:
        pipe: the diffusers pipeline.
        info: what is known from its files.
        device: where it computes.
        dtype: of the arithmetic; float32, or bfloat16 under autocast.
        text_length: text tokens that the model gets.
    """

    pipe: Any
    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    text_length: int

    def __post_init__(self) -> None:
        check_trainable(self.info)
        if getattr(self.pipe, "transformer_2", None) is not None:
            raise UnsupportedModelError(
                "Wan 2.2 A14B has two transformers; training one of them is not supported yet."
            )

    @property
    def transformer(self) -> Any:
        return self.pipe.transformer

    @property
    def flow_shift(self) -> float:
        config = self.pipe.scheduler.config
        return float(next((config[k] for k in ("flow_shift", "shift") if config.get(k)), 1.0))

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @torch.no_grad()
    def encode_video(self, clips: Tensor) -> Tensor:
        """Normalised latents `[batch, channels, latent frames, h, w]`, float32, of `[batch, 3, frames, H, W]` in [-1, 1]."""
        vae = self.pipe.vae
        latents = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode().float()
        mean, std = (
            torch.tensor(v, device=latents.device).view(1, -1, 1, 1, 1)
            for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (latents - mean) / std

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings `[tokens, dim]` without their padding, one for each caption."""
        embeds, _ = self.pipe.encode_prompt(
            prompt=list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            device=self.device,
        )
        used = embeds.abs().amax(-1) > 0
        lengths = [int(row.nonzero().max()) + 1 if row.any() else 1 for row in used]
        return [e[:n].float().cpu() for e, n in zip(embeds, lengths, strict=True)]

    def pad_text(self, texts: Sequence[Tensor]) -> Tensor:
        """`[batch, text_length, dim]` on the device; Wan pads with zeros and attends to them."""
        out = torch.zeros(len(texts), self.text_length, texts[0].shape[-1])
        for row, text in zip(out, texts, strict=True):
            row[: len(text)] = text[: self.text_length]
        return out.to(self.device)

    def velocity(self, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """What the model says of noise - clean, float32.

        Args:
            latents: noisy, `[batch, channels, frames, h, w]`.
            sigma: `[batch]` in [0, 1].
            text: from `pad_text`.
        """
        dtype = self.transformer.dtype
        with self.autocast():
            out = self.transformer(
                hidden_states=latents.to(dtype),
                timestep=sigma * 1000,
                encoder_hidden_states=text.to(dtype),
                return_dict=False,
            )[0]
        return out.float()


def check_trainable(info: ModelInfo) -> None:
    """Raises UnsupportedModelError for a family that only `generate` knows."""
    if info.pipeline_class not in TRAINABLE:
        raise UnsupportedModelError(
            f"Training takes a {' or '.join(TRAINABLE)} so far, and {info.name!r} is a {info.pipeline_class}."
        )
