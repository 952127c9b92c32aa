"""Distil a dense video model into a sparse one: at the same number of steps, or at a few.

    vidsparse train distill lora/vidsparse_lora/configs/tiny_sparsify.yaml --set method_options.density=0.2
    accelerate launch lora/vidsparse_lora/distill.py --config CONFIG.yaml --set key=value

Run the same command again to go on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsparse_lora.config import DistillConfig
from vidsparse_lora.roles import STUDENT
from vidsparse_lora.session import Session


def train(config: DistillConfig, echo: Callable[[str], None] | None = None) -> Path:
    """Distil, and return the adapter's file.

    Raises:
        VidsparseError: one sentence.
    """
    if config.stage == "few-step":
        from vidsparse_lora.few_step import train_few_step

        return train_few_step(config, echo)
    session = Session(config, echo)

    def train_step() -> dict[str, Tensor]:
        losses = []
        for micro in range(config.gradient_accumulation):
            losses.append(sparsify_loss(session, micro))
            session.backward(losses[-1])
        norm = session.update(STUDENT)
        return {"loss": torch.stack([loss.detach() for loss in losses]).mean(), "grad_norm": norm}

    return session.run(train_step)


def sparsify_loss(session: Session, micro: int) -> Tensor:
    """Mismatch of the sparse student's velocity with the dense teacher's at the same noisy latents and text."""
    assert isinstance(session.config, DistillConfig)
    _, clean, text = session.batch(micro)
    sigma = session.sample_sigma(len(clean), session.generator("sigma", micro))
    noisy = session.backbone.add_noise(clean, session.noise(clean.shape, micro), sigma)
    with session.roles.teacher():
        target = session.guided_velocity(noisy, sigma, text, session.config.guidance)
    return F.mse_loss(session.backbone.velocity(noisy, sigma, text), target)


if __name__ == "__main__":
    from vidsparse_lora.launch import main

    main(DistillConfig, train, __doc__)
