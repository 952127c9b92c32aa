"""What training needs of a family: latents of a video, embeddings of a text, the prediction at noisy latents, the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidsparse.errors import ConfigError, UnsupportedModelError
from vidsparse_lora import objective
from vidsparse_pipelines.model_info import ModelInfo

HIGH, LOW = "high", "low"


@dataclass
class Backbone:
    """A loaded pipeline, as training sees it; rectified flow unless a family says otherwise.

    Attributes:
        pipe: the diffusers pipeline.
        info: what is known from its files.
        device: where it computes.
        dtype: of the arithmetic; float32, or bfloat16 under autocast.
        text_length: text tokens that the model gets; None for the model's own.
        expert: which of two transformers trains, "high" or "low" noise; None where there is one.
        fps: of the videos, frames per second; None for the preset's.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    objective: ClassVar[str] = "flow matching"
    targets: ClassVar[str] = r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
    default_text_length: ClassVar[int] = 512
    from_image: ClassVar[bool] = False
    images: ClassVar[bool] = False
    no_split: ClassVar[str | None] = "diffusers has no plan to split its sequences"
    """Why sequences cannot be shared among processes, None where they can."""

    pipe: Any
    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    text_length: int
    expert: str | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        check_trainable(self.info)
        self.check()
        two = getattr(self.pipe, "transformer_2", None) is not None
        if two and self.expert is None:
            raise ConfigError(
                f"{self.info.name!r} has two transformers, for high and for low noise; set `expert` to 'high' or 'low', "
                "and train the other in a run of its own."
            )
        if not two and self.expert is not None:
            raise ConfigError(f"{self.info.name!r} has one transformer; leave `expert` out.")

    def check(self) -> None:
        """Raises UnsupportedModelError for a model of the family that cannot be trained."""

    def check_splits(self) -> None:
        """Raises ConfigError where sequences cannot be shared among processes."""
        if self.no_split is not None:
            raise ConfigError(
                f"`context_parallel` cannot be used with {self.info.pipeline_class}: {self.no_split}; leave it out."
            )

    @property
    def transformer(self) -> Any:
        return self.pipe.transformer_2 if self.expert == LOW else self.pipe.transformer

    @property
    def idle(self) -> list[Any]:
        """Modules that no training step runs."""
        names = (
            "text_encoder",
            "text_encoder_2",
            "image_encoder",
            "vae",
            "transformer" if self.expert == LOW else "transformer_2",
        )
        return [part for name in names if (part := getattr(self.pipe, name, None)) is not None]

    @property
    def latent_channels(self) -> int:
        return self.transformer.config.in_channels

    # Noise

    @property
    def flow_shift(self) -> float:
        """The scheduler's; where that grows with the number of tokens, that of the longest sequence it names."""
        config = self.pipe.scheduler.config
        if config.get("use_dynamic_shifting"):
            return math.exp(config.get("max_shift", 1.15))
        return float(next((config[k] for k in ("flow_shift", "shift") if config.get(k)), 1.0))

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The noise levels that the transformer is used at."""
        if self.expert is None:
            return (0.0, 1.0)
        boundary = float(self.pipe.config.boundary_ratio)
        return (boundary, 1.0) if self.expert == HIGH else (0.0, boundary)

    def sample_sigma(self, count: int, shift: float, sampling: str, generator: torch.Generator) -> Tensor:
        """`[count]` noise levels, on the CPU."""
        return objective.sample_sigma(count, shift, sampling, generator, self.sigma_range)

    def add_noise(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return objective.add_noise(clean, noise, sigma)

    def loss(self, prediction: Tensor, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Mismatch of what the model says with what it should say."""
        return objective.flow_loss(prediction, clean, noise)

    # Videos and texts

    @torch.no_grad()
    def encode_video(self, clips: Tensor) -> Tensor:
        """Normalised latents `[batch, channels, latent frames, h, w]`, float32, of `[batch, 3, frames, H, W]` in [-1, 1]."""
        vae = self.pipe.vae
        return self.normalised(vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode().float())

    def encode_first_frame(self, clips: Tensor) -> Tensor | None:
        """Embeddings `[batch, tokens, dim]`, float32, that the model gets of a picture beside its latents; None for none."""
        return None

    def normalised(self, latents: Tensor) -> Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def encode_text(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings `[tokens, dim]`, float32 on the CPU, one for each caption."""
        raise NotImplementedError

    def pad_text(self, texts: Sequence[Tensor]) -> Tensor:
        """`[batch, text_length, dim]` on the device, padded with zeros."""
        return self._padded(texts, self.text_length)

    def _padded(self, texts: Sequence[Tensor], rows: int) -> Tensor:
        out = torch.zeros(len(texts), rows, texts[0].shape[-1])
        for row, text in zip(out, texts, strict=True):
            row[: len(text)] = text[:rows]
        return out.to(self.device)

    def split(self, latents: Tensor, text: Tensor, image: Tensor | None = None) -> tuple[Tensor, Any]:
        """The latents that get noise, and the conditions that `velocity` takes, from those of a cached batch.

        image: from `encode_first_frame`, of the batch.
        """
        return latents, text

    # The model

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def velocity(self, latents: Tensor, sigma: Tensor, text: Any) -> Tensor:
        """What the model says at noisy latents, float32; of noise - clean where the objective is flow matching.

        Args:
            latents: noisy, `[batch, channels, frames, h, w]`.
            sigma: `[batch]` in [0, 1].
            text: from `pad_text` or `split`.
        """
        with self.autocast():
            return self.forward(latents.to(self.transformer.dtype), sigma, text).float()

    def forward(self, latents: Tensor, sigma: Tensor, text: Any) -> Tensor:
        raise NotImplementedError


def text_mask(text: Tensor) -> Tensor:
    """`[batch, tokens]`, 1 where a row of zero-padded embeddings is a token."""
    return (text.abs().amax(-1) > 0).long()


def check_trainable(info: ModelInfo) -> None:
    """Raises UnsupportedModelError for a family that only `generate` knows."""
    from vidsparse_lora.families import trainable

    if info.pipeline_class not in trainable():
        raise UnsupportedModelError(
            f"Training takes a {', '.join(trainable())}, and {info.name!r} is a {info.pipeline_class}."
        )
