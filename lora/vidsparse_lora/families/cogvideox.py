"""CogVideoX 1.0, text-to-video. Its objective is no flow matching: noise by the scheduler's alphas, v-prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsparse.errors import UnsupportedModelError
from vidsparse_lora.families.base import Backbone


class CogVideoXBackbone(Backbone):
    """`sigma` in [0, 1) stands for the timestep `floor(1000 sigma)`, drawn evenly; there is no shift.

    What the model says is v = sqrt(a) noise - sqrt(1 - a) clean (arXiv 2202.00512) at x_t = sqrt(a) clean + sqrt(1 - a)
    noise, not noise - clean.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("CogVideoXPipeline",)
    objective: ClassVar[str] = "v-prediction"
    default_text_length: ClassVar[int] = 226

    def check(self) -> None:
        if self.transformer.config.patch_size_t is not None:
            raise UnsupportedModelError(
                f"{self.info.name!r} is a CogVideoX 1.5, which joins latent frames in pairs; training takes CogVideoX 1.0."
            )
        kind = self.pipe.scheduler.config.prediction_type
        if kind != "v_prediction":
            raise UnsupportedModelError(f"{self.info.name!r} predicts {kind!r}; training takes 'v_prediction'.")

    @property
    def flow_shift(self) -> float:
        return 1.0

    def _timestep(self, sigma: Tensor) -> Tensor:
        last = self.pipe.scheduler.config.num_train_timesteps - 1
        return (sigma * (last + 1)).long().clamp(0, last)

    def sample_sigma(self, count: int, shift: float, sampling: str, generator: torch.Generator) -> Tensor:
        return super().sample_sigma(count, 1.0, "uniform", generator)

    def add_noise(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return self.pipe.scheduler.add_noise(clean, noise, self._timestep(sigma))

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return F.mse_loss(prediction, self.pipe.scheduler.get_velocity(clean, noise, self._timestep(sigma)))

    def normalised(self, latents: Tensor) -> Tensor:
        return latents * self.pipe.vae_scaling_factor_image

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        """With the padding, which the model attends to."""
        embeds, _ = self.pipe.encode_prompt(
            prompt=list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            device=self.device,
        )
        return list(embeds.float().cpu())

    def forward(self, latents: Tensor, sigma: Tensor, text: Any) -> Tensor:
        pipe, config = self.pipe, self.transformer.config
        ratio = pipe.vae_scale_factor_spatial
        rotary = None
        if config.use_rotary_positional_embeddings:
            rotary = pipe._prepare_rotary_positional_embeddings(
                latents.shape[3] * ratio, latents.shape[4] * ratio, latents.shape[2], self.device
            )
        return self.transformer(
            hidden_states=latents.transpose(1, 2),
            timestep=self._timestep(sigma),
            encoder_hidden_states=text.to(latents.dtype),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0].transpose(1, 2)
